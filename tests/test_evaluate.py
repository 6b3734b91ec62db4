"""Evaluation: identities of its measures, parts that resume and divide, files that others read, a report in one file."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_two_processes, tiny_model
from PIL import Image
from torch import nn
from torch.nn import functional as F

import mediatorize as mz
from mediatorize import DiffusionTransformer, UserError, load_model
from mediatorize.diffusion.plan import Plan
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.sampling import Sampler, sample
from mediatorize.evaluation import comparison
from mediatorize.evaluation.comparison import InMemoryParts, Row, Samples, calls_of_sample_0, compare, draw, rows_of, shown_calls
from mediatorize.evaluation.features import as_bytes, as_images, digits_extractor
from mediatorize.evaluation.metrics import frechet_distance, precision_and_recall, statistics_of
from mediatorize.evaluation.results import Evaluation, Timing
from mediatorize.evaluation.timing import paired_time
from mediatorize.formats import bundle
from mediatorize.formats.images import class_names, to_pixels, write_grid
from mediatorize.formats.plans import write_plans
from mediatorize.model.block import SwitchableAttention
from mediatorize.model.cost import forward_flops
from mediatorize.model.levels import SOFTMAX, MediatorSettings, levels_per_layer
from mediatorize.model.schedule import RuleSchedule, Schedule, SwitchRule
from mediatorize.planning.fit import analytic
from mediatorize.planning.judge import Errors, relative_errors
from mediatorize.planning.search import Wanted
from mediatorize.report.document import Code, Document, Heading, Picture, Sides, Table, Text, markdown
from mediatorize.report.evaluation import facts, words
from mediatorize.report.html import html_page
from mediatorize.signatures import as_command
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.inspect import inspect

SETTINGS = MediatorSettings((1, 4), local_rank=4)
ALL_SOFTMAX = Schedule((0.5,), ((SOFTMAX,) * 3, (SOFTMAX,) * 3))
MIXED = Schedule((0.5,), ((SOFTMAX, 4, SOFTMAX), (1, 4, 1)))


def make_bundle(path: Path, schedule: Schedule | None = None, **changes: Any) -> Path:
    """A bundle of a tiny randomised model that makes 16x16 grey pictures of ten classes."""
    model = tiny_model(SETTINGS, **({"channels": 1, "grid": (8, 8), "learn_sigma": False} | changes))
    path.mkdir()
    source = bundle.Origin("teacher.pt", "official", sha256=bundle.hash_of_weights(model))
    bundle.write_bundle(path, model, bundle.BundleConfig(model.arch, SETTINGS, source), "card")
    bundle.append_log(path, "convert", {"levels": [1, 4]}, {"seconds": 1})
    if schedule is not None:
        bundle.write_json(path / "schedule.json", schedule.to_json())
    return path


def plans_for(model: DiffusionTransformer, *counts: int, **guidance: Any) -> dict[int, Plan]:
    """Plans with the weights of Adams and Bashforth, which need no fit."""
    arch = model.arch
    wanted = Wanted(process=process_of(arch).name, shape=(arch.channels, *arch.input_size), **guidance)
    made_for = {"weights": bundle.hash_of_weights(model), "reference": {"calls": 60}}
    plans = {count: analytic(wanted.plan(wanted.times(count, 1.0, 1.4)), wanted.shape) for count in counts}
    return {count: replace(plan, made_for=made_for) for count, plan in plans.items()}


def evaluated(path: Path, out: Path, **options: Any) -> Evaluation:
    """A small evaluation."""
    found = evaluate(str(path), out, **({"samples": 10, "steps": 3, "batch": 4, "features": "none", "pairs": 0, "device": "cpu"} | options))
    assert isinstance(found, Evaluation)
    return found


def judged(path: Path, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Its results by row."""
    return {row["level"]: row for row in facts(evaluated(path, out, **options))["results"]}


def stored(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every part on disk."""
    parts = {}
    for file in sorted(folder.rglob("*.npz")):
        with np.load(file) as arrays:
            parts[str(file.relative_to(folder))] = dict(arrays)
    return parts


def assert_same_parts(first: Path, second: Path) -> None:
    one, two = stored(first), stored(second)
    assert one.keys() == two.keys()
    assert one
    for name, arrays in one.items():
        for key, values in arrays.items():
            assert np.array_equal(values, two[name][key]), (name, key)


# --- measures ------------------------------------------------------------------------------------------------------------------


def test_a_set_is_no_distance_from_itself_and_wholly_among_itself() -> None:
    features = np.random.default_rng(0).normal(size=(60, 5))
    assert frechet_distance(features, features.copy()) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(statistics_of(features), features) == pytest.approx(0, abs=1e-9)
    assert precision_and_recall(features, features.copy()) == (1, 1)


def test_frechet_distance_of_shifted_and_scaled_sets_is_known() -> None:
    features = np.random.default_rng(0).normal(size=(400, 3))
    assert frechet_distance(features, features + np.array([3, 0, 4])) == pytest.approx(25)
    gap = (2 - 1) ** 2 * np.trace(np.cov(features, rowvar=False)) + np.square(features.mean(0)).sum()
    assert frechet_distance(features, 2 * features) == pytest.approx(gap)


def test_precision_and_recall_count_points_within_the_other_sets_reach() -> None:
    reference = np.random.default_rng(1).normal(size=(50, 2))
    far = reference + 100
    assert precision_and_recall(reference, far) == (0, 0)
    assert precision_and_recall(reference, np.concatenate([reference, far])) == (0.5, 1)
    line = np.arange(4.0)[:, None]  # radii to the nearest neighbour are 1
    assert precision_and_recall(line, np.array([[0.5], [4.5], [3.9], [9.0]]), neighbours=1) == (0.5, 1)


def test_paired_time_of_a_call_twice_as_long_is_two() -> None:
    clock = {"now": 0.0}

    def takes(seconds: float) -> Callable[[], None]:
        def call() -> None:
            clock["now"] += seconds

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock["now"])
        found = paired_time(takes(2), takes(1), 4, torch.device("cpu"))
    assert (found.ratio, found.quartiles, found.reference_seconds) == (2, (2, 2), 1)
    with pytest.raises(ValueError, match="two pairs"):
        paired_time(takes(2), takes(1), 1, torch.device("cpu"))


def test_bytes_are_pictures_and_back() -> None:
    every_byte = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
    assert np.array_equal(as_bytes(as_images(every_byte)), every_byte)
    images = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(as_bytes(images), to_pixels(images))


# --- the comparison, in memory -------------------------------------------------------------------------------------------------


def test_a_comparison_in_a_notebook_is_what_the_stage_writes(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b", MIXED)
    written = judged(path, tmp_path / "out", features="digits", cfg_scale=2.0, solver="heun")
    model = load_model(path)
    sampler = Sampler.resolve(model.arch, solver="heun", steps=3, cfg_scale=2.0)
    samples = Samples(rows=rows_of(model, sampler), labels=torch.arange(10), batch=4)
    found = compare(model, samples, sampler, extractor=digits_extractor())
    assert [asdict(row) for row in found.results] == list(written.values())
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert json.loads(json.dumps([asdict(row) for row in found.results])) == content["results"]
    assert (found.features, found.reference) == (content["features"], content["reference"]) == ("the digits classifier", "the real digits")
    assert found.distance_of_halves == content["distance_of_halves"] > 0
    on_disk = stored(tmp_path / "out" / "samples")
    assert isinstance(samples.parts, InMemoryParts)
    assert {f"{name}.npz" for name in samples.parts.parts} == on_disk.keys()
    for name, arrays in samples.parts.parts.items():
        assert arrays.keys() == on_disk[f"{name}.npz"].keys()
        assert all(np.array_equal(values, on_disk[f"{name}.npz"][key]) for key, values in arrays.items())


def test_rows_are_the_teacher_schedules_and_levels_from_the_dearest() -> None:
    model, sampler = tiny_model(MediatorSettings((1, 4, 16))), Sampler.resolve(tiny_model().arch, steps=3)
    assert [(row.name, row.kind) for row in rows_of(model, sampler)] == [(name, "level") for name in (SOFTMAX, "16", "4", "1")]
    model.schedule = MIXED
    rows = rows_of(model, sampler, [1, 16, SOFTMAX, 16], {"other": ALL_SOFTMAX})
    assert [row.name for row in rows] == [SOFTMAX, "schedule", "other", "16", "1"]  # softmax is the teacher: once
    assert [row.levels for row in rows[1:3]] == [MIXED, ALL_SOFTMAX]
    assert [row.name for row in rows_of(model, sampler, [], {"0.5": MIXED, "other": ALL_SOFTMAX})] == [SOFTMAX, "0.5", "other"]
    with pytest.raises(UserError, match="no level 9"):
        rows_of(model, sampler, [9])
    assert [row.name for row in rows_of(tiny_model(), sampler)] == [SOFTMAX]


SOLVERS_OF_CALLS = {"sit": ["euler", "unipc"], "dit": ["ddim", "dpm-solver++"]}
"""Deterministic solvers of one call a step."""


@pytest.mark.parametrize("family", SOLVERS_OF_CALLS)
def test_plans_stand_after_the_converged_teacher_beside_solvers_of_as_many_calls(family: str) -> None:
    model = tiny_model(SETTINGS, family=family)
    model.schedule = MIXED
    sampler = Sampler.resolve(model.arch, steps=9, seed=5, cfg_scale=2.0)
    rows = rows_of(model, sampler, [4], {"other": ALL_SOFTMAX}, plans_for(model, 3, 4, cfg_scale=2.0))
    planned = [
        (name, kind)
        for calls in (4, 3)
        for name, kind in ((f"plan of {calls} calls", "plan"), *((f"{s}, {calls} calls", "solver") for s in SOLVERS_OF_CALLS[family]))
    ]
    assert [(row.name, row.kind) for row in rows] == [
        (SOFTMAX, "level"),
        ("converged teacher", "converged"),
        *planned,
        ("schedule", "schedule"),
        ("other", "schedule"),
        ("4", "level"),
    ]
    for row in rows:
        if row.sampler is not None:
            assert row.sampler == replace(sampler, solver=row.name.partition(",")[0], steps=int(row.name.split()[-2]))
    assert len({row.key for row in rows}) == len({row.file_name for row in rows}) == len(rows)
    with pytest.raises(UserError, match="for 1 channels"):
        rows_of(model, sampler, plans=plans_for(tiny_model(family=family, channels=1), 3))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("guidance", [{}, {"cfg_scale": 2.0, "cfg_interval": (0.3, 0.8)}], ids=["unguided", "guided"])
@pytest.mark.parametrize("family", SOLVERS_OF_CALLS)
def test_plans_are_judged_by_the_converged_teacher_and_count_the_rows_that_they_call(family: str, guidance: dict[str, Any]) -> None:
    model = tiny_model(family=family, learn_sigma=False, channels=1)
    plans = plans_for(model, 3, 4, **guidance)
    sampler = Sampler.resolve(model.arch, steps=9, seed=5, **guidance)
    samples = Samples(rows=rows_of(model, sampler, plans=plans), labels=torch.arange(6), batch=6)
    rows_seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: rows_seen.append(len(inputs[0])))
    seen: dict[str, tuple[int, int]] = {}
    for row in samples.rows:
        draw(model, replace(samples, rows=[samples.rows[0], row]), sampler)
        if row is not samples.rows[0]:
            seen[row.name] = len(rows_seen), sum(rows_seen)
        rows_seen.clear()
    hook.remove()
    found = {result.level: result for result in compare(model, samples, sampler).results}
    parts = {row.name: torch.from_numpy(next(samples.read(row, "samples"))) for row in samples.rows}
    goal = parts["converged teacher"]
    for name, result in found.items():
        if name != SOFTMAX:  # which was drawn first
            calls, rows = seen[name]
            assert result.calls == calls, name
            assert result.flops == rows / 6 * forward_flops(model.arch), name
            assert result.trajectory_error is None and result.errors_by_call == ()
        errors = Errors.summed(relative_errors(parts[name], goal))
        assert result.converged is not None and result.converged.interval is not None
        assert replace(result.converged, interval=None) == errors
    exact = found["converged teacher"]
    assert exact.converged is not None
    assert (exact.converged.median, exact.converged.mean, exact.converged.interval) == (0, 0, (0, 0))
    assert exact.calls == 60 + (family == "dit")  # a DiT's last call is not at the data themselves
    for count, plan in plans.items():
        assert torch.equal(parts[f"plan of {count} calls"], mz.sample(model, torch.arange(6), plan=plan, seed=5))
        assert found[f"plan of {count} calls"].calls == count
        if not guidance:
            assert found[f"plan of {count} calls"].relative_flops == count / 9
        for solver in SOLVERS_OF_CALLS[family]:
            assert torch.equal(
                parts[f"{solver}, {count} calls"], sample(model, torch.arange(6), solver=solver, steps=count, seed=5, **guidance)
            )


def test_what_has_no_fixed_cost_is_not_drawn() -> None:
    model, parts = tiny_model(SETTINGS), InMemoryParts()
    samples = Samples(rows=rows_of(model, Sampler.resolve(model.arch)), labels=torch.arange(4), parts=parts)
    with pytest.raises(UserError, match="dopri5 has no fixed cost"):
        compare(model, samples, Sampler.resolve(model.arch, solver="dopri5"))
    assert not parts.parts


def test_a_schedules_time_is_the_mean_over_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose layers take as many seconds as they have mediators, or nine at softmax, per sample."""
    model, clock = tiny_model(SETTINGS), {"now": 0.0}
    model.schedule = MIXED
    real = DiffusionTransformer.forward

    def slow(self: DiffusionTransformer, x: torch.Tensor, t: Any, y: Any, levels: Any = SOFTMAX) -> torch.Tensor:
        if len(x) == 6:  # a timed call: three samples and their unconditional halves
            assert torch.equal(process_of(self.arch).noise_level(t), torch.full((6,), 0.5))
        per_layer = levels_per_layer(levels, self.arch.depth, self.settings)
        clock["now"] += len(x) * sum(9 if level == SOFTMAX else int(level) for level in per_layer)
        return real(self, x, t, y, levels)

    monkeypatch.setattr(DiffusionTransformer, "forward", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    sampler = Sampler.resolve(model.arch, steps=3, cfg_scale=2.0)
    samples = Samples(rows=rows_of(model, sampler), labels=torch.arange(10), batch=10)
    found = compare(model, samples, sampler, pairs=2, timing_batch=3)
    noisy, clear = (1 + 4 + 1) / 27, (9 + 4 + 9) / 27  # seconds of MIXED's two pieces beside softmax's
    shares = [1, (2 * noisy + clear) / 3, 12 / 27, 3 / 27]  # euler's three calls are at noise levels 1, 2/3 and 1/3
    assert [row.relative_time for row in found.results] == pytest.approx(shares)
    assert [row.latency_ms for row in found.results] == pytest.approx([1000 * 6 * 27 * share for share in shares])  # guidance: 6 rows
    assert [row.images_per_second for row in found.results] == pytest.approx([3 / (3 * 6 * 27 * share) for share in shares])
    assert found.timing == Timing(pairs=2, batch=3, softmax_ms=1000 * 6 * 27, control=1, control_quartiles=(1, 1))


def attention_alone_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many seconds per row as it has mediators, or nine at softmax."""
    clock, real = {"now": 0.0}, SwitchableAttention.forward

    def slow(self: SwitchableAttention, x: torch.Tensor, level: Any = SOFTMAX) -> torch.Tensor:
        clock["now"] += len(x) * (9 if level == SOFTMAX else int(level))
        return real(self, x, level)

    monkeypatch.setattr(SwitchableAttention, "forward", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])


def test_unguided_calls_are_timed_with_half_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose attention takes as many seconds per row as it has mediators, or nine at softmax."""
    model = tiny_model(SETTINGS)
    attention_alone_takes_time(monkeypatch)
    model.schedule = Schedule((0.5,), ((SOFTMAX,) * 3, (1,) * 3))
    sampler = Sampler.resolve(model.arch, steps=3, cfg_scale=2.0, cfg_interval=(0.5, 0.9))  # of noise levels 1, 2/3, 1/3: one guided
    samples = Samples(rows=rows_of(model, sampler, [4]), labels=torch.arange(4), batch=4)
    found = compare(model, samples, sampler, pairs=2, timing_batch=3)
    teacher = 3 * (27 + 54 + 27) / 3  # seconds of its mean call
    shares = [1, (3 + 2 * 3 + 27) / 108, 4 / 9]  # euler's calls go from noise to data
    assert [row.relative_time for row in found.results] == pytest.approx(shares)
    assert [row.latency_ms for row in found.results] == pytest.approx([1000 * teacher * share for share in shares])


def test_calls_that_rest_on_others_are_timed_as_a_whole_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mediators whose rest is held run beside softmax attention too."""
    model = tiny_model(SETTINGS)
    model.schedule = Schedule((0.5,), (("hold+1|full", "hold+4|full", SOFTMAX), (SOFTMAX,) * 3))
    attention_alone_takes_time(monkeypatch)
    sampler = Sampler.resolve(model.arch, steps=3, cfg_scale=2.0)
    samples = Samples(rows=rows_of(model, sampler, []), labels=torch.arange(4), batch=4)
    found = compare(model, samples, sampler, pairs=2, timing_batch=3)
    seconds = 27 + (27 + 1 + 4) + (1 + 4 + 9)  # of euler's three calls, per row
    assert [row.relative_time for row in found.results] == pytest.approx([1, seconds / (3 * 27)])
    assert [row.images_per_second for row in found.results] == pytest.approx([3 / (6 * each) for each in (3 * 27, seconds)])


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("family", SOLVERS_OF_CALLS)
def test_plans_and_solvers_are_timed_over_all_their_calls(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By attention alone, times are rows: of plans, of solvers, and of the converged teacher, guided or not."""
    model, guidance = tiny_model(family=family), {"cfg_scale": 2.0, "cfg_interval": (0.3, 0.8)}
    attention_alone_takes_time(monkeypatch)
    sampler = Sampler.resolve(model.arch, steps=6, **guidance)
    samples = Samples(rows=rows_of(model, sampler, plans=plans_for(model, 4, **guidance)), labels=torch.arange(4), batch=4)
    found = compare(model, samples, sampler, pairs=2, timing_batch=3)
    assert {row.kind for row in found.results} == {"level", "converged", "plan", "solver"}
    for row in found.results:
        assert row.relative_time == pytest.approx(row.relative_flops)
        seconds = row.flops / forward_flops(model.arch) * 27  # of a sample
        assert row.images_per_second == pytest.approx(1 / seconds)
        assert row.latency_ms == pytest.approx(1000 * 3 * seconds / row.calls)


# --- the stage -----------------------------------------------------------------------------------------------------------------


def test_a_schedule_of_softmax_is_the_teacher(tmp_path: Path) -> None:
    results = judged(make_bundle(tmp_path / "b", ALL_SOFTMAX), tmp_path / "out", pairs=2, timing_batch=2)
    assert list(results) == [SOFTMAX, "schedule", "4", "1"]
    same = results["schedule"]
    assert same["trajectory_error"] == same["sample_error"] == 0
    assert same["relative_flops"] == same["relative_time"] == 1
    assert results["1"]["sample_error"] > 0
    assert results["1"]["relative_time"] > 0
    assert results["1"]["peak_bytes"] is None


def test_errors_are_those_of_the_samplers_states(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b", MIXED)
    results = judged(path, tmp_path / "out", cfg_scale=2.0)
    model, labels = load_model(path), torch.arange(10)
    ends: dict[Any, torch.Tensor] = {}
    seen: dict[Any, list[torch.Tensor]] = {}
    for name, level in {SOFTMAX: SOFTMAX, "schedule": None, "4": 4, "1": 1}.items():
        states: list[torch.Tensor] = []
        ends[name] = sample(
            model, labels, steps=3, cfg_scale=2.0, schedule=level, observe=lambda x, t, y, to=states: to.append(x[: len(labels)])
        )
        seen[name] = states
    for name, row in results.items():
        errors = [float((x - base).norm() / base.norm()) for x, base in zip(seen[name], seen[SOFTMAX], strict=True)]
        assert row["errors_by_call"] == pytest.approx(errors, abs=1e-5)
        assert row["trajectory_error"] == pytest.approx(sum(errors) / 3, abs=1e-5)
        assert row["sample_error"] == pytest.approx(float((ends[name] - ends[SOFTMAX]).norm() / ends[SOFTMAX].norm()), abs=1e-5)
    assert results["schedule"]["sample_error"] > 0


def test_other_schedules_are_judged_by_the_name_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_bundle(tmp_path / "b", MIXED)
    (tmp_path / "mine.json").write_text(json.dumps(MIXED.to_json()))
    results = judged(path, tmp_path / "out", schedule=(tmp_path / "mine.json",), levels=())
    assert list(results) == [SOFTMAX, "mine"]  # which is the bundle's own
    assert {**results["mine"], "level": ""} == {**judged(path, tmp_path / "own", levels=())["schedule"], "level": ""}
    monkeypatch.chdir(tmp_path)
    Path("of").mkdir()
    taken = [Path("of", f"{name}.json") for name in ("4", SOFTMAX, "schedule", "mine")]  # a level, the bundle's own, another file's
    for file in (Path("mine.json"), *taken):
        file.write_text(json.dumps(ALL_SOFTMAX.to_json()))
    results = judged(path, tmp_path / "taken", schedule=(Path("mine.json"), *taken), levels=(4,))
    assert list(results) == [SOFTMAX, "schedule", "mine", *map(str, taken), "4"]
    assert [row["kind"] for row in results.values()] == ["level", *["schedule"] * 6, "level"]
    (tmp_path / "short.json").write_text(json.dumps(Schedule((), ((1, 4),)).to_json()))
    with pytest.raises(UserError, match=r"short\.json: is for 2 layers, the model has 3"):
        judged(path, tmp_path / "other", schedule=(tmp_path / "short.json",))
    with pytest.raises(UserError, match="no such schedule"):
        judged(path, tmp_path / "other", schedule=(tmp_path / "none.json",))
    assert not (tmp_path / "other").exists()


def test_a_killed_evaluation_goes_on_to_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_bundle(tmp_path / "b", MIXED)
    unbroken = judged(path, tmp_path / "unbroken")
    real, drawn = comparison.sample_part, []

    def dies(*arguments: Any) -> torch.Tensor:
        drawn.append(arguments)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(comparison, "sample_part", dies)
    with pytest.raises(KeyboardInterrupt):
        judged(path, tmp_path / "broken")
    assert len(stored(tmp_path / "broken" / "samples")) == 6
    assert not (tmp_path / "broken" / "evaluation.json").exists()
    assert judged(path, tmp_path / "broken") == unbroken
    assert len(drawn) == 7 + 1 + 2 + 4  # the teacher of the broken part again, what it lacked, and the last part
    assert_same_parts(tmp_path / "unbroken" / "samples", tmp_path / "broken" / "samples")


def test_samples_are_kept_for_the_next_judgement_and_another_plan_needs_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = make_bundle(tmp_path / "b"), tmp_path / "out"
    first = judged(path, out)
    with pytest.raises(UserError, match="has an evaluation"):
        judged(path, out)
    (out / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"samples of another plan \(sampling\)"):
        judged(path, out, seed=1)
    assert judged(path, out, seed=1, force=True)["4"]["sample_error"] != first["4"]["sample_error"]
    monkeypatch.setattr("mediatorize.evaluation.comparison.sample_part", None)  # nothing is to be drawn
    assert judged(path, out, seed=1, features="digits", force=True)["4"]["accuracy"] is not None
    damaged = next((out / "samples" / "4").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"not whole.*Delete it"):
        judged(path, out, seed=1, force=True)


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    (tmp_path / "out" / "samples").mkdir(parents=True)
    (tmp_path / "out" / "samples" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"samples: holds files that are not mediatorize's work"):
        judged(path, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "samples" / "mine.txt").read_text() == "mine"


def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b", MIXED)
    alone = judged(path, tmp_path / "alone")
    options: dict[str, Any] = {"samples": 10, "steps": 3, "batch": 4, "features": "none", "pairs": 0, "device": "cpu"}
    printed = in_two_processes("evaluate", path, tmp_path / "two", **options)
    assert printed.count("Wrote report.html") == 1
    together = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert together["sampling"]["processes"] == 2
    assert together["results"] == json.loads(json.dumps(list(alone.values())))
    assert_same_parts(tmp_path / "alone" / "samples", tmp_path / "two" / "samples")


PLANNED = [
    SOFTMAX,
    "converged teacher",
    "plan of 4 calls",
    "euler, 4 calls",
    "unipc, 4 calls",
    "plan of 3 calls",
    "euler, 3 calls",
    "unipc, 3 calls",
]


def test_a_bundles_plans_are_judged_without_flags_and_bring_their_guidance(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    plans = plans_for(load_model(path), 3, 4, cfg_scale=2.0)
    write_plans(path / "plan.json", plans)
    bundle.append_log(path, "calibrate", {"calls": [3, 4], "cfg_scale": 2.0}, {"plans": [], "schedules": []})
    found = evaluated(path, tmp_path / "out", steps=None, levels=(4,), npz=True)
    results = {row.level: row for row in found.results}
    assert list(results) == [*PLANNED, "4"]
    assert (found.sampler.cfg_scale, found.sampler.steps) == (2.0, 50)
    for count, plan in plans.items():
        row = results[f"plan of {count} calls"]
        assert row.relative_flops == count / 50
        kept = np.concatenate(
            [part["samples"] for name, part in stored(tmp_path / "out" / "samples").items() if name.startswith(row_key(plan))]
        )
        expected = mz.sample(load_model(path), torch.arange(10), plan=plan)
        torch.testing.assert_close(torch.from_numpy(kept), expected, rtol=1e-4, atol=1e-4)
        with np.load(tmp_path / "out" / f"plan-of-{count}-calls.npz") as arrays:
            assert np.abs(arrays["arr_0"][..., :1].astype(int) - to_pixels(expected).astype(int)).max() <= 1
    told, text = words(found), (tmp_path / "out" / "report.md").read_text()
    for count in (3, 4):
        row, others = results[f"plan of {count} calls"], [results[f"{name}, {count} calls"] for name in ("euler", "unipc")]
        best = min(others, key=lambda other: other.converged.median)
        lead = f"teacher is {row.converged.median:.4f}; the best other solver of the tool has {best.converged.median:.4f} ({best.level})"
        assert lead in told and lead in text
        assert f"takes {count / 50:.1%} of the FLOPs of 50 calls" in told
    assert "error-calls.png" in found.pictures
    facts_of = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert [row["converged"] for row in facts_of] == [json.loads(json.dumps(asdict(row)))["converged"] for row in found.results]
    picked = judged(path, tmp_path / "picked", calls=(3,), levels=())
    assert list(picked) == [SOFTMAX, "converged teacher", *PLANNED[5:]]
    elsewhere = tmp_path / "elsewhere.json"
    (path / "plan.json").rename(elsewhere)
    assert list(judged(path, tmp_path / "none", levels=())) == [SOFTMAX]
    assert judged(path, tmp_path / "named", plan=elsewhere, calls=(3,), levels=()) == picked


def row_key(plan: Plan) -> str:
    return Row("", plan=plan).key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": 4.0}, r"plan\.json: The plan's cfg-scale is 2, not 4\..*--cfg-scale 4"),
        ({"cfg_interval": (0.0, 0.5)}, "cfg-interval is 0,1, not 0,0.5"),
        ({"timestep_shift": 0.3}, "timestep-shift is 1, not 0.3"),
        ({"calls": (5,)}, "no plan of 5 calls; there are plans of 3, 4"),
        ({"plan": Path("nowhere.json")}, r"nowhere\.json: cannot be read"),
    ],
)
def test_plans_that_cannot_be_judged_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    write_plans(path / "plan.json", plans_for(load_model(path), 3, 4, cfg_scale=2.0))
    with pytest.raises(UserError, match=message):
        judged(path, tmp_path / "out", **{"plan": path / "plan.json"} | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"cfg_scale": 4.0}, {"cfg_scale": 2.0, "timestep_shift": 0.3}])
def test_a_bundles_plans_for_other_guidance_are_left_out_and_that_is_told(options: dict[str, Any], tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    write_plans(path / "plan.json", plans_for(load_model(path), 3, cfg_scale=2.0))
    found = judged(path, tmp_path / "out", levels=(), **options)
    assert list(found) == [SOFTMAX]
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())["notes"]
    assert any(note.startswith("the bundle's plans are left out: The plan's") for note in told)


def test_plans_of_other_weights_or_of_several_guidances_are_refused(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    model, other = load_model(path), tiny_model(channels=1, grid=(8, 8), learn_sigma=False, seed=1)
    with pytest.raises(UserError, match=r"has no plan\. Run `mediatorize calibrate`"):
        judged(path, tmp_path / "out", calls=(3,))
    write_plans(path / "plan.json", plans_for(other, 3))
    with pytest.raises(UserError, match="fitted to other weights"):
        judged(path, tmp_path / "out", plan=path / "plan.json")
    write_plans(path / "plan.json", {**plans_for(model, 3), **plans_for(model, 4, cfg_scale=2.0)})
    with pytest.raises(UserError, match="for different guidance"):
        judged(path, tmp_path / "out", plan=path / "plan.json")
    assert not (tmp_path / "out").exists()
    assert "plan of 4 calls" in judged(path, tmp_path / "out", calls=(4,))


def test_a_finished_evaluation_of_plans_draws_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_bundle(tmp_path / "b")
    write_plans(path / "plan.json", plans_for(load_model(path), 3, 4))
    first = judged(path, tmp_path / "out", levels=())
    assert list(first) == PLANNED
    parts = stored(tmp_path / "out" / "samples")
    assert len(parts) == len(PLANNED) * 3  # of ten samples, four at a time
    next((tmp_path / "out" / "samples").glob("plan-*/*")).unlink()
    real, drawn = comparison.sample_by_plan, []

    def again(*arguments: Any) -> torch.Tensor:
        drawn.append(len(arguments[1]))
        return real(*arguments)

    monkeypatch.setattr(comparison, "sample_by_plan", again)
    monkeypatch.setattr(comparison, "sample_part", None)
    monkeypatch.setattr(comparison, "converged", None)
    assert judged(path, tmp_path / "out", levels=(), force=True) == first
    assert len(drawn) == 1
    after = stored(tmp_path / "out" / "samples")
    assert after.keys() == parts.keys()
    assert all(np.array_equal(values, parts[name][key]) for name, arrays in after.items() for key, values in arrays.items())


def test_two_processes_draw_plans_as_one_does(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    write_plans(path / "plan.json", plans_for(load_model(path), 3, cfg_scale=2.0))
    alone = judged(path, tmp_path / "alone", levels=())
    options: dict[str, Any] = {"samples": 10, "steps": 3, "batch": 4, "features": "none", "pairs": 0, "device": "cpu"}
    in_two_processes("evaluate", path, tmp_path / "two", **options, levels=SOFTMAX)
    together = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert together["results"] == json.loads(json.dumps(list(alone.values())))
    assert_same_parts(tmp_path / "alone" / "samples", tmp_path / "two" / "samples")


# --- judges --------------------------------------------------------------------------------------------------------------------


def test_arrays_for_the_adm_evaluator_hold_the_samples(tmp_path: Path) -> None:
    path, out = make_bundle(tmp_path / "b", MIXED), tmp_path / "out"
    judged(path, out, npz=True)
    model = load_model(path)
    for name, level in {"teacher": SOFTMAX, "schedule": None, "level-4": 4, "level-1": 1}.items():
        with np.load(out / f"{name}.npz", allow_pickle=False) as arrays:
            pictures = arrays["arr_0"]
        expected = to_pixels(sample(model, torch.arange(10), steps=3, schedule=level)).repeat(3, -1)
        assert pictures.shape == (10, 16, 16, 3)
        assert pictures.dtype == np.uint8
        assert np.abs(pictures.astype(int) - expected.astype(int)).max() <= 1


class Corner(nn.Module):
    """Features: the mean of each quarter; scores: none or ten, the highest at the class that brightness says."""

    def __init__(self, scores: bool) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, images: torch.Tensor) -> Any:
        features = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)
        return (features, features.sum(1, keepdim=True).expand(-1, 10) * 0 + torch.arange(10)) if self.scores else features


def export(path: Path, module: nn.Module, dynamic: bool = True) -> Path:
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=1024)}} if dynamic else None
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(2, 1, 16, 16),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.filterwarnings("ignore")  # of torch.export's own
def test_any_exported_program_judges(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    plain, scoring = export(tmp_path / "plain.pt2", Corner(False)), export(tmp_path / "scores.pt2", Corner(True))
    results = judged(path, tmp_path / "out", features=str(plain), npz=True)
    assert results[SOFTMAX]["frechet_distance"] == pytest.approx(0, abs=1e-9)  # no reference: the teacher's own samples
    assert results[SOFTMAX]["precision"] == results[SOFTMAX]["recall"] == 1
    assert results["1"]["frechet_distance"] > 0
    assert results["1"]["accuracy"] is None

    pictures = np.load(tmp_path / "out" / "level-1.npz")["arr_0"]
    features = Corner(False)(torch.from_numpy(pictures[..., :1]).permute(0, 3, 1, 2).float() / 127.5 - 1).double().numpy()
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    by_statistics = judged(path, tmp_path / "s", features=str(scoring), reference=stats)
    assert by_statistics["1"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert by_statistics["1"]["precision"] is None
    assert by_statistics["1"]["accuracy"] == 0.1  # the last class of ten always wins
    np.savez(tmp_path / "pictures.npz", arr_0=pictures[..., :1])
    by_pictures = judged(path, tmp_path / "p", features=str(plain), reference=tmp_path / "pictures.npz")
    assert by_pictures["1"]["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert by_pictures["1"]["precision"] == by_pictures["1"]["recall"] == 1
    assert by_pictures[SOFTMAX]["frechet_distance"] == pytest.approx(results["1"]["frechet_distance"], rel=1e-6)

    np.savez(stats, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match="of 7 features, samples have 4"):
        judged(path, tmp_path / "x", features=str(plain), reference=stats)
    fixed = export(tmp_path / "fixed.pt2", Corner(False), dynamic=False)
    with pytest.raises(UserError, match="dynamic batch"):
        judged(path, tmp_path / "x", features=str(fixed), force=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "nowhere.pt2"}, "no such file"),
        ({"features": __file__}, "not a program of torch.export"),
        ({"inception_weights": Path("nowhere.pth")}, "Nothing is downloaded"),
        ({"reference": Path(__file__)}, "of no use with --features none"),
        ({"features": "digits", "reference": Path(__file__)}, r"not a \.npz"),
        ({"vae": Path("vae")}, "no VAE decodes"),
        ({"samples": 1}, "--samples 1 is too small"),
        ({"pairs": 1}, "--pairs 1 is too small"),
        ({"levels": (3,)}, "no level 3"),
        ({"solver": "dopri5"}, "takes as many steps as it needs; a comparison needs a fixed number"),
        ({"steps": 0}, "0 steps cannot be taken"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_drawn(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    with pytest.raises(UserError, match=message):
        judged(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_latents_are_judged_through_a_vae(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    path = make_bundle(tmp_path / "b", channels=4, grid=(4, 4))
    with pytest.raises(UserError, match=r"makes latents.*Pass --vae"):
        judged(path, tmp_path / "out", npz=True)
    assert judged(path, tmp_path / "none")["4"]["sample_error"] > 0
    assert not (tmp_path / "none" / "comparison.png").exists()
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    judged(path, tmp_path / "out", vae=tmp_path / "vae", npz=True)
    with torch.no_grad():
        expected = to_pixels(vae.decode(sample(load_model(path), torch.arange(10), steps=3, schedule=4) / 0.18215).sample)
    found = np.load(tmp_path / "out" / "level-4.npz")["arr_0"]
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert (tmp_path / "out" / "comparison.png").exists()


def test_fids_inception_is_torchvisions_but_for_its_pools(tmp_path: Path) -> None:
    from torchvision.models import inception_v3

    from mediatorize.evaluation.inception import load_inception

    torch.manual_seed(0)
    theirs = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False, transform_input=False).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1)
    state = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    file = tmp_path / "pt_inception.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    ours = load_inception(file)
    x = torch.randn(1, 192, 9, 9)
    with torch.no_grad():
        pooled = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) * 9 / F.avg_pool2d(F.pad(torch.ones_like(x), (1, 1, 1, 1)), 3, 1) / 9
        block = theirs.Mixed_5b
        others = block(x)[:, :-32]
        torch.testing.assert_close(ours.Mixed_5b(x), torch.cat([others, block.branch_pool(pooled)], 1))
        torch.testing.assert_close(ours.Mixed_5b(x)[..., 1:-1, 1:-1], block(x)[..., 1:-1, 1:-1])  # nothing padded: the same
        last, y = theirs.Mixed_7c, torch.randn(1, 2048, 5, 5)
        expected = torch.cat([last(y)[:, :-192], last.branch_pool(F.max_pool2d(y, 3, 1, 1))], 1)
        torch.testing.assert_close(ours.Mixed_7c(y), expected)
        assert ours(torch.rand(1, 3, 32, 32) * 2 - 1).shape == (1, 2048)
    state["fc.weight"] = state["fc.weight"][:1000]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"fc\.weight is \(1000, 2048\) where FID's Inception has \(1008, 2048\)"):
        load_inception(file)
    with pytest.raises(UserError, match="no weights that can be read"):
        load_inception(Path(__file__))


# --- the report ----------------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_with_every_picture_in_it(tmp_path: Path) -> None:
    path, out = make_bundle(tmp_path / "b", MIXED), tmp_path / "out"
    found = evaluated(path, out, features="digits", samples=70, pairs=2, timing_batch=2)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    content = json.loads((out / "evaluation.json").read_text())
    assert content == json.loads(json.dumps(facts(found)))
    sheets = {f"pictures-{name}.png" for name in ("level-softmax", "schedule", "level-4", "level-1")}
    assert set(content["pictures"]) == {"comparison.png", "error-cost.png", "trajectory.png", "schedule.png", *sheets}
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert sorted(embedded) == sorted((out / name).read_bytes() for name in content["pictures"])
    assert page.count("<img") == len(embedded)
    without_pictures = re.sub(r"base64,[^\"]+", "", page)  # whose bytes may spell anything
    for outside in ("http", "<link", "<script", "@import", "url("):
        assert outside not in without_pictures
    assert 'name="viewport"' in page
    assert page.count('<input type="range"') == 1
    labels = re.findall(r'">\n([^<>"]+)</label>', page)
    assert labels == [row.title for row in found.results[1:]]
    with Image.open(out / "pictures-schedule.png") as picture:
        assert picture.size == (10 * 66 + 2, 2 * (66 + 15) + 2)  # twenty pictures with a line of text each
    assert f"{found.pictures['schedule.png']}</figcaption>" in page
    for name in content["pictures"]:
        assert f"]({name})" in text
    told = words(found)
    for row in found.results:
        assert f"<td>{row.frechet_distance:.2f}</td>" in page
        assert f"| {row.relative_flops:.1%} |" in text
        (line,) = (line for line in told.splitlines() if line.split()[0:1] == [row.title])
        _, calls, _, *shares = line.split()
        assert calls == str(row.calls) == "3"
        assert shares[:2] == [f"{row.relative_flops:.1%}", f"{row.relative_time:.1%}"]
    assert told.endswith(f"Wrote report.html, report.md, evaluation.json, {', '.join(content['pictures'])} in {out}.")
    for fact in (content["command"], content["source"]["sha256"], content["versions"]["torch"], content["hardware"]["processor"]):
        assert fact in page
    assert f"evaluate {path} {out} --samples 70" in content["command"]
    assert content["log"][0]["command"] == "convert"
    assert "At its calibrated schedule" in page
    assert "| m=4 | " in text
    assert "Frechet distances of 70 samples" not in text


def test_the_first_part_keeps_the_states_of_the_first_sample() -> None:
    model = tiny_model(SETTINGS, channels=1, learn_sigma=False)
    model.schedule = MIXED
    sampler = Sampler.resolve(model.arch, steps=27)
    samples = Samples(rows=rows_of(model, sampler), labels=torch.arange(6), batch=4)
    compare(model, samples, sampler)
    assert shown_calls(27) == [*range(0, 27, 2)]
    for row in samples.rows:
        seen: list[torch.Tensor] = []
        end = sample(model, torch.arange(4), steps=27, schedule=row.levels, observe=lambda x, t, y, to=seen: to.append(x[0].clone()))
        after = torch.stack([*seen[1:], end[0]])[::2]
        kept = samples.parts.read(samples.name(row, 0), "states")
        torch.testing.assert_close(torch.from_numpy(kept), after, rtol=1e-4, atol=1e-4)
        assert np.array_equal(samples.states(row), as_bytes(torch.from_numpy(kept)))
        assert "states" not in samples.parts.parts[samples.name(row, 4)]
    assert [shown_calls(count) for count in (1, 3, 25)] == [[0], [0, 1, 2], [*range(25)]]
    assert all(len(shown_calls(count)) <= 25 and shown_calls(count)[-1] == count - 1 for count in range(1, 300))


def test_the_calls_of_the_first_sample_are_those_that_ran() -> None:
    model, sampler = tiny_model(SETTINGS, channels=1, learn_sigma=False), Sampler.resolve(tiny_model().arch, steps=8, cfg_scale=2.0)
    rule = SwitchRule(levels=(1, SOFTMAX), ratios=(2.0,), first=3, per="sample")  # a ratio that the first check finds
    schedules = {"mixed": MIXED, "rule": RuleSchedule(rule, MIXED)}
    samples = Samples(rows=rows_of(model, sampler, [], schedules), labels=torch.arange(3))
    draw(model, samples, sampler)
    _, mixed, ruled = samples.rows
    assert calls_of_sample_0(model, samples, mixed, sampler) == [MIXED.levels[1]] * 5 + [MIXED.levels[0]] * 3  # noise level 0.5 is noisy
    begin = int(next(samples.read(ruled, "switches"))[0, 0])
    assert begin == rule.earliest
    assert calls_of_sample_0(model, samples, ruled, sampler) == [(1,) * 3] * begin + [(SOFTMAX,) * 3] * (8 - begin)


def test_pictures_that_are_compared_stand_in_both_forms_of_a_report(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file in files:
        file.write_bytes(file.stem.encode())
    first, *others = (Picture(file, f"<{file.stem}>") for file in files)
    document = Document("t", "lead", [Sides(first, others, "<both>")])
    page, text = html_page(document), markdown(document)
    assert [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", page)] == [b"a", b"b", b"c"]
    assert page.count("<div hidden>") == 1  # all but the first of the others
    for raw in ("<a>", "<b>", "<c>", "<both>"):
        assert raw not in page
        assert raw in text
    assert [line for line in text.splitlines() if line.startswith("!")] == [f"![<{name}>]({name}.png)" for name in "abc"]


def test_classes_stand_under_pictures_once_for_neighbours(tmp_path: Path) -> None:
    assert class_names([0, 9, 10], 10) == ["0", "9", "no class"]
    assert class_names([207, 387, 1000], 1000) == ["207 golden retriever", "387 lesser panda", "no class"]
    pixels = np.zeros((4, 64, 64, 3), np.uint8)
    names = ["207 golden retriever"] * 3 + ["1"]
    write_grid(tmp_path / "plain.png", pixels, 2)
    write_grid(tmp_path / "named.png", pixels, 2, captions=names)
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "named.png") as named:
        assert (plain.size, named.size) == ((134, 134), (134, 134 + 2 * 15))
        rows = np.asarray(named.convert("L")).reshape(164, 134)
    inked = [[bool((rows[top : top + 15, left : left + 64] < 200).any()) for left in (2, 68)] for top in (2 + 64, 2 + 81 + 64)]
    assert inked == [[True, False], [True, True]]


def test_a_document_escapes_what_it_is_given(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    blocks = [Heading("<b>"), Text("a & b"), Table(("x", "y|z"), [("<i>", "1")]), Picture(picture, 'a "caption"'), Code("<x>", "<s>")]
    page = html_page(Document("<t>", "<lead>", blocks))
    for raw in ("<b>", "<i>", "<x>", "<s>", "<t>", "<lead>", "a & b"):
        assert raw not in page
    for escaped in ("&lt;b&gt;", "&lt;i&gt;", "&lt;x&gt;", "&lt;s&gt;", "&lt;t&gt;", "&lt;lead&gt;", "a &amp; b", "a &#34;caption&#34;"):
        assert escaped in page
    assert "cG5n" in page
    assert r"y\|z" in markdown(Document("t", "lead", blocks))


def test_the_command_that_a_report_names_repeats_it() -> None:
    given = {"model": "a b", "out": Path("o"), "levels": (1, 4), "npz": True, "cfg_scale": 1.5, "samples": 2000}
    assert as_command("evaluate", evaluate, given) == "mediatorize evaluate 'a b' o --levels 1,4 --npz --cfg-scale 1.5"
    assert as_command("inspect", inspect, {"checkpoint": "x", "redundancy": Path("r.png")}) == "mediatorize inspect x --redundancy r.png"


def test_a_checkpoint_is_judged_alone(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file(channels=1, grid=(8, 8), learn_sigma=False)
    results = judged(source, tmp_path / "out", family="sit", num_heads=3, features="digits")
    assert list(results) == [SOFTMAX]
    assert "Only the pretrained model was judged" in (tmp_path / "out" / "report.html").read_text()
