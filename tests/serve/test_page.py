"""The local page in a real browser: talk, side by side, a run of the studio, stopping; nothing asked of the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.serve.running import Scripted, serving, until, with_scripted
from tsotsallm.serve.guard import Rules
from tsotsallm.serve.served import Loading, Models, load_all

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the extra [dev]")
pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
pytestmark = pytest.mark.slow
EXPECTED_WORDS = "Failed to load resource"
"""What Chromium says of an answer that is an error; the page tells it in words."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced model and its file, with a report beside it."""
    out = tmp_path_factory.mktemp("studio")
    tsotsallm.compress("embedded", [{"layers": {"skip": [3, 8]}}, "rtn:q4_0"], out / "small")
    (out / "small" / "report.html").write_text("<!DOCTYPE html><title>What was lost</title>")
    return out


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    found = Models()
    tsotsallm.to_gguf(folder / "small", folder / "small" / "small.gguf", verify=False)
    tsotsallm.to_gguf("embedded", folder / "embedded.gguf", verify=False)
    load_all([f"embedded={folder / 'embedded.gguf'}", str(folder / "small" / "small.gguf")], Loading(slots=2), found,
             lambda _line: None)
    return found


@contextmanager
def page_at(browser: Any, address: str, width: int = 1280, path: str = "/", *, language: str = "en-GB",
            expected: int = 0) -> Iterator[Any]:
    """A page on which nothing must go wrong: no word on the console, no request elsewhere, no sideways scroll."""
    context = browser.new_context(viewport={"width": width, "height": 900}, locale=language)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(address + path)
    page.wait_for_selector("html[data-ready]")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [one for one in said if EXPECTED_WORDS not in one] == []
    assert len(said) <= expected
    assert [url for url in asked if not url.startswith((address, "blob:"))] == []
    context.close()


def ask(page: Any, text: str, answers: int = 1) -> list[str]:
    """Send a prompt and wait for its answers; their texts."""
    page.fill("#prompt", text)
    page.click("#send")
    page.wait_for_selector("#send:not([disabled])", timeout=60_000)
    found = [page.locator(f'[data-testid="answer-{name}"]').last for name in "ab"[:answers]]
    for one in found:
        assert one.get_attribute("aria-busy") == "false"
        facts = one.locator('[data-testid="facts"]').inner_text()
        assert re.search(r"tokens?/s|tokens a second", facts), facts
    return [one.locator('[data-testid="text"]').inner_text() for one in found]


def no_serious_fault(page: Any) -> None:
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["help"]) for one in found if one["impact"] in ("serious", "critical")] == []


def steady(page: Any) -> None:
    """The likeliest tokens, so that what is said is known."""
    if not page.locator("#temperature").is_visible():
        page.click("#sampling summary")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "12")


@pytest.mark.parametrize("width", [1280, 390])
def test_talking(browser: Any, models: Models, width: int, tmp_path: Path) -> None:
    from tsotsallm.engine.interface import Question, said

    with serving(models) as address, page_at(browser, address, width) as page:
        page.select_option("#model-a", "small")
        steady(page)
        question = "Where was Ada born?"
        [text] = ask(page, question)
        expected = said(models.by_name["small"].speaker, Question(({"role": "user", "content": question},), 12))
        assert text.strip() == expected.strip()
        ask(page, "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>")
        assert "broken" not in page.title()
        assert page.locator("main img, main script").count() == 0
        page.check("#surprise")
        ask(page, question)
        token = page.locator(".token").first
        token.hover()
        assert page.locator("#tip").is_visible()
        no_serious_fault(page)
        assert len(page.screenshot(path=tmp_path / f"talk-{width}.png", full_page=True)) > 20_000


@pytest.mark.parametrize("width", [1280, 390])
def test_side_by_side(browser: Any, models: Models, width: int, tmp_path: Path) -> None:
    with serving(models) as address, page_at(browser, address, width, language="fr-FR") as page:
        assert page.get_attribute("html", "lang") == "fr"
        page.select_option("#language", "en")
        page.select_option("#model-a", "small")
        page.check("#compare")
        assert page.input_value("#model-b") == "embedded"           # what it was made from, as its file says
        steady(page)
        page.fill("#max-tokens", "40")
        first, second = ask(page, "Tell me of the town of Bedomo.", answers=2)
        assert first
        assert second
        marks = page.locator('[data-testid="answer-a"]').last.locator("mark").count()
        assert (marks > 0) == (first.split() != second.split())
        page.click("#card-a summary")
        assert "q4_0" in page.locator("#card-a").inner_text()
        no_serious_fault(page)
        page.screenshot(path=tmp_path / f"side-{width}.png", full_page=True)


def test_errors_and_stopping(browser: Any, models: Models) -> None:
    both = with_scripted(endless := Scripted())
    both.add(models.by_name["embedded"])
    with serving(both, most_tokens=100_000) as address, page_at(browser, address, expected=4) as page:
        page.select_option("#model-a", "scripted")
        page.click("#sampling summary")
        page.fill("#max-tokens", "100000")
        page.fill("#prompt", "Say a word.")
        page.click("#send")
        page.wait_for_selector("#stop:not([disabled])")
        until(lambda: page.evaluate("document.querySelector('[data-testid=text]')?.innerText.length ?? 0") > 10)
        page.click("#stop")
        page.wait_for_selector("#send:not([disabled])")
        until(lambda: endless.ended == 1, 10)
        page.select_option("#model-a", "embedded")
        page.click("#new-conversation")
        page.fill("#prompt", "word " * 5000)
        page.click("#send")
        page.wait_for_selector("#error:visible")
        assert "token" in page.locator("#error").inner_text()
        no_serious_fault(page)


def test_the_key(browser: Any, models: Models) -> None:
    with serving(models, Rules(key="a-key-of-tests")) as address, page_at(browser, address, expected=2) as page:
        no_serious_fault(page)
        page.fill("#key", "wrong-key")
        page.press("#key", "Enter")
        page.wait_for_selector("#error:visible")
        page.fill("#key", "a-key-of-tests")
        page.press("#key", "Enter")
        page.wait_for_selector("#prompt:visible")
        steady(page)
        assert ask(page, "Where was Ada born?")[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_studio_from_choice_to_talk(browser: Any, width: int, tmp_path: Path) -> None:
    """The embedded model made smaller by a recipe: the plan, progress that moves, stopping, going on, talking."""
    (own := tmp_path / "studio").mkdir()
    with serving(Models(), studio=own) as address, page_at(browser, address, width, "/#studio") as page:
        page.select_option("#studio-model", "embedded")
        page.check("#goal-recipe")
        page.fill("#recipe", "skip:3, gptq:4:64")
        page.click("#see-plan")
        page.wait_for_selector("#plan-facts:visible")
        assert "tsotsallm compress embedded" in page.locator("#plan-command").inner_text()
        page.click("#start-job")
        share = "+(document.querySelector('#job-progress')?.getAttribute('aria-valuenow') ?? 0)"
        until(lambda: page.evaluate(share) > 3, 120)
        seen = page.evaluate(share)
        until(lambda: page.evaluate(share) > seen, 120)
        no_serious_fault(page)
        page.screenshot(path=tmp_path / f"running-{width}.png", full_page=True)
        page.click("#stop-job")
        page.wait_for_selector('#job-state[data-state="stopped"]', timeout=60_000)
        assert list(own.glob("*.partial"))
        page.click("#resume-job")
        page.wait_for_selector('#job-state[data-state="done"]', timeout=240_000)
        [made] = own.glob("embedded-recipe*/tsotsallm.json")
        assert made.exists()
        page.click("#talk-to-result")
        page.wait_for_selector("#prompt:visible")
        steady(page)
        assert ask(page, "Where was Ada born?")[0]
        page.screenshot(path=tmp_path / f"done-{width}.png", full_page=True)


def test_the_studio_fits_and_reports(browser: Any, tmp_path: Path) -> None:
    """The goal of most people: a size. What comes out has a file and a report, which opens by itself."""
    (own := tmp_path / "studio").mkdir()
    with serving(Models(), studio=own) as address, page_at(browser, address, 1280, "/#studio", expected=1) as page:
        page.check("#goal-bytes")
        page.fill("#bytes", "lots")
        page.click("#see-plan")
        page.wait_for_selector("#error:visible")
        page.click("#close-error")
        page.fill("#bytes", "9MB")
        page.fill("#minutes", "1")
        page.check("#quick")
        page.click("#start-job")
        page.wait_for_selector('#job-state[data-state="done"]', timeout=900_000)
        assert (own / "embedded-9MB" / "model.gguf").stat().st_size <= 9_000_000
        with page.context.expect_page() as opened:
            page.click("#open-report")
        report = opened.value
        report.wait_for_load_state()
        assert report.locator("h1").inner_text()
        assert report.evaluate("getComputedStyle(document.body).maxWidth") != "none"        # its own styles are allowed
        report.close()
        page.click("#talk-to-result")
        page.wait_for_selector("#prompt:visible")
        steady(page)
        assert ask(page, "Where was Ada born?")[0]
