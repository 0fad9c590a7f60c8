"""Amounts in text: bytes read from it and written into it, and an error of the caller's own kind."""

from __future__ import annotations

import pytest

from tsotsallm.errors import RecipeError, ServeError
from tsotsallm.units import bytes_from_text, human_bytes, human_seconds, plus_minus


@pytest.mark.parametrize(("text", "count"), [("700MB", 700_000_000), ("1.5 GB", 1_500_000_000), ("2000", 2000),
                                             ("1 MiB", 1 << 20), ("3k", 3000), ("0", 0)])
def test_bytes_are_read_in_decimal_and_binary_units(text: str, count: int) -> None:
    assert bytes_from_text(text, "here") == count


def test_the_error_names_the_place_and_is_of_the_callers_kind() -> None:
    with pytest.raises(RecipeError, match=r"budget is 'many'; it takes bytes"):
        bytes_from_text("many", "budget")
    with pytest.raises(ServeError, match="max_body is '1 LB'"):
        bytes_from_text("1 LB", "--max-body", ServeError)


def test_amounts_for_people() -> None:
    assert [human_bytes(count) for count in (2.5e9, 13_100_000, 820)] == ["2.5 GB", "13.1 MB", "820 B"]
    assert [human_seconds(seconds) for seconds in (5520, 250, 3.2)] == ["1 h 32 min", "4 min 10 s", "3.2 s"]


@pytest.mark.parametrize(("value", "error", "text"), [
    (0.03031, 0.00142, "0.0303 ± 0.0014"), (2.738, 0.0312, "2.738 ± 0.031"),
    (0.000431, 0.000021, "0.000431 ± 0.000021"), (3.1e-5, 2.1e-6, "3.10e-05 ± 2.1e-06"),
    (4.67e-8, 2.1e-9, "4.67e-08 ± 2.1e-09"), (123.4, 12.3, "123 ± 12"), (1234.0, 123.0, "1234 ± 123"), (0.0, 0.0, "0 ± 0"),
    (2.738, None, "2.738"), (0.00996, 0.000996, "0.0100 ± 0.0010")])
def test_an_error_has_two_significant_digits_and_the_value_as_many_places(value: float, error: float | None,
                                                                          text: str) -> None:
    assert plus_minus(value, error) == text
