"""The page in a real browser, on which nothing may go wrong, and what a user does there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the extra [dev]")
EXPECTED_WORDS = "Failed to load resource"
"""What Chromium says of an answer that is an error; the page tells it in words."""


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


@contextmanager
def settings(page: Any) -> Iterator[None]:
    """The panel of settings, open for a while."""
    page.click("#open-settings")
    yield
    page.click("#close-settings")
    assert page.locator("#open-settings").evaluate("button => button === document.activeElement")


def steady(page: Any, tokens: int = 12, *, alone: bool = True) -> None:
    """One model and its likeliest tokens, so that what is said is known."""
    with settings(page):
        if alone and page.locator("#compare").is_visible():
            page.uncheck("#compare")
        page.fill("#temperature", "0")
        page.fill("#max-tokens", str(tokens))


def put(page: Any, name: str, on: bool) -> None:
    with settings(page):
        page.set_checked(f"#{name}", on)
