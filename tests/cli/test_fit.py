"""What fit says of targets and tasks that are none; nothing is left of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import within


@pytest.mark.parametrize(("options", "words"), [
    ([], "--device"), (["--bytes", "lots"], "--bytes is 'lots'"),
    (["--device", "toaster"], "toaster"), (["--bytes", "1MB", "--task", "piqaa"], "did you mean")])
def test_a_target_that_is_none_is_one_line(tiny: Path, text: Path, tmp_path: Path, options: list[str], words: str) -> None:
    found = within("fit", tiny, "-o", tmp_path / "out", "--calibration", text, "--windows", 2, "--window", 32, *options,
                   check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
