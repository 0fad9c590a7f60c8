"""Our log-likelihoods against lm-evaluation-harness's own transformers model, and its tasks over our scorer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.conftest import shared
from tsotsallm.evaluation.task_run import open_examinee
from tsotsallm.evaluation.tasks import read_items, read_task

pytestmark = pytest.mark.slow
ITEMS = 200


@pytest.fixture(scope="module")
def theirs(stories: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(stories), device="cpu", dtype="float32", batch_size=16)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


@pytest.mark.parametrize("name", ["hellaswag", "arc-easy", "arc-challenge", "piqa"])
def test_every_log_likelihood_equals_theirs(name: str, stories: Path, theirs: Any, tmp_path: Path) -> None:
    task = read_task(name)
    items = read_items(task, shared("data"), limit=ITEMS)
    asked = [(item.prompt, [task.delimiter + choice for choice in item.choices]) for item in items]
    ours = dict(open_examinee(stories, tmp_path).likelihoods(asked))
    pairs = [(prompt, one) for prompt, choices in asked for one in choices]
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    found = [score for index in range(len(items)) for score in ours[index]]
    assert len(found) == len(expected) >= 2 * ITEMS
    for score, (total, greedy) in zip(found, expected, strict=True):
        assert score.total == pytest.approx(total, abs=1e-3)
        assert score.greedy == greedy


def test_rolling_log_likelihood_equals_theirs(stories: Path, theirs: Any, tmp_path: Path) -> None:
    text = (shared("data") / "wikitext-2-raw" / "wiki.test.raw").read_text()
    texts = [text[:5000], text[5000:5200], text[6000:9000]]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", [(one,) for one in texts]), disable_tqdm=True)
    found = dict(open_examinee(stories, tmp_path).rolling(texts))
    for index, total in enumerate(expected):
        assert found[index] == pytest.approx(total, rel=1e-5)


def test_generation_equals_theirs(stories: Path, theirs: Any, tmp_path: Path) -> None:
    from tsotsallm.evaluation.harness import HarnessModel

    options = {"until": [".", "\n"], "max_gen_toks": 40, "do_sample": False}
    prompts = ["Once upon a time", "Lily and Tom went to", "The big dog"]
    asked = requests("generate_until", [(prompt, options) for prompt in prompts])
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert HarnessModel(open_examinee(stories, tmp_path)).generate_until(asked) == expected


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_a_task_of_the_harness_runs_on_our_scorer(stories: Path, tmp_path: Path, kind: str) -> None:
    model = stories
    if kind == "gguf":
        model = tmp_path / "stories.gguf"
        tsotsallm.to_gguf(stories, model)
    data = tmp_path / "items.jsonl"
    data.write_text("".join((shared("data") / "piqa" / "piqa.jsonl").open().readlines()[:60]))
    (tmp_path / "ours.yaml").write_text(json.dumps({
        "task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query | trim}}\nAnswer:",
        "doc_to_target": "gold", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}))
    found = tsotsallm.harness(model, ["ours"], include=tmp_path)["results"]["ours"]
    ours = {score.measure: score.value for score in tsotsallm.examine([stories], ["piqa"], data=data).results[0][0].scores}
    assert found["acc,none"] == pytest.approx(ours["acc"])
    assert found["acc_norm,none"] == pytest.approx(ours["acc_norm"])
