"""The pages in a real browser, wide and narrow: nothing is asked of the network, nothing goes wrong, tips are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.study.test_study import spec_of
from tsotsallm.inspection import LayerMap
from tsotsallm.report import drawings
from tsotsallm.report.document import Document, Glance, Section
from tsotsallm.report.page import write
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
    linears = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    plan = LayerMap(30, tuple(layer for layer in range(30) if layer not in (20, 21)),
                    tuple(dict.fromkeys(linears, 4.25 + layer % 3) for layer in range(28)), {"embeddings": 8.5})
    figures = [drawings.layers("layers", plan, "A map of 30 layers."),
               drawings.bytes_by_part("bytes", {"model": {"embeddings": 10 ** 6, "attention": 10 ** 7}}, "Bytes."),
               drawings.by_place("importance", {str(layer): 8.0 + layer % 7 for layer in range(30)}, "layer", "perplexity",
                                 "Importance.", marked=["20"], baseline=7.0),
               drawings.plane("front", [drawings.Point(1.0, 0.1, "one", True, 0.02, "a kind"), drawings.Point(
                   2.0, 0.2, "two", False, 0.02, "another kind")], "megabytes", "KL divergence", "A front.")]
    write(Document("Wide pictures", Glance("A model", "1 MB", "nothing", "tsotsallm chat small"),
                   [Section("Pictures", figures)]), folder / "wide.html")
    return {"study": folder / "study.html", "small": folder / "small.html", "wide": folder / "wide.html", "folder": folder}


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


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["study", "small", "wide"])
def test_a_page_has_no_serious_fault_of_access(browser: Any, pages: dict[str, Path], name: str, scheme: str,
                                               width: int) -> None:
    browsing = pytest.importorskip("tests.serve.browsing", reason="axe is in the extra [dev]")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(f"file://{pages[name]}")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browsing.no_serious_fault(page)
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_letters_of_a_map_of_thirty_layers_can_be_read(browser: Any, pages: dict[str, Path], width: int) -> None:
    """They have 9 pixels or more; the picture is scrolled inside its box where the screen is narrow, not the page."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"file://{pages['wide']}")
    letters = page.evaluate("""() => [...document.querySelectorAll('figure svg')].map(svg => {
        const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        return Math.min(...[...svg.querySelectorAll('text')].map(one => scale * parseFloat(getComputedStyle(one).fontSize)));
    })""")
    assert len(letters) == 4        # the map, bytes, importance, and a plane
    assert min(letters) >= 9
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate("[...document.querySelectorAll('figure .wide')].map(one => [one.scrollWidth, one.clientWidth])")
    assert (boxes[0][0] > boxes[0][1]) == (width == 390)
    page.emulate_media(media="print")
    assert page.evaluate("[...document.querySelectorAll('figure svg')].every(svg => svg.getBoundingClientRect().width "
                         "<= svg.parentElement.clientWidth)")
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
