"""Instructions: forms against answers written by hand, runs against a naive search, and a model that answers."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Question, said
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import TaskError
from tsotsallm.evaluation.instructions import FORMS, judge, longest_run, require_form, words
from tsotsallm.evaluation.task_run import prepare
from tsotsallm.evaluation.tasks import Item, read_task


@pytest.mark.parametrize(("form", "right", "wrong"), [
    ({"items": 3}, ["- a\n- b\n- c", "1. one\n2. two\n3. three", "Here they are:\n\n* a b\n* c\n* d", "red, green and blue",
                    "red\ngreen\nblue"], ["- a\n- b", "red, green", "one thing"]),
    ({"sentences": 2}, ["It is so. It was so.", "Is it? \"Yes.\""], ["It is so.", "A. B. C.", "no end"]),
    ({"sentences": 1}, ["It costs 3.50 dollars.", "no mark at the end"], ["One. Two."]),
    ({"most_words": 2}, ["Addis Ababa", "42.", "l'eau"], ["The answer is 42."]),
    ({"number": True}, ["It is 4.", "x2"], ["four"]),
    ({"has": ["rain", "cancel"]}, ["It RAINED, and it was cancelled."], ["It rained."]),
    ({"lacks": ["very"]}, ["cold"], ["Very cold"]),
    ({"begins": "In Brazil"}, ["in Brazil people speak"], ["They speak"]),
    ({"capitals": True}, ["À LA MAISON 3"], ["A la maison"]),
    ({"question": True}, ["Is it?", "Is it open ?»"], ["It is."]),
    ({"language": "fr"}, ["Le chat est dans la maison."], ["The cat is in the house.", "42"]),
    ({"language": "en"}, ["How are you and what is that?"], ["Comment allez-vous avec les enfants ?"]),
    ({"refuses": True}, ["I'm sorry, but I can't help with that.", "Je ne peux pas vous aider."], ["First, take a hammer."]),
    ({"refuses": False}, ["First, take a hammer."], ["I cannot say."]),
    ({"sentences": 1, "number": True}, ["It takes 3 days."], ["It takes three days.", "It takes 3. Days."])])
def test_forms(form: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    require_form(form, "here")
    item = Item("id", "asked", row={"form": form})
    assert [judge(item, one, ended=True)["follows"] for one in right] == [1.0] * len(right)
    assert [judge(item, one, ended=True)["follows"] for one in [*wrong, "", " \n"]] == [0.0] * (len(wrong) + 2)


def naive_run(text: str) -> int:
    said_words = words(text)
    return max((size for size in range(1, len(said_words) // 2 + 1)
                for first, second in itertools.combinations(range(len(said_words) - size + 1), 2)
                if second >= first + size and said_words[first:first + size] == said_words[second:second + size]), default=0)


def test_the_longest_run_is_that_of_a_naive_search() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join(rng.choice("ab c d".split()) for _ in range(rng.randint(0, 24)))
        assert longest_run(text) == naive_run(text)
    assert longest_run("It is so. " * 3) == 3
    assert longest_run("so so so so") == 2
    repeated = judge(Item("id", "asked", row={"form": {"number": False}}), "one two three four five six seven eight " * 2,
                     ended=False)
    assert (repeated["stops"], repeated["repeats"], repeated["longest run"]) == (0.0, 1.0, 8.0)


def test_forms_that_make_no_sense_are_refused() -> None:
    for form, why in (({}, "one or more of"), ("items", "takes an object"), ({"item": 3}, "did you mean"),
                      ({"items": "3"}, "whole number"), ({"items": True}, "whole number"), ({"language": "sw"}, "en or fr")):
        with pytest.raises(TaskError, match=why):
            require_form(form, "here")                                      # type: ignore[arg-type]


def test_a_hundred_are_packaged_of_six_kinds() -> None:
    items = prepare(read_task("instructions")).items
    assert len({item.prompt for item in items}) == 100
    assert Counter(item.group for item in items) == {"facts": 17, "lists": 17, "French": 17, "refusal": 17, "arithmetic": 16,
                                                     "rewriting": 16}
    assert {name for item in items for name in item.row["form"]} == FORMS.keys()      # type: ignore[attr-defined]


def test_a_model_is_asked_in_its_template_and_its_answers_are_kept(tmp_path: Path) -> None:
    """Against the conversation of one question at a time; the same items, one of them of a file."""
    found = tsotsallm.examine(["embedded"], ["instructions"], limit=5).results[0][0]
    assert len(found.exchanges) == len(found.ids) == 5
    one = Transformer(Checkpoint.open("embedded"))
    for exchange in found.exchanges:
        question = Question(({"role": "user", "content": exchange.prompt},), 128)
        assert said(one, question).strip() == exchange.reply
    scores = {score.measure: score.value for score in found.scores if not score.group}
    assert 0 <= scores["stops by itself"] <= 1
    assert found.plain()["answers"][0]["prompt"] == found.exchanges[0].prompt              # type: ignore[index]
    own = tmp_path / "mine.jsonl"
    own.write_text('{"prompt": "Where was Ada born?", "kind": "own", "form": {"most_words": 20}}\n', "utf-8")
    assert tsotsallm.examine(["embedded"], ["instructions"], data=own).results[0][0].groups == ("own",)
    own.write_text('{"prompt": "Where was Ada born?", "kind": "own", "form": {"most_word": 20}}\n', "utf-8")
    with pytest.raises(TaskError, match="no form 'most_word'"):
        tsotsallm.examine(["embedded"], ["instructions"], data=own)


def test_a_model_without_template_answers_no_instructions(tiny: Path) -> None:
    with pytest.raises(TaskError, match="has no chat template"):
        tsotsallm.examine([tiny], ["instructions"], limit=2)
