"""The pages in a real browser, wide and narrow: nothing is asked of the network, nothing goes wrong, tips are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.study.test_study import spec_of
from tsotsallm.study.study import open_study, run_study
from tsotsallm.study.verdict import names_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny: Path, text: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run_study(spec_of(text), str(tiny), folder / "study")
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 2, 2]}}, "rtn:4:channel"], folder / "small")
    tsotsallm.write_report([folder / "study"], folder / "study.html")
    tsotsallm.write_report([folder / "small"], folder / "small.html", reference=tiny, text=text, limit=3, tokens=3)
    return {"study": folder / "study.html", "small": folder / "small.html", "folder": folder}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["study", "small"])
def test_a_page_opens_without_a_word(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{pages[name]}")
    assert said == []
    assert asked == [f"file://{pages[name]}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width       # nothing makes the page scroll sideways
    for figure in page.query_selector_all("figure svg"):
        box = figure.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 60
    shot = page.screenshot(full_page=True)
    assert len(shot) > 20_000
    page.close()


def test_what_a_point_is_can_be_read_by_key_and_by_pointer(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"file://{pages['study']}")
    found = open_study(pages["folder"] / "study")
    trial = found.front[0]
    mark = page.locator(f'#front-description ~ * .tip[aria-label^="{trial.number}: "]').first
    mark.scroll_into_view_if_needed()
    page.evaluate("mark => mark.focus()", mark.element_handle())
    assert page.locator("#tip").inner_text().startswith(f"{trial.number}: {names_of(found.trials)[trial.number]}, kl")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    mark.hover(force=True)
    assert page.locator("#tip").is_visible()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    page.close()
