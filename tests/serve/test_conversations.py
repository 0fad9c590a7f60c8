"""Conversations in the browser: kept over a reload, renamed, deleted, exported, imported; system prompts; bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import ask, no_serious_fault, page_at, settings
from tests.serve.running import Scripted, serving, with_scripted
from tsotsallm.engine.interface import Answer, Heard, Question

pytestmark = pytest.mark.slow


class Listening(Scripted):
    """A speaker that remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[Any] = []

    def speak(self, question: Question, heard: Heard) -> Answer:
        self.prompts.append(question.prompt)
        return super().speak(question, heard)


def few(page: Any) -> None:
    with settings(page):
        page.fill("#max-tokens", "4")


def titles(page: Any) -> list[str]:
    return list(page.locator("#kept .title").all_inner_texts())


def reload(page: Any) -> None:
    page.reload()
    page.wait_for_selector("html[data-ready]")


@pytest.mark.parametrize("width", [1280, 390])
def test_conversations_are_kept_in_the_browser(browser: Any, width: int, tmp_path: Path) -> None:
    models = with_scripted(heard := Listening())
    with serving(models) as address, page_at(browser, address, width) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        few(page)
        ask(page, "The first question")
        ask(page, "The second question")
        page.click("#new-conversation")
        assert page.locator(".turn").count() == 0
        ask(page, "Another conversation")
        page.click("#open-list")
        assert titles(page) == ["Another conversation", "The first question"]
        no_serious_fault(page)
        page.screenshot(path=tmp_path / f"list-{width}.png")
        page.locator("#kept .title").last.click()
        assert page.locator(".prompt").all_inner_texts() == ["The first question", "The second question"]
        assert page.locator('[data-testid="text"]').first.inner_text().strip() == "word word word word"
        reload(page)
        assert page.locator(".prompt").count() == 2                     # the same conversation, after a reload
        assert page.locator('[data-testid="facts"]').first.inner_text().strip().endswith("4 tokens")
        few(page)
        ask(page, "The third question")
        assert [one["content"] for one in heard.prompts[-1] if one["role"] == "user"] == [
            "The first question", "The second question", "The third question"]
        if not page.locator("#list").is_visible():
            page.click("#open-list")
        page.click('[data-testid="rename"]')
        page.fill('[data-testid="rename-field"]', "My title")
        page.press('[data-testid="rename-field"]', "Enter")
        assert titles(page) == ["My title", "Another conversation"]
        assert page.evaluate("document.activeElement.dataset.testid") == "rename"
        page.locator("#kept").get_by_test_id("delete").click()
        if not page.locator("#list").is_visible():
            page.click("#open-list")
        assert titles(page) == ["Another conversation"]
        assert page.locator(".turn").count() == 0
        reload(page)
        assert page.locator(".turn").count() == 0


def test_export_and_import(browser: Any, tmp_path: Path) -> None:
    with serving(with_scripted(Listening())) as address:
        with page_at(browser, address) as page:
            few(page)
            ask(page, "A question <b>with</b> signs\nمرحبا")
            page.click("#new-conversation")
            ask(page, "Another")
            page.click("#open-list")
            with page.expect_download() as saved:
                page.click("#export-all")
            saved.value.save_as(tmp_path / "all.json")
            with page.expect_download() as one:
                page.get_by_test_id("export").click()
            assert one.value.suggested_filename == "Another.json"
        written = json.loads((tmp_path / "all.json").read_text("utf-8"))
        assert (written["format"], written["version"], len(written["conversations"])) == ("tsotsallm-conversations", 1, 2)
        with page_at(browser, address) as page:         # another browser
            page.click("#open-list")
            assert titles(page) == []
            no_serious_fault(page)
            page.set_input_files("#import-file", tmp_path / "all.json")
            page.wait_for_selector("#kept .title")
            assert titles(page) == ["Another", "A question <b>with</b> signs مرحبا"]
            page.locator("#kept .title").last.click()
            assert page.locator(".prompt").inner_text() == "A question <b>with</b> signs\nمرحبا"
            assert page.locator('[data-testid="answer-a"] h4').inner_text() == "scripted"


WRONG: list[tuple[str, str]] = [
    ("not json", "is not JSON"), ("[]", "holds no conversations of this page"), ("null", "holds no conversations"),
    ('{"format": "tsotsallm-conversations", "version": 2, "conversations": []}', "another version"),
    ('{"format": "tsotsallm-conversations", "version": 1, "conversations": [{"title": 5}]}',
     "in conversation 1, the field “title”"),
    ('{"format": "tsotsallm-conversations", "version": 1, "conversations": [{"title": "", "system": "", "changed": 1, '
     '"turns": [{"prompt": "a", "converse": true, "separate": false, "answers": [{"model": "m", "text": {}}]}]}]}',
     "the field “text”"),
    ('{"format": "tsotsallm-conversations", "version": 1, "conversations": [{"title": "", "system": "", "changed": 1, '
     '"turns": []}]}', "the field “turns”"),
]


def test_bad_files_are_refused(browser: Any, tmp_path: Path) -> None:
    with serving(with_scripted(Listening())) as address, page_at(browser, address) as page:
        page.click("#open-list")
        for text, message in WRONG:
            (tmp_path / "bad.json").write_text(text, "utf-8")
            page.set_input_files("#import-file", tmp_path / "bad.json")
            page.wait_for_selector("#error:visible")
            assert "bad.json" in page.locator("#error").inner_text()
            assert message in page.locator("#error").inner_text(), text
            assert titles(page) == []
            page.click("#close-error")
        (tmp_path / "large.json").write_bytes(b" " * 20_000_001)
        page.set_input_files("#import-file", tmp_path / "large.json")
        page.wait_for_selector("#error:visible")
        assert "larger than 20 MB" in page.locator("#error").inner_text()


def test_a_full_storage_is_said_and_nothing_is_lost_before_the_window_closes(browser: Any) -> None:
    with serving(with_scripted(Listening())) as address, page_at(browser, address) as page:
        few(page)
        page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 200))")
        ask(page, "One more question, in a browser that keeps no more")
        assert "storage" in page.locator("#error").inner_text()
        page.click("#open-list")
        assert len(titles(page)) == 1


def test_a_system_prompt_belongs_to_its_conversation(browser: Any) -> None:
    models = with_scripted(heard := Listening())
    with serving(models) as address, page_at(browser, address) as page:
        few(page)
        with settings(page):
            page.click('[data-level="school"]')
            assert "14-year-olds" in page.input_value("#system")
            assert page.get_attribute('[data-level="school"]', "aria-pressed") == "true"
            no_serious_fault(page)
        ask(page, "What is light?")
        assert [one["role"] for one in heard.prompts[-1]] == ["system", "user"]
        assert "14-year-olds" in heard.prompts[-1][0]["content"]
        page.click("#new-conversation")
        ask(page, "And now?")
        assert [one["role"] for one in heard.prompts[-1]] == ["user"]
        with settings(page):
            assert page.input_value("#system") == ""
            page.select_option("#language", "fr")
            page.click('[data-level="simple"]')
            assert page.input_value("#system").startswith("Utilise des mots simples")
            page.click('[data-level="simple"]')
            assert page.input_value("#system") == ""
        page.click("#open-list")
        page.locator("#kept .title").last.click()
        with settings(page):
            assert "14-year-olds" in page.input_value("#system")
