"""Models without a teacher, side by side: what they cost, how they are judged, and the step-wise rule between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from mediatorize import UserError, load_model, sample
from mediatorize.diffusion.sampling import Sampler, own_level
from mediatorize.evaluation.digits import digit_classifier, digit_images
from mediatorize.evaluation.metrics import frechet_distance
from mediatorize.evaluation.results import SideBySide
from mediatorize.formats import bundle
from mediatorize.formats.plans import write_plans
from mediatorize.model.cost import forward_flops
from mediatorize.model.levels import SOFTMAX, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.planning.fit import analytic
from mediatorize.planning.search import Wanted
from mediatorize.report.side_by_side import facts, words
from mediatorize.stages.compare import compare

QUICK: dict[str, Any] = {"samples": 12, "steps": 4, "batch": 5, "device": "cpu"}
SIZES: dict[str, Any] = {"channels": 1, "grid": (8, 8)}


def made(path: Path, level: Any, seed: int) -> str:
    """A bundle of random weights that runs at one level."""
    settings = MediatorSettings((1, 4), form="published", projection_rank=None)
    model = tiny_model(settings, seed=seed, **SIZES)
    config = bundle.BundleConfig(model.arch, settings, bundle.Origin("model.pt", weights=bundle.RANDOM))
    path.mkdir()
    bundle.write_bundle(path, model, config, "")
    if level != SOFTMAX:
        bundle.write_json(path / "schedule.json", Schedule((), ((level,) * 3,)).to_json())
    return str(path)


def compared(model: str, out: Path, **options: Any) -> SideBySide:
    found = compare(model, out, **(QUICK | options))
    assert isinstance(found, SideBySide)
    return found


def test_every_model_is_judged_as_it_runs_by_itself(tmp_path: Path) -> None:
    files = [made(tmp_path / name, level, seed) for seed, (name, level) in enumerate([("base", SOFTMAX), ("m1", 1), ("m4", 4)])]
    found = compared(files[0], tmp_path / "out", beside=tuple(files[1:]))
    assert [row.name for row in found.results] == ["base", "m1", "m4"]
    labels, classifier = torch.arange(12) % 10, digit_classifier()
    real = classifier.features(digit_images()[0])
    for row, file, level in zip(found.results, files, (SOFTMAX, 1, 4), strict=True):
        model = load_model(file)
        assert row.flops == 4 * forward_flops(model.arch, level, model.settings)
        x = sample(model, labels, steps=4, schedule=level)
        assert row.accuracy == pytest.approx(classifier.accuracy(x, labels))
        assert row.frechet_distance == pytest.approx(frechet_distance(classifier.features(x), real), rel=1e-4)
        assert row.relative_flops == row.flops / found.results[0].flops
    text = words(found)
    assert all(f"{row.frechet_distance:.2f}" in text for row in found.results) and "the real digits" in text
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written == json.loads(json.dumps(facts(found)))
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert all(f"| {row.name} |" in table for row in found.results)


def test_a_models_plans_stand_beside_it(tmp_path: Path) -> None:
    files = [made(tmp_path / name, SOFTMAX, seed) for seed, name in enumerate(("one", "two"))]
    model, wanted = load_model(files[0]), Wanted(process="flow", shape=(1, 16, 16), cfg_scale=2.0)
    plans = {count: analytic(wanted.plan(wanted.times(count, 1.0, 1.4)), wanted.shape) for count in (3, 4)}
    write_plans(tmp_path / "one" / "plan.json", plans)
    found = compared(files[0], tmp_path / "out", beside=(files[1],), steps=8)
    assert [row.name for row in found.results] == ["one", "two", "one, plan of 4 calls", "one, plan of 3 calls"]
    assert [row.relative_flops for row in found.results] == [1, 1, 4 / 8, 3 / 8]
    assert found.sampler.cfg_scale == 2.0  # the plans' own
    labels, classifier = torch.arange(12) % 10, digit_classifier()
    real = classifier.features(digit_images()[0])
    for row, plan in zip(found.results[2:], (plans[4], plans[3]), strict=True):
        features = classifier.features(sample(model, labels, plan=plan))
        assert row.frechet_distance == pytest.approx(frechet_distance(features, real), rel=1e-4)
    with pytest.raises(UserError, match=r"cfg-scale is 2, not 3"):
        compared(files[0], tmp_path / "other", plan=tmp_path / "one" / "plan.json", cfg_scale=3.0)
    left = compared(files[0], tmp_path / "other", cfg_scale=3.0)
    assert [row.name for row in left.results] == ["one"]
    assert left.about_plans[0].startswith("the bundle's plans are left out: The plan's cfg-scale is 2, not 3.")
    assert left.about_plans[0] in words(left)


def test_the_rule_switches_between_bundles_at_their_own_levels(tmp_path: Path) -> None:
    files = tuple(made(tmp_path / name, level, 0) for name, level in (("m1", 1), ("m4", 4), ("base", SOFTMAX)))
    models = [load_model(file) for file in files]
    assert [own_level(model) for model in models] == [1, 4, SOFTMAX]
    options: dict[str, Any] = {"switch": files, "steps": 10, "solver": "sde", "first": 2}
    always, never = (
        compared(files[2], tmp_path / name, ratios=ratios, **options) for name, ratios in (("a", (1e6, 1e6)), ("b", (1e-9, 1e-9)))
    )
    costs = [forward_flops(model.arch, level, model.settings) for model, level in zip(models, (1, 4, SOFTMAX), strict=True)]
    assert [row.name for row in always.results] == ["base", "step-wise"]
    assert always.results[1].flops == 4 * costs[0] + 6 * costs[2]  # both switches after the first check, before step 4
    assert never.results[1].flops == 10 * costs[0]
    models[1].schedule = Schedule((0.5,), ((1, 1, 1), (4, 4, 4)))
    with pytest.raises(UserError, match="schedule has several levels"):
        own_level(models[1])


def test_a_killed_comparison_goes_on_to_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [made(tmp_path / name, SOFTMAX, seed) for seed, name in enumerate(("one", "two"))]
    whole = compared(files[0], tmp_path / "whole", beside=(files[1],))
    with pytest.raises(UserError, match=r"whole: has a comparison\. Pass --force"):
        compared(files[0], tmp_path / "whole", beside=(files[1],))
    from mediatorize.evaluation import side_by_side

    real, calls = side_by_side.sample_part, []

    def interrupted(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(side_by_side, "sample_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(files[0], tmp_path / "out", beside=(files[1],))
    again = compared(files[0], tmp_path / "out", beside=(files[1],))
    assert again.results == whole.results and len(calls) == 7  # three parts of each, one of them tried twice
    with pytest.raises(UserError, match="samples of another model or plan"):
        (tmp_path / "out" / "comparison.json").unlink()
        compared(files[1], tmp_path / "out", beside=(files[0],))


def test_a_reference_takes_the_place_of_the_digits(tmp_path: Path) -> None:
    file = made(tmp_path / "one", SOFTMAX, 0)
    pictures = np.random.default_rng(0).integers(0, 256, size=(80, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pictures)
    found = compared(file, tmp_path / "out", reference=tmp_path / "reference.npz")
    assert found.reference == "reference.npz"
    assert Sampler.resolve(load_model(file).arch, steps=4) == found.sampler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "none"}, "Without features nothing is judged"),
        ({"switch": ("{one}",)}, "the only one of --switch"),
        ({"switch": ("{one}", "{two}")}, "2 ratios do not switch between 2 stages"),
        ({"beside": ("{other}",)}, "the digits classifier judges 16x16 digits"),
        ({"beside": ("nowhere",)}, "nowhere: no such file"),
        ({"samples": 1}, "--samples 1 is too small"),
        ({"solver": "dopri5"}, "a comparison needs a fixed number"),
    ],
)
def test_bad_comparisons_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    places = {name: made(tmp_path / name, SOFTMAX, 0) for name in ("one", "two")}
    other = tiny_model(channels=1, grid=(4, 4))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    places["other"] = str(tmp_path / "other.pt")
    change = {name: tuple(item.format(**places) for item in value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        compared(places["one"], tmp_path / "out", family="sit", num_heads=3, **change)
    assert not (tmp_path / "out").exists()
