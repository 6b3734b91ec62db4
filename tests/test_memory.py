"""Held rests: exact where nothing changed, never without a memory of as many rows, of one trajectory, and counted as they run."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import model_inputs, relative_error, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mediatorize import UserError, sample
from mediatorize.diffusion.driver import Driver
from mediatorize.diffusion.sampling import GuidedModel, Sampler
from mediatorize.model import cost
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.memory import Memory
from mediatorize.model.schedule import Levels, Schedule, schedule_from_json, with_memory
from mediatorize.model.transformer import DiffusionTransformer

NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, projection_rank=3, mlp_widths=(8, 4))
SAMPLERS = [("dit", "ddim"), ("dit", "ddpm"), ("dit", "dpm-solver++"), ("sit", "euler"), ("sit", "heun"), ("sit", "unipc"), ("sit", "sde")]
COMPUTED: Levels = (SOFTMAX,) * 3
HELD: Levels = ("hold+4|full",) * 3


def model_of(family: str = "sit", **changes: Any) -> DiffusionTransformer:
    return tiny_model(SETTINGS, family=family, channels=1, learn_sigma=family == "dit", **changes)


def schedule_of(model: DiffusionTransformer, sampler: Sampler, calls: Sequence[Levels]) -> Schedule:
    """For the sampler: these calls again and again."""
    noise_levels = sampler.noise_levels(model.arch)
    cells = list(dict.fromkeys(noise_levels))  # of heun's calls, two are at one noise level
    at = {noise_level: calls[index % len(calls)] for index, noise_level in enumerate(cells)}
    return Schedule.through(noise_levels, [at[noise_level] for noise_level in noise_levels])


# --- what a call gives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [1, 4])
@pytest.mark.parametrize("mlp", ["full", "1/8"])
def test_at_the_input_of_the_remembered_call_a_held_rest_gives_softmax_attention(attention: int, mlp: str) -> None:
    model = model_of()
    x, t, y = model_inputs(model)
    memory = Memory(3)
    memory.begin([(attention,)] * 3)
    remembered = model(x, t, y, levels=[f"softmax|{mlp}"] * 3, memory=memory)
    assert torch.equal(remembered, model(x, t, y, levels=f"softmax|{mlp}"))  # which leaving something does not change
    memory.begin([()] * 3)
    held = model(x, t, y, levels=[f"hold+{attention}|{mlp}"] * 3, memory=memory)
    assert relative_error(held, remembered) < 1e-5
    assert relative_error(model(x, t, y, levels=[f"{attention}|{mlp}"] * 3), remembered) > 1e-3


def test_elsewhere_a_held_rest_is_what_mediators_left_out_there() -> None:
    """By hand, in one block: y(x) is taken for M(x) + y(a) - M(a), both of the attention's input under the pretrained modulation."""
    block = model_of().layers()[0]
    draw = torch.Generator().manual_seed(0)
    before, x = torch.randn(2, 2, 16, 48, generator=draw)
    conditioning, later = torch.randn(2, 2, 48, generator=draw)
    memory = Memory(1)
    memory.begin([(4, 1)])
    block(before, conditioning, SOFTMAX, memory.blocks[0])
    at, _ = block.attention_input(before, conditioning)
    inputs, gate = block.attention_input(x, later)
    shift, scale, mlp_gate = (each.unsqueeze(1) for each in block.modulation(later)[3:])
    for count in (1, 4):
        tokens = x + gate * (block.attn(inputs, count) + block.attn(at) - block.attn(at, count))
        expected = tokens + mlp_gate * block.mlp(block.norm2(tokens) * (1 + scale) + shift)
        found = block(x, later, f"hold+{count}|full", memory.blocks[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert relative_error(found, block(x, later, SOFTMAX)) > 1e-4


def test_without_a_memory_a_held_rest_runs_as_softmax() -> None:
    model = model_of()
    inputs = model_inputs(model)
    assert torch.equal(model(*inputs, levels="hold+4|full"), model(*inputs))
    assert torch.equal(model(*inputs, levels=["hold+1|1/8", 4, SOFTMAX]), model(*inputs, levels=["softmax|1/8", 4, SOFTMAX]))


def test_perfect_mediators_leave_nothing_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mediators are softmax attention, holding their rest changes nothing, however old it is."""
    model = model_of()
    attention = type(model.attention_layers()[0])
    attend = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, x, level=SOFTMAX: attend(self, x, SOFTMAX))
    sampler = Sampler.resolve(model.arch, steps=5)
    found = sample(model, [1, 2], steps=5, schedule=schedule_of(model, sampler, [COMPUTED, *[HELD] * 4]))
    torch.testing.assert_close(found, sample(model, [1, 2], steps=5, schedule=SOFTMAX), rtol=1e-4, atol=1e-5)


# --- along a trajectory ----------------------------------------------------------------------------------------------------------


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_a_trajectory_whose_calls_all_compute_attention_is_the_teachers_bit_for_bit(family: str, solver: str, cfg_scale: float) -> None:
    model = model_of(family)
    sampler = Sampler.resolve(model.arch, solver=solver, steps=4, cfg_scale=cfg_scale)
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale}
    teacher = sample(model, [1, 2], schedule=SOFTMAX, **how)
    assert torch.equal(sample(model, [1, 2], schedule=schedule_of(model, sampler, [COMPUTED]), **how), teacher)
    held = sample(model, [1, 2], schedule=schedule_of(model, sampler, [COMPUTED, HELD]), **how)
    assert held.isfinite().all()
    assert not torch.equal(held, teacher)


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_where_nothing_was_remembered_a_call_runs_and_costs_as_softmax(family: str, solver: str, cfg_scale: float) -> None:
    """The first call does, and later ones hold what it left; mediators that run bare leave nothing."""
    model = model_of(family)
    sampler = Sampler.resolve(model.arch, solver=solver, steps=4, cfg_scale=cfg_scale)
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale}

    def sampled(calls: Sequence[Levels]) -> tuple[Tensor, float | None]:
        schedule = schedule_of(model, sampler, calls)
        return sample(model, [1, 2], schedule=schedule, **how), sampler.flops(model.arch, schedule, SETTINGS)

    (always, spent), (told, known) = sampled([HELD]), sampled([COMPUTED, *[HELD] * 20])
    assert torch.equal(always, told)
    assert spent == known
    if solver != "heun":  # whose second and third call are of one piece, and the third would hold what the second leaves
        bare: Levels = (4,) * 3
        (always, spent), (told, known) = sampled([bare, *[HELD] * 20]), sampled([bare, COMPUTED, *[HELD] * 20])
        assert torch.equal(always, told)
        assert spent == known


def test_every_layer_holds_what_its_own_last_softmax_call_left() -> None:
    first, held, other = "softmax|1/4", "hold+4|full", "hold+1|1/8"
    calls: list[Levels] = [(held, 4), (held, other), (first, held), (held, other), (other, SOFTMAX), (held, other)]
    runs, watched = with_memory(calls, [1] * 6)
    assert runs == [(SOFTMAX, 4), (held, "softmax|1/8"), (first, held), (held, other), (other, SOFTMAX), (held, other)]
    # the second layer's call 1 computes softmax attention, and its rests are held by calls 2 and 3
    assert watched == [((4,), ()), ((), (1, 4)), ((1, 4), ()), ((), ()), ((), (1,)), ((), ())]
    assert with_memory([(4,), (SOFTMAX,)], [1, 1]) == ([(4,), (SOFTMAX,)], [((),), ((),)])


def test_a_guided_call_does_not_hold_what_an_unguided_one_left() -> None:
    calls: list[Levels] = [(SOFTMAX,), ("hold+4|full",), ("hold+4|full",), ("hold+4|full",), (SOFTMAX,), ("hold+4|full",)]
    runs, watched = with_memory(calls, [1, 1, 2, 1, 1, 2])
    assert runs == [(SOFTMAX,), ("hold+4|full",), (SOFTMAX,), ("hold+4|full",), (SOFTMAX,), (SOFTMAX,)]
    assert watched == [((4,),), ((),), ((4,),), ((),), ((),), ((),)]


@pytest.mark.parametrize("interval", [(0.3, 0.8), (0.0, 0.8), (0.3, 1.0)])
def test_unguided_calls_after_guided_ones_hold_the_conditional_half(interval: tuple[float, float]) -> None:
    """By hand, with a memory for each half: the unconditional one begins within the interval, and with it all of the first such call."""
    model = model_of()
    how: dict[str, Any] = {"steps": 8, "cfg_scale": 2.0, "cfg_interval": interval}
    sampler = Sampler.resolve(model.arch, **how)
    rows = sampler.rows_of_calls(model.arch)
    assert {1, 2} == set(rows)
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    memories, x = [Memory(3), Memory(3)], noise
    for call in range(8):
        t, computes = torch.full((2,), call / 8), call == 0 or rows[: call + 1] == [*[1] * call, 2]
        halves = []
        for memory, y in list(zip(memories, (labels, torch.full((2,), 10)), strict=True))[: rows[call]]:
            memory.begin([(4,)] * 3)
            halves.append(model(x, t, y, levels=COMPUTED if computes else HELD, memory=memory))
        x = x + (halves[0] if len(halves) == 1 else halves[1] + 2.0 * (halves[0] - halves[1])) / 8
    found = sample(model, labels, **how, noise=noise, schedule=Schedule((), (HELD,)))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    assert relative_error(found, sample(model, labels, **how, noise=noise, schedule=SOFTMAX)) > 1e-3


def test_a_call_on_fewer_rows_holds_the_rests_of_the_first_and_one_on_more_is_refused() -> None:
    model = model_of()
    x, t, y = model_inputs(model)
    memory, alone = Memory(3), Memory(3)
    for each, count in ((memory, 3), (alone, 2)):
        each.begin([(4,)] * 3)
        model(x[:count], t[:count], y[:count], memory=each)
    late = 2 * x[:2], t[:2], y[:2]
    torch.testing.assert_close(model(*late, levels=HELD, memory=memory), model(*late, levels=HELD, memory=alone))
    for unknown, levels in ((Memory(3), HELD), (alone, HELD), (memory, ("hold+1|full",) * 3)):
        with pytest.raises(UserError, match="needs a call with softmax attention before it, of as many rows"):
            model(x, t, y, levels=levels, memory=unknown)
    memory.begin([()] * 3)
    model(x, t, y, memory=memory)
    with pytest.raises(UserError, match="needs a call with softmax attention before it"):  # nothing is kept from before
        model(x, t, y, levels=HELD, memory=memory)


def test_a_split_batch_and_samplers_side_by_side_change_nothing() -> None:
    model = model_of()
    sampler = Sampler.resolve(model.arch, steps=6, cfg_scale=1.5)
    schedule = schedule_of(model, sampler, [COMPUTED, HELD, ("hold+1|full", 4, "hold+4|1/8")])
    whole = sample(model, [1, 2, 3], steps=6, cfg_scale=1.5, schedule=schedule)
    parts = [sample(model, [label], steps=6, cfg_scale=1.5, schedule=schedule, first_index=label - 1) for label in (1, 2, 3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)

    x, t, y = model_inputs(model)
    calls = sampler.calls(model.arch, schedule, model.settings)

    def driver() -> Driver:
        return Driver(model, calls, [1] * 6)

    alone = [driver(), driver()]
    expected = [[call((1 + index) * state, t, y) for index in range(6)] for call, state in zip(alone, (x, 2 * x), strict=True)]
    first, second = driver(), driver()
    for index in range(6):  # in turn, on one model
        assert torch.equal(first((1 + index) * x, t, y), expected[0][index])
        assert torch.equal(second((1 + index) * 2 * x, t, y), expected[1][index])
    with pytest.raises(UserError, match="has 6 calls, and this is one more"):
        first(x, t, y)


def test_what_a_memory_holds_is_freed_with_it() -> None:
    """At once, and not when Python next looks for cycles: it can be as large as the model."""
    model = model_of()
    memory = Memory(model.arch.depth)
    memory.begin([(4,)] * 3)
    model(*model_inputs(model, 2), SOFTMAX, memory=memory)
    held = weakref.ref(memory.blocks[0].rests[4])
    assert held() is not None
    gc.disable()
    try:
        del memory
        assert held() is None
    finally:
        gc.enable()


def test_only_what_later_calls_hold_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    sampler = Sampler.resolve(model.arch, steps=4)
    schedule = schedule_of(model, sampler, [COMPUTED, ("hold+4|full", 4, SOFTMAX), ("hold+1|full", 1, 1), COMPUTED])
    kept, begin = [], Memory.begin

    def looked_at(self: Memory, watched: Any) -> None:
        kept.append([sorted(block.rests) for block in self.blocks])
        begin(self, watched)

    monkeypatch.setattr(Memory, "begin", looked_at)
    sample(model, [1, 2], steps=4, schedule=schedule)
    assert kept == [[[], [], []], *[[[1, 4], [], []]] * 3]
    kept.clear()
    sample(model, [1, 2], steps=4, schedule=Schedule((), ((4, SOFTMAX, 1),)))
    assert not kept  # nothing is held, and there is no memory


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_bfloat16_holds(compiled: bool) -> None:
    model = model_of().to(torch.bfloat16)
    schedule = schedule_of(model, Sampler.resolve(model.arch, steps=4), [COMPUTED, HELD])
    plain = sample(model, [1, 2], steps=4, schedule=schedule)
    if compiled:
        torch.compiler.reset()
        model.compile_blocks(backend="eager")
    found = sample(model, [1, 2], steps=4, schedule=schedule)
    assert found.isfinite().all()
    assert found.dtype == torch.float32
    assert relative_error(found, plain) < 0.02
    assert relative_error(found, sample(model_of(), [1, 2], steps=4, schedule=schedule)) < 0.1


def test_an_adaptive_solver_remembers_nothing() -> None:
    model = model_of()
    how: dict[str, Any] = {"solver": "dopri5", "steps": 2}
    held = Schedule((), (("hold+4|1/8", 4, "hold+1|full"),))
    in_full = Schedule((), (("softmax|1/8", 4, SOFTMAX),))
    assert torch.equal(sample(model, [1], schedule=held, **how), sample(model, [1], schedule=in_full, **how))


# --- cost ------------------------------------------------------------------------------------------------------------------------


CALLS: list[list[Levels]] = [
    [COMPUTED, HELD],
    [HELD],
    [COMPUTED, ("hold+1|1/4", 4, "hold+4|full")],
    [COMPUTED, ("softmax|1/4", "4|1/8", 1), HELD],
    [COMPUTED, COMPUTED, COMPUTED, *[("hold+1|1/4", "hold+4|1/8", SOFTMAX)] * 2, HELD],
    [(4, "hold+4|full", 1), HELD, COMPUTED],
]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)])
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_stated_flops_are_those_that_run(calls: list[Levels], cfg_scale: float, interval: tuple[float, float], solver: str) -> None:
    model = model_of()
    how: dict[str, Any] = {"solver": solver, "steps": 6, "cfg_scale": cfg_scale, "cfg_interval": interval}
    sampler = Sampler.resolve(model.arch, **how)
    schedule = schedule_of(model, sampler, calls)
    for layer in model.attention_layers():
        layer.fused_attn = False  # whose products the counter does not see on the CPU
    with FlopCounterMode(display=False) as counter:
        sample(model, [1], schedule=schedule, **how)
    assert counter.get_total_flops() == sampler.flops(model.arch, schedule, SETTINGS)


def test_mediators_that_run_beside_softmax_attention_are_paid_for() -> None:
    arch, beside = model_of().arch, cost.attention_flops(model_of().arch, 4, SETTINGS)
    alone = cost.forward_flops(arch, SOFTMAX, SETTINGS)
    held = cost.forward_flops(arch, HELD, SETTINGS)
    assert cost.calls_flops(arch, [COMPUTED] * 2, [1, 2], SETTINGS) == 3 * alone
    assert cost.calls_flops(arch, [COMPUTED, HELD], [1, 1], SETTINGS) == alone + 3 * beside + held
    assert cost.calls_flops(arch, [COMPUTED, HELD, HELD], [2, 2, 1], SETTINGS) == 2 * (alone + 3 * beside) + 3 * held
    assert cost.calls_flops(arch, [COMPUTED, HELD, HELD], [1, 2, 1], SETTINGS) == alone + 2 * (alone + 3 * beside) + held
    assert cost.block_flops(arch, "hold+4|full", SETTINGS) < cost.block_flops(arch, "4|full", SETTINGS)  # whose modulation changes


# --- narrow MLPs and parts of levels ---------------------------------------------------------------------------------------------


def test_narrow_mlps_are_nested_parts_of_one() -> None:
    model = model_of()
    block = model.layers()[0]
    assert block.mediator is not None
    narrow = block.mediator.narrow
    assert narrow is not None
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    before = narrow(x, "1/8")
    narrow.fc1.weight.data[24:] = 0.0  # units that the eighth does not have
    narrow.fc2.weight.data[:, 24:] = 0.0
    assert torch.equal(narrow(x, "1/8"), before)
    assert cost.added_parameters(model.arch, SETTINGS) == sum(p.numel() for p in model.mediator_parameters().values())
    with pytest.raises(UserError, match="no MLP of width 1/2"):
        narrow(x, "1/2")
    with pytest.raises(UserError, match="no narrow MLPs"):
        tiny_model(MediatorSettings((1,))).layers()[0].run_mlp(x, "1/8")


def test_levels_of_parts_need_what_the_model_has() -> None:
    model = model_of()
    with pytest.raises(UserError, match="no level 2"):
        sample(model, [1], steps=1, schedule="2|1/8")
    with pytest.raises(UserError, match="Layer 0 has no level 1/2"):
        sample(model, [1], steps=1, schedule="4|1/2")
    with pytest.raises(UserError, match="no level 2"):
        sample(model, [1], steps=2, schedule="hold+2|full")
    levels: list[Level] = ["softmax|full", "4|own"]
    assert torch.equal(sample(model, [1], steps=2, schedule="softmax|full"), sample(model, [1], steps=2, schedule=SOFTMAX))
    assert torch.equal(sample(model, [1], steps=2, schedule=levels[1]), sample(model, [1], steps=2, schedule=4))
    assert replace(SETTINGS, mlp_widths=()).mlp_levels == ()


# --- guidance in an interval -----------------------------------------------------------------------------------------------------


def test_outside_the_interval_calls_are_unguided_and_cost_half() -> None:
    model = model_of()
    how: dict[str, Any] = {"steps": 4, "cfg_scale": 2.0}
    none = sample(model, [1, 2], steps=4, schedule=SOFTMAX)
    torch.testing.assert_close(sample(model, [1, 2], **how, cfg_interval=(0.99999, 0.99999)), none)
    assert torch.equal(sample(model, [1, 2], **how, cfg_interval=(0.0, 1.0)), sample(model, [1, 2], **how))
    sampler = Sampler.resolve(model.arch, **how, cfg_interval=(0.4, 0.6))
    assert sampler.rows_of_calls(model.arch) == [1, 1, 2, 1]
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    x = noise
    for call in range(4):
        t = torch.full((2,), call / 4)
        velocity = model(x, t, labels)
        if call == 2:
            unconditional = model(x, t, torch.full((2,), 10))
            velocity = unconditional + 2.0 * (velocity - unconditional)
        x = x + velocity / 4
    torch.testing.assert_close(sample(model, labels, **how, cfg_interval=(0.4, 0.6), noise=noise), x, rtol=1e-4, atol=1e-5)
    guided = GuidedModel(model, labels, sampler)
    assert [len(guided.inputs(x, t)[0]) for t in sampler.times()] == [2, 2, 4, 2]
    whole = Sampler.resolve(model.arch, **how).flops(model.arch, SOFTMAX, None)
    assert whole
    assert sampler.flops(model.arch, SOFTMAX, None) == whole * 5 / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_interval": (0.6, 0.4)}, "No noise level is in the interval 0.6,0.4"),
        ({"cfg_interval": (-0.1, 0.4)}, "No noise level is in the interval"),
        ({"solver": "dopri5", "cfg_scale": 2.0, "cfg_interval": (0.1, 0.4)}, "dopri5 takes its steps by both halves"),
    ],
)
def test_intervals_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(model_of(), [1], steps=3, **arguments)


# --- schedules of single calls, which older versions wrote -----------------------------------------------------------------------


def old_file(calls: Sequence[Any]) -> dict[str, Any]:
    """As older versions wrote one: the levels of every call, one for all layers or one each."""
    given = [call if isinstance(call, dict) else {"levels": call} for call in calls]
    noise_levels = [1 - index / len(given) for index in range(len(given))]
    content = [{"noise_level": noise, **call} for noise, call in zip(noise_levels, given, strict=True)]
    return json.loads(json.dumps({"format": 2, "layers": 3, "calls": content}))


def test_an_old_schedule_of_calls_without_forecasts_runs_the_same_calls() -> None:
    calls: list[Levels] = [COMPUTED, (4, "softmax|1/4", 1), (4, "softmax|1/4", 1), (4, 4, 4), ("1|1/8", "4|own", SOFTMAX)]
    written: list[Any] = ["softmax", {"levels": list(calls[1]), "unconditional": list(calls[1])}, list(calls[2]), 4, list(calls[4])]
    schedule = schedule_from_json(old_file(written))
    assert isinstance(schedule, Schedule)
    assert schedule.edges == (0.3, 0.5, 0.9)  # half-way between calls that differ
    assert schedule.calls([1 - index / 5 for index in range(5)]) == [*calls[:4], ("1|1/8", 4, SOFTMAX)]
    assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    "call",
    [
        "linear",
        [SOFTMAX, "linear+4|linear+1/8", SOFTMAX],
        [SOFTMAX, "softmax|quadratic", 4],
        "hold+4|hold",
        "hold",
        [],
        {"levels": "softmax", "unconditional": []},
        {"levels": ["softmax"] * 3, "unconditional": ["linear"] * 3},
    ],
)
def test_an_old_schedule_with_forecasts_is_refused_in_one_line(call: Any) -> None:
    with pytest.raises(UserError, match=r"^This schedule forecasts model calls\..* then run `mediatorize calibrate MODEL --calls 8`\.$"):
        schedule_from_json(old_file(["softmax", call]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3 is not known"),
        ({"format": None}, "format None is not known"),
        ({"layers": "many"}, "Not a schedule"),
        ({"calls": []}, "Not a schedule"),
        ({"calls": 3}, "Not a schedule"),
        ({"calls": [{"noise_level": 0.5}]}, "Not a schedule"),
        ({"calls": [{"levels": "softmax"}]}, "Not a schedule"),
        ({"calls": [{"noise_level": "low", "levels": "softmax"}]}, "Not a schedule"),
        ({"calls": [{"noise_level": 0.5, "levels": "cubic"}]}, "'cubic' is no level"),
        ({"calls": [{"noise_level": 0.5, "levels": "softmax"}, {"noise_level": 0.4, "levels": [4]}]}, "differ in their number"),
        ({"calls": [{"noise_level": 1.8, "levels": "softmax"}, {"noise_level": 1.4, "levels": 4}]}, "do not ascend"),
    ],
)
def test_a_file_that_is_no_schedule_of_calls_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule_from_json(old_file(["softmax", 4]) | change)


def test_a_schedule_through_calls_runs_them_whatever_their_order() -> None:
    noise_levels, calls = [0.2, 1.0, 0.6, 0.6, 0.4], [(1,), (SOFTMAX,), (4,), (4,), (1,)]
    schedule = Schedule.through(noise_levels, calls)
    assert schedule == Schedule((0.5, 0.8), ((1,), (4,), (SOFTMAX,)))
    assert schedule.calls(noise_levels) == calls
    assert Schedule.through([0.7], [(4,)]) == Schedule((), ((4,),))
