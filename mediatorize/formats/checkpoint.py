"""Pretrained checkpoints: which format, which architecture, and every weight under its official name."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mediatorize.errors import UserError, about
from mediatorize.formats.tensors import StoredTensor, Weight, load_weights, read_pickle, read_safetensors, refuse_non_finite
from mediatorize.model.architecture import FAMILIES, HEADS_OF_WIDTH, MLPS, Architecture, Family
from mediatorize.model.transformer import DiffusionTransformer, sincos_position_embedding

FOREIGN = {
    "DyDiT": r"\.(attn_rate|mlp_rate)\.router\.|\.token_selection\.mlp_head\.",
    "Latte": r"(^|\.)temp_embed$|(^|\.)temporal_transformer_blocks\.\d+\.",
    "MDT": r"\.rel_pos_bias\.relative_position_|(^|\.)sideblocks\.\d+\.|(^|\.)(en_inblocks|en_outblocks|de_blocks)\.\d+\.",
    "MaskDiT": r"(^|\.)decoder_layer\.linear\.",
    "RAE": r"(^|\.)t_embedder\.W$",
    "DDT": r"(^|\.)s_embedder\.proj\.|\.adaLN_modulation\.0\.weight$",
    "JiT": r"(^|\.)x_embedder\.proj[12]\.|(^|\.)in_context_posemb",
    "FiT": r"\.mlp\.fc1_[gx]\.|(^|\.)global_adaLN_modulation\.",
    "U-ViT": r"(^|\.)(mid_block\.attn\.|decoder_pred\.)",
    "Sana": r"\.mlp\.(depth|point)_conv\.",
    "PixArt": r"\.cross_attn\.q_linear\.|(^|\.)t_block\.1\.",
    "HunyuanDiT": r"\.attn1\.Wqkv\.|\.default_modulation\.",
    "MMDiT (Stable Diffusion 3)": r"(^|\.)joint_blocks\.\d+\.(context|x)_block\.",
    "FLUX": r"(^|\.)(double_blocks\.\d+\.img_attn|single_blocks\.\d+\.linear1)\.",
    "VAR": r"\.attn\.mat_qkv\.|(^|\.)lvl_embed\.",
    "LlamaGen": r"\.attention\.wqkv\.|(^|\.)tok_embeddings\.",
}
"""Parameter names of architectures that look like this one and are not, from their public code; the first that matches names it."""


@dataclass(frozen=True)
class Hints:
    """What the user says that a file may not: `None` means look in the file."""

    family: Family | None = None
    num_heads: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint's tensors as stored, and what else the file says."""

    path: Path
    tensors: dict[str, StoredTensor]
    facts: dict[str, Any] = field(default_factory=dict)
    """Training arguments, a diffusers config or safetensors metadata."""
    part: str = ""
    """Which set of weights of a training checkpoint was taken."""


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint, its weights still in the file."""

    path: Path
    format: str
    arch: Architecture
    weights: dict[str, Weight]
    part: str
    notes: tuple[str, ...]
    """What was assumed, for the user to check."""

    def verify(self) -> None:
        """Reads every weight once and refuses NaN and infinity; needs memory for one weight at a time."""
        refuse_non_finite(self.weights.items())

    def load(self) -> DiffusionTransformer:
        """The model in eval mode, float32, its weights memory-mapped where they lie as the model wants them."""
        with torch.device("meta"):
            model = DiffusionTransformer(self.arch)
        state = load_weights(self.weights)
        if "pos_embed" not in state:
            state["pos_embed"] = sincos_position_embedding(self.arch.width, self.arch.grid)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()


def open_checkpoint(path: str | Path, hints: Hints | None = None, weights: str | None = None) -> Checkpoint:
    """Recognises a checkpoint and checks every name and shape in it, without reading its weights.

    Args:
        path: an official DiT, SiT or LightningDiT `.pt` or safetensors file, flat or from training; a REPA SiT; a SiT of
            Attention-Mediators; a diffusers `DiTPipeline` folder or its transformer folder.
        hints: what the file cannot tell.
        weights: `ema` or `model` of a training checkpoint; `None` takes `ema` where it is there.
    """
    source = read_source(Path(path), weights)
    refuse_foreign(source)
    for name, form in FORMATS.items():
        if form.matches(source):
            return form.open(name, source, hints or Hints())
    raise UserError(
        f"{source.path}: not a DiT or SiT ({len(source.tensors)} tensors, such as {_some(source.tensors)}).",
        hint="`mediatorize` reads official DiT, SiT and LightningDiT files, REPA's and Attention-Mediators' SiT and diffusers' DiT.",
    )


# --- files ---------------------------------------------------------------------------------------------------------------------


def read_source(path: Path, weights: str | None) -> Source:
    """Lists the tensors of a file or folder."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.", hint="Check the path.")
    if path.is_dir():
        return _read_diffusers_folder(path, weights)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        content: dict[str, Any] = dict(tensors)
        facts: dict[str, Any] = dict(metadata)
    else:
        content = read_pickle(path)
        facts = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not named weights.", hint="Save a state dict.")
    return _unwrap(path, content, facts, weights)


def _unwrap(path: Path, content: dict[str, Any], facts: dict[str, Any], weights: str | None) -> Source:
    """Takes one set of weights out of a training checkpoint, nested (`.pt`) or by prefix (safetensors)."""
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace | dict):
        facts = facts | (vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments)
    sets = {name: content[name] for name in WEIGHT_SETS if isinstance(content.get(name), dict)}
    if not sets:
        for name in WEIGHT_SETS:
            prefix = f"{name}."
            inside = {key.removeprefix(prefix): value for key, value in content.items() if str(key).startswith(prefix)}
            if inside:
                sets[name] = inside
    if isinstance(content.get("vae"), dict):
        facts = facts | {"holds_vae": True}
    part = ""
    if sets:
        part = weights or next(iter(sets))
        if part not in sets:
            raise UserError(f"{path}: has no {part} weights.", hint=f"Pass --weights {' or '.join(sets)}.")
        content = sets[part]
    elif weights:
        raise UserError(f"{path}: holds one set of weights, not several.", hint="Leave --weights out.")
    tensors: dict[str, StoredTensor] = {}
    for name, value in content.items():
        if isinstance(value, StoredTensor):
            bare = _bare(str(name))
            if bare in tensors:
                raise UserError(f"{path}: {bare} is there twice, once as {name}.", hint="Save one model's state dict.")
            tensors[bare] = value
    if not tensors:
        raise UserError(f"{path}: holds no tensors.", hint="Save a state dict.")
    return Source(path, tensors, facts, part)


WEIGHT_SETS = ("ema", "model", "state_dict")
"""Where training scripts put weights, the preferred first."""


def _bare(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put before it."""
    while True:
        bare = name.removeprefix("module.").removeprefix("_orig_mod.")
        if bare == name:
            return name
        name = bare


def _read_diffusers_folder(path: Path, weights: str | None) -> Source:
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config_path = folder / "config.json"
    if not config_path.exists():
        raise UserError(
            f"{path}: neither a bundle nor a diffusers folder (no config.json).", hint="Pass the folder that holds it, or a file."
        )
    try:
        config = json.loads(config_path.read_text())
        kind = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config_path}: not a diffusers model's config.", hint="Copy the folder again.") from error
    if weights:
        raise UserError(f"{path}: a diffusers folder holds one set of weights.", hint="Leave --weights out.")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel") or config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise UserError(f"{folder}: a {kind}, not a class-conditional DiT.", hint="Only diffusers' DiTTransformer2DModel is read.")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        file = folder / name
        if file.exists():
            tensors: Any = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_pickle(file)
            if not isinstance(tensors, dict):
                raise UserError(f"{file}: holds a {type(tensors).__name__}, not named weights.", hint="Download it again.")
            return _unwrap(file, tensors, config, None)
    raise UserError(f"{folder}: no diffusion_pytorch_model.safetensors or .bin beside config.json.", hint="Download the weights too.")


# --- families ------------------------------------------------------------------------------------------------------------------


def refuse_foreign(source: Source) -> None:
    """Refuses, by name, the architectures that look like this one and are not."""
    for name, pattern in FOREIGN.items():
        found = next((key for key in source.tensors if re.search(pattern, key)), None)
        if found:
            raise UserError(f"{source.path}: {name} (it has {found}), not a plain DiT or SiT.", hint="It is not supported.")
    path, prediction = (str(source.facts.get(key, "")).lower() for key in ("path_type", "prediction"))
    if path not in ("", "linear") or prediction not in ("", "velocity", "v"):
        raise UserError(
            f"{source.path}: a SiT of path {path or 'linear'} that predicts {prediction or 'velocity'}.",
            hint="Only the linear path and velocity are supported.",
        )


def family_of(source: Source, hints: Hints) -> tuple[Family, str]:
    """DiT or SiT, and how that was known: same names and shapes, so by flag, arguments, or the variance rows that SiT never trains."""
    if hints.family:
        return hints.family, "as --family says"
    facts = source.facts
    declared = str(facts.get("family", "") or facts.get("model", "")).lower()
    if named := next((family for family in FAMILIES if declared.startswith(family)), None):
        return named, "as the file says"
    if "path_type" in facts or "prediction" in facts:
        return "sit", "as the file says"
    weight = source.tensors["final_layer.linear.weight"]
    _, channels, patch, _ = source.tensors["x_embedder.proj.weight"].shape
    if weight.shape[0] == 2 * channels * patch**2:
        variance_rows = weight.mapped.unflatten(0, (patch**2, 2, channels))[:, 1]
        if not variance_rows.any():
            return "sit", "by variance rows that were never trained"
    options = " or ".join(f"--family {family}" for family in FAMILIES)
    raise UserError(f"{source.path}: DiT and SiT have the same weights' names and shapes.", hint=f"Pass {options}.")


def infer_architecture(
    source: Source, hints: Hints, family: Family, grid: tuple[int, int], **conventions: Any
) -> tuple[Architecture, list[str]]:
    """Sizes from the shapes of officially named tensors; and what had to be assumed."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    parts = parts_of_blocks(source)
    mlp = MLPS[parts["mlp"]]
    notes = []
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = _first(hints.num_heads, _count(source, "num_heads"), _count(source, "num_attention_heads"), HEADS_OF_WIDTH.get(width))
    if heads is None:
        raise UserError(f"{source.path}: width {width} has no known head count.", hint="Pass --num-heads.")

    last_rows = shapes["final_layer.linear.weight"][0]
    multiple, rest = divmod(last_rows, patch**2 * channels)
    if rest or multiple not in (1, 2):
        raise UserError(
            f"{source.path}: final_layer.linear.weight has {last_rows} rows; {channels} channels in patches of {patch} need "
            f"{patch**2 * channels} or twice that.",
            hint="It is not a DiT or SiT, or it is damaged.",
        )
    rows = shapes["y_embedder.embedding_table.weight"][0]
    told = _first(hints.num_classes, _count(source, "num_classes"))
    classes = rows - 1 if told is None else told
    if rows - classes not in (0, 1):
        raise UserError(f"{source.path}: {rows} label rows do not fit {classes} classes.", hint="Pass the right --num-classes.")
    if told is None:
        notes.append(f"{rows} label rows are read as {classes} classes and the null class; --num-classes tells otherwise")
    with about(source.path):
        arch = Architecture(
            family=family,
            depth=len({name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)}),
            width=width,
            heads=heads,
            patch=patch,
            channels=channels,
            grid=grid,
            classes=classes,
            null_class=rows > classes,
            learn_sigma=multiple == 2,
            mlp_width=shapes[f"blocks.0.mlp.{mlp.first}.weight"][0] // mlp.rows,
            **parts,
            **conventions,
        )
    return arch, notes


def parts_of_blocks(source: Source) -> dict[str, Any]:
    """What blocks are made of, as fields of `Architecture`, by the names of the weights."""
    names = source.tensors
    return {
        "norm": "rms" if "blocks.0.norm1.weight" in names else "layer",
        "mlp": next((kind for kind, facts in MLPS.items() if f"blocks.0.mlp.{facts.first}.weight" in names), "gelu"),
        "rotary": "feat_rope.freqs_cos" in names,
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
    }


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _count(source: Source, key: str) -> int | None:
    """A whole number among a file's facts, None where it is not there."""
    value = source.facts.get(key)
    if value is None:
        return None
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"{source.path}: {key} is {value!r} in its config or arguments.", hint="It must be a whole number of at least 1.")
    return count


def _grid_of(source: Source) -> tuple[int, int]:
    """Rows and columns of tokens: the grid whose fixed position embedding is in the file; a square where none is."""
    stored = source.tensors["pos_embed"]
    tokens, width = stored.shape[1:]
    side = math.isqrt(tokens)
    table = stored.read().float()
    divisors = [rows for rows in range(1, tokens + 1) if tokens % rows == 0]
    for rows in sorted(divisors, key=lambda rows: abs(rows - side)):
        grid = rows, tokens // rows
        if width % 4 == 0 and torch.allclose(table, sincos_position_embedding(width, grid), atol=1e-2):
            return grid
    if side**2 == tokens:
        return side, side
    raise UserError(f"{source.path}: {tokens} tokens are no square, and pos_embed is of no known grid.", hint="It is not supported.")


def _check_names_and_shapes(path: Path, arch: Architecture, weights: Mapping[str, Weight], optional: set[str]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in DiffusionTransformer(arch).state_dict().items()}
    if missing := [name for name in expected if name not in weights and name not in optional]:
        raise UserError(f"{path}: {len(missing)} weights are missing: {_some(missing)}.", hint="It is damaged, or not a DiT or SiT.")
    if extra := [name for name in weights if name not in expected]:
        raise UserError(f"{path}: {len(extra)} weights are not a DiT's or SiT's: {_some(extra)}.", hint="It is another architecture.")
    for name, shape in expected.items():
        if name in weights and not all(part.dtype.is_floating_point for part in weights[name].parts):
            raise UserError(f"{path}: {name} is of type {weights[name].parts[0].dtype}.", hint="Weights must be floating-point.")
        if name in weights and weights[name].shape != shape:
            raise UserError(
                f"{path}: {name} is {list(weights[name].shape)} where {arch.name} needs {list(shape)}.",
                hint="It is damaged, or not a DiT or SiT.",
            )


def _some(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


# --- formats -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    matches: Callable[[Source], bool]
    open: Callable[[str, Source, Hints], Checkpoint]


AXES = {
    "x_embedder.proj.weight": 4,
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
}
"""What sizes are read from, and how many axes each has."""


def _refuse_unreadable_sizes(source: Source, *, positions: bool) -> None:
    first = MLPS[parts_of_blocks(source)["mlp"]].first
    needed = {name: axes for name, axes in AXES.items() if positions or name != "pos_embed"} | {f"blocks.0.mlp.{first}.weight": 2}
    if missing := [name for name in needed if name not in source.tensors]:
        raise UserError(f"{source.path}: weights are missing: {_some(missing)}.", hint="It is damaged, or not a DiT or SiT.")
    for name, axes in needed.items():
        shape = source.tensors[name].shape
        if len(shape) != axes or not source.tensors[name].is_weight:
            kind = source.tensors[name].dtype
            raise UserError(f"{source.path}: {name} is {list(shape)} of {kind}; it needs {axes} axes of floats.", hint="It is damaged.")


def _open_official(name: str, source: Source, hints: Hints, **conventions: Any) -> Checkpoint:
    _refuse_unreadable_sizes(source, positions=True)
    family, how = family_of(source, hints)
    arch, notes = infer_architecture(source, hints, family, _grid_of(source), **conventions)
    weights = {own_name(key, arch.mediators): Weight((value,)) for key, value in source.tensors.items()}
    _check_names_and_shapes(source.path, arch, weights, optional=set())
    return Checkpoint(source.path, name, arch, weights, source.part, (f"{FAMILIES[family].name}, {how}", *notes))


def _open_repa(name: str, source: Source, hints: Hints) -> Checkpoint:
    """REPA's and REPA-E's SiT: projectors are dropped; time runs from data (0) to noise (1), the output is noise - data.

    REPA-E's latents are normalised by the running statistics of a BatchNorm, `bn`, which its `generate.py` undoes before decoding.
    """
    tensors = {key: value for key, value in source.tensors.items() if not key.startswith(("projectors.", "bn."))}
    if hints.family not in (None, "sit"):
        raise UserError(f"{source.path}: a REPA checkpoint is a SiT.", hint="Leave --family out.")
    statistics = _batch_statistics(source)
    own_vae = ("the VAE in the file was left alone; --vae takes one of diffusers",) if source.facts.get("holds_vae") else ()
    source = Source(source.path, tensors, source.facts | {"family": "sit"}, source.part)
    opened = _open_official(name, source, hints, reversed_time=True, **statistics)
    return replace(opened, notes=(*opened.notes, *own_vae))


def _batch_statistics(source: Source) -> dict[str, Any]:
    """The mean and deviation of latents that REPA-E's BatchNorm holds, as fields of `Architecture`; nothing where it has none."""
    stored = [source.tensors.get(f"bn.{name}") for name in ("running_mean", "running_var")]
    if stored == [None, None]:
        return {}
    values = [value.read().float() for value in stored if value is not None and value.is_weight]
    if len(values) != 2 or values[0].ndim != 1 or values[0].shape != values[1].shape:
        raise UserError(f"{source.path}: bn.running_mean and bn.running_var do not go together.", hint="It is damaged.")
    mean, variance = values
    if not (mean.isfinite().all() and variance.isfinite().all() and (variance > 0).all()):
        raise UserError(f"{source.path}: bn has a mean that is not finite, or a variance that is not above 0.", hint="It is damaged.")
    return {"latent_mean": tuple(mean.tolist()), "latent_std": tuple(variance.sqrt().tolist())}


def _open_lightningdit(name: str, source: Source, hints: Hints) -> Checkpoint:
    """LightningDiT: SiT's flow and names, with RMSNorm, SwiGLU and rotary positions, each of which a file may have or not."""
    if hints.family not in (None, "lightningdit"):
        raise UserError(f"{source.path}: a LightningDiT checkpoint is no {FAMILIES[hints.family].name}.", hint="Leave --family out.")
    modulation, width = source.tensors.get("blocks.0.adaLN_modulation.1.weight"), source.tensors.get("x_embedder.proj.weight")
    if modulation is not None and width is not None and modulation.shape[:1] == (4 * width.shape[0],):
        raise UserError(f"{source.path}: a LightningDiT whose blocks have no shifts (wo_shift).", hint="It is not supported.")
    return _open_official(name, replace(source, facts=source.facts | {"family": "lightningdit"}), hints)


PUBLISHED_TERMS = r"\.attn\.((an|na|ah|aw|ha|wa)_bias|dwc\.(weight|bias))$"
"""What attention in the published form of arXiv 2408.05710 has beside its projections, in LeapLabTHU/Attention-Mediators."""


def own_name(name: str, mediators: int) -> str:
    """What a parameter of Attention-Mediators' code is called here."""
    return re.sub(PUBLISHED_TERMS, rf".attn.published.levels.{mediators}.\1", name)


def published_name(name: str) -> str:
    """What one of our parameters is called in Attention-Mediators' code."""
    return re.sub(r"\.attn\.published\.levels\.\d+\.", ".attn.", name)


def _open_attention_mediators(name: str, source: Source, hints: Hints) -> Checkpoint:
    """A SiT that was trained with mediators in every layer, one count for all (the published form)."""
    if hints.family not in (None, "sit"):
        raise UserError(f"{source.path}: an Attention-Mediators checkpoint is a SiT.", hint="Leave --family out.")
    key, biases = next((key, value.shape) for key, value in source.tensors.items() if key.endswith(".attn.an_bias"))
    if len(biases) != 4:
        raise UserError(f"{source.path}: {key} is {list(biases)}; it needs 4 axes, heads and mediators first.", hint="It is damaged.")
    heads, mediators = biases[:2]
    if hints.num_heads not in (None, heads):
        raise UserError(f"{source.path}: its position terms are of {heads} heads.", hint="Leave --num-heads out.")
    source = Source(source.path, source.tensors, source.facts | {"family": "sit", "num_heads": heads}, source.part)
    opened = _open_official(name, source, hints, mediators=mediators)
    note = f"its attention has {mediators} mediators per head, in the published form; level softmax stands for it"
    return replace(opened, notes=(*opened.notes, note))


DIFFUSERS_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
DIFFUSERS_BLOCK_NAMES = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
DIFFUSERS_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}


def _open_diffusers(name: str, source: Source, hints: Hints) -> Checkpoint:
    """diffusers' DiT: other names, a copy of the embedders in every block, its own timestep frequencies and epsilon."""
    if hints.family not in (None, "dit"):
        raise UserError(f"{source.path}: a diffusers DiTTransformer2DModel is a DiT.", hint="Leave --family out.")
    weights: dict[str, Weight] = {}
    joined: dict[str, dict[str, StoredTensor]] = {}
    embedders: dict[str, StoredTensor] = {}
    for key, stored in source.tensors.items():
        if key == "pos_embed.pos_embed":
            continue  # the sin-cos buffer, which old versions stored
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", key)
        if not block:
            stem, _, kind = key.rpartition(".")
            weights[f"{DIFFUSERS_NAMES.get(stem, stem)}.{kind}"] = Weight((stored,))
            continue
        index, inner = block.groups()
        if inner.startswith("norm1.emb."):
            official = DIFFUSERS_EMBEDDERS.get(inner.removeprefix("norm1.emb."), inner)
            if official in embedders and not torch.equal(embedders[official].read(), stored.read()):
                raise UserError(
                    f"{source.path}: block {index} has its own {inner}; a DiT has one for all blocks.", hint="It cannot be converted."
                )
            embedders.setdefault(official, stored)
        elif projection := re.fullmatch(r"attn1\.to_([qkv])\.(weight|bias)", inner):
            joined.setdefault(f"blocks.{index}.attn.qkv.{projection[2]}", {})[projection[1]] = stored
        else:
            stem, _, kind = inner.rpartition(".")
            weights[f"blocks.{index}.{DIFFUSERS_BLOCK_NAMES.get(stem, stem)}.{kind}"] = Weight((stored,))
    weights |= {key: Weight((stored,)) for key, stored in embedders.items()}
    for key, parts in joined.items():
        shapes = {part.shape for part in parts.values()}
        if len(parts) == 3 and (len(shapes) > 1 or () in shapes):
            raise UserError(f"{source.path}: {key} would join {[list(part.shape) for part in parts.values()]}.", hint="It is damaged.")
        if len(parts) != 3:
            raise UserError(f"{source.path}: {key} needs to_q, to_k and to_v; it has {_some(parts)}.", hint="It is damaged.")
        weights[key] = Weight((parts["q"], parts["k"], parts["v"]))

    named = {key: weight.parts[0] for key, weight in weights.items()}
    told = Source(source.path, named, source.facts | {"num_classes": source.facts.get("num_embeds_ada_norm")})
    _refuse_unreadable_sizes(told, positions=False)
    side, patch = _count(told, "sample_size"), _count(told, "patch_size")
    if side is None or patch is None or patch != named["x_embedder.proj.weight"].shape[2] or side % patch:
        raise UserError(f"{source.path}: sample_size {side} and patch_size {patch} of config.json do not fit it.", hint="Copy both again.")
    try:
        epsilon = float(source.facts.get("norm_eps", 1e-5))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.path}: norm_eps is {source.facts['norm_eps']!r} in config.json.", hint="Copy it again.") from error
    arch, notes = infer_architecture(told, hints, "dit", (side // patch, side // patch), frequency_shift=1, mlp_norm_eps=epsilon)
    _check_names_and_shapes(source.path, arch, weights, optional={"pos_embed"})
    return Checkpoint(source.path, name, arch, weights, "", ("DiT, with diffusers' frequencies and epsilon", *notes))


FORMATS: dict[str, Format] = {
    "diffusers DiT": Format(lambda source: any(key.startswith("transformer_blocks.") for key in source.tensors), _open_diffusers),
    "REPA SiT": Format(
        lambda source: "enc_type" in source.facts or any(key.startswith(("projectors.", "bn.running_")) for key in source.tensors),
        _open_repa,
    ),
    "Attention-Mediators SiT": Format(
        lambda source: any(re.search(PUBLISHED_TERMS, key) and key.endswith("an_bias") for key in source.tensors), _open_attention_mediators
    ),
    "LightningDiT": Format(
        lambda source: any(re.search(r"^feat_rope\.freqs_|\.mlp\.w12\.|^blocks\.\d+\.norm1\.weight$", key) for key in source.tensors),
        _open_lightningdit,
    ),
    "official": Format(lambda source: any(re.match(r"blocks\.\d+\.attn\.", key) for key in source.tensors), _open_official),
}
"""Formats by name, tried in order. To add one: a test of the tensors' names, and a function that gives official names."""
