"""`macer predict` takes files and standard input, one answer per image in their order, and refuses the rest clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from brightness import issuer
from click.testing import CliRunner, Result

from macer_serve import SmoothedClassifier
from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.errors import ParameterError, UndecodableError, UnsupportedTypeError

IMAGES = Path(__file__).parent / "images"
SHIP, CAT = IMAGES / "0001-ship.png", IMAGES / "0000-cat.png"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
AVIF = b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(40)


def predict(*arguments: object, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)], input=stdin)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options of short runs that repeat themselves."""
    key = tmp_path_factory.mktemp("key") / "issuer.key"
    issuer().save(key)
    engine = ["--engine", "torch", "--device", "cpu", "--no-compile", "--cores", 1]
    return [*engine, "--n", 200, "--key", key]


@pytest.fixture(scope="module")
def of_ship(options: list[object]) -> str:
    result = predict(SHIP, "--json", *options)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_several_files_give_one_json_line_each_in_their_order(options: list[object], of_ship: str) -> None:
    assert of_ship.count("\n") == 1
    result = predict(SHIP, CAT, SHIP, "--json", *options)
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines(keepends=True)
    assert first == third == of_ship
    inputs = [json.loads(line)["certificate"]["input"]["digest"] for line in (first, second)]
    assert inputs[0] != inputs[1]


def test_several_files_in_words_are_named(options: list[object]) -> None:
    result = predict(SHIP, CAT, *options)
    assert result.exit_code == 0, result.output
    named = [line for line in result.stdout.splitlines() if line.startswith(str(IMAGES))]
    assert [line.partition(": ")[0] for line in named] == [str(SHIP), str(CAT)]
    assert named[0].startswith(f"{SHIP}: ship  radius 0.")


def test_standard_input_is_an_image(options: list[object], of_ship: str) -> None:
    alone = predict("-", "--json", *options, stdin=SHIP.read_bytes())
    assert alone.exit_code == 0, alone.output
    assert alone.stdout == of_ship
    among_files = predict(CAT, "-", "--json", *options, stdin=SHIP.read_bytes())
    assert among_files.exit_code == 0, among_files.output
    assert among_files.stdout.splitlines(keepends=True)[1] == of_ship
    words = predict("-", *options, stdin=SHIP.read_bytes())
    assert words.stdout.startswith("ship  radius 0.")


def test_certificates_of_many_images_can_be_verified(options: list[object], of_ship: str, tmp_path: Path) -> None:
    (tmp_path / "ship.json").write_text(of_ship)
    arguments = ["verify", str(tmp_path / "ship.json")]
    result = CliRunner().invoke(main, [*arguments, "-", "--key", str(options[-1]), "--no-recount"], SHIP.read_bytes())
    assert result.exit_code == 20, result.output  # consistent
    result = CliRunner().invoke(main, [*arguments, "https://example.org/x.png"])
    assert (result.exit_code, "addresses are not fetched" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/x.png",
        "https://example.org/x.png",
        "HTTP://EXAMPLE.ORG/X.PNG",
        "http:/127.0.0.1/x.png",
        "ftp://example.org/x.png",
        "s3://bucket/x.png",
        "gs://bucket/x.png",
        "hdfs://host/x.png",
        "file:///etc/hostname",
        "sftp://host/x.png",
        "data:image/png;base64,iVBORw0KGgo=",
    ],
)
def test_addresses_are_refused(address: str) -> None:
    result = predict(address)
    assert result.exit_code == 2
    assert result.stderr == f"macer: {address}: addresses are not fetched; download the image and give its path\n"


@pytest.mark.parametrize("name", ["http:.png", "C:x.png", "a:b", "data.png"])
def test_a_file_may_have_a_colon_in_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(HEIC)
    assert predict(name).stderr == f"macer: {name}: HEIF or AVIF is not accepted: send a PNG, JPEG or WebP file\n"


def test_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder.png")
    for name in (".", "..", "folder.png", "folder.png/", "link", str(tmp_path), "./folder.png/../folder.png"):
        result = predict(name)
        assert result.exit_code == 8
        assert result.stderr == f"macer: {name} is a folder, not an image: give the files in it\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HEIC, "HEIF or AVIF is not accepted"),
        (AVIF, "HEIF or AVIF is not accepted"),
        (b"GIF89a" + bytes(20), "GIF is not accepted"),
        (b"%PDF-1.7", "PDF is not accepted"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not accepted"),
        (b"", "the file is empty"),
        (b"hello", "the file is not an image"),
        (SHIP.read_bytes()[:100], "truncated or damaged"),
    ],
)
def test_other_files_are_refused_by_name(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for arguments in ((path,), (SHIP, path), (path, SHIP), (SHIP, path, CAT, "--json")):
        result = predict(*arguments)
        assert result.exit_code == 8
        assert result.stdout == "", "nothing is certified if one of the files cannot be used"
        assert result.stderr.startswith(f"macer: {path}: ")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    piped = predict("-", stdin=data)
    assert piped.exit_code == 8
    assert piped.stderr.startswith("macer: standard input: ")
    assert words in piped.stderr


def test_standard_input_is_given_once() -> None:
    result = predict("-", SHIP, "-", stdin=SHIP.read_bytes())
    assert result.exit_code == 2
    assert "can be given once" in result.stderr


def test_no_image_at_all() -> None:
    assert predict().exit_code == 2


def test_a_file_named_like_an_option(options: list[object], of_ship: str, tmp_path: Path) -> None:
    shutil.copy(SHIP, tmp_path / "-")
    result = predict("--json", *options, "--", tmp_path / "-")
    assert result.exit_code == 0, result.output
    assert result.stdout == of_ship


def test_the_library_names_the_file_too(tmp_path: Path) -> None:
    g = SmoothedClassifier(load_config("bundled:cifar10"), noise="exact", issuer=issuer(), limits=None)  # type: ignore[arg-type]
    (tmp_path / "x.heic").write_bytes(HEIC)
    with pytest.raises(UnsupportedTypeError, match=r"x\.heic: HEIF"):
        g.model_input(tmp_path / "x.heic")
    with pytest.raises(UndecodableError, match="is a folder"):
        g.model_input(tmp_path)
    with pytest.raises(ParameterError, match="not fetched"):
        g.model_input(Path("https://example.org/x.png"))
