"""Targets: a device or a size, one of them."""

from __future__ import annotations

import pytest

from tsotsallm.errors import StudyError
from tsotsallm.fit.target import target_of


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
