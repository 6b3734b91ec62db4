"""Forecast calls: computed ones are the teacher, others follow polynomials, memory is of one trajectory, and costs are counted."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import model_inputs, tiny_model
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mediatorize import UserError, sample
from mediatorize.compression.paths import MEASURES, ForecastTable, bases, best_path, uniform_path
from mediatorize.diffusion.driver import Driver
from mediatorize.diffusion.sampling import GuidedModel, Sampler
from mediatorize.model import cost
from mediatorize.model.block import Block
from mediatorize.model.levels import LINEAR, SOFTMAX, Level, MediatorSettings
from mediatorize.model.memory import Memory, Series
from mediatorize.model.schedule import Call, CallSchedule, calls_at, schedule_from_json
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report.pictures import write_schedule_map

NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, projection_rank=3, mlp_widths=(8, 4))
SAMPLERS = [("dit", "ddim"), ("dit", "ddpm"), ("dit", "dpm-solver++"), ("sit", "euler"), ("sit", "heun"), ("sit", "unipc"), ("sit", "sde")]
COMPUTED = Call((SOFTMAX,) * 3)
RESTING = Call((LINEAR,) * 3)


def model_of(family: str = "sit", **changes: Any) -> DiffusionTransformer:
    return tiny_model(SETTINGS, family=family, channels=1, learn_sigma=family == "dit", **changes)


def schedule_of(model: DiffusionTransformer, sampler: Sampler, calls: Sequence[Call]) -> CallSchedule:
    """For the sampler: these calls again and again."""
    noise_levels = tuple(sampler.noise_levels(model.arch))
    return CallSchedule(noise_levels, tuple(calls[index % len(calls)] for index in range(len(noise_levels))))


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_a_schedule_that_computes_every_call_is_the_teacher_bit_for_bit(family: str, solver: str, cfg_scale: float) -> None:
    model = model_of(family)
    sampler = Sampler.resolve(model.arch, solver=solver, steps=4, cfg_scale=cfg_scale)
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale}
    teacher = sample(model, [1, 2], schedule=SOFTMAX, **how)
    assert torch.equal(sample(model, [1, 2], schedule=schedule_of(model, sampler, [COMPUTED]), **how), teacher)
    forecast = sample(model, [1, 2], schedule=schedule_of(model, sampler, [COMPUTED, RESTING]), **how)
    assert forecast.isfinite().all()
    assert not torch.equal(forecast, teacher)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_is_exact_on_polynomials_of_its_order(order: int) -> None:
    places, at = [0.0, 1.0, 3.0, 4.0], 6.5
    coefficients = torch.randn(order + 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(order))

    def value(place: float, coefficients: Tensor = coefficients) -> Tensor:
        return sum((c * place**power for power, c in enumerate(coefficients)), torch.zeros(2, 3, dtype=torch.float64))

    series = Series()
    for place in places:
        series.add(place, value(place), keep=order + 1)
    torch.testing.assert_close(series.at(at, order), value(at))
    if order:
        assert not torch.allclose(series.at(at, order - 1), value(at))


def test_a_second_value_at_one_place_takes_the_first_ones() -> None:
    series = Series()
    for place, number in ((0.0, 1.0), (1.0, 5.0), (1.0, 3.0)):
        series.add(place, torch.tensor(number), keep=2)
    assert float(series.at(2.0, 1)) == 5.0  # through (0, 1) and (1, 3)


def test_a_perfect_surrogate_makes_any_forecast_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stand-ins are the sub-layers themselves, nothing is left out, and nothing is forecast wrong."""
    model = model_of()
    attend, run_mlp = type(model.attention_layers()[0]).forward, Block.run_mlp
    monkeypatch.setattr(type(model.attention_layers()[0]), "forward", lambda self, x, level=SOFTMAX: attend(self, x, SOFTMAX))
    monkeypatch.setattr(Block, "run_mlp", lambda self, x, level: run_mlp(self, x, "full"))
    sampler = Sampler.resolve(model.arch, steps=5)
    teacher = sample(model, [1, 2], steps=5, schedule=SOFTMAX)
    for level in ("hold+1|hold+1/8", "linear+4|linear+1/4", "quadratic+1|quadratic+1/8"):
        found = sample(model, [1, 2], steps=5, schedule=schedule_of(model, sampler, [COMPUTED, *[Call((level,) * 3)] * 4]))
        torch.testing.assert_close(found, teacher, rtol=1e-4, atol=1e-5)
    plain = sample(model, [1, 2], steps=5, schedule=schedule_of(model, sampler, [COMPUTED, *[RESTING] * 4]))
    assert (plain - teacher).abs().max() > 1e-2


def test_a_forecast_of_two_equal_calls_is_their_output() -> None:
    model = model_of()
    x, t, y = model_inputs(model)
    memory = Memory(3)
    for place in (0.0, 1.0):
        memory.begin(place)
        expected = model(x, t, y, memory=memory)
    memory.begin(4.0)
    torch.testing.assert_close(model(x, t, y, levels=LINEAR, memory=memory), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x, t, y, levels=LINEAR), model(x, t, y))  # without a memory everything is computed


@NUMPY_2
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_a_surrogate_that_gives_nothing_changes_nothing(family: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves out is all, and is forecast from the same calls, two of which are at one noise level in heun."""
    model = model_of(family)
    attention = type(model.attention_layers()[0])
    attend, run_mlp = attention.forward, Block.run_mlp
    monkeypatch.setattr(attention, "forward", lambda self, x, level=SOFTMAX: attend(self, x, SOFTMAX) * (level == SOFTMAX))
    monkeypatch.setattr(Block, "run_mlp", lambda self, x, level: run_mlp(self, x, "full") * (level == "full"))
    sampler = Sampler.resolve(model.arch, solver=solver, steps=4)

    def sampled(resting: Call) -> Tensor:
        schedule = schedule_of(model, sampler, [COMPUTED, COMPUTED, COMPUTED, *[resting] * 20])
        return sample(model, [1, 2], solver=solver, steps=4, schedule=schedule)

    torch.testing.assert_close(sampled(Call(("linear+4|linear+1/8",) * 3)), sampled(RESTING), rtol=1e-4, atol=1e-5)


def test_a_forecast_of_the_models_output_is_a_line_through_the_computed_ones() -> None:
    """By hand: outputs at calls 0, 1 and 4 are computed, the others forecast from the last two."""
    model = model_of()
    calls = [COMPUTED, COMPUTED, Call(()), Call(()), COMPUTED, Call(())]
    sampler = Sampler.resolve(model.arch, steps=6)
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    x, outputs = noise, dict[int, Tensor]()
    for call, last, before in ((0, 0, 0), (1, 0, 0), (2, 1, 0), (3, 1, 0), (4, 0, 0), (5, 4, 1)):
        if call in (0, 1, 4):
            outputs[call] = velocity = model(x, torch.full((2,), call / 6), labels)
        else:
            velocity = outputs[last] + (outputs[last] - outputs[before]) * (call - last) / (last - before)
        x = x + velocity / 6
    found = sample(model, labels, steps=6, noise=noise, schedule=schedule_of(model, sampler, calls))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_without_its_unconditional_half_a_call_is_guided_by_a_forecast_of_the_difference() -> None:
    """By hand: the halves' difference is computed at calls 0 and 2, held at 1, a line after."""
    model = model_of()
    half = Call((SOFTMAX,) * 3, ())
    calls = [COMPUTED, half, COMPUTED, half, half]
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    x, differences = noise, dict[int, Tensor]()
    for call in range(5):
        t = torch.full((2,), call / 5)
        conditional = model(x, t, labels)
        if call in (0, 2):
            differences[call] = model(x, t, torch.full((2,), 10)) - conditional
        first, second = differences[0], differences.get(2, differences[0])
        change = [first, first, second, second + (second - first) / 2, second + (second - first)][call]
        x = x + (conditional + change - 2.0 * change) / 5
    how: dict[str, Any] = {"steps": 5, "cfg_scale": 2.0}
    schedule = schedule_of(model, Sampler.resolve(model.arch, **how), calls)
    torch.testing.assert_close(sample(model, labels, **how, noise=noise, schedule=schedule), x, rtol=1e-4, atol=1e-5)
    # a sampler without guidance has the conditional half alone, all of it computed
    assert torch.equal(sample(model, labels, steps=5, noise=noise, schedule=schedule), sample(model, labels, steps=5, noise=noise))


def test_calls_with_and_without_guidance_forecast_their_halves_apart() -> None:
    """The unconditional half begins within the interval, where its first call is computed, whatever the schedule says."""
    model = model_of()
    how: dict[str, Any] = {"steps": 8, "cfg_scale": 2.0, "cfg_interval": (0.3, 0.8)}  # calls 2 to 5
    sampler = Sampler.resolve(model.arch, **how)
    assert sampler.rows_of_calls(model.arch) == [1, 1, 2, 2, 2, 2, 1, 1]
    computed = (0, 3)
    schedule = schedule_of(model, sampler, [COMPUTED if call in computed else RESTING for call in range(8)])
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    memories, x = [Memory(3), Memory(3)], noise
    for call in range(8):
        t = torch.full((2,), call / 8)
        halves = []
        for side, memory in enumerate(memories[: 2 if 2 <= call <= 5 else 1]):
            memory.begin(float(call))
            known = call in computed or (side == 1 and call == 2)
            halves.append(model(x, t, (labels, torch.full((2,), 10))[side], levels=SOFTMAX if known else LINEAR, memory=memory))
        x = x + (halves[0] if len(halves) == 1 else halves[1] + 2.0 * (halves[0] - halves[1])) / 8
    found = sample(model, labels, **how, noise=noise, schedule=schedule)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("calls", [[COMPUTED, COMPUTED, RESTING, RESTING], [COMPUTED, Call(("quadratic+1|linear+1/4", LINEAR, "hold"))]])
def test_the_stated_memory_is_the_most_that_a_sampler_keeps(calls: list[Call], cfg_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    sampler = Sampler.resolve(model.arch, steps=8, cfg_scale=cfg_scale)
    schedule = schedule_of(model, sampler, calls)
    most, begin = 0, Memory.begin

    def begin_counted(self: Memory, *arguments: Any) -> None:
        nonlocal most
        parts = [part for block in self.blocks for part in (block.attention, block.mlp)]
        series = [series for part in parts for series in (part.outputs, *part.surrogates.values())]
        most = max(most, sum(value.numel() for one in series for value in one.values))
        begin(self, *arguments)

    monkeypatch.setattr(Memory, "begin", begin_counted)
    sample(model, [1, 2, 3], steps=8, cfg_scale=cfg_scale, schedule=schedule)
    assert most == 3 * sampler.memory_numbers(model.arch, schedule, model.settings)
    assert sampler.memory_numbers(model.arch, SOFTMAX, model.settings) == 0


def test_a_split_batch_and_samplers_side_by_side_change_nothing() -> None:
    model = model_of()
    sampler = Sampler.resolve(model.arch, steps=6, cfg_scale=1.5)
    schedule = schedule_of(model, sampler, [COMPUTED, COMPUTED, RESTING])
    whole = sample(model, [1, 2, 3], steps=6, cfg_scale=1.5, schedule=schedule)
    parts = [sample(model, [label], steps=6, cfg_scale=1.5, schedule=schedule, first_index=label - 1) for label in (1, 2, 3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)

    x, t, y = model_inputs(model)
    calls = calls_at(schedule, sampler.noise_levels(model.arch), 3, model.settings)

    def driver() -> Driver:
        return Driver(model, 3, calls, sampler.noise_levels(model.arch), [1] * 6, len(x))

    alone = [driver(), driver()]
    expected = [[call(state, t, y) for _ in range(6)] for call, state in zip(alone, (x, 2 * x), strict=True)]
    first, second = driver(), driver()
    for index in range(6):  # in turn, on one model
        assert torch.equal(first(x, t, y), expected[0][index])
        assert torch.equal(second(2 * x, t, y), expected[1][index])
    with pytest.raises(UserError, match="has 6 calls, and this is one more"):
        first(x, t, y)


def test_memory_of_nothing_or_of_another_batch_is_refused() -> None:
    model = model_of()
    x, t, y = model_inputs(model)
    memory = Memory(3)
    memory.begin(0.0)
    with pytest.raises(UserError, match="needs a model call that was computed before it"):
        model(x, t, y, levels=LINEAR, memory=memory)
    model(x, t, y, memory=memory)
    memory.begin(1.0)
    with pytest.raises(UserError, match=r"is of a batch \[3, 16, 48\], the call of \[2, 16, 48\]"):
        model(x[:2], t[:2], y[:2], levels=LINEAR, memory=memory)
    with pytest.raises(UserError, match="needs a model call that was computed before it"):
        sample(model, [1], steps=2, schedule=LINEAR)


def test_what_a_memory_holds_is_freed_with_it() -> None:
    """At once, and not when Python next looks for cycles: it can be as large as the model."""
    model = model_of()
    memory = Memory(model.arch.depth)
    memory.begin(0.0)
    model(*model_inputs(model, 2), SOFTMAX, memory=memory)
    held = weakref.ref(memory.blocks[0].attention.outputs.values[0])
    assert held() is not None
    gc.disable()
    try:
        del memory
        assert held() is None
    finally:
        gc.enable()


def test_a_model_in_bfloat16_forecasts() -> None:
    model = model_of().to(torch.bfloat16)
    sampler = Sampler.resolve(model.arch, steps=4)
    found = sample(model, [1, 2], steps=4, schedule=schedule_of(model, sampler, [COMPUTED, RESTING]))
    assert found.isfinite().all()
    assert found.dtype == torch.float32


CALLS: list[list[Call]] = [
    [COMPUTED, RESTING],
    [COMPUTED, Call(("linear+1|linear+1/4", LINEAR, "hold+4|hold"))],
    [COMPUTED, Call(("softmax|1/4", "4|1/8", 1)), RESTING],
    [COMPUTED, COMPUTED, COMPUTED, *[Call(("linear+1|linear+1/4", LINEAR, "quadratic+4|hold"))] * 2],
    [COMPUTED, Call(())],
    [COMPUTED, Call((SOFTMAX,) * 3, ())],
    [COMPUTED, Call((SOFTMAX,) * 3, (LINEAR,) * 3), RESTING],
]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)])
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_stated_flops_are_those_that_run(calls: list[Call], cfg_scale: float, interval: tuple[float, float], solver: str) -> None:
    model = model_of()
    how: dict[str, Any] = {"solver": solver, "steps": 6, "cfg_scale": cfg_scale, "cfg_interval": interval}
    sampler = Sampler.resolve(model.arch, **how)
    schedule = schedule_of(model, sampler, calls)
    for layer in model.attention_layers():
        layer.fused_attn = False  # whose products the counter does not see on the CPU
    with FlopCounterMode(display=False) as counter:
        sample(model, [1], schedule=schedule, **how)
    assert counter.get_total_flops() == sampler.flops(model.arch, schedule, SETTINGS)


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
        ({"solver": "dopri5"}, "dopri5 takes as many steps as it needs; a schedule with forecasts"),
    ],
)
def test_intervals_and_solvers_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = model_of()
    schedule = schedule_of(model, Sampler.resolve(model.arch, steps=3), [COMPUTED, RESTING])
    with pytest.raises(UserError, match=message):
        sample(model, [1], steps=3, schedule=schedule, **arguments)


def test_schedules_of_calls_go_to_json_and_back() -> None:
    calls = (
        COMPUTED,
        Call((LINEAR, "linear+4|linear+1/8", 4)),
        Call((), None),
        Call((SOFTMAX,) * 3, ()),
        Call((SOFTMAX,) * 3, (LINEAR,) * 3),
    )
    schedule = CallSchedule((1.0, 0.8, 0.6, 0.4, 0.2), calls)
    assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert (schedule.depth, schedule.guided) == (3, True)
    assert schedule.used == {SOFTMAX, LINEAR, "linear+4|linear+1/8", 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3 is not known"),
        ({"layers": "many"}, "Not a schedule"),
        ({"calls": []}, "A schedule of 0 calls has 0 noise levels"),
        ({"calls": [{"noise_level": 0.5, "levels": "linear"}]}, "forecasts its first call"),
        ({"calls": [{"noise_level": 0.5, "levels": []}]}, "differ in their number of layers"),
        ({"calls": [{"noise_level": 0.5, "levels": "softmax"}, {"noise_level": 0.6, "levels": "linear"}]}, "do not fall"),
        ({"calls": [{"noise_level": 1.5, "levels": "softmax"}]}, "do not fall"),
        ({"calls": [{"noise_level": 0.5, "levels": "cubic"}]}, "'cubic' is no level"),
        ({"calls": [{"noise_level": 0.5, "levels": "softmax"}, {"noise_level": 0.4, "levels": ["linear"]}]}, "differ in their number"),
    ],
)
def test_a_file_that_is_no_schedule_of_calls_is_refused(change: dict[str, Any], message: str) -> None:
    good = CallSchedule((1.0, 0.5), (COMPUTED, RESTING)).to_json()
    with pytest.raises(UserError, match=message):
        schedule_from_json(good | change)


@pytest.mark.parametrize("calls", [5, 9, 12, 17, 24, 100])
def test_another_number_of_steps_computes_the_nearest_calls(calls: int) -> None:
    own = [1 - index / 12 for index in range(12)]
    computed = (0, 1, 5, 8, 11)
    schedule = CallSchedule(tuple(own), tuple(COMPUTED if index in computed else RESTING for index in range(12)))
    noise_levels = [1 - index / calls for index in range(calls)]
    found = schedule.calls(noise_levels)
    there = [index for index, call in enumerate(found) if call.computed]
    assert there[0] == 0
    assert len(there) == min(len(computed), calls)
    if calls == 12:
        assert tuple(there) == computed
    if calls > 12:
        distances = [min(abs(noise_levels[index] - own[place]) for index in there) for place in computed]
        assert max(distances) <= 2 / calls


# --- which calls are computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("calls", "window"), [(5, 12), (8, 7), (9, 4)])
def test_the_best_path_is_the_best_of_all(calls: int, window: int, measure: str) -> None:
    random = np.random.default_rng(calls)
    table = ForecastTable(tuple(map(float, range(calls))), random.normal(size=(calls, window + 1, 3, 2)))
    of = MEASURES[measure]
    for count in range(1, calls + 1):
        sums = {}
        for rest in combinations(range(1, calls), count - 1):
            if table.reaches((0, *rest)):
                sums[0, *rest] = sum(of(table.effect(call, basis)) for call, basis in bases((0, *rest), table.places).items())
        found = best_path(table.errors(of), count)
        if not sums:
            assert found is None
        else:
            assert found is not None
            assert sums[found] == pytest.approx(min(sums.values()))


def linear_table(places: Sequence[float]) -> ForecastTable:
    """Of calls at these places whose outputs' effect is their place, looked at from 7 calls back at most."""
    products = np.array([[[[places[max(0, call - back)]]] for back in range(8)] for call in range(len(places))])
    return ForecastTable(tuple(places), products)


def test_outputs_that_grow_linearly_are_forecast_exactly_once_two_calls_are_computed() -> None:
    table = linear_table([float(place) for place in range(8)])
    assert np.allclose(table.effect(5, [1, 2]), 0)
    assert np.allclose(table.effect(3, [0]), -3)  # held
    for measure in MEASURES.values():
        assert best_path(table.errors(measure), 2) == (0, 1)
    assert np.allclose(table.joint((0, 1)), 0)
    assert np.allclose(table.joint((0, 3)), -1 - 2)  # of calls 1 and 2, which are held


def test_two_computed_calls_at_one_place_are_one_point_of_the_line() -> None:
    """Heun's calls 1 and 2 are at one noise level, as 3 and 4 are."""
    table = linear_table([0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0])
    assert np.allclose(table.joint((0, 1, 2)), 0)
    assert np.allclose(table.joint((0, 3, 4)), -1 - 1)  # of calls 1 and 2
    constant = ForecastTable(table.places, np.ones((8, 8, 1, 1)))
    for path in ((0,), (0, 1, 2), (0, 2, 3, 4), (0, 5, 6)):
        assert np.allclose(constant.joint(path), 0)


@pytest.mark.parametrize("count", range(1, 12))
def test_uniform_paths_are_even_after_the_first_and_keep_the_count(count: int) -> None:
    path = uniform_path(11, count)
    assert path[0] == 0
    assert len(path) <= count
    assert len({after - before for before, after in pairwise(path[1:])}) <= 1
    if count > 1:
        assert path[1] == 1


def test_levels_of_parts_need_what_the_model_has() -> None:
    model = model_of()
    with pytest.raises(UserError, match="no level 2"):
        sample(model, [1], steps=1, schedule="2|1/8")
    with pytest.raises(UserError, match="Layer 0 has no level 1/2"):
        sample(model, [1], steps=1, schedule="4|1/2")
    levels: list[Level] = ["softmax|full", "4|own"]
    assert torch.equal(sample(model, [1], steps=2, schedule="softmax|full"), sample(model, [1], steps=2, schedule=SOFTMAX))
    assert torch.equal(sample(model, [1], steps=2, schedule=levels[1]), sample(model, [1], steps=2, schedule=4))
    assert replace(SETTINGS, mlp_widths=()).mlp_levels == ()


@pytest.mark.parametrize("calls", cost.FORECAST_CALLS[:3])
def test_what_inspect_says_of_forecasts_is_what_a_sampler_costs(calls: int) -> None:
    model = tiny_model(channels=1, learn_sigma=False)
    sampler = Sampler.resolve(model.arch, steps=calls)
    for every, share in cost.forecast_shares(model.arch)[calls].items():
        schedule = schedule_of(model, sampler, [COMPUTED, *[RESTING] * (every - 1)])
        whole, spent = sampler.flops(model.arch, SOFTMAX, None), sampler.flops(model.arch, schedule, None)
        assert whole
        assert spent == pytest.approx(share * whole)


def test_a_schedules_map_shows_the_unconditional_half_where_it_differs(tmp_path: Path) -> None:
    whole, resting = (SOFTMAX,) * 3, (LINEAR,) * 3
    alike = CallSchedule((1.0, 0.6, 0.3), (Call(whole), Call(resting), Call(whole)))
    apart = CallSchedule((1.0, 0.6, 0.3), (Call(whole), Call(resting), Call(whole, ())))
    for name, schedule in (("alike", alike), ("apart", apart)):
        write_schedule_map(tmp_path / f"{name}.png", schedule, name)
    sizes = {}
    for name in ("alike", "apart"):
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes[name] = image.height
    assert sizes["apart"] > 1.4 * sizes["alike"]
