"""The report of a sweep: means over seeds of one recipe, each with its error between seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main
from macer_serve.evaluation.logs import LogWriter, Row


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", "--sweep", *map(str, arguments)])


def log(path: Path, radii: list[float], first: int = 0) -> Path:
    """A log of images that are all right with these radii; a negative one stands for an abstention."""
    with LogWriter.open(path, {"sigma": 0.25}) as writer:
        for idx, radius in enumerate(radii, start=first):
            writer.write(Row(idx, 1, 1 if radius >= 0 else -1, max(radius, 0.0), radius >= 0, 1.0))
    return path


def run(folder: Path, loss: float, acr: float, recipe: str = "sigma: 0.25\n") -> Path:
    folder.mkdir(parents=True)
    lines = [{"epoch": at, "loss": loss * (2 - at), "seconds": 1800.0} for at in range(2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "certified.jsonl").write_text(json.dumps({"epoch": 1, "acr": acr}) + "\n")
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_logs_of_seeds_become_one_row_per_recipe(tmp_path: Path) -> None:
    logs = [log(tmp_path / "a" / f"seed-{seed}.tsv", [0.5, round(0.2 + seed / 10, 1), 0.0, -1.0]) for seed in range(3)]
    logs.append(log(tmp_path / "b-seed-0.tsv", [0.3, 0.3]))
    result = report(*logs, "--radii", "0.25")
    assert result.exit_code == 0, result.output
    titles, first, second, *_ = (" ".join(line.split()) for line in result.stdout.splitlines())
    assert titles == "recipe image set images seeds ACR r=0.25 abstained"
    # ACR .175, .2, .225; at .25 are one, two and two of four images.
    assert first == "a images 0-3 4 3 0.2000 +/- 0.0144 41.7 +/- 8.3 25.0 +/- 0.0"
    assert second == "b images 0-1 2 1 0.3000 +/- - 100.0 +/- - 0.0 +/- -"
    records = json.loads(report(*logs, "--radii", "0.25", "--format", "json").stdout)
    assert (records[0]["recipe"], records[0]["seeds"], records[1]["ACR error"]) == ("a", 3, None)
    assert records[0]["ACR"] == pytest.approx(0.2)
    assert records[0]["ACR error"] == pytest.approx(0.025 / math.sqrt(3))


def test_labels_say_which_logs_are_of_one_recipe(tmp_path: Path) -> None:
    logs = [log(tmp_path / f"{name}.tsv", [radius]) for name, radius in (("x", 0.1), ("y", 0.3))]
    result = report(*logs, "--label", "ours", "--label", "ours", "--radii", "0")
    assert " ".join(result.stdout.splitlines()[1].split()).startswith("ours image 0 1 2 0.2000 +/- 0.1000 100.0")
    refused = report(*logs)
    assert refused.exit_code == 2
    assert "x.tsv does not say its seed, as in recipe/seed-0.tsv; give logs of one recipe one label" in refused.stderr


def test_logs_of_other_images_are_not_averaged(tmp_path: Path) -> None:
    logs = [log(tmp_path / f"seed-{first}" / "a.tsv", [0.1, 0.2], first) for first in (0, 5)]
    refused = report(*logs)
    assert refused.exit_code == 2
    assert "are of different images: images 0-1; images 5-6" in refused.stderr


def test_runs_of_seeds_become_one_row_per_recipe(tmp_path: Path) -> None:
    for seed, (loss, acr) in enumerate(((1.0, 0.3), (2.0, 0.5))):
        run(tmp_path / "mine" / f"seed-{seed}.run", loss, acr)
    for named in ([tmp_path / "mine"], [*(tmp_path / "mine").iterdir()]):
        titles, row, *_ = (" ".join(line.split()) for line in report(*named).stdout.splitlines())
        assert titles == "recipe seeds epochs hours loss acr"
        assert row == "mine 2 2 2.00 1.5000 +/- 0.5000 0.4000 +/- 0.1000"


def test_runs_of_different_recipes_are_not_averaged(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / "mine" / f"seed-{seed}.run", 1.0, 0.3, recipe=f"lr: {seed}\n")
    refused = report(tmp_path / "mine")
    assert refused.exit_code == 2
    assert "the runs of mine are of different recipes" in refused.stderr


def test_the_phases_of_a_run_are_one_curve(tmp_path: Path) -> None:
    run(tmp_path / "mine.run" / "phase-1.run", 3.0, 0.1)
    run(tmp_path / "mine.run" / "phase-2.run", 2.0, 0.2)
    one = CliRunner().invoke(main, ["report", str(tmp_path / "mine.run"), "--format", "json"])
    assert [(entry["epoch"], entry["loss"]) for entry in json.loads(one.stdout)] == [(0, 6), (1, 3), (2, 4), (3, 2)]
    for path in (tmp_path / "mine.run" / "phase-2.run").glob("*"):
        path.rename(tmp_path / "mine.run" / path.name)
    (tmp_path / "mine.run" / "phase-2.run").rmdir()
    whole = CliRunner().invoke(main, ["report", str(tmp_path / "mine.run"), "--format", "json"])
    assert json.loads(whole.stdout) == json.loads(one.stdout), "the last phase lies in the folder itself"


def test_training_cost_is_not_averaged() -> None:
    refused = report("--table3", "bundled:cifar10")
    assert (refused.exit_code, "no average over seeds" in refused.stderr) == (2, True)
