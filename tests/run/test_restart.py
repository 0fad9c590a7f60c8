"""--restart deletes unfinished work, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

import tsotsallm
from tests.compressing import SMALL, THREE_STAGES, Stop, same_bytes, stop_after
from tsotsallm.errors import ResumeError


@pytest.mark.parametrize("after", [1, 9, 30, 45])
@pytest.mark.parametrize("recipe", [
    f"{THREE_STAGES[:-1]}, {{layers: {{order: [0, 1, 1, 2]}}}}, {{quantize: {{bits: 3, group: 32}}}}]",
    "[{quantize: {grid: q4_0}}]", "['wanda:1:4', {adapt: {steps: 3, batch: 2, window: 32, engine: streamed}}, 'gptq:4:32']"])
def test_restart_deletes_unfinished_work_and_begins_again(tiny: Path, text: Path, tmp_path: Path, recipe: str,
                                                          after: int) -> None:
    scratch = tmp_path / "elsewhere"
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, scratch=scratch, progress=stop_after(after),
                           **SMALL)
    scratch.mkdir(exist_ok=True)
    (scratch / "mine.txt").write_text("kept")
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", scratch=scratch, restart=True)
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "plain")
    assert same_bytes(tmp_path / "plain", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "out", "plain"}
    assert [path.name for path in scratch.iterdir()] == ["mine.txt"]
    with pytest.raises(ResumeError, match="exists already"):        # a result is never deleted
        tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)


def test_restart_deletes_nothing_else(tiny: Path, text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"

    def refused(message: str) -> None:
        before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file() and path.name != "lock"}
        with pytest.raises(ResumeError, match=message):
            tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)
        assert {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()} == before
        assert not (tmp_path / "out").exists()

    partial.mkdir()
    (partial / "thesis.txt").write_text("years")
    refused(r"is not unfinished work \(it holds thesis.txt, but no run.json\)")
    with pytest.raises(ResumeError, match="is not unfinished work"):     # nor is it worked in and then deleted
        tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out")
    (partial / "run.json").write_text('{"runs": "mine"}')
    refused("not recognised as unfinished work of compress")
    (partial / "run.json").write_text("[[" * 1000)
    refused("not recognised as unfinished work of compress")
    (partial / "run.json").write_text('{"source": {}, "recipe": [], "corpus": null}')
    refused("holds thesis.txt beside the unfinished work of compress")
    (partial / "thesis.txt").rename(tmp_path / "thesis.txt")
    (partial / "result").symlink_to(tmp_path / "precious", target_is_directory=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("kept")
    real = tmp_path / "real"
    partial.rename(real)
    partial.symlink_to(real, target_is_directory=True)
    refused("not recognised")
    partial.unlink()
    real.rename(partial)
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)
    assert (tmp_path / "precious" / "data").read_text() == "kept"
    assert not partial.exists()


def test_restart_waits_for_a_living_process(tiny: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"source": {}, "recipe": [], "corpus": null}')
    (partial / "lock").write_text(json.dumps([os.getppid(), psutil.Process(os.getppid()).create_time()]))
    with pytest.raises(ResumeError, match="is working on"):
        tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)
    assert (partial / "run.json").exists()
