"""The pages are true: links, files, commands, options and examples exist, and the drawings are those of the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import house
import pytest
from pages import PAGES, ROOT, anchors, blocks, commands, files, inline, links, name_of, prose

from macer_serve import errors
from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.issuing import KeySet
from macer_serve.serving.schemas import Answer, Problem
from macer_serve.smoothing.certificate import Certificate
from macer_serve.verification import Verdict, read_document, verify

README, HTTP, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "http.md", ROOT / "docs" / "architecture.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def cells(page: Path, heading: str) -> list[list[str]]:
    """Returns the rows of the first table below a heading, without its head."""
    section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table, f"{page} has no table below {heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[0].splitlines()[2:]]


# --- links and files --------------------------------------------------------------------------------------------------


@each_page
def test_links_lead_to_something(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link} leads nowhere"
        assert ROOT in (path, *path.parents), f"{link} leads out of the project"
        assert not anchor or anchor in anchors(path), f"{link}: there is no such heading"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    """Files of users (below `runs/`, or with a placeholder in capitals) are left out."""
    for code in inline(page):
        path = code.removeprefix("../").rstrip("/")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+|[\w-]+\.(py|md|yaml)", path):
            continue
        parts = path.split("/")
        if parts[0] in ("runs", "image", "application", "multipart", "text") or any(p.isupper() for p in parts):
            continue
        if any(re.match(r"[A-Z]{3,}\b", part) for part in parts):  # NAME.py: its folder must exist
            path = "/".join(parts[:-1])
        assert any(known == path or known.endswith(f"/{path}") for known in files()), f"{code} does not exist"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    reached = {(index.parent / link).resolve() for link in links(index)} | {index}
    reached |= {(page.parent / link.partition("#")[0]).resolve() for page in list(reached) for link in links(page)}
    assert not [name_of(page) for page in PAGES if page not in reached]


def test_no_page_but_results_lies_beside_logs() -> None:
    assert {Path(name).suffix for name in files() if name.startswith("docs/")} == {".md", ".png", ".jwks"}


# --- commands ---------------------------------------------------------------------------------------------------------


def check_macer(words: list[str]) -> None:
    """Fails unless `macer` has the command with these options."""
    context = click.Context(main)
    if not words or words[0].startswith("-"):
        return
    command = main.get_command(context, words[0])
    assert command is not None, f"macer {words[0]} does not exist"
    try:
        command.make_parser(click.Context(command)).parse_args(list(words[1:]))
    except click.UsageError as error:
        raise AssertionError(f"macer {' '.join(words)}: {error.format_message()}") from None


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    for program, *words in commands(page):
        if program == "macer":
            check_macer(words)
        elif program == "serve":
            assert words[0] in ("run", "status", "deploy"), words
            assert words[1:2] in ([], ["deployments/smoothed.yaml"]), words
        elif program == "python" and words and words[0].endswith(".py"):
            source = (ROOT / words[0]).read_text(encoding="utf-8")
            if "--train" in words:  # hands the rest to `macer train`
                check_macer(["train", *words[words.index("--train") + 1 :]])
                words = words[: words.index("--train")]
            for word in words[1:]:
                assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in source, f"{words[0]} has no {word}"
        elif program.startswith(("scripts/", ".ci/")):
            assert (ROOT / program).is_file()


def test_wrong_commands_would_be_seen() -> None:
    for words in (["trane"], ["train", "--epoch-s", "3"], ["certify", "--dataset"]):
        with pytest.raises(AssertionError, match=f"macer {words[0]}"):
            check_macer(words)


@each_page
def test_options_that_are_named_exist(page: Path) -> None:
    """Alone, as `--n`: an option of some command of `macer`, or of a benchmark."""
    context = click.Context(main)
    known = {"--torch-backend"}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        known |= {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    for code in inline(page):
        option = code.split()[0].partition("=")[0]
        if re.fullmatch(r"--[a-z][a-z0-9-]*", option):
            assert option in known or f'"{option}"' in benchmarks, f"there is no option {option}"


# --- README -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_names_its_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    serves, tests = re.findall(r"^    (pip install .*)$", text, re.MULTILINE)
    assert re.fullmatch(r"pip install \. && (serve run deployments/smoothed\.yaml|macer serve)", serves)
    assert tests == "pip install '.[test]' && pytest"
    # `.ci/run` runs the second one: its own pattern finds it, and nothing else.
    pattern = re.search(r"s/\^(.*)\\\((.*)\\\)\$/", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert pattern
    found = re.findall(f"^{pattern[1]}({pattern[2]})$", text, re.MULTILINE)
    assert found == [tests]


def test_every_claim_names_its_benchmark_hardware_and_runs() -> None:
    rows = cells(README, "Claims")
    assert len(rows) >= 6
    for claim, figure, hardware, runs, printed_by in rows:
        assert claim
        assert re.search(r"\d", figure), claim
        assert re.search(r"cores?\b|GPU", hardware), claim
        assert re.match(r"\d+", runs), claim
        linked = re.fullmatch(r"\[(.*)\]\((.*)\)", printed_by)
        assert linked, claim
        assert linked[1] == linked[2]
        assert (ROOT / linked[1]).is_file()
        assert linked[1].startswith(("benchmarks/", "results/"))


def test_the_readmes_program_runs() -> None:
    (code,) = blocks(README, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    label, radius = done.stdout.split()
    assert label == "ship"
    assert 0.6 < float(radius) < 1.0


def test_shell_completion_as_described_knows_the_commands() -> None:
    from click.shell_completion import get_completion_class

    spoken = re.findall(r"\b(\w+)_source\b", README.read_text(encoding="utf-8"))
    assert set(spoken) == {"bash", "zsh"}
    for shell in spoken:
        kind = get_completion_class(shell)
        assert kind is not None
        completion = kind(main, {}, "macer", "_MACER_COMPLETE")
        assert "_MACER_COMPLETE=" in completion.source_vars()["complete_var"] + "="
        assert [item.value for item in completion.get_completions([], "tr")] == ["train"]


# --- the HTTP page ----------------------------------------------------------------------------------------------------


def documented_answer() -> dict[str, Any]:
    documents = [json.loads(block) for block in blocks(HTTP, "json")]
    (found,) = [document for document in documents if "certificate" in document]
    return dict(found)


def test_the_documented_answer_is_one_that_the_server_gives() -> None:
    """The record follows from itself, and is about the image and the bundled checkpoint that the page names."""
    answer = documented_answer()
    assert list(answer) == list(Answer.model_fields)
    Answer.model_validate(answer)
    certificate = Certificate.from_json(answer["certificate"])
    image = ROOT / "tests" / "images" / "0001-ship.png"
    keys = KeySet.read((ROOT / "docs" / "example.jwks").read_bytes())
    document = read_document(json.dumps(answer).encode())
    assert document.certificate == certificate
    report = verify(document, image, load_config("bundled:cifar10"), keys=keys)
    assert report.verdict is Verdict.CONSISTENT, report.reasons
    assert [finding.check for finding in report.not_checked] == ["votes counted again"]


def test_the_readmes_session_is_that_answer() -> None:
    (session,) = [block for block in blocks(README) if block.startswith("$ curl")]
    compact = "".join(json.dumps(documented_answer(), separators=(",", ":")).split())
    pieces = ["".join(piece.split()) for piece in session.partition("\n")[2].split("...")]
    for piece in filter(None, pieces):
        assert piece in compact, "run the command in the head of scripts/examples, and copy its numbers"


def test_the_documented_problem_is_one_that_the_server_gives() -> None:
    (document,) = [json.loads(block) for block in blocks(HTTP, "json") if "title" in json.loads(block)]
    Problem.model_validate(document)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MacerError)]
    assert document["title"] in {kind.title for kind in kinds}


def test_parameters_paths_and_statuses_are_those_of_the_server() -> None:
    from macer_serve.serving.ingress import app

    paths = app.openapi()["paths"]
    operation = paths["/predict"]["post"]
    parameters = [row[0].strip("`") for row in cells(HTTP, "Parameters")]
    assert sorted(parameters) == sorted(parameter["name"] for parameter in operation["parameters"])
    statuses = {row[0] for row in cells(HTTP, "Errors")} | {"200"}
    assert set(operation["responses"]) <= statuses
    named = set(re.findall(r"`(?:GET|POST) (/[\w/.-]*)`", prose(HTTP)))
    assert {path for path in paths if not path.startswith("/-/")} <= named
    assert named <= {*paths, "/", "/docs", "/metrics", app.openapi_url}


# --- the architecture -------------------------------------------------------------------------------------------------


def test_the_drawn_rooms_import_downwards_only() -> None:
    (drawing,) = [block for block in blocks(ARCHITECTURE) if block.lstrip().startswith("┌")]
    rows = [line.split("│")[1].split() for line in drawing.splitlines() if "│" in line]
    level = {room: number for number, row in enumerate(rows) for room in row}
    missing = {path.name for path in packages()} - set(level)
    assert not missing, f"docs/architecture.md must draw {missing}"
    for module, imported in house.imports().items():
        for other in imported:
            here, there = house.room(module), house.room(other)
            if here != there and here in level and there in level:
                assert level[here] < level[there], f"{module} imports {other}, which the page draws above or beside it"


def test_packages_import_what_the_page_allows() -> None:
    allowed = {row[0].strip("`"): row[1] for row in cells(ARCHITECTURE, "The rooms and their arrows")}
    assert set(allowed) == {path.name for path in packages()}
    for module, imported in house.imports().items():
        here = house.room(module)
        for other in {house.room(name) for name in imported} & set(allowed) - {here}:
            if here in allowed:
                assert allowed[here] == "all" or f"`{other}`" in allowed[here], f"{module} imports {other}"


def test_every_package_and_module_is_explained() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for path in packages():
        name = path.relative_to(ROOT).as_posix()
        assert f"**`{name}/`**" in text, f"docs/architecture.md must say what {name} does"
    for path in (ROOT / "macer_serve").glob("*.py"):
        known = path.name in ("__init__.py", "version.py") or f"`{path.name}`" in text
        assert known, f"docs/architecture.md must say what macer_serve/{path.name} does"


def packages() -> set[Path]:
    """Returns the folders of the rooms that are packages. Links to a folder are that folder."""
    inside = {path.parent.resolve() for path in (ROOT / "macer_serve").glob("*/__init__.py")}
    return inside | {ROOT / "training"}


# --- contributing -----------------------------------------------------------------------------------------------------


def test_the_tables_to_extend_stand_where_the_page_says() -> None:
    found = re.findall(r"`([A-Z]+)`\s+in\s+`([\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {"ENGINES", "BOUNDS", "FORMATS", "DATASETS"} <= {name for name, _ in found}
    for name, file in found:
        assert re.search(rf"^{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{name} in {file}"
    for code in inline(ROOT / "CONTRIBUTING.md"):
        if code.endswith("/NAME.py"):  # one new file per addition, beside others of its kind
            assert len(list((ROOT / code).parent.glob("*.py"))) > 2
