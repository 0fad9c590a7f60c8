"""Targets: a device or a size, one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import tsotsallm
from tsotsallm.api.fit import usual_folder
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import StudyError
from tsotsallm.evaluation.cost import THIS_COMPUTER
from tsotsallm.fit import target as targets
from tsotsallm.fit.target import FitsAlready, Target, refuse_what_fits, target_of, usual_target
from tsotsallm.machine import total_ram_bytes


def test_a_target_is_a_device_or_a_size() -> None:
    with pytest.raises(StudyError, match="one of them"):
        target_of(100, device=None, size=None, faster_than=None)
    with pytest.raises(StudyError, match="no device 'toaster'"):
        target_of(100, device="toaster", size=None, faster_than=None)
    with pytest.raises(StudyError, match="above 0"):
        target_of(100, device=None, size=5, faster_than=-1)
    siracusa = target_of(100, device="siracusa", size=None, faster_than=None)
    assert siracusa.bytes == 4 * 2**20                  # for weights alone
    assert target_of(100, device="pi4-4gb", size=None, faster_than=None).bytes == 3 * 10**9 - 512 * 100
    assert target_of(0, device=THIS_COMPUTER, size=None, faster_than=None).bytes == total_ram_bytes() // 2


def test_a_model_that_fits_a_device_already_is_left_as_it_is() -> None:
    checkpoint = Checkpoint.open("embedded")
    with pytest.raises(FitsAlready, match=r"embedded fits pi4-4gb already: it has [\d.]+ MB, and of the 3 GB there for "
                                          r"it [\d.]+ GB are left; nothing is done\. .* size=.[\d.]+MB"):
        refuse_what_fits(checkpoint, "embedded", Target(3 * 10**9, device="pi4-4gb"))
    for other in (Target(3 * 10**9), Target(10**6, device="siracusa"), Target(3 * 10**9, 5.0, "pi4-4gb")):
        refuse_what_fits(checkpoint, "embedded", other)


def test_without_a_wish_it_is_four_and_a_half_bits_a_weight_or_what_this_computer_holds(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with fewer bits already is left as it is."""
    checkpoint = Checkpoint.open("embedded")
    found = usual_target(checkpoint, "embedded")
    assert 4.5 / 8 * 11_607_296 < found.bytes < 4.5 / 8 * 11_607_296 + 200_000            # and the vocabulary
    assert "4.5 bits" in found.why
    tsotsallm.compress("embedded", [{"quantize": {"grid": "q4_0", "ends": "q4_0", "method": "rtn"}}], tmp_path / "small")
    with pytest.raises(FitsAlready, match="nothing is done"):
        usual_target(Checkpoint.open(tmp_path / "small"), "small")
    with pytest.raises(StudyError, match="above 0"):
        usual_target(checkpoint, "embedded", 0.0)
    monkeypatch.setattr(targets, "room_for_weights", lambda _device, _cache: 5_000_000)
    found = usual_target(checkpoint, "embedded")
    assert found.bytes == 5_000_000
    assert "this computer has room for 5 MB" in found.why


@pytest.mark.parametrize(("model", "folder"), [
    ("embedded", "embedded-small"), ("models/Llama-3.2-1B/", "Llama-3.2-1B-small"),
    ("ollama:llama3.2:1b", "llama3.2-1b-small"), ("hub:owner/Name@main", "Name-small"),
    ("a\\b\\Model.Q4_1.gguf", "Model.Q4_1-small")])
def test_a_result_is_called_after_its_model(model: str, folder: str) -> None:
    assert usual_folder(model) == Path(folder)
