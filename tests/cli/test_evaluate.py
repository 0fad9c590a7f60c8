"""What evaluate prints of a text, of tasks and of a forecast; options that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tsotsallm
from tests.cli.running import within
from tsotsallm.units import plus_minus


@pytest.fixture
def task(tmp_path: Path) -> list[object]:
    """Four questions of two groups with two answers each."""
    rows = [{"q": f"one {word}", "a": ["two", "three"], "right": place % 2, "kind": f"kind {place % 2}"}
            for place, word in enumerate(("a", "b", "c", "d"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text("kind: choices\nlayouts:\n"
                                        "  - {prompt: '{{q}}', choices: a, answer: right, group: kind}\n")
    return ["--task", tmp_path / "mine.yaml", "--data", tmp_path / "rows.jsonl"]


def test_a_text_and_an_original_are_printed_with_the_protocol(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:3:32", tmp_path / "out")
    options = ["--text", text, "--context", 48, "--limit", 4, "--reference", tiny]
    found = tsotsallm.evaluate(tmp_path / "out", text, context=48, limit=4, reference=tiny)
    shown = " ".join(within("evaluate", tmp_path / "out", *options).stdout.split())
    for number in (found.perplexity, found.reference_perplexity):
        assert f"{number:.4f}" in shown
    assert found.kl is not None
    for number, error in ((found.loss, found.loss_standard_error), (found.kl, found.kl_standard_error)):
        assert plus_minus(number, error) in shown
    assert f"{found.same_top_token:.1%}" in shown
    assert f"protocol: windows of 48 tokens, one BOS each, {4 * 47} predicted tokens, float32" in shown
    plain = json.loads(within("evaluate", tmp_path / "out", *options, "--json").stdout)
    assert plain["kl"] == found.kl
    assert plain["protocol"]["tokens_sha256"] == found.protocol.tokens_sha256


@pytest.mark.usefixtures("wide")
def test_models_are_compared_on_a_task_by_group(tiny: Path, tmp_path: Path, task: list[object]) -> None:
    tsotsallm.compress(tiny, "rtn:2:32", tmp_path / "out")
    shown = within("evaluate", tiny, tmp_path / "out", *task, "--groups").stdout
    plain = json.loads(within("evaluate", tiny, tmp_path / "out", *task, "--json").stdout)
    scores = tsotsallm.examine([tiny, tmp_path / "out"], [task[1]], data=task[3]).plain()
    assert plain["models"] == [str(tiny), str(tmp_path / "out")]
    assert plain["comparisons"] == json.loads(json.dumps(scores["comparisons"]))
    assert "kind 0" in shown
    assert "kind 0" not in within("evaluate", tiny, *task).stdout
    assert "MACs" in shown


@pytest.mark.usefixtures("wide")
def test_a_forecast_scores_nothing(tiny: Path, task: list[object]) -> None:
    shown = within("evaluate", tiny, *task, "--plan").stdout
    assert "floor of time" in shown
    [found] = json.loads(within("evaluate", tiny, *task, "--plan", "--json").stdout)
    assert (found["items"], found["task"]) == (4, "mine")


@pytest.mark.parametrize(("options", "words"), [
    (["--text", "a.txt", "--task", "piqa"], "choose one at a time"), (["--data", "a.jsonl"], "--data belongs to --task"),
    (["--task", "piqa", "--context", "64"], "--context and --protocol belong to --text"),
    (["--harness", "piqa", "--plan"], "do not reach tasks of lm-evaluation-harness"), ([], "give a text to evaluate on"),
    (["--text", "a.txt", "--protocol", "lines"], "there is no protocol 'lines'"),
    (["--kv", "q8_0", "--country", "KEN"], "do not reach GGUF files"),
    (["--kv", "f16,q8_0", "--plan"], "--plan does not forecast --kv"), (["--task", "piqaa"], "did you mean"),
    (["--workers", "tcp://127.0.0.1:9", "--text", "a.txt"], "--workers evaluates tasks on a cluster")])
def test_options_that_do_not_belong_together_are_refused(tiny: Path, options: list[str], words: str) -> None:
    found = within("evaluate", tiny, *options, check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
