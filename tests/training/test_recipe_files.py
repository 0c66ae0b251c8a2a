"""Recipe files say all of a run, refuse what they would ignore, and train their phases one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from small_runs import states_of

from macer_serve.checkpoint import load_config, load_model
from macer_serve.cli import main
from macer_serve.errors import ParameterError
from macer_serve.training.methods import METHODS
from macer_serve.training.recipe_file import named_recipes, read_recipe, write_recipe
from macer_serve.training.recipes import recipe

Train = Callable[..., Result]
PHASE = {"method": "gaussian", "epochs": 1, "batch": 16, "lr": 0.05, "weight_decay": 0.0}
SECOND = {"method": "consistency", "epochs": 2, "batch": 16, "lr": 0.01, "weight_decay": 0.0, "ema": 0.5, "lam": 3}
FILE: dict[str, Any] = {"dataset": "mnist", "architecture": "lenet", "sigma": 0.5, "phases": [PHASE, SECOND]}


def written(folder: Path, document: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("dataset", ["cifar10", "mnist", "imagenet"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["published", "fast"])
def test_every_named_recipe_can_be_written_and_read(tmp_path: Path, dataset: str, method: str, name: str) -> None:
    chosen = recipe(dataset, method, 0.5, name)
    text = write_recipe(dataset, "lenet", (chosen, chosen.with_options(epochs=3)), init="start", about="a test")
    read = read_recipe(written(tmp_path, text))
    assert read.phases == (chosen, chosen.with_options(epochs=3))
    assert (read.dataset, read.architecture, read.sigma, read.init, read.text) == (dataset, "lenet", 0.5, "start", text)
    assert set(yaml.safe_load(text)["phases"][0]) == {*chosen.to_json()} - {"sigma"}, "every constant is named"


def test_the_recipes_of_the_package_can_be_read() -> None:
    assert "cifar10-bundled" in named_recipes()
    for path in named_recipes().values():
        assert read_recipe(path).phases


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "a recipe has no epoch; it has about, dataset"),
        ({"dataset": None}, "dataset is missing"),
        ({"dataset": "cifar"}, "unknown dataset 'cifar'"),
        ({"dataset": 3}, "dataset must be text, not 3"),
        ({"sigma": "much"}, "sigma must be a number, not 'much'"),
        ({"sigma": True}, "sigma must be a number, not True"),
        ({"sigma": -1}, r"phase 1: sigma must lie in \[0.005, 4\]"),
        ({"phases": []}, "phases must be a list of one phase or more"),
        ({"phases": [PHASE, "x"]}, "phase 2: method must be one of: gaussian"),
        ({"phases": [{**PHASE, "method": "smoothmix"}]}, "phase 1: method must be one of"),
        ({"phases": [{**PHASE, "lam": 1.0}]}, "phase 1: a phase of gaussian has no lam"),
        ({"phases": [{**PHASE, "sigma": 0.25}]}, "phase 1: a phase of gaussian has no sigma"),
        ({"phases": [{**PHASE, "epochs": 1.5}]}, "epochs must be a whole number, not 1.5"),
        ({"phases": [{**PHASE, "nesterov": 1}]}, "nesterov must be true or false, not 1"),
        ({"phases": [{**PHASE, "milestones": 3}]}, "milestones must be a list of whole numbers"),
        ({"phases": [{**PHASE, "milestones": [True]}]}, "milestones must be a whole number, not True"),
        ({"phases": [{**PHASE, "schedule": "cosine"}]}, "schedule must be one of: step, one-cycle, not 'cosine'"),
        ({"phases": [{**PHASE, "lr": 0}]}, "phase 1: lr must be positive"),
        ({"phases": [{"method": "gaussian", "epochs": 1}]}, "phase 1: batch, lr, weight_decay must be given"),
    ],
)
def test_what_no_run_could_use_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, {**FILE, **change})
    with pytest.raises(ParameterError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: mnist\ndataset: cifar10\n", "'dataset' is given twice"),
        ("a: [", "is not YAML"),
        ("[[[", "is not YAML"),
        ("- 1", "a recipe must be names with values, not list"),
        ("", "a recipe must be names with values"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
        ("? [a]\n: 1\n", "is not YAML"),
        ("#" * (1 << 20) + "\n", "too long"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        read_recipe(written(tmp_path, text))


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["train", "--data-dir", str(tmp_path), "--recipe", str(tmp_path / "no.yaml")])
    assert refused.exit_code == 2
    assert "no.yaml cannot be read" in refused.output
    assert "(--recipe)" in refused.output


@pytest.mark.parametrize(("text", "rate"), [("1e-4", 1e-4), ("5E-2", 0.05), ("2", 2.0), ("0.5", 0.5), ("1.e-1", 0.1)])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, rate: float) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    path = written(tmp_path, yaml.safe_dump({**FILE, "phases": [PHASE]}).replace("lr: 0.05", f"lr: {text}"))
    assert read_recipe(path).phases[0].lr == rate


def test_two_phases_are_the_two_runs_that_init_would_chain(mnist: Path, train: Train, tmp_path: Path) -> None:
    """Digest by digest; and a complete run may be asked for again."""
    path = written(tmp_path, FILE)
    how = ("--data-dir", mnist, "--seed", 3)
    both = train(*how, "--recipe", path, "--out", tmp_path / "both")
    assert both.exit_code == 0, both.output
    assert "phase 2 of 2" in both.output
    one = {**FILE, "phases": [PHASE]}
    first = train(*how, "--recipe", written(tmp_path, one), "--out", tmp_path / "first")
    assert first.exit_code == 0, first.output
    two = {**FILE, "phases": [SECOND], "init": str(tmp_path / "first")}
    second = train(*how, "--recipe", written(tmp_path, two), "--out", tmp_path / "second")
    assert second.exit_code == 0, second.output
    ours, chained = (load_model(tmp_path / name)[1].state_dict() for name in ("both", "second"))
    assert all(bool((ours[name] == chained[name]).all()) for name in chained)

    config = load_config(tmp_path / "both")
    assert [config.recipe["method"], config.recipe["earlier"][0]["method"]] == ["consistency", "gaussian"]
    assert config.recipe["init"] == load_config(tmp_path / "both.run" / "phase-1").digest
    assert (tmp_path / "both.run" / "recipe.yaml").read_text() == yaml.safe_dump(FILE), "the file that it came from"
    written(tmp_path, FILE)
    again = train(*how, "--recipe", path, "--out", tmp_path / "both")
    assert again.exit_code == 0, again.output
    assert load_config(tmp_path / "both").digest == config.digest

    changed = {**FILE, "phases": [{**PHASE, "lr": 0.04}, SECOND]}
    refused = train(*how, "--recipe", written(tmp_path, changed), "--out", tmp_path / "both")
    assert refused.exit_code == 6
    assert "recipe.lr was 0.05, now 0.04" in refused.output
    fresh = train(*how, "--recipe", path, "--out", tmp_path / "both", "--restart")
    assert fresh.exit_code == 0, fresh.output
    assert load_config(tmp_path / "both").recipe["earlier"][0]["lr"] == 0.04


def test_the_recipe_of_any_run_is_kept_and_can_be_run_again(mnist: Path, train: Train, tmp_path: Path) -> None:
    constants = ("--method", "gaussian", "--epochs", 1, "--batch", 16)
    result = train("--dataset", "mnist", *constants, "--data-dir", mnist, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    kept = tmp_path / "out.run" / "recipe.yaml"
    printed = train("--dataset", "mnist", *constants, "--data-dir", tmp_path / "nowhere", "--print-recipe")
    assert printed.output == kept.read_text()
    again = train("--recipe", kept, "--data-dir", mnist, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert load_config(tmp_path / "again").digest == load_config(tmp_path / "out").digest


def test_what_a_file_says_is_not_said_again(mnist: Path, train: Train, tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    out = ("--data-dir", mnist, "--out", tmp_path / "out", "--recipe", path)
    for options, message in (
        (("--method", "macer"), "says this itself; leave it out, or change a copy (--method, --recipe)"),
        (("--sigma", 0.25), "(--sigma, --recipe)"),
        (("--dataset", "cifar10"), "(--dataset, --recipe)"),
        (("--lr", 0.1), "has 2 phases, each with constants of its own; change a copy (--lr)"),
        (("--seed", 1, "--seeds", "1,2"), "give one seed (--seed) or several (--seeds)"),
    ):
        refused = train(*out, *options)
        assert refused.exit_code == 2
        assert message in refused.output
        assert not list(tmp_path.glob("out*"))
    missing = train("--data-dir", mnist, "--out", tmp_path / "out")
    assert (missing.exit_code, "Missing option '--dataset'" in missing.output) == (2, True)
    one = written(tmp_path, {**FILE, "phases": [PHASE]})
    shorter = train("--data-dir", mnist, "--out", tmp_path / "out", "--recipe", one, "--lr", 0.02, "--print-recipe")
    assert yaml.safe_load(shorter.output)["phases"][0]["lr"] == 0.02


def test_several_seeds_are_several_runs(mnist: Path, train: Train, tmp_path: Path) -> None:
    how = ("--data-dir", mnist, "--recipe", written(tmp_path, {**FILE, "phases": [PHASE]}))
    result = train(*how, "--out", tmp_path / "sweep", "--seeds", "0,7")
    assert result.exit_code == 0, result.output
    alone = train(*how, "--out", tmp_path / "alone", "--seed", 7)
    assert alone.exit_code == 0, alone.output
    found = {seed: load_config(tmp_path / "sweep" / f"seed-{seed}") for seed in (0, 7)}
    assert [config.seed for config in found.values()] == [0, 7]
    assert found[7].files == load_config(tmp_path / "alone").files != found[0].files
    assert states_of(tmp_path / "sweep" / "seed-7") == [(1, 0)]
    lines = (tmp_path / "sweep" / "seed-0.run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0]
    for wrong in ("0,a", "1,1"):
        assert train(*how, "--out", tmp_path / "wrong", "--seeds", wrong).exit_code == 2
