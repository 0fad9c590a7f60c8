"""compress and the commands around it, from recipe to evaluation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import tsotsallm, within
from tsotsallm.machine import PROGRESS


def test_compress_evaluate_inspect_plan_speak_json(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--calibration", text, "--windows", 4, "--window", 64, "--json"]
    result = json.loads(within("compress", tiny, "wanda:2:4, gptq:4:32", "-o", out, *options).stdout)
    assert result["path"] == str(out)
    assert json.loads(within("inspect", out, "--json").stdout)["layers"] == 4
    assert json.loads(within("plan", tiny, "gptq:4:32", "--json").stdout)["result_bytes"] > 0
    found = json.loads(within("evaluate", out, "--text", text, "--context", 64, "--limit", 5, "--reference", tiny,
                                 "--json").stdout)
    assert found["kl"] > 0
    assert found["protocol"]["context"] == 64
    assert "gptq4" in json.loads(within("recipes", "--json").stdout)


def test_a_recipe_may_begin_with_a_dash(tiny: Path, tmp_path: Path) -> None:
    tsotsallm("compress", tiny, "- quantize: {method: rtn, grid: q8_0}", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tsotsallm.json").read_text())["recipe"][0]["quantize"]["grid"] == "q8_0"


def test_tables_are_printed_for_people(tiny: Path, text: Path, tmp_path: Path) -> None:
    assert "at least" in within("plan", tiny, "gptq:4:32").stdout
    assert "embeddings" in within("inspect", tiny).stdout
    assert "model   " in within("compress", tiny, "", "-o", tmp_path / "o").stdout
    assert "perplexity" in within("evaluate", tiny, "--text", text, "--context", 64, "--limit", 3).stdout


def test_a_table_after_every_stage(tiny: Path, text: Path, tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("kind: perplexity\ncontext: 64\nlayouts:\n  - text: '{{text}}'\n")
    adapt = "{adapt: {steps: 2, batch: 2, window: 48, rank: 2}}"
    recipe = f"['wanda:1:4', {adapt}, 'gptq:4:32', 'eora:2']"
    common = ["--calibration", text, "--windows", 4, "--window", 48, "--task", task, "--data", text, "--limit", 3]
    shown = within("compress", tiny, recipe, "-o", tmp_path / "out", *common).stdout
    assert "held-out loss" in shown
    assert all(name in shown for name in ("After every stage", "1-sparsity", "2-adapt", "3-quantize", "perplexity", "bytes"))
    assert (tmp_path / "out" / "training-1-adapt.png").exists()
    found = json.loads(within("compress", tiny, recipe, "-o", tmp_path / "again", *common, "--json").stdout)
    assert len(found["examination"]["models"]) == 5
    assert found["training"][0]["stage"] == "adapt"
    refused = within("compress", tiny, recipe, "-o", tmp_path / "x", "--limit", 3, check=False)
    assert "belong to --task" in refused.stderr
    assert "adapt, resident" in within("plan", tiny, recipe).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="shells of Windows start no jobs with Ctrl-C ignored")
def test_a_program_that_reads_the_progress_stops_it_though_a_shell_ignores_ctrl_c(tmp_path: Path) -> None:
    """A studio that a shell started in the background stops its jobs at once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tsotsallm", "compress", "embedded", "gptq:q4_k", "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {PROGRESS: "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.stderr is not None
    assert process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_ctrl_c_and_kill_lose_at_most_a_layer(tmp_path: Path, text: Path) -> None:
    """kill -9 after five different steps and one Ctrl-C; the result equals an uninterrupted one byte for byte."""
    from tests.conftest import build

    source = build(tmp_path / "source", "llama3", num_hidden_layers=12, hidden_size=256, intermediate_size=512)
    recipe = "[{depth: {remove: 2, protect: {first: 1, last: 1}}}, {sparsity: {prune: 2, group: 4}}, " \
             "{quantize: {bits: 4, group: 64}}]"
    common = ["--calibration", text, "--windows", 32, "--window", 128]
    tsotsallm("compress", source, recipe, "-o", tmp_path / "whole", *common)
    command = [sys.executable, "-m", "tsotsallm", "compress", str(source), recipe, "-o", str(tmp_path / "cut"),
               *map(str, common)]
    journal = tmp_path / "cut.partial" / "journal.jsonl"

    def steps() -> int:
        return len(journal.read_bytes().splitlines()) if journal.exists() else 0

    for kill in [signal.SIGKILL] * 5 + [signal.SIGINT]:
        done = steps()
        # a shell starts background jobs with Ctrl-C ignored, and so would this one's children
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while steps() <= done and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, kill)
        _, errors = process.communicate()
        assert "Traceback" not in errors
        assert process.returncode == (130 if kill == signal.SIGINT else -kill)
        assert not (tmp_path / "cut").exists()
    left = steps()
    subprocess.run(command, check=True, capture_output=True)
    assert left > 5
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "cut.partial").exists()
