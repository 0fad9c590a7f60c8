"""The time that a fit may take."""

from __future__ import annotations

import time


class TimeUp(Exception):
    """The time of a fit is up; raised only where the work so far is kept."""


class Deadline:
    """Minutes from now on, after which `check` stops the work in progress."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self._began = minutes, time.monotonic()

    @property
    def minutes_gone(self) -> float:
        """Minutes since the beginning."""
        return (time.monotonic() - self._began) / 60

    def beyond(self, share: float) -> bool:
        """Whether more than a share of the time has gone."""
        return self.minutes_gone > share * self.minutes

    def check(self) -> None:
        """Raise TimeUp where the time is up."""
        if self.minutes_gone >= self.minutes:
            raise TimeUp
