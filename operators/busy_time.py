"""How long something was at work, however much of it at once."""

from __future__ import annotations

import time
from collections.abc import Callable


class BusyTime:
    """Counts the time in which at least one of its `with` blocks is entered; for one thread, or one event loop.

    Args:
        clock_s: Any clock that only goes forward.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic):
        self._clock_s = clock_s
        self._entered = 0
        self._since_s = 0.0
        self._busy_s = 0.0

    def __enter__(self) -> None:
        if not self._entered:
            self._since_s = self._clock_s()
        self._entered += 1

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._busy_s += self._clock_s() - self._since_s

    @property
    def busy_s(self) -> float:
        """Return the time so far, that of open blocks included."""
        return self._busy_s + (self._clock_s() - self._since_s if self._entered else 0.0)
