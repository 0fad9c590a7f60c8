"""A fit without any decision; what it says of targets and tasks that are none, of which nothing is left."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.running import within
from tests.report.test_report import first_screen
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.stages.quantize.sizes import matrix_weights
from tsotsallm.units import human_bytes, plus_minus


def test_a_model_that_fits_already_is_no_error(tiny: Path, tmp_path: Path) -> None:
    found = within("fit", tiny, "-o", tmp_path / "out", "--device", "pi4-4gb")
    assert "fits pi4-4gb already" in found.stdout
    assert json.loads(within("fit", tiny, "-o", tmp_path / "out", "--device", "pi4-4gb", "--json").stdout)["fits_already"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--device", "pi4-4gb", "--bytes", "1MB"], "one of them"), (["--bytes", "lots"], "--bytes is 'lots'"),
    (["--device", "toaster"], "toaster"), (["--bytes", "1MB", "--task", "piqaa"], "did you mean")])
def test_a_target_that_is_none_is_one_line(tiny: Path, text: Path, tmp_path: Path, options: list[str], words: str) -> None:
    found = within("fit", tiny, "-o", tmp_path / "out", "--calibration", text, "--windows", 2, "--window", 32, *options,
                   check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_decision_is_needed(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size and the minutes are chosen and told; the result has a Modelfile, and the commands that run it are true."""
    monkeypatch.chdir(tmp_path)
    found = within("fit", tiny, "--calibration", text, "--windows", 2, "--window", 32, "--quick").stdout
    out = Path(f"{tiny.name}-small")
    assert "4.5 bits a weight lose little" in found
    assert re.search(r"the search takes \d+ minutes at most", found)
    size = (out / "model.gguf").stat().st_size
    told = json.loads((out / "fit.json").read_text("utf-8"))["target"]["bytes"]
    matrices = matrix_weights(Checkpoint.open(tiny).spec)
    assert size <= told < size + 0.1 * matrices
    assert abs(8 * size / matrices - 4.5) < 1.5                          # vocabulary and norms of a tiny model count
    assert (out / "model.Modelfile").read_text("utf-8").startswith("FROM ./model.gguf\n")
    assert f"tsotsallm chat {out}/model.gguf" in found
    assert f"ollama create {tiny.name}-small -f {out}/model.Modelfile && ollama run {tiny.name}-small" in found
    assert "The file has" in found
    first = first_screen(out / "report.html")
    fit = json.loads((out / "fit.json").read_text("utf-8"))
    assert f"The best model found for {told:,} bytes" in first["What it is"]
    assert first["How small"].startswith(human_bytes(fit["best"]["bytes"]))
    assert f", {fit['tokens_per_s']:.0f} new tokens per second." in first["How small"]       # although none was asked for
    assert fit["best"]["decode_tokens_per_s"] is None
    assert f"{plus_minus(fit['best']['measured'], fit['best']['error'])} nats per token" in first["What was lost"]
    assert re.search(r"perplexity [\d.]+ before and [\d.]+ after", first["What was lost"])
    assert first["How to run it"] == f"tsotsallm chat {out}/model.gguf"
    again = within("fit", tiny, "--calibration", text, check=False)
    assert f"{out / 'model'} exists already" in again.stderr
