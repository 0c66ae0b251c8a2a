"""Figures of the report: what their curves are, and that they can be told apart on paper."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from scipy.stats import beta

from macer_serve.cli import main
from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Log, Row, read_log
from macer_serve.evaluation.reports.figure import DPI, HEIGHT, STYLES, WIDTH, Curve, Panel, save_figure
from macer_serve.evaluation.reports.panels import PANELS
from macer_serve.evaluation.reports.training_runs import training_panels
from macer_serve.evaluation.training_logs import TrainingLog

ROOT = Path(__file__).resolve().parent.parent
FIXED = ROOT / "results" / "bundled" / "certify-every20-n10000.tsv"
DECIDED = ROOT / "results" / "bundled" / "certify-every20-radius0.25.tsv"
SMALL = Log(
    (
        Row(0, 1, 1, 0.5, True, 1.0, 0.9, 100, 95, 1),
        Row(1, 1, 2, 0.9, False, 1.0, 0.9, 200, 190, 2),  # wrong
        Row(2, 1, -1, 0.0, False, 1.0, 0.4, 400, 180, 1),  # abstained, the right class on top
        Row(3, 1, 1, 0.0, True, 1.0, 0.5, 800, 500, 1),
    ),
    name="small",
)


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def at(curve: Curve, x: float) -> float:
    """Returns the height of a curve at the first of its points that is not before x."""
    return float(curve.y[np.searchsorted(curve.x, x - 1e-12)])


def test_certified_accuracy_is_the_tables() -> None:
    (curve,) = PANELS["accuracy"]([SMALL]).curves
    assert (curve.x[0], curve.x[-1]) == (0.0, 0.5)
    assert (at(curve, 0.0), at(curve, 0.01), at(curve, 0.5)) == (50.0, 25.0, 25.0)
    log = read_log(FIXED)
    (curve,) = PANELS["accuracy"]([log]).curves
    exact = [100 * np.mean([row.correct and row.radius >= x for row in log.rows]) for x in curve.x]
    assert curve.y.tolist() == pytest.approx(exact)


def test_bands_are_clopper_pearson() -> None:
    (curve,) = PANELS["accuracy"]([SMALL]).curves
    assert curve.low is not None
    assert curve.high is not None
    assert (curve.low[0], curve.high[0]) == pytest.approx((100 * beta.ppf(0.025, 2, 3), 100 * beta.ppf(0.975, 3, 2)))


def test_the_distribution_of_p_counts_the_images_own_class() -> None:
    (curve,) = PANELS["probability"]([SMALL]).curves
    shares = [0.95, 0.0, 0.45, 0.625]
    assert curve.y.tolist() == [100 * np.mean([share >= x for share in shares]) for x in curve.x]
    assert (at(curve, 0.25), at(curve, 0.5), at(curve, 0.94)) == (75.0, 50.0, 25.0)


def test_votes_that_were_spent() -> None:
    fixed, decided = PANELS["votes"]([read_log(FIXED), read_log(DECIDED)]).curves
    assert set(fixed.y) == {100.0, 0.0}
    assert fixed.x[fixed.y == 100.0].max() <= 10_000 < fixed.x[fixed.y == 0.0].min()
    assert 10 < at(decided, 500) < 20
    assert decided.y[-1] == 0.0


def test_a_curve_ends_where_it_meets_the_axis() -> None:
    _, decided = PANELS["accuracy"]([read_log(FIXED), read_log(DECIDED)]).curves
    assert 0.25 < decided.x[-1] < 0.26
    assert (decided.y[:-1] > 0).all()


@pytest.mark.parametrize("panel", ["probability", "votes"])
def test_logs_from_elsewhere_lack_the_votes(panel: str, tmp_path: Path) -> None:
    result = report(ROOT / "tests/logs/good.tsv", "--plot", tmp_path / "x.png", "--panels", panel)
    assert result.exit_code == 2
    assert "does not say how the votes fell" in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_predictions_have_no_radii_to_plot(tmp_path: Path) -> None:
    result = report(ROOT / "tests/logs/predict.tsv", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "no radii to plot" in result.stderr


# On paper


def grey(colour: str) -> float:
    """Returns the lightness L* of CIELAB of a colour, 0 to 100."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_curves_differ_in_more_than_colour() -> None:
    colours, lines, markers = zip(*STYLES, strict=True)
    for kind in (colours, lines, markers):
        assert len(set(kind)) == len(STYLES)
    shades = [grey(colour) for colour in colours]
    assert all(abs(one - other) >= 9 for one, other in pairwise(shades))
    assert max(shades) < 75, "white paper is at 100"


def test_files_are_one_column_wide_and_always_the_same(tmp_path: Path) -> None:
    panels = [PANELS["accuracy"]([SMALL])]
    for suffix, magic in ((".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")):
        first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        for path in (first, second):
            save_figure(panels, path)
        assert first.read_bytes().startswith(magic)
        assert first.read_bytes() == second.read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (round(WIDTH * DPI), round(HEIGHT * DPI))
    fonts = (tmp_path / "a.pdf").read_bytes()
    assert b"/Type3" not in fonts, "publishers refuse fonts of type 3"


def test_a_figure_in_grey_shows_each_curve(tmp_path: Path) -> None:
    """Curves far apart, one per style: in grey, each row of the picture has its own shade."""
    x = np.linspace(0.0, 1.0, 50)
    heights = [10.0 + 12 * number for number in range(len(STYLES))]
    curves = [Curve(str(number), x, np.full(50, height)) for number, height in enumerate(heights)]
    save_figure([Panel("x", "y", curves, is_share=True)], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("L"))[:, image.width // 2 :]
    shades = {int(value) for value, count in zip(*np.unique(pixels, return_counts=True), strict=True) if count > 300}
    expected = [np.asarray(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0] for colour, _, _ in STYLES]
    assert {int(value) for value in expected} <= shades


def test_more_curves_than_styles_are_refused(tmp_path: Path) -> None:
    x = np.linspace(0.0, 1.0, 5)
    curves = [Curve(str(number), x, x) for number in range(len(STYLES) + 1)]
    with pytest.raises(ParameterError, match="at most 7"):
        save_figure([Panel("x", "y", curves)], tmp_path / "x.png")
    with pytest.raises(ParameterError, match="nothing to draw"):
        save_figure([], tmp_path / "x.png")


def test_the_command_draws_and_tabulates(tmp_path: Path) -> None:
    plot = tmp_path / "new" / "x.png"
    panels = ",".join(PANELS)
    result = report(FIXED, DECIDED, "--label", "fixed", "--label", "decided", "--plot", plot, "--panels", panels)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["fixed", "decided"]
    with Image.open(io.BytesIO(plot.read_bytes())) as image:
        assert image.format == "PNG"


# Training runs


RUN = TrainingLog(
    "a.run",
    tuple({"epoch": at, "loss": 2.0 - at, "noisy_correct": 0.5, "seconds": 1.0, "inside": 0.1} for at in range(3)),
    ({"epoch": 0, "acr": 0.1}, {"epoch": 2, "acr": 0.3}),
)
BARE = TrainingLog("b.run", tuple({"epoch": at, "loss": 1.0, "seconds": 1.0} for at in range(2)))


def test_curves_of_training_runs() -> None:
    loss, correct, acr = training_panels([RUN, BARE])
    assert [(curve.label, curve.y.tolist()) for curve in loss.curves] == [("a", [2.0, 1.0, 0.0]), ("b", [1.0, 1.0])]
    assert [curve.label for curve in correct.curves] == ["a"]
    assert (acr.curves[0].x.tolist(), acr.curves[0].y.tolist()) == ([1.0, 3.0], [0.1, 0.3])
    (inside,) = training_panels([RUN, BARE], ["inside"])
    assert inside.y_label == "inside"
    with pytest.raises(ParameterError, match="no run has a metric 'radius'; there are epoch, loss"):
        training_panels([RUN], ["radius"])


def test_the_command_draws_training_runs(tmp_path: Path) -> None:
    run = tmp_path / "mine.run"
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in RUN.epochs))
    result = report(run, "--plot", tmp_path / "x.svg", "--panels", "loss, inside")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.svg").read_text().count("axes_") >= 2
    result = report(run, "--plot", tmp_path / "y.svg", "--panels", "radius")
    assert result.exit_code == 2
    assert "(--panels)" in result.stderr


def test_a_metric_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 0, "loss": NaN, "seconds": 1}\n{"epoch": 1, "loss": 1.0, "seconds": 1}\n')
    result = report(path, "--plot", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert not any(math.isnan(one.get("loss", 0.0)) for one in json.loads(report(path, "--format", "json").stdout))
