"""Follows the committed results of an output folder from any place on: none is missed, none comes twice.

Files are named by lane and epoch, and manifests say which epochs count. So what is new is found by their names: a
look at what did not change lists a few folders for each lane, and opens nothing. What was compacted before it was
seen is found in the compacted file, row for row.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from .checkpoint import (
    KEPT_EPOCHS,
    DamagedCheckpointError,
    list_committed,
    list_lanes,
    newest_committed,
    read_manifest,
)
from .compacted_files import FileRows, find_rows, read_table, while_files_move
from .parquet_sink import date_of
from .tables import RESULTS

logger = logging.getLogger(__name__)

TABLE = "results"
EPOCHS_AT_ONCE = 64  # whose rows are in memory at a time
_CURSOR_VERSION = 1
_Epoch = tuple[int, int, list[FileRows]]  # epoch, lane, and where its rows are, by date
_MAX_CURSOR_CHARS = 64_000  # a lane takes three or four, more where it is far from its neighbour's epoch


@dataclass(frozen=True)
class Cursor:
    """Which results were seen: of each lane those of all epochs up to one, and perhaps the first few of its next.

    As text (`str`, `parse`) it is short, has only letters, digits, ``-`` and ``_``, and means the same after any
    restart, also with another number of lanes.
    """

    epochs: Mapping[int, int] = field(default_factory=dict)  # lane → its newest epoch of which all was seen
    partial: tuple[int, int, int] | None = None  # lane, epoch, and how many rows of that epoch were seen

    def has(self, event: ResultEvent) -> bool:
        """Tell whether an event was seen."""
        if event.epoch <= self.epochs.get(event.lane, 0):
            return True
        return self.partial is not None and self._covers(self.partial, event)

    @staticmethod
    def _covers(partial: tuple[int, int, int], event: ResultEvent) -> bool:
        return (event.lane, event.epoch) == partial[:2] and event.row < partial[2]

    def joined(self, other: Cursor) -> Cursor:
        """Return what was seen by either; of two partial epochs the other's."""
        lanes = self.epochs.keys() | other.epochs.keys()
        epochs = {lane: max(self.epochs.get(lane, 0), other.epochs.get(lane, 0)) for lane in lanes}
        partial = other.partial or self.partial
        return Cursor(epochs, partial if partial and partial[1] > epochs.get(partial[0], 0) else None)

    def is_ahead_of(self, other: Cursor) -> bool:
        """Tell whether it says to have seen what is not there yet: then it is of another folder."""
        ahead = any(epoch > other.epochs.get(lane, 0) for lane, epoch in self.epochs.items())
        return ahead or (self.partial is not None and self.partial[1] > other.epochs.get(self.partial[0], 0))

    def __str__(self) -> str:
        lane, epoch, rows = self.partial or (0, 0, 0)
        numbers = [_CURSOR_VERSION, rows, *([lane, epoch] if rows else [])]
        lane_before, epoch_before = 0, 0
        for lane, epoch in sorted(self.epochs.items()):
            numbers += [lane - lane_before, _zigzag(epoch - epoch_before)]
            lane_before, epoch_before = lane, epoch
        return base64.urlsafe_b64encode(b"".join(map(_varint, numbers))).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read it back.

        Raises:
            ValueError: If it is none.
        """
        try:
            if len(text) > _MAX_CURSOR_CHARS:
                raise ValueError
            padded = text.encode("ascii") + b"=" * (-len(text) % 4)
            numbers = list(_varints(base64.b64decode(padded, altchars=b"-_", validate=True)))
            version, rows, *rest = numbers
            if version != _CURSOR_VERSION:
                raise ValueError
            partial = (rest.pop(0), rest.pop(0), rows) if rows else None
            epochs, lane, epoch = {}, 0, 0
            for lane_step, epoch_step in zip(rest[::2], rest[1::2], strict=True):
                lane, epoch = lane + lane_step, epoch + _unzigzag(epoch_step)
                epochs[lane] = epoch
        except (ValueError, IndexError):
            raise ValueError("this is no cursor; expected the id of an earlier event") from None
        return cls(epochs, partial)


@dataclass(frozen=True)
class ResultEvent:
    """One committed row of the results table."""

    lane: int
    epoch: int
    row: int  # within the epoch
    values: Mapping[str, Any]  # by column of `tables.RESULTS`
    cursor: Cursor  # to go on after it

    @property
    def row_id(self) -> str:
        """Return what names the row for ever in this folder: lane-epoch-row."""
        return f"{self.lane}-{self.epoch}-{self.row}"

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values, its name as `id`."""
        return {"id": self.row_id, **plain_row(self.values)}


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table with its times as text, ``2026-01-31T12:00:00Z``."""
    return {key: _plain(value) for key, value in row.items()}


class ResultTail:
    """The committed results of a folder, from a place on.

    Each row comes once and never before it is committed; a lane's rows come in their order, and those of several
    lanes about in the order in which they were made. Only where recovery had to take a damaged checkpoint back do
    rows that were seen come again, as rows of a later epoch. Of files that somebody deleted the rows are left out,
    with a warning in the log.

    Whoever must not lose its place keeps ``str(event.cursor)`` once an event is dealt with, and starts from that.
    Not safe to use from two threads at once.

    Args:
        root: The output folder; it may have nothing in it yet.
        after: Go on after that; None: from the first row on. `newest_cursor` is what has been committed so far.
    """

    def __init__(self, root: Path, after: Cursor | None = None):
        self._root = root
        self.cursor = after or Cursor()

    def poll(self) -> Iterator[ResultEvent]:
        """Yield what has been committed since, up to now; `cursor` follows, also over epochs without results."""
        committed = _committed(self._root)
        unseen = self._unseen(committed)
        # An epoch that was begun is ended before another one begins: a cursor holds one such at most.
        begun = [item for item in unseen if self.cursor.partial and item[1::-1] == self.cursor.partial[:2]]
        for page in (begun, *_pages([item for item in unseen if item not in begun])):
            for event in self._events(page):
                self.cursor = event.cursor
                yield event
        self.cursor = self.cursor.joined(_newest(committed))

    def _unseen(self, committed: Mapping[int, list[int]]) -> list[_Epoch]:
        """Return what was not seen whole, in the order to hand it out."""
        found: dict[tuple[int, int], list[FileRows]] = {}
        to_search: dict[int, int] = {}
        for lane, epochs in committed.items():
            seen = self.cursor.epochs.get(lane, 0)
            new = [epoch for epoch in epochs if epoch > seen]
            # Manifests of older epochs than the newest few may be gone: then the names of all files tell.
            paths = None
            if seen + 1 >= epochs[:KEPT_EPOCHS][-1]:
                paths = self._named_by_manifests(lane, new)
            if paths is None:
                to_search[lane] = seen
            else:
                found |= paths
        if to_search:
            for rows in while_files_move(lambda: list(find_rows(self._root, [TABLE]))):
                lane, epoch = rows.lane, rows.epoch
                if lane in to_search and to_search[lane] < epoch <= committed[lane][0]:
                    found.setdefault((epoch, lane), []).append(rows)
        return [(epoch, lane, sorted(rows)) for (epoch, lane), rows in sorted(found.items())]

    def _named_by_manifests(self, lane: int, epochs: Iterable[int]) -> dict[tuple[int, int], list[FileRows]] | None:
        found = {}
        for epoch in epochs:
            try:
                files = read_manifest(self._root, lane, epoch).data_files
            except (FileNotFoundError, DamagedCheckpointError):
                return None  # pruned just now, or not whole
            paths = [self._root / file.path for file in files if file.table == TABLE]
            found[epoch, lane] = [FileRows(TABLE, date_of(path), lane, epoch, path) for path in paths]
        return {key: rows for key, rows in found.items() if rows}

    def _events(self, page: list[_Epoch]) -> Iterator[ResultEvent]:
        """Yield the rows of some epochs, those of several lanes by the time at which they were made."""
        read = self._read(page)
        newest: dict[int, datetime] = {}
        made = []
        for _, lane, rows in read:
            if rows:
                newest[lane] = max(rows[-1]["emitted_time"], newest.get(lane, rows[-1]["emitted_time"]))
            made.append(newest.get(lane))
        order = sorted((time, i) for i, time in enumerate(made) if time is not None)
        for _, i in order:
            yield from self._epoch(*read[i])

    def _epoch(self, epoch: int, lane: int, rows: list[dict[str, Any]]) -> Iterator[ResultEvent]:
        before = self.cursor
        already = before.partial[2] if before.partial and before.partial[:2] == (lane, epoch) else 0
        whole = Cursor({**before.epochs, lane: epoch})
        for i, values in enumerate(rows):
            if i >= already:
                cursor = whole if i + 1 == len(rows) else Cursor(before.epochs, (lane, epoch, i + 1))
                yield ResultEvent(lane, epoch, i, values, cursor)

    def _read(self, page: list[_Epoch]) -> list[tuple[int, int, list[dict[str, Any]]]]:
        """Return (epoch, lane, rows) of some epochs; what was compacted since it was found is read from there."""
        try:
            return [(epoch, lane, read_table(rows, RESULTS).to_pylist()) for epoch, lane, rows in page]
        except FileNotFoundError:
            return while_files_move(lambda: self._read_moved(page))

    def _read_moved(self, page: list[_Epoch]) -> list[tuple[int, int, list[dict[str, Any]]]]:
        keys = {(epoch, lane) for epoch, lane, _ in page}
        now: dict[tuple[int, int], list[FileRows]] = {key: [] for key in keys}
        for rows in find_rows(self._root, [TABLE]):
            if (rows.epoch, rows.lane) in keys:
                now[rows.epoch, rows.lane].append(rows)
        read = []
        for epoch, lane, before in page:
            found = sorted(now[epoch, lane])
            for date in {rows.date for rows in before} - {rows.date for rows in found}:
                logger.warning("results_file_gone date=%s lane=%d epoch=%d; its rows are left out", date, lane, epoch)
            read.append((epoch, lane, read_table(found, RESULTS).to_pylist()))
        return read


def newest_cursor(root: Path) -> Cursor:
    """Return the cursor of somebody who has seen everything that is committed now."""
    return Cursor(newest_committed(root))


def _committed(root: Path) -> dict[int, list[int]]:
    """Return each lane's committed epochs of which the manifest is still there, newest first."""
    return {lane: epochs for lane in list_lanes(root) if (epochs := list_committed(root, lane))}


def _newest(committed: Mapping[int, list[int]]) -> Cursor:
    return Cursor({lane: epochs[0] for lane, epochs in committed.items()})


def _pages(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), EPOCHS_AT_ONCE):
        yield items[start : start + EPOCHS_AT_ONCE]


def _plain(value: Any) -> Any:
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value


def _zigzag(number: int) -> int:
    return number * 2 if number >= 0 else -number * 2 - 1


def _unzigzag(number: int) -> int:
    return number // 2 if number % 2 == 0 else -(number + 1) // 2


def _varint(number: int) -> bytes:
    """Return seven bits a byte, the lowest first; all but the last byte have their top bit set (LEB128)."""
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _varints(data: bytes) -> Iterator[int]:
    number, shift = 0, 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            yield number
            number, shift = 0, 0
    if shift:
        raise ValueError("cut short")
