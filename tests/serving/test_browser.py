"""The web page in a real browser: what a visitor sees of a certificate, an abstention and a mistake."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from macer_serve.verification import read_document

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = os.environ.get("MACER_REQUIRE_BROWSER") == "1"  # where all is said to be installed, nothing is skipped
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED, reason="no chromium on this machine (apt-get install chromium)"
)

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    """The page, loaded; at the end nothing may have failed, gone elsewhere, or run that is not its own."""
    context = browser.new_context(viewport={"width": 900, "height": 900}, accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: (faults.append("a script ran"), dialog.dismiss()))
    tab.on("request", lambda r: None if r.url.startswith((server.url, "blob:", "data:")) else faults.append(r.url))
    tab.goto(server.url + "/")
    tab.wait_for_selector("#model option", state="attached")
    yield tab
    context.close()
    assert not faults


def test_an_upload_gets_its_class_and_radius(page: Any, ship: Path) -> None:
    assert page.locator("#model option").all_text_contents() == ["cifar10", "quick"]
    assert page.input_value("#model") == "cifar10"
    page.set_input_files("#file", ship)
    page.click("#certify")
    page.wait_for_selector(".class.certified")
    assert page.text_content(".class") == "ship"
    with page.expect_download() as download:
        page.click("summary")
        page.click("#download")
    saved = Path(download.value.path()).read_bytes()
    certificate = json.loads(saved)["certificate"]
    assert read_document(saved).jws is not None, "what is saved can be checked, signature included"
    assert download.value.suggested_filename in page.inner_text("#command")
    assert page.get_attribute("#details a:last-of-type", "href") == ".well-known/jwks.json"
    assert certificate["label"] == "ship"
    assert 0 < certificate["n"] <= 10_000
    assert certificate["stopped"] in ("tolerance", "cap")
    assert f"Certified radius {certificate['radius']:.6f}" in page.inner_text("#outcome")
    assert certificate["statement"] in page.inner_text("#answer")
    assert page.locator("#image").is_visible()


def test_a_broken_file_shows_the_problem_and_no_answer(page: Any, ship: Path, tmp_path: Path) -> None:
    page.select_option("#model", "quick")
    page.set_input_files("#file", ship)
    page.click("#certify")
    page.wait_for_selector(".class")
    broken = tmp_path / "broken.png"
    broken.write_bytes(ship.read_bytes()[:8] + bytes(200))  # a browser would draw the upper part of a truncated one
    page.set_input_files("#file", broken)
    assert page.locator(".class").count() == 0  # an answer never stands beside another image
    page.click("#certify")
    page.wait_for_selector(".problem")
    assert "Image cannot be decoded: " in page.inner_text(".problem")
    page.wait_for_selector("#image", state="hidden")
    assert page.is_enabled("#certify")


def test_nothing_in_an_answer_is_markup(page: Any, ship: Path) -> None:
    """Labels and reasons come from checkpoints that others made; scripts in them, and in file names, stay text."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"

    def abstention(route: Any) -> None:
        answer = {"abstained": True, "label": None, "reason": evil, "radius": 0, "upload_radius": 0}
        answer |= {"top": [{"label": evil, "class_id": 0, "votes": 5}], "certificate": {"statement": evil, "n": 5}}
        route.fulfill(content_type="text/event-stream", body=f"event: result\ndata: {json.dumps(answer)}\n\n")

    page.route("**/predict?**", abstention)
    page.set_input_files("#file", {"name": evil, "mimeType": "image/png", "buffer": ship.read_bytes()})
    page.click("#certify")
    page.wait_for_selector(".class.abstained")
    assert page.text_content("#outcome .radius") == evil
    assert page.locator("#outcome img, #answer img, #answer script").count() == 0
    # And were markup ever to come in, the content security policy would not run it.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=alert(3)>')")
    page.wait_for_timeout(200)


def test_a_stream_that_breaks_off_is_not_taken_for_an_answer(page: Any, ship: Path) -> None:
    state = {"label": "ship", "abstained": False, "n": 1234, "radius": 0.25, "upload_radius": 0.25, "certificate": {}}
    body = f"event: progress\ndata: {json.dumps(state)}\n\nevent: resu"
    page.route("**/predict?**", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.set_input_files("#file", ship)
    page.click("#certify")
    page.wait_for_selector(".problem")
    assert "before it was complete" in page.inner_text(".problem")
    assert page.locator(".class").count() == 0


def test_a_fault_in_the_middle_is_shown_as_the_problem_it_is(page: Any, ship: Path) -> None:
    fault = {"title": "No voter is available", "detail": "try again", "status": 503, "type": "about:blank"}
    body = f"event: error\ndata: {json.dumps(fault)}\n\n"
    page.route("**/predict?**", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.set_input_files("#file", ship)
    page.click("#certify")
    page.wait_for_selector(".problem")
    assert page.inner_text(".problem") == "No voter is available: try again"


def test_an_answer_that_is_not_json_is_shown_as_what_it_is(page: Any, ship: Path) -> None:
    page.route("**/predict?**", lambda route: route.fulfill(status=503, content_type="text/plain", body="busy"))
    page.set_input_files("#file", ship)
    page.click("#certify")
    page.wait_for_selector(".problem")
    assert page.inner_text(".problem") == "The server answered 503."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling(page: Any, ship: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 340, "height": 700})
    page.select_option("#model", "quick")
    page.set_input_files("#file", ship)
    page.click("#certify")
    page.wait_for_selector(".class")
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 340


def test_the_documentation_works_offline_and_sends_a_request(browser: Any, server: Any, ship: Path) -> None:
    """Every request goes to this server; "Try it out" certifies an image."""
    context = browser.new_context(viewport={"width": 1200, "height": 1600})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda r: None if r.url.startswith((server.url, "blob:", "data:")) else faults.append(r.url))
    tab.goto(server.url + "/docs")
    tab.click('[data-path="/predict"]')
    operation = tab.locator(".opblock.is-open")
    operation.locator(".try-out__btn").click()
    operation.locator('tr[data-param-name="model"] input').fill("quick")
    operation.locator('input[type="file"]').set_input_files(ship)
    operation.locator(".execute").click()
    operation.locator(".live-responses-table .response-col_status").first.wait_for()
    assert operation.locator(".live-responses-table .response .response-col_status").first.inner_text().strip() == "200"
    assert '"ship"' in operation.locator(".live-responses-table .response .response-col_description").first.inner_text()
    context.close()
    assert not faults
