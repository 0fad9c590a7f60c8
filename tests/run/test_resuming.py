"""Stopped runs: they go on to the same bytes, or say why they cannot; a result is never written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.compressing import SMALL, THREE_STAGES, Stop, same_bytes, stop_after
from tsotsallm.errors import ResumeError


@pytest.mark.parametrize("after", [1, 3, 7, 20, 33, 47])
def test_a_stopped_run_goes_on_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path, after: int) -> None:
    recipe = f"{THREE_STAGES[:-1]}, {{layers: {{order: [0, 1, 1, 2]}}}}, {{quantize: {{bits: 3, group: 32}}}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "whole", calibration=text, **SMALL)
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, recipe, tmp_path / "cut", calibration=text, progress=stop_after(after), **SMALL)
    assert not (tmp_path / "cut").exists()
    tsotsallm.compress(tiny, recipe, tmp_path / "cut", calibration=text, **SMALL)
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut.partial").exists()


def test_unfinished_work_of_another_recipe_is_not_taken_over(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, progress=stop_after(1), **SMALL)
    for recipe, more, message in (
            ("gptq:3:32", {}, r"recipe: gptq:4:32 then, gptq:3:32 now\); finish it with those, or .* restart=True"),
            ("gptq:4:32", {"windows": 4}, r"corpus: 6 windows of 64 tokens from .*words.txt, seed 0 then, 4 windows"),
            ("gptq:4:32", {"seed": 3}, r"\(corpus: .*, seed 0 then, .*, seed 3 now\)"),
            ("gptq:4:32", {"keep_stages": True}, "keep_stages: no then, yes now"),
            ("rtn:4:32", {}, r"recipe: .* now; corpus: .* then, none now")):
        with pytest.raises(ResumeError, match=message):
            tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, **SMALL | more)
    other = tmp_path / text.name
    other.write_text(text.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(ResumeError, match=r"corpus: .*words.txt, seed 0 then, .*words.txt, seed 0 now"):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=other, **SMALL)
    state = json.loads((tmp_path / "out.partial" / "run.json").read_text("utf-8"))
    machine = state["machine"] | {"torch": "0.9"}
    del state["words"]                                      # as versions before this wrote it
    (tmp_path / "out.partial" / "run.json").write_text(json.dumps(state | {"machine": machine, "corpus": "0" * 64}), "utf-8")
    with pytest.raises(ResumeError, match=r"corpus: 00000000… then, 6 windows.*; machine.torch: 0.9 then, \d+"):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)


def test_a_result_of_that_name_beside_unfinished_work_is_not_taken_for_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, progress=stop_after(1), **SMALL)
    (tmp_path / "out").mkdir()
    with pytest.raises(ResumeError, match="exists already"):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
    assert (tmp_path / "out.partial" / "run.json").exists()


def test_an_existing_result_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "", tmp_path / "out")
    with pytest.raises(ResumeError, match="exists already"):
        tsotsallm.compress(tiny, "", tmp_path / "out")


@pytest.mark.parametrize("spoil", [
    lambda partial: (partial / "run.json").write_text("[3]"),
    lambda partial: (partial / "journal.jsonl").write_bytes(b'3\n{}\n\xff'),
    lambda partial: (partial / "journal.jsonl").write_bytes((partial / "journal.jsonl").read_bytes()[:-5]),
])
def test_damaged_notes_of_unfinished_work_lose_no_correctness(tiny: Path, text: Path, tmp_path: Path, spoil: Any) -> None:
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "whole", calibration=text, **SMALL)

    def stop(progress: Any) -> None:
        if progress.layer == 2:
            raise Stop

    with pytest.raises(Stop):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, progress=stop, **SMALL)
    spoil(tmp_path / "out.partial")
    if (tmp_path / "out.partial" / "run.json").read_text() == "[3]":
        with pytest.raises(ResumeError, match="delete"):
            tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
        return
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
    assert same_bytes(tmp_path / "whole", tmp_path / "out")
