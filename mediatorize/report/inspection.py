"""The report of `mediatorize inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mediatorize.model import cost
from mediatorize.model.levels import title
from mediatorize.planning.results import InspectedPlans
from mediatorize.report.plans import plan_facts, plan_words
from mediatorize.report.tables import gmacs, text_table

if TYPE_CHECKING:
    from mediatorize.compression.redundancy import Redundancy
    from mediatorize.stages.inspect import CallTimes, Inspection


def words(found: Inspection | InspectedPlans) -> str:
    if isinstance(found, InspectedPlans):
        return plan_words(found.file, found.plans)
    arch = found.arch
    image = f", pictures of {_size(arch.image_size)}" if arch.image_size else ""
    kind = "pixels" if arch.channels in (1, 3) else "latents"
    lines = [
        f"{found.source}: {arch.name} ({found.format}{', ' + found.weights if found.weights else ''})",
        f"  family {arch.family}, {arch.depth} layers, width {arch.width}, {arch.heads} heads of {arch.head_width}, "
        f"patches of {arch.patch}, {arch.tokens} tokens ({_size(arch.grid)}), "
        f"{arch.classes} classes{' and null' if arch.null_class else ''}",
        f"  {arch.channels} channels of {_size(arch.input_size)} {kind}{image}; {found.parameters / 1e6:.1f}M parameters",
        *(f"  {note}" for note in found.notes),
        "",
        "One forward pass on one sample (the papers' Gflops are GMACs):",
        _parts(found),
        "",
        f"Model FLOPs with the whole model at one level, as a share of softmax's (local branch of rank {found.settings.local_rank}):",
        _reachable(found),
    ]
    if found.times is not None:
        lines += ["", _times(found.times)]
    if found.redundancy is not None:
        lines += ["", _redundancy(found.redundancy, arch.tokens), f"Wrote {found.redundancy_picture}."]
    return "\n".join(lines)


def _size(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _parts(found: Inspection) -> str:
    parts = cost.forward_flops_by_part(found.arch)
    total = sum(parts.values())
    rows = [(name, f"{flops / 2e9:.3f}", f"{flops / 1e9:.3f}", f"{flops / total:.1%}") for name, flops in parts.items()]
    rows.append(("total", gmacs(total), f"{2 * float(gmacs(total)):.4g}", "100%"))
    return text_table(("part", "GMACs", "GFLOPs", "share"), rows)


def _reachable(found: Inspection) -> str:
    levels = found.settings.levels
    rows = []
    for at in found.reachable:
        name = f"{_size(at.arch.image_size or at.arch.input_size)}{' (this one)' if at.arch == found.arch else ''}"
        rows.append((name, gmacs(at.flops), *(f"{at.relative[level]:.1%}" if level in at.relative else "-" for level in levels)))
    return text_table(("resolution", "GMACs softmax", *map(title, levels)), rows)


def _times(found: CallTimes) -> str:
    where = found.hardware
    rows, slower = [], []
    for level, (share, time) in found.calls.items():
        name = title(level)
        rows.append((name, f"{share:.1%}", f"{time.ratio:.1%}", "{:.1%} to {:.1%}".format(*time.quartiles)))
        slower += [name] if share < 1 < time.quartiles[0] else []
    seconds = next(iter(found.calls.values()))[1].reference_seconds
    about = (
        f"Time of a whole model call of {found.batch} rows, as a share of softmax's ({seconds:.3g} s), measured side by side on "
        f"{where['device']} ({where['processor']}, {where['threads']} threads), {found.dtype}, random weights:"
    )
    warning = f"\nSlower than softmax here, though of fewer FLOPs: {', '.join(slower)}." if slower else ""
    return f"{about}\n{text_table(('call', 'FLOPs', 'time', 'quartiles'), rows)}{warning}"


def _redundancy(found: Redundancy, tokens: int) -> str:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    header = ("layer", *(f"rank at {level:.2f}" for level in found.noise_levels), *(f"error at {title(m)}" for m in found.errors))
    rows = []
    for layer, ranks in enumerate(found.effective_rank):
        errors = (f"{mean(values[layer]):.3f}" for values in found.errors.values())
        rows.append((f"{layer}", *(f"{rank:.1f}" for rank in ranks), *errors))
    about = (
        f"How redundant attention is, measured on {found.states} states of the model's own trajectories. Rank: the effective rank of the "
        f"{tokens}x{tokens} attention matrices A (exp of the entropy of their singular values, mean over heads and states), at noise "
        "levels from 1 (noise) to 0 (data). Error: |A - A_m| / |A|, where A_m is the best matrix of rank m (Frobenius norm, mean over "
        "noise levels too). No attention through m mediators can have a smaller error:"
    )
    return f"{about}\n{text_table(header, rows)}\n\n{_earlier(found)}"


def _earlier(found: Redundancy) -> str:
    """Whether attention is more redundant in early steps, as arXiv 2408.05710 observes."""
    both = found.early_and_late()
    early, late = (sum(column) / len(both) for column in zip(*both, strict=True))
    count = sum(one < other for one, other in both)
    verdict = "as the paper observes" if early < late else "other than the paper observes"
    return (
        f"Early attention is {'more' if early < late else 'less'} redundant than late attention here, {verdict} (arXiv 2408.05710): the "
        f"effective rank is {early:.1f} in the noisy half of the calls and {late:.1f} in the other; it is smaller early in {count} of "
        f"{len(both)} layers."
    )


def _times_facts(found: CallTimes) -> dict[str, Any]:
    calls = {
        str(level): {"flops": share, "time": time.ratio, "quartiles": time.quartiles, "softmax_seconds": time.reference_seconds}
        for level, (share, time) in found.calls.items()
    }
    return {"hardware": found.hardware, "dtype": found.dtype, "batch": found.batch, "calls": calls}


def facts(found: Inspection | InspectedPlans) -> dict[str, Any]:
    if isinstance(found, InspectedPlans):
        return {"file": str(found.file), "plans": plan_facts(found.plans)}
    parts = cost.forward_flops_by_part(found.arch)
    flops = sum(parts.values())
    return {
        "source": found.source,
        "format": found.format,
        "weights": found.weights,
        "name": found.arch.name,
        "architecture": found.arch.to_json(),
        "parameters": found.parameters,
        "image_size": found.arch.image_size,
        "flops": flops,
        "macs": flops // 2,
        "flops_by_part": parts,
        "reachable": [
            {
                "input_size": list(at.arch.input_size),
                "image_size": at.arch.image_size,
                "flops": at.flops,
                "relative": dict(at.relative),
            }
            for at in found.reachable
        ],
        "local_rank": found.settings.local_rank,
        "notes": list(found.notes),
        "times": None if found.times is None else _times_facts(found.times),
        "redundancy": vars(found.redundancy) | {"effective_rank": found.redundancy.effective_rank} if found.redundancy else None,
    }
