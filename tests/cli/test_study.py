"""What study and its commands print of a small study: trials, the front, the notebook, a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.running import within
from tsotsallm.units import plus_minus

SPEC = """recipes: {eight: ['rtn:8:channel'], three: ['gptq:3:channel']}
evaluation: {context: 32, cheap: 2, full: 4}
calibration: {windows: 2, window: 32}
"""


@pytest.fixture(scope="module")
def folder(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tmp_path_factory.mktemp("study") / "two.yaml"
    spec.write_text(SPEC)
    out = spec.with_name("out")
    options = ["-o", out, "--model", tiny, "--text", text, "--calibration", text]
    shown = within("study", spec, *options).stdout
    assert "Trials (* on the front)" in shown
    assert f"ledger  {out}" in shown
    return out


def test_trials_are_shown_again_and_the_same_as_json(folder: Path) -> None:
    found = json.loads(within("study", "show", folder, "--json").stdout)
    trials = {trial["name"]: trial for trial in found["trials"]}
    assert {trial["status"] for trial in trials.values()} == {"done"}
    shown = within("study", "show", folder).stdout
    for trial in trials.values():
        measured = trial["measures"].get("full") or trial["measures"]["cheap"]
        assert plus_minus(measured["kl"], measured["kl_error"]) in shown
    assert "nats per token, perplexity" in shown
    assert "|" not in shown


@pytest.mark.usefixtures("wide")
def test_trials_are_put_side_by_side(folder: Path) -> None:
    shown = within("study", "compare", folder, 0, 1).stdout
    assert all(word in shown for word in ("recipe", "seconds", '"bits": 8', '"bits": 3'))
    assert len(json.loads(within("study", "compare", folder, 1, "--json").stdout)) == 1
    found = within("study", "compare", folder, 7, check=False)
    assert found.exit_code == 1
    assert "has no trial 7; it has 0 to 1" in found.stderr


def test_the_ledger_becomes_a_table_and_the_notebook_is_told(folder: Path, tmp_path: Path) -> None:
    assert within("study", "export", folder, "--csv", tmp_path / "a.csv").stdout == f"2 trials in {tmp_path / 'a.csv'}\n"
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert "Cycle 0" in within("study", "show", folder, "--notebook").stdout
    assert {note["phase"] for note in json.loads(within("study", "show", folder, "--notebook", "--json").stdout)} >= {
        "plan", "implement", "revise"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere.yaml", "-o", "out"], "nowhere.yaml"), (["quick", "-o", "out", "--set", "text"], "--set takes NAME=VALUE"),
    (["show", "nowhere"], "nowhere")])
def test_misuse_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = within("study", *arguments, check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
