"""Every language of the page has the same keys with the same blanks, and says whether a speaker has read it."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import page_at, settings
from tests.serve.running import Scripted, serving, with_scripted
from tsotsallm.evaluation.cost import devices_here
from tsotsallm.lab.world import build_world
from tsotsallm.stages import STAGES

PAGE = Path(str(resources.files("tsotsallm.serve") / "page"))
NAMES = json.loads((PAGE / "languages.json").read_text("utf-8"))
REVIEWED = {"en", "fr"}


def texts(tag: str) -> dict[str, str]:
    text = (PAGE / "languages" / f"{tag}.json").read_text("utf-8")
    pairs: list[tuple[str, str]] = json.loads(text, object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == len(pairs), f"{tag}: a key is given twice"
    return dict(pairs)


def blanks(text: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)\}", text))


def test_the_list_names_the_files() -> None:
    assert {path.stem for path in (PAGE / "languages").iterdir()} == set(NAMES)
    assert all(texts(tag)["language_name"] == name for tag, name in NAMES.items())


@pytest.mark.parametrize("tag", sorted(NAMES))
def test_a_language_is_complete(tag: str) -> None:
    english, found = texts("en"), texts(tag)
    assert list(found) == list(english)
    for key, text in found.items():
        assert text.strip(), key
        assert blanks(text) == blanks(english[key]), key
    if tag != "en":
        same = [key for key, text in found.items() if text == english[key] and len(text) > 14 and "{" not in text]
        assert not same, "not translated"
    assert found["about"].startswith("Not reviewed by a speaker.") == (tag not in REVIEWED)


def test_every_text_that_the_page_shows_has_a_key() -> None:
    sources = "".join(path.read_text("utf-8") for path in [*PAGE.glob("*.js"), PAGE / "page.html"])
    used = set(re.findall(r'data-(?:text|label|hint)="(\w+)"', sources)) | set(
        re.findall(r'\b(?:say\([^;]*?, |word\(|label\(\w+, |quietButton\()"(\w+)"', sources))
    assert len(used) > 100
    assert used <= set(texts("en"))


def test_stages_and_devices_have_words() -> None:
    names = [*(f"stage {name}" for name in (*STAGES, "copy", "calibration")),
             *(f"device{about} {name}" for name in devices_here() for about in ("", " about"))]
    assert {re.sub(r"\W+", "_", name) for name in names} <= set(texts("en"))


def test_french_punctuation_does_not_break_lines() -> None:
    """No-break spaces stand before double punctuation and within quotation marks, none before an ellipsis; what is sent to a
    model has plain ones."""
    sent = re.compile(r"example_\d|level_.*_text|question_to_continue")
    wrong = [key for key, text in texts("fr").items() if re.search(r" [:;!?»]|« |\s…", text) and not sent.fullmatch(key)]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("tag", sorted(NAMES))
def test_the_page_in_every_language(browser: Any, tag: str) -> None:
    with serving(with_scripted(Scripted())) as address, page_at(browser, address, 390, language=tag) as page:
        assert page.get_attribute("html", "lang") == tag
        assert page.get_attribute("#prompt", "placeholder") == texts(tag)["your_message"]
        with settings(page):
            assert page.input_value("#language") == tag
            assert page.locator("#settings h2").inner_text() == texts(tag)["settings"]


def test_the_answers_that_the_empty_page_names_are_true() -> None:
    script = (PAGE / "examples.js").read_text("utf-8")
    pairs = re.findall(r'\["([^"]+\?)", "([^"]+)"\]', script)
    assert len(pairs) == script.count("?\"") == 8
    people = {person.term.en: person.facts for person in build_world().people}
    for question, answer in pairs:
        [person] = [name for name in people if name in question]
        [relation] = [name for name, words in (("birthplace", "born|naissance"), ("home", "live|habite"), ("food", "dish"))
                      if re.search(words, question)]
        assert people[person][relation].en == answer, question
