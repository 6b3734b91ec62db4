"""Recipes: keys checked against the stages' signatures, nothing run twice, the shipped ones work."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mediatorize import UserError, load_model
from mediatorize.cli import COMMANDS
from mediatorize.evaluation.digits import digit_images
from mediatorize.evaluation.features import as_bytes
from mediatorize.stages.recipes import read_recipe, resolved_toml, stage_of
from mediatorize.stages.run import run
from mediatorize.stages.table import STAGES

RECIPES = Path(__file__).parent.parent / "recipes"
QUICK = [
    "convert.levels=1,4",
    "convert.states=48",
    "convert.trajectories=4",
    "convert.fit_steps=2",
    "convert.batch=8",
    "finetune.train_steps=4",
    "finetune.trajectories=4",
    "finetune.sampler_steps=3",
    "calibrate.calls=3",
    "calibrate.samples=8",
    "calibrate.verify=4",
    "evaluate.samples=40",
    "evaluate.steps=3",
    "evaluate.pairs=2",
]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_pass_a_dry_run_without_a_checkpoint(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(path, dry_run=True)
    stages = tuple(tomllib.loads(path.read_text()).keys() & STAGES.keys())
    assert {stage_of(label) for label in (*result.told, *result.unplanned)} == set(stages)
    ready = {"inspect", "convert", *(["calibrate"] if path.stem == "plans" else [])}  # the others read bundles that are not there yet
    assert {stage_of(label) for label in result.told} == ready & set(stages)
    text = COMMANDS["run"].words(result)
    assert ("Nothing was written" if path.stem == "plans" else "would be written") in text
    assert all(f"== {label} ==" in text for label in result.recipe.stages)
    assert not list(tmp_path.iterdir())


def test_the_digits_recipe_runs_whole_and_only_once(tmp_path: Path) -> None:
    result = run(RECIPES / "digits.toml", set=QUICK, out=tmp_path / "out")
    stages = ["inspect", "convert", "finetune", "calibrate", "sample", "evaluate", "export"]
    assert list(result.told) == stages
    for picture in ("student.png", "evaluation/comparison.png", "evaluation/error-calls.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert len(image.convert("L").getcolors() or []) > 10
    levels = [row["level"] for row in result.told["evaluate"].facts["results"]]
    assert levels == ["softmax", "converged teacher", "plan of 3 calls", "euler, 3 calls", "unipc, 3 calls", "4", "1"]
    assert result.told["sample"].facts["plan"].endswith("plan.json, 3 calls")
    assert (tmp_path / "out" / "diffusers" / "model_index.json").exists()

    again = run(RECIPES / "digits.toml", set=QUICK, out=tmp_path / "out")
    assert list(again.skipped) == stages
    changed = run(RECIPES / "digits.toml", set=[*QUICK, "sample.seed=5"], out=tmp_path / "out")
    assert list(changed.skipped) == stages[:4]
    planned = run(RECIPES / "digits.toml", set=QUICK, out=tmp_path / "out", dry_run=True)
    assert list(planned.told) == stages[:4]
    assert planned.told["finetune"].facts["estimated_seconds"] > 0
    assert planned.told["calibrate"].facts["dry_run"]["seconds"] > 0
    resolved = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert resolved["convert"]["levels"] == [1, 4]
    assert resolved["convert"]["form"] == "learned"
    assert resolved["sample"]["seed"] == 5
    assert load_model(tmp_path / "out" / "bundle").settings is not None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[convert]\ncheckpoint = 'x'\nout = 'y'\nlevls = [1]", r"\[convert\] has no key 'levls'"),
        ("[convert]\ncheckpoint = 'x'", r"\[convert\] needs out"),
        ("[convert]\ncheckpoint = 'x'\nout = 'y'\nlevels = ['a']", "--levels.*'a' is no level"),
        ("[convert]\ncheckpoint = 'x'\nout = 'y'\nfit_steps = 2.5", "--fit-steps.*valid integer"),
        ("[convert]\ncheckpoint = 'x'\nout = 'y'\ninit = 'magic'", "--init.*is not one of 'pool'"),
        ("[convert]\ncheckpoint = 'x'\nout = 'y'\nforce = 'perhaps'", "--force"),
        ("[convrt]\n", "'convrt' is neither a stage nor a known key"),
        ("[convert", "not TOML"),
        ("convert = 3", "'convert' is no table"),
        ("[out]\n[inspect]\ncheckpoint = 'x'", "'out' is a table"),
        ("description = 'nothing'", "has no stages"),
    ],
)
def test_mistakes_in_a_recipe_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(write(tmp_path, text))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_recipe_runs_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"runs in one process.*one by one under torchrun"):
        run(RECIPES / "digits.toml", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["levels=1", "convert.levels", "nothing.levels=1"])
def test_malformed_changes_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=r"STAGE\.KEY=VALUE"):
        run(RECIPES / "digits.toml", set=[change], dry_run=True)


def test_a_change_replaces_the_recipes_value_in_its_own_type(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "digits.toml", ("convert.levels=2,8", "convert.cfg_channels=all", "sample.level=softmax"), tmp_path)
    assert recipe.stages["convert"]["levels"] == (2, 8)
    assert recipe.stages["convert"]["cfg_channels"] == "all"
    assert recipe.stages["sample"]["level"] == "softmax"
    assert recipe.stages["convert"]["out"] == tmp_path / "bundle"


def test_several_paths_are_kept_when_a_recipe_is_written_resolved(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "digits.toml", ("evaluate.schedule=a.json,b.json",), tmp_path)
    assert recipe.stages["evaluate"]["schedule"] == (Path("a.json"), Path("b.json"))
    resolved = tomllib.loads(resolved_toml(recipe))
    assert resolved["evaluate"]["schedule"] == ["a.json", "b.json"]
    assert resolved["evaluate"]["out"] == str(tmp_path / "evaluation")
    again = read_recipe(write(tmp_path, resolved_toml(recipe)), (), tmp_path)
    assert resolved_toml(again) == resolved_toml(recipe)


def test_tables_of_an_array_run_in_order_and_only_once(tmp_path: Path) -> None:
    text = "".join(
        f"[[convert]]\ncheckpoint = '{RECIPES}/digits/sit.safetensors'\nout = '{{out}}/m{count}'\nlevels = [{count}]\n"
        "weights = 'random'\nform = 'published'\n"
        for count in (4, 16)
    )
    recipe = write(tmp_path, text)
    result = run(recipe, out=tmp_path / "out")
    assert list(result.told) == ["convert 1", "convert 2"]
    assert [load_model(tmp_path / "out" / name).all_levels for name in ("m4", "m16")] == [(4, "softmax"), (16, "softmax")]
    assert run(recipe, out=tmp_path / "out").skipped == ("convert 1", "convert 2")
    shutil.rmtree(tmp_path / "out" / "m16")
    assert run(recipe, out=tmp_path / "out").skipped == ("convert 1",)
    resolved = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert [table["levels"] for table in resolved["convert"]] == [[4], [16]]
    changed = read_recipe(recipe, ("convert.seed=3",), tmp_path / "out")
    assert [arguments["seed"] for arguments in changed.stages.values()] == [3, 3]
    assert run(tmp_path / "out" / "recipe.toml", out=tmp_path / "out").recipe.stages.keys() == result.recipe.stages.keys()
    with pytest.raises(UserError, match="'convert' is no table"):
        read_recipe(write(tmp_path, "convert = [1, 2]"), (), None)


PAPER = [
    *("finetune.train_steps=4", "finetune.batch=4", "sample.per_class=1", "sample.steps=6", "sample.ratios=0.99,0.98"),
    *("compare.samples=10", "compare.steps=6", "compare.ratios=0.99,0.98"),
]


def test_the_papers_recipe_runs_whole_and_only_once(tmp_path: Path) -> None:
    result = run(RECIPES / "paper-digits.toml", set=PAPER, out=tmp_path / "out")
    assert [stage_of(label) for label in result.told] == ["convert"] * 3 + ["finetune"] * 3 + ["sample", "compare"]
    rows = result.told["compare"].facts["results"]
    assert [row["name"] for row in rows] == ["baseline", "m4", "m16", "step-wise"]
    flops = [row["flops"] for row in rows]
    assert flops[1] < flops[2] < flops[0] and flops[1] <= flops[3] < flops[0]
    assert (tmp_path / "out" / "comparison" / "comparison.png").exists() and (tmp_path / "out" / "step-wise.png").exists()
    again = run(RECIPES / "paper-digits.toml", set=PAPER, out=tmp_path / "out")
    assert again.skipped == tuple(result.told)


def test_the_digits_on_disk_are_those_of_scikit_learn() -> None:
    with np.load(RECIPES / "digits" / "digits.npz") as stored:
        images, labels = digit_images()
        assert np.array_equal(stored["labels"], labels.numpy())
        assert np.array_equal(stored["arr_0"], as_bytes(images))


def test_a_stage_that_failed_is_run_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no level 3"):
        run(RECIPES / "digits.toml", set=[*QUICK, "sample.level=3"], out=tmp_path / "out")
    before = ["inspect", "convert", "finetune", "calibrate"]
    assert list(json.loads((tmp_path / "out" / "finished.json").read_text())) == before
    assert list(run(RECIPES / "digits.toml", set=QUICK, out=tmp_path / "out").skipped) == before


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("fit_steps", "3", 3),
        ("fit-steps", "3", 3),
        ("cfg_scale", "2", 2.0),
        ("cfg_channels", "all", "all"),
        ("levels", "1, 8", (1, 8)),
        ("init", "pool", "pool"),
        ("data", "some/where", Path("some/where")),
    ],
)
def test_values_take_the_type_of_their_parameter(key: str, value: str, expected: object) -> None:
    recipe = read_recipe(RECIPES / "digits.toml", (f"convert.{key}={value}",), None)
    found = recipe.stages["convert"][key.replace("-", "_")]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("finetune.steps=800", "there is no --steps here; pass --train-steps or --sampler-steps"),
        ("finetune.lr=1", "there is no --lr here; pass --learning-rate"),
    ],
)
def test_words_that_the_command_line_answers_are_answered_in_recipes_too(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(RECIPES / "digits.toml", (change,), None)


def test_another_file_under_the_same_name_is_converted_again(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes((RECIPES / "digits" / "sit.safetensors").read_bytes())
    text = f"[convert]\ncheckpoint = '{teacher}'\nout = '{{out}}/bundle'\nfit_steps = 0\nstates = 16\nsampler_steps = 2\n"
    recipe = write(tmp_path, text)
    run(recipe, out=tmp_path / "out")
    assert run(recipe, out=tmp_path / "out").skipped == ("convert",)
    teacher.write_bytes((RECIPES / "digits" / "dit.safetensors").read_bytes())
    assert run(recipe, out=tmp_path / "out").skipped == ()
    shutil.rmtree(tmp_path / "out" / "bundle")
    assert run(recipe, out=tmp_path / "out").skipped == ()


def test_a_recipe_forces_nothing_outside_its_own_folder(tmp_path: Path) -> None:
    run(RECIPES / "digits.toml", set=[*QUICK, f"sample.out={tmp_path}/mine.png"], out=tmp_path / "out")
    with pytest.raises(UserError, match=r"mine\.png: exists"):
        run(RECIPES / "digits.toml", set=[*QUICK, f"sample.out={tmp_path}/mine.png", "sample.seed=2"], out=tmp_path / "out")


def test_the_recipe_of_plans_runs_whole_and_only_once(tmp_path: Path) -> None:
    quick = ["calibrate.calls=3", "calibrate.samples=8", "calibrate.verify=4", "sample.calls=3", "sample.per_class=1"]
    result = run(RECIPES / "plans.toml", set=quick, out=tmp_path / "out")
    assert list(result.told) == ["inspect", "calibrate", "sample", "export"]
    assert (tmp_path / "out" / "samples.png").exists() and (tmp_path / "out" / "scheduler" / "scheduler_config.json").exists()
    assert run(RECIPES / "plans.toml", set=quick, out=tmp_path / "out").skipped == tuple(result.told)
