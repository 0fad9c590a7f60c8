"""Amounts in text: bytes read from it and written into it, and an error of the caller's own kind."""

from __future__ import annotations

import pytest

from tsotsallm.errors import RecipeError, ServeError
from tsotsallm.units import bytes_from_text, human_bytes, human_seconds


@pytest.mark.parametrize(("text", "count"), [("700MB", 700_000_000), ("1.5 GB", 1_500_000_000), ("2000", 2000),
                                             ("1 MiB", 1 << 20), ("3k", 3000), ("0", 0)])
def test_bytes_are_read_in_decimal_and_binary_units(text: str, count: int) -> None:
    assert bytes_from_text(text, "here") == count


def test_the_error_names_the_place_and_is_of_the_callers_kind() -> None:
    with pytest.raises(RecipeError, match=r"budget is 'many'; it takes bytes"):
        bytes_from_text("many", "budget")
    with pytest.raises(ServeError, match="--max-body is '1 LB'"):
        bytes_from_text("1 LB", "--max-body", ServeError)


def test_amounts_for_people() -> None:
    assert [human_bytes(count) for count in (2.5e9, 13_100_000, 820)] == ["2.5 GB", "13.1 MB", "820 B"]
    assert [human_seconds(seconds) for seconds in (5520, 250, 3.2)] == ["1 h 32 min", "4 min 10 s", "3.2 s"]
