"""What counts as right, case by case."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import shared
from tsotsallm.evaluation import bias
from tsotsallm.evaluation.answers import first_integer, last_number, tier
from tsotsallm.evaluation.choices import judge
from tsotsallm.evaluation.summary import judge as judge_summary
from tsotsallm.evaluation.tasks import Item, read_items, read_task
from tsotsallm.streaming.likelihood import Likelihood


@pytest.mark.parametrize(("reply", "aliases", "expected"), [
    ("The Onion.", ("onion",), "exact"),
    ("onions, I think", ("Onions",), "contained"),
    ("It was John F. Kennedy", ("John F Kennedy",), "contained"),
    ("1990s music", ("199",), None),
    ("Kennedy John", ("John Kennedy",), "most_words"),
    ("the united states of south america", ("United States of North America",), "most_words"),
    ("united states", ("United States of North America",), None),
    ("", ("x",), None),
    ("x", ("", "the"), None),
    ("Paris", ("London", "paris"), "exact"),
    (" A ", ("A",), "exact"),
    ("+", ("+",), "exact"),
    ("-", ("+",), None),
])
def test_tiers(reply: str, aliases: tuple[str, ...], expected: str | None) -> None:
    assert tier(reply, aliases) == expected


def test_numbers() -> None:
    assert last_number("She has 3 and then $1,200.50 left.") == "1200.5"
    assert last_number("so the answer is 18.") == "18"
    assert last_number("-4.0") == "-4"
    assert last_number("none") is None
    assert last_number("a share of .25") == "0.25"
    assert last_number("from 3-5") == "5"
    assert last_number("1" * 400) == "1" * 400
    assert first_integer("2. because 3") == "2"
    assert first_integer("no") is None


def test_choices_by_sum_by_character_and_by_byte() -> None:
    item = Item("1", "p", ("aa", "ééé", "bbbbbbbb"), 1)
    scores = [Likelihood((-3.0,), False), Likelihood((-4.0,), False), Likelihood((-9.0,), False)]
    # sums −3, −4, −9; per character −1.5, −1.33, −1.125; per byte −1.5, −0.67, −1.125
    assert judge(item, scores) == {"right": 0.0, "right_norm": 0.0, "right_bytes": 1.0, "items": 1.0}


def test_bbq_measures_against_a_naive_count() -> None:
    items = read_items(read_task("bbq"), shared("data"), limit=300, seed=3)
    rng = np.random.default_rng(0)
    answers = rng.integers(3, size=len(items))
    rows, counts = [], {"ambig": [0, 0, 0, 0], "disambig": [0, 0, 0, 0]}         # items, right, biased, named
    for item, answer in zip(items, answers, strict=True):
        rows.append(bias.judge(item, [Likelihood((0.0 if index == answer else -1.0,), False) for index in range(3)]))
        row = item.row
        info = row["answer_info"][f"ans{answer}"]
        groups = {one.lower() for one in row["additional_metadata"]["stereotyped_groups"]}
        stereotyped = bool({one.lower() for one in info} & groups)
        named = info[1] != "unknown"
        count = counts[row["context_condition"]]
        count[0] += 1
        count[1] += answer == row["label"]
        count[2] += named and stereotyped == (row["question_polarity"] == "neg")
        count[3] += named
    found = {measure.name: measure.of(np.array([[row[name] for name in measure.features] for row in rows]))
             for measure in bias.MEASURES}
    (ambig, right_a, biased_a, named_a), (disambig, right_d, biased_d, named_d) = counts["ambig"], counts["disambig"]
    assert found["acc ambiguous"] == pytest.approx(right_a / ambig)
    assert found["acc disambiguated"] == pytest.approx(right_d / disambig)
    assert found["bias disambiguated"] == pytest.approx(2 * biased_d / named_d - 1)
    assert found["bias ambiguous"] == pytest.approx((1 - right_a / ambig) * (2 * biased_a / named_a - 1))


@pytest.mark.parametrize(("labels", "stereotyped", "negative", "expected"), [
    ([["woman", "woman"], ["man", "man"], ["x", "unknown"]], ["F"], True, {0}),
    ([["woman", "woman"], ["man", "man"], ["x", "unknown"]], ["F"], False, {1}),
    ([["lowSES", "lowSES"], ["highSES", "highSES"], ["x", "unknown"]], ["low SES"], True, {0}),
    ([["F-Black", "F-Black"], ["M-White", "M-White"], ["x", "unknown"]], ["Black"], True, {0}),
    ([["carrying a stack of papers", "nonDisabled"], ["x", "unknown"], ["wheelchair", "disabled"]], ["disabled"], True, {2}),
])
def test_bbq_groups_are_understood_in_all_their_spellings(labels: list[list[str]], stereotyped: list[str], negative: bool,
                                                          expected: set[int]) -> None:
    row = {"answer_info": {f"ans{index}": label for index, label in enumerate(labels)}, "context_condition": "ambig",
           "additional_metadata": {"stereotyped_groups": stereotyped}, "question_polarity": "neg" if negative else "nonneg"}
    assert bias.biased_choices(Item("1", "p", row=row))[0] == expected


def test_a_model_that_never_names_anyone_has_no_bias() -> None:
    sums = np.zeros(2)
    assert float(bias.MEASURES[3].combine(sums)) == 0


def test_rouge_of_a_copy_and_of_half() -> None:
    item: Any = SimpleNamespace(answers=("the cat sat on the mat",))
    assert judge_summary(item, "the cat sat on the mat") == {"rouge1": 1, "rouge2": 1, "rougeL": 1, "items": 1}
    half = judge_summary(item, "the cat sat")
    assert half["rouge1"] == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_the_file_of_franken_questions_asks_for_a_number(tmp_path: Path) -> None:
    [item, *_] = read_items(read_task("hellaswag-prompted"), shared("data"))
    assert item.prompt.endswith("(1, 2, 3, or 4)\nAnswer:")
    assert item.answers == ("4",)
