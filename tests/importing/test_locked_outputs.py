"""Export, import and quantize: one at a time per output, and the second is told who is at work."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from importing.foreign_files import linear

from macer_serve.checkpoint.quantize import quantize_checkpoint
from macer_serve.cli import main
from macer_serve.cli.exit_codes import EXIT_CODES
from macer_serve.errors import CheckpointError, MissingFactsError, OutputError
from macer_serve.importing import Facts, import_model
from macer_serve.locks import locked


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def importing(folder: Path, out: Path) -> Result:
    case = linear(folder)
    return macer("import", case.file, "--sigma", 0.25, "--out", out, *case.options)


def test_an_import_waits_for_no_other_of_the_same_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    with locked(out):
        refused = importing(tmp_path, out)
    assert refused.exit_code == EXIT_CODES[OutputError]
    assert f"mine is being written by process {os.getpid()} on " in refused.stderr
    assert not out.exists()
    assert importing(tmp_path, out).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.onnx", "mine"]


def test_an_export_waits_for_no_other_of_the_same_file(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    with locked(out):
        refused = macer("export", "bundled:cifar10", "--out", out)
    assert refused.exit_code == EXIT_CODES[OutputError]
    assert f"model.onnx is being written by process {os.getpid()} on " in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_quantisation_waits_for_no_other_writer_of_the_checkpoint(tmp_path: Path) -> None:
    assert importing(tmp_path, tmp_path / "mine").exit_code == 0
    pixels = np.zeros((32, 3, 4, 4), np.float32)
    with locked(tmp_path / "mine"), pytest.raises(OutputError, match="mine is being written by process"):
        quantize_checkpoint(tmp_path / "mine", pixels, pixels, source={})


def test_an_import_says_that_a_place_is_taken_before_it_reads_the_network(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    for name, words in (("file", "is a file, not a folder"), ("thesis", "holds other files than a checkpoint's")):
        with pytest.raises(CheckpointError, match=words):
            import_model(tmp_path / "damaged.onnx", tmp_path / name, Facts())
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"


def test_library_messages_name_no_option_of_the_command(tmp_path: Path) -> None:
    """What is missing is a field of the error; the command says by which option to give it."""
    with pytest.raises(MissingFactsError, match="does not state the sigma") as missing:
        import_model(linear(tmp_path).file, tmp_path / "out", Facts())
    assert missing.value.facts == ("sigma", "classes", "value_range")
    assert "--" not in str(missing.value)
    done = macer("import", linear(tmp_path).file, "--out", tmp_path / "out")
    for option in ("--sigma S", "--classes FILE", "--range LOW,HIGH"):
        assert option in done.stderr
    with pytest.raises(CheckpointError, match="choose another output"):
        import_model(linear(tmp_path).file, tmp_path, Facts())
