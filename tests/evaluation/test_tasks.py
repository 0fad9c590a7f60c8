"""Tasks as data: packaged ones on real files, the user's own, and what is refused before a model is opened."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.conftest import shared
from tsotsallm.errors import TaskError, TsotsallmError
from tsotsallm.evaluation.tasks import packaged_tasks, read_items, read_task, read_texts

LOCAL = {"afriqa": 849, "arc-challenge": 1172, "arc-easy": 2376, "bbq": 2756, "boolq": 3270, "gsm8k": 1319,
         "hellaswag": 5200, "hellaswag-prompted": 5200, "mmlu": 1531, "nq-open": 3610, "piqa": 1838, "triviaqa-closed": 3000}


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_packaged_tasks_read_published_files_as_they_are(name: str) -> None:
    items = read_items(read_task(name), shared("data"))
    assert len(items) == LOCAL[name]
    assert len({item.id for item in items}) == len(items)
    assert all(item.prompt.strip() for item in items)
    for item in items:
        assert (item.gold is not None and 0 <= item.gold < len(item.choices)) or item.answers


def test_texts_are_read_by_language() -> None:
    texts = read_texts(read_task("udhr"), shared("data"))
    assert len(texts) == 12
    assert {"swahili", "yoruba", "wolof", "english"} <= {text.group for text in texts}
    [whole] = read_texts(read_task("wikitext-2"), shared("data"))
    assert whole.content == (shared("data") / "wikitext-2-raw" / "wiki.test.raw").read_text()


def test_prompts_are_those_of_the_harness() -> None:
    [item, *_] = read_items(read_task("arc-easy"), shared("data"))
    assert item.prompt.startswith("Question: Which statement best explains why photosynthesis")
    assert item.prompt.endswith("?\nAnswer:")
    [item, *_] = read_items(read_task("mmlu"), shared("data"))
    assert item.group == "abstract_algebra"
    asked = "The following are multiple choice questions (with answers) about abstract algebra."
    assert item.prompt.splitlines()[0] == asked
    assert item.prompt.endswith("\nA. 4\nB. 8\nC. 12\nD. 6\nAnswer:")


def test_hub_columns_are_understood_too(tmp_path: Path) -> None:
    hub = {"hellaswag": {"activity_label": "Roof", "ctx_a": "A man [title] sits", "ctx_b": "on a roof",
                         "endings": ["a", "b"], "label": "1"},
           "arc-easy": {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
           "piqa": {"goal": "To eat", "sol1": "chew", "sol2": "sing", "label": 0},
           "boolq": {"passage": "It is.", "question": "is it", "answer": True},
           "truthfulqa": {"question": "Is it?", "mc1_targets": {"choices": ["no", "yes"], "labels": [0, 1]}},
           "triviaqa-open": {"question": "Who?", "answer": {"aliases": ["Ann"]},
                             "entity_pages": {"wiki_context": ["longer text"]},
                             "search_results": {"search_context": ["", "short"]}}}
    for name, row in hub.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row))
        [item] = read_items(read_task(name), path)
        assert item.gold == {"hellaswag": 1, "arc-easy": 1, "piqa": 0, "boolq": 1, "truthfulqa": 1}.get(name)
        if name == "hellaswag":
            assert item.prompt == "Roof: A man. sits On a roof"
        if name == "triviaqa-open":
            assert item.prompt == "Context: short\nQuestion: Who?\nAnswer:"


def test_own_tasks_and_csv(tmp_path: Path) -> None:
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["frage", "richtig", "falsch"], ["Wie \"heißt\" er,\nder Hund?", "Rex", "Max"]])
    (tmp_path / "own.yaml").write_text(
        '{kind: choices, layouts: [{prompt: "{{frage}}", choices: "[falsch, richtig]", answer: 1}]}')
    [item] = read_items(read_task(tmp_path / "own.yaml"), tmp_path / "data.csv")
    assert (item.prompt, item.choices, item.gold) == ('Wie "heißt" er,\nder Hund?', ("Max", "Rex"), 1)


def test_big_bench_files_load_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"name": "t", "task_prefix": "Think.\n", "examples": [
        {"input": "2+2?", "target_scores": {"3": 0, "4": 1}}, {"input": "1+1?", "target_scores": {"2": 1, "3": 0}}]}))
    items = read_items(read_task(path), path)
    assert [item.gold for item in items] == [1, 0]
    assert items[0].prompt == "Think.\n\nQ: 2+2?\n  choice: 3\n  choice: 4\nA:"
    path.write_text(json.dumps({"name": "t", "examples": [{"input": "2+2?", "target": ["4", "four"]}]}))
    [item] = read_items(read_task(path), path)
    assert item.answers == ("4", "four")


def test_a_limit_draws_the_same_items_for_the_same_seed() -> None:
    task = read_task("piqa")
    first, again, other = (read_items(task, shared("data"), limit=40, seed=seed) for seed in (1, 1, 2))
    assert [item.id for item in first] == [item.id for item in again] != [item.id for item in other]
    assert len({item.id for item in first}) == 40


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(("task", "content", "message"), [
    ("piqa", {"goal": "x", "solution": "y"}, r"no column sol1, sol2, label|no column label|no column choices"),
    ("piqa", "", "is empty"),
    ("piqa", {"query": "x", "choices": ["a", "b"], "gold": 2}, "the label is 2, but there are 2 choices"),
    ("piqa", {"query": "x", "choices": ["a", "b"], "gold": "left"}, "the label is 'left'"),
    ("piqa", {"query": "x", "choices": ["a", "b"], "gold": None}, "the label is None"),
    ("commonsense-qa", {"question": "q", "choices": {"text": list("abcde")}, "answerKey": ""}, "answer cannot be made"),
    ("nq-open", {"question": "q", "answer": None}, "has no answer"),
    ("piqa", "{not json", "line 1, is not valid JSON"),
    ("piqa", "[1, 2]", "holds int where an object"),
    ("arc-easy", {"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "Z"}, "answer cannot be made"),
    ("bbq", {"context": "c", "question": "q", "ans0": "a", "ans1": "b", "ans2": "c", "label": 0, "category": "x"},
     "not a BBQ item"),
])
def test_bad_data_is_refused_before_the_model_is_looked_for(task: str, content: Any, message: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", content)
    with pytest.raises(TaskError, match=message):
        tsotsallm.examine([tmp_path / "no-such-model"], [task], data=data)


@pytest.mark.parametrize(("content", "message"), [
    ("{kind: chioces}", "did you mean 'choices'"),
    ('{kind: answers, layouts: [{prompt: "{{nothing}}", answers: text}]}', "no column nothing"),
    ('{kind: answers, layouts: [{prompt: "{{text}", answers: text}]}', "not a valid template"),
    ('{kind: answers, layouts: [{prompt: "{{text}}"}]}', "this one lacks answers"),
    ("{kind: answers, layuots: []}", "did you mean 'layouts'"),
    ("{kind: answers}", "has no layouts"),
    ('{kind: answers, max_new_tokens: many, layouts: [{prompt: "{{text}}", answers: text}]}', "takes a whole number"),
    ('{kind: answers, max_new_tokens: 0, layouts: [{prompt: "{{text}}", answers: text}]}', "number, 1 or more"),
    ('{kind: choices, layouts: [{prompt: "{{text}}", choices: [text, text], answer: 0}]}', "in quotes"),
    ('{kind: perplexity, protocol: row, layouts: [{text: "{{text}}"}]}', "did you mean 'rows'"),
    ('{kind: answers, stop: ".", layouts: [{prompt: "{{text}}", answers: text}]}', "it takes a list"),
    ('{kind: answers, hub: {name: x}, layouts: [{prompt: "{{text}}", answers: text}]}', "hub has no option 'name'"),
    ('{kind: answers, judge: luck, layouts: [{prompt: "{{text}}", answers: text}]}', "known: first_integer"),
    ("{kind: [", "not valid YAML"),
    ('{kind: answers, layouts: [{prompt: "{{text.__class__.__mro__}}", answers: text}]}', "cannot be made"),
    ('{kind: answers, layouts: [{prompt: "{{text * 999999999}}", answers: text}]}', "more text than a template should"),
    ('{kind: answers, layouts: [{prompt: "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", '
     'answers: text}]}', "more steps than a template should"),
    ('{kind: choices, layouts: [{prompt: "{{text}}", choices: "7", answer: 0}]}', "choices cannot be made"),
    ("{kind: answers, stop: [7], layouts: [{prompt: a, answers: text}]}", r"stop\[0\] is 7; it takes text"),
    ("{kind: answers, files: [../../x], layouts: [{prompt: a, answers: text}]}", "below the folder"),
    ("{kind: answers, hub: {repository: 7, split: x}, layouts: [{prompt: a, answers: text}]}", "repository is 7"),
    ("a: &a [*a]", "nests them more than 100 deep"), ("kind: 2001-13-45", "month must be in"), ("[" * 100_000, "too deeply"),
])
def test_bad_tasks_are_refused_before_the_model_is_looked_for(content: str, message: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", {"text": "x"})
    with pytest.raises(TaskError, match=message):
        tsotsallm.examine([tmp_path / "no-such-model"], [write(tmp_path / "own.yaml", content)], data=data)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("data.csv", b"text\n\xe9", "line 2 is not UTF-8"), ("data.csv", b'text\na,b', "another number of fields"),
    ("data.csv", b"text\na\0", "line 2|has no answer|items"), ("data.jsonl", b'{"text": "\\ud800"}', "half of a surrogate"),
    ("data.jsonl", b"[" * 200 + b"]" * 200, "too deeply"), ("data.json", b'{"text": 1', "line 1, is not valid JSON"),
    ("data.json", b'[{"text": "a"},\n {"text": }]', r"is not valid JSON \(.*line 2 column 11")])
def test_data_that_is_none_is_refused_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "own.yaml", '{kind: answers, layouts: [{prompt: "{{text}}", answers: text}]}'))
    (tmp_path / name).write_bytes(content)
    try:
        [item] = read_items(task, tmp_path / name)
    except TaskError as error:
        found = str(error)
    else:
        found = f"items {item.prompt}"
    assert re.search(message, found)
    assert "\n" not in found


def test_rows_that_lack_a_column_of_the_first_are_refused(tmp_path: Path) -> None:
    parts = {"prompt": "'{{text}}'", "answers": "[text, other]", "group": "group"}
    task = read_task(write(tmp_path / "own.yaml", "{kind: answers, layouts: [{" + ", ".join(
        f"{name}: {value}" if name == "prompt" else f'{name}: "{value}"' for name, value in parts.items()) + "}]}"))
    row = {"text": "a", "other": "b", "group": "g"}
    for name, missing in (("prompt", "text"), ("answers", "other"), ("group", "group")):
        rows = [row, {key: value for key, value in row.items() if key != missing}]
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(TaskError, match=f"item 2: {name} cannot be made"):
            read_items(task, tmp_path / "x.jsonl")


def test_lines_end_at_line_feeds_and_marks_are_left_out(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "own.yaml", '{kind: answers, layouts: [{prompt: "{{text}}", answers: text}]}'))
    (tmp_path / "x.jsonl").write_text('\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}', "utf-8")
    assert [item.prompt for item in read_items(task, tmp_path / "x.jsonl")] == ["a\u2028b", "c"]
    (tmp_path / "x.csv").write_bytes('\ufefftext\r\n"a\r\nb"\r\nc'.encode())
    assert [item.prompt for item in read_items(task, tmp_path / "x.csv")] == ["a\nb", "c"]


def test_a_folder_gives_a_task_its_own_files_only(tmp_path: Path) -> None:
    row = json.dumps({"query": "x", "choices": ["a", "b"], "gold": 0})
    (tmp_path / "piqa.jsonl").write_text(row)
    assert len(read_items(read_task("piqa"), tmp_path)) == 1
    with pytest.raises(TaskError, match="holds nothing for task boolq"):
        read_items(read_task("boolq"), tmp_path)
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "arc_easy.jsonl").write_text(row)
    for folder in (tmp_path, tmp_path / "arc"):
        assert len(read_items(read_task("arc-easy"), folder)) == 1


def test_unknown_names_and_missing_files_say_what_to_do(tmp_path: Path) -> None:
    for task, data, message in [("helaswag", None, "did you mean 'hellaswag'"),
                                ("piqa", tmp_path / "none.jsonl", "does not exist"),
                                ("piqa", tmp_path, "holds nothing for task piqa")]:
        with pytest.raises(TsotsallmError, match=message):
            tsotsallm.examine([tmp_path / "no-such-model"], [task], data=data)
    assert len(packaged_tasks()) == 25


def test_without_network_or_file_a_task_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TsotsallmError, match="data=FILE"):
        tsotsallm.examine([tmp_path / "no-such-model"], ["piqa"])
