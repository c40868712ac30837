"""How much memory all processes of a run take together, each page counted once."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict

import psutil

from benchmarks.measuring import part_of

from .runs import tree

SAMPLE_S = 2.0


class MemoryLog:
    """Proportional memory (PSS: a page that several processes share counts once in all) of a tree of processes."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self.samples: list[dict[str, float]] = []  # MB by part

    def look(self, pid: int) -> None:
        """Take a sample, where it is time."""
        if time.monotonic() < self._next_s:
            return
        parts: dict[str, float] = defaultdict(float)
        for one in tree(pid).values():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                command = " ".join(one.cmdline())
                name = part_of(command) or "other"
                parts["command" if one.pid == pid else name] += one.memory_full_info().pss / 1e6
        self.samples.append(dict(parts))
        self._next_s = time.monotonic() + SAMPLE_S

    def report(self) -> dict[str, object]:
        """Return the peak of all together in MB, the median of the last tenth, and what the peak is made of."""
        totals = [sum(sample.values()) for sample in self.samples]
        peak = max(range(len(totals)), key=totals.__getitem__)
        return {
            "peak_mb": round(totals[peak]),
            "at_the_end_mb": round(statistics.median(totals[-max(1, len(totals) // 10) :])),
            "peak_by_part_mb": {name: round(mb) for name, mb in sorted(self.samples[peak].items())},
        }
