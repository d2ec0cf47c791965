"""The page in a real Chromium: every view opened, searched, dragged, resized; nothing is run."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from saeguard.browse.export import export
from saeguard.browse.server import app
from tests.browse.hostile import SCRIPT, make_site
from tests.latents.made import Made

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VIEWS = ("/", "/?q=a", "/latent/1", "/feature/loud", "/policy/noise.own", "/events", "/event/0")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a served page over hostile texts."""
    listening = socket.create_server(("127.0.0.1", 0))
    served = app(*make_site(made, tmp_path_factory.mktemp("chromium")))
    server = uvicorn.Server(uvicorn.Config(served, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test if a script fails, or anything violates the policy."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    wrong: list[str] = []

    def told(line: Any) -> None:
        if line.type == "error" and "(Bad Request)" not in line.text:  # a text that is refused
            wrong.append(line.text)

    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", told)
    yield page
    context.close()
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_at_any_width(page: Any, address: str, scheme: str) -> None:
    """At 390 pixels nothing reaches beyond the window; hostile texts do nothing."""
    page.emulate_media(color_scheme=scheme)
    for width in (390, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        for view in VIEWS:
            page.goto(address + view)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (view, width)
            assert page.evaluate("window.owned") is None
            assert page.evaluate("document.querySelectorAll('main img').length") == 0
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert body == {"light": "rgb(246, 245, 242)", "dark": "rgb(21, 23, 26)"}[scheme]
    assert SCRIPT in page.goto(address + "/policy/noise.own").text() or SCRIPT in page.inner_text(
        "main"
    )


def test_keys_go_from_latent_to_latent(page: Any, address: str) -> None:
    """Keys j and k, slash for the search, h for the start; not while typing."""
    page.goto(address + "/latent/1")
    page.keyboard.press("j")
    page.wait_for_url("**/latent/2")
    page.keyboard.press("k")
    page.wait_for_url("**/latent/1")
    page.keyboard.press("/")
    page.keyboard.type("17jk")
    assert page.input_value("#q").endswith("17jk")
    page.fill("#q", "17")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=17")
    assert page.locator("a.n").all_inner_texts() == ["17"]
    page.keyboard.press("h")
    page.wait_for_url(address + "/")


def test_the_threshold_can_be_dragged(page: Any, address: str) -> None:
    """Counts follow the slider: all texts above the lowest, none above the highest."""
    page.goto(address + "/feature/loud")
    slider = page.locator("input[type=range]")
    before = page.locator("td.pos").first.inner_text()
    assert " of 9" in before
    slider.focus()
    page.keyboard.press("End")
    assert page.locator("td.pos").first.inner_text() == "0 of 9"
    assert page.locator(".over:visible").count() == 0
    page.keyboard.press("Home")
    assert int(page.locator("td.pos").first.inner_text().split()[0]) >= 8
    assert page.locator(".over:visible").count() > 0


def test_a_text_is_tried(page: Any, address: str) -> None:
    """Tokens appear as text; choosing one lists its latents; an error is told."""
    page.goto(address + "/latent/1")
    page.fill("textarea[name=prompt]", SCRIPT)
    page.click("button")
    page.wait_for_selector(".result .token")
    assert SCRIPT in page.locator(".result").inner_text()
    page.locator(".result .token").nth(12).click()
    assert page.locator(".fired a").count() > 0
    assert page.evaluate("window.owned") is None
    page.goto(address + "/event/0")
    page.click("button")
    page.wait_for_function("document.querySelector('.state').textContent.includes('special')")


def test_the_map_leads_to_neighbours(page: Any, address: str) -> None:
    """Dots are links; the figure keeps its height while it loads."""
    page.goto(address + "/latent/1")
    height = page.locator(".map").bounding_box()["height"]
    page.wait_for_selector(".map circle", timeout=120_000)
    assert page.locator(".map").bounding_box()["height"] == height
    assert page.locator(".map a").count() == 61


def test_axe_finds_no_serious_fault(page: Any, address: str) -> None:
    """Names, roles and contrast of every view, light and dark."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for view in VIEWS:
            page.goto(address + view)
            found = [
                (view, scheme, fault["id"], fault["nodes"][0]["html"])
                for fault in Axe().run(page).response["violations"]
                if fault["impact"] in {"serious", "critical"}
            ]
            assert found == []


def test_written_pages_work_without_a_server(page: Any, made: Made, tmp_path: Any) -> None:
    """Style and script load from files; the search hides rows."""
    site, _ = make_site(made, tmp_path)
    export(site, tmp_path / "pages", [1, 2, 17])
    page.goto((tmp_path / "pages" / "index.html").as_uri())
    assert page.locator("tr.row:visible").count() == 3
    page.fill("#q", "17")
    assert page.locator("tr.row:visible").count() >= 1
    page.locator("tr.row:visible a.n").last.click()
    page.wait_for_url("**/latent/*.html")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.panel')).borderRadius") == "10px"
    )
