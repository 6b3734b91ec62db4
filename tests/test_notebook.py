"""The whole path on a model in memory: convert, distil, calibrate, compare and sample, without a bundle folder or a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import model_inputs

from mediatorize import MediatorSettings, load_model, sample
from mediatorize.compression.conversion import convert_model
from mediatorize.compression.records import DistillSettings, FitSettings
from mediatorize.compression.search import costs_of, search
from mediatorize.compression.training import TrainingPlan, train
from mediatorize.compression.trajectories import teacher_states
from mediatorize.diffusion.sampling import Sampler
from mediatorize.evaluation.comparison import Samples, compare, rows_of

TEACHER = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors"


def test_a_model_in_memory_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model(TEACHER)
    inputs = model_inputs(model)
    pretrained = model(*inputs)
    sampler = Sampler.resolve(model.arch, steps=5)

    states = teacher_states(model, 320, sampler, trajectories=64)
    errors = convert_model(model, states, MediatorSettings((1, 16), local_rank=32), fit=FitSettings(steps=60))
    for level in (1, 16):
        assert sum(error.after[level] for error in errors) < 0.9 * sum(error.before[level] for error in errors)

    distill = DistillSettings(steps=60, batch=16, seed=1)
    plan = TrainingPlan.resolve(model.arch, distill=distill, trajectories=64, steps=5, cfg_scales=(1.0,), weighting="even")
    trained = train(model, plan)
    assert all(trained.after[level] < trained.before[level] for level in (1, 16))
    assert torch.equal(model(*inputs), pretrained)  # level softmax is the teacher, bit for bit

    found = search(model, sampler, [0.8], costs_of("flops", model, sampler), trajectories=8, verify=16)
    (outcome,) = found.outcomes
    flops = [sampler.flops(model.arch, schedule, model.added()) for schedule in (outcome.schedule, "softmax")]
    assert flops[0] is not None
    assert flops[1] is not None
    assert flops[0] <= 0.8 * flops[1]

    rows = rows_of(model, sampler, schedules={"ours": outcome.schedule})
    teacher, ours, *levels = compare(model, Samples(rows=rows, labels=torch.arange(40) % 10), sampler).results
    assert teacher.sample_error == 0
    assert ours.relative_flops == flops[0] / flops[1]
    assert ours.sample_error < min(row.sample_error for row in levels if row.relative_flops < ours.relative_flops)

    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = sample(model, [1, 2], steps=5, noise=noise, schedule=outcome.schedule)
    exact = sample(model, [1, 2], steps=5, noise=noise, schedule="softmax")
    assert 0 < float((drawn - exact).norm() / exact.norm()) < 0.5
    assert not list(tmp_path.iterdir())
