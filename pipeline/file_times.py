"""From when to when the rows of data files begin: which files a stretch of time is in, without reading them.

A lane writes a file at every commit, thousands a day, and a stretch of minutes is in few of them. Each file's footer is
read once and kept, some hundred bytes a file.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .compacted_files import FileRows

COLUMN = "start_time"
MOST_FILES = 200_000  # kept; beyond, all are forgotten and read again as they are asked for


class FileTimes:
    """The first and the last `start_time` in each file that was asked for. Safe to call from several threads."""

    def __init__(self) -> None:
        self._spans: dict[tuple[Path, int], tuple[datetime, datetime] | None] = {}
        self._lock = threading.Lock()

    def within(self, files: Sequence[FileRows], since: datetime | None, until: datetime | None) -> list[FileRows]:
        """Return the files that may have rows with `since` <= `start_time` < `until`, either of them None: all.

        Raises:
            FileNotFoundError: If one of the files was compacted meanwhile.
        """
        if since is None and until is None:
            return list(files)
        found = []
        for file in files:
            span = self._span(file.path)
            if span is None or ((since is None or span[1] >= since) and (until is None or span[0] < until)):
                found.append(file)
        return found

    def _span(self, path: Path) -> tuple[datetime, datetime] | None:
        # A lane's epoch may be written anew under its name, where a damaged checkpoint was taken back.
        key = path, path.stat().st_mtime_ns
        with self._lock:
            if key in self._spans:
                return self._spans[key]
        span = _read_span(path)
        with self._lock:
            if len(self._spans) >= MOST_FILES:
                self._spans.clear()
            self._spans[key] = span
        return span


def _read_span(path: Path) -> tuple[datetime, datetime] | None:
    """Return the smallest and largest value of `COLUMN`; None where the footer does not say."""
    footer = pq.read_metadata(path)
    column = footer.schema.names.index(COLUMN)
    groups = [footer.row_group(i).column(column).statistics for i in range(footer.num_row_groups)]
    told: list[Any] = [each for each in groups if each is not None and each.has_min_max]
    if not told or len(told) < len(groups):
        return None
    return min(each.min for each in told), max(each.max for each in told)
