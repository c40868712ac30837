"""Reads the tables of an output folder while lanes write to it: committed rows only.

A lane's rows can be seen a moment before they are committed, and after a crash just then they come again. Who
wants each row once goes by the manifests: a file counts when its epoch is not after its lane's last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import reduce
from itertools import groupby
from operator import and_
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from ..operators.errors import SettingsError
from ..operators.rows import RESULT_KINDS
from .checkpoint import newest_committed
from .compacted_files import MOVED_TRIES, FileRows, compacted_in, read_table, rows_in, while_files_move
from .file_times import FileTimes
from .parquet_sink import DateFolder, data_files_in, list_date_folders
from .tables import TABLES

_BULKY = ("tokens", "data")  # columns that nobody wants on a screen
_FILES_AT_ONCE = 256
_EPOCHS_AT_ONCE = 64  # without bulky columns; with them, one


@dataclass(frozen=True)
class RowFilter:
    """Which rows are wanted; all that are given must hold."""

    kind: str | None = None  # results only: caption, alert, answer
    stream: str | None = None  # a name, or a pattern with * ? [ ]
    since: datetime | None = None  # by start_time; aware
    until: datetime | None = None  # by start_time, not included; aware


class TableReader:
    """Reads one table of an output folder.

    Args:
        root: The output folder.
        table: Which.
        wanted: Leaves rows out.
        columns: Those that are wanted; None: all but tokens and bytes.
        times: What is known of files; for readers that are made again and again.

    Raises:
        SettingsError: When built, if the folder is not one that stormline writes to, or the filter asks for a
            column that the table has not.
    """

    def __init__(
        self,
        root: Path,
        table: str,
        wanted: RowFilter = RowFilter(),
        columns: Sequence[str] | None = None,
        times: FileTimes | None = None,
    ):
        check_output_folder(root)
        self._root = root
        self._table = table
        self._schema = TABLES[table]
        self._columns = list(columns or (name for name in self._schema.names if name not in _BULKY))
        self._wanted = wanted
        self._times = times
        self._seen: dict[int, int] = {}  # lane → its last epoch given out
        if wanted.kind is not None and "kind" not in self._schema.names:
            raise SettingsError(f"--kind is for results: rows of {table} have no kind. Leave it out.")
        check_kind(wanted.kind)

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """Return at most `limit` rows, oldest first.

        Later dates come before earlier ones, and within a date what was committed later. No more files are read
        than that needs.
        """
        return while_files_move(lambda: self._newest(limit))

    def _newest(self, limit: int) -> list[dict[str, Any]]:
        committed = newest_committed(self._root)
        self._seen = dict(committed)
        found = self.schema.empty_table()
        files = self._files(committed)
        if self._times is not None:
            files = self._times.within(files, self._wanted.since, self._wanted.until)
        for batch in _batches(files):
            if found.num_rows >= limit:
                break
            found = pa.concat_tables([self._read(batch), found])
        return _by_time(found).slice(max(0, found.num_rows - limit)).to_pylist()

    def fresh(self) -> list[dict[str, Any]]:
        """Return the rows committed since the last call of this or of `newest`, oldest first."""
        committed = newest_committed(self._root)
        if committed == self._seen:
            return []
        rows = while_files_move(lambda: self._read(self._epochs(self._seen, committed)))
        self._seen = dict(committed)
        return _by_time(rows).to_pylist()

    def batches(self) -> Iterator[pa.Table]:
        """Yield all rows that are committed now, by date, epoch and lane; some epochs' at a time are in memory.

        Files may be compacted meanwhile.

        Raises:
            FileNotFoundError: If that happens again and again, or somebody deletes files.
            TableError: If one is damaged.
        """
        committed = newest_committed(self._root)
        n = 1 if set(_BULKY) & set(self._columns) else _EPOCHS_AT_ONCE
        done: tuple[str, int, int] | None = None
        tries = 0
        while True:
            rows = while_files_move(lambda: self._epochs({}, committed))
            todo = [each for each in rows if done is None or _place(each) > done]
            try:
                for start in range(0, len(todo), n):
                    batch = self._read(todo[start : start + n])
                    done, tries = _place(todo[start : start + n][-1]), 0
                    if batch.num_rows:
                        yield batch
                return
            except FileNotFoundError:  # compacted since it was listed: what is left is found elsewhere
                tries += 1
                if tries == MOVED_TRIES:
                    raise

    def _files(self, committed: dict[int, int]) -> list[FileRows]:
        """Return the files of committed rows, without those of days that the filter leaves out."""
        found: list[FileRows] = []
        for folder in self._folders():
            found += [
                FileRows(file.table, file.date, file.lane, file.epoch, file.path)
                for file in data_files_in(folder)
                if not file.temporary and file.epoch <= committed.get(file.lane, 0)
            ]
            found += [FileRows(folder.table, folder.date, 0, 0, path) for path in compacted_in(folder)]
        return found

    def _epochs(self, after: dict[int, int], until: dict[int, int]) -> list[FileRows]:
        """Return where the rows of epochs (after, until] of each lane are."""
        found = (rows for folder in self._folders() for rows in rows_in(folder))
        new = [rows for rows in found if after.get(rows.lane, 0) < rows.epoch <= until.get(rows.lane, 0)]
        return sorted(new, key=_place)

    def _folders(self) -> Iterator[DateFolder]:
        first_date, last_date = _date_of(self._wanted.since) or "", _date_of(self._wanted.until) or "9999"
        folders = list_date_folders(self._root, [self._table])
        return (folder for folder in folders if first_date <= folder.date <= last_date)

    @property
    def schema(self) -> pa.Schema:
        """Return the columns of the rows that it reads."""
        return pa.schema([self._schema.field(name) for name in self._columns])

    def _read(self, files: Sequence[FileRows]) -> pa.Table:
        rows = read_table(files, self._schema, self._columns, self._filter())
        if self._wanted.stream is None:
            return rows
        streams = pc.call_function("unique", [rows["stream_id"]]).to_pylist()
        wanted = [stream for stream in streams if fnmatchcase(stream, self._wanted.stream)]
        return rows.filter(ds.field("stream_id").isin(pa.array(wanted, pa.string())))

    def _filter(self) -> ds.Expression | None:
        conditions = []
        if self._wanted.kind is not None:
            conditions.append(ds.field("kind") == self._wanted.kind)
        if self._wanted.since is not None:
            conditions.append(ds.field("start_time") >= _scalar(self._wanted.since))
        if self._wanted.until is not None:
            conditions.append(ds.field("start_time") < _scalar(self._wanted.until))
        return reduce(and_, conditions) if conditions else None


def check_kind(kind: str | None) -> None:
    """Raise if no result is of a kind.

    Raises:
        SettingsError: If so.
    """
    if kind is not None and kind not in RESULT_KINDS:
        raise SettingsError(
            f"no result is of kind {kind!r}; expected {' or '.join(RESULT_KINDS)}. Answers to `archive --ask` are "
            "captions with a query_id of their own."
        )


def check_text(text: str) -> None:
    """Raise if there are bytes in a text that are none, as a shell may pass them on.

    Raises:
        SettingsError: If so.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"{text!r} is no text: some of its bytes are not UTF-8; expected UTF-8.") from None


def check_output_folder(root: Path) -> None:
    """Raise if stormline has not written here.

    Raises:
        SettingsError: If so.
    """
    if not root.is_dir():
        raise SettingsError(f"no folder {root}. Give the folder that `stormline run` writes to (its `output.path`).")
    if not (root / "checkpoints").is_dir():
        inside = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
        raise SettingsError(
            f"{root} is no output folder of stormline: expected checkpoints/ in it, got {inside}. Give the folder "
            f"that `stormline run` writes to (its `output.path`), not one of its tables."
        )


def _batches(files: list[FileRows]) -> Iterator[list[FileRows]]:
    """Yield files in groups of one date and not too many, the newest group first; in a group the oldest file first."""
    for _, group in groupby(sorted(files, key=lambda f: f.date, reverse=True), key=lambda f: f.date):
        day = sorted(group, key=lambda f: (f.path.stat().st_mtime_ns, f.epoch), reverse=True)
        for start in range(0, len(day), _FILES_AT_ONCE):
            yield day[start : start + _FILES_AT_ONCE][::-1]


def _place(rows: FileRows) -> tuple[str, int, int]:
    return rows.date, rows.epoch, rows.lane


def _date_of(moment: datetime | None) -> str | None:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%d") if moment else None


def _scalar(moment: datetime) -> pa.Scalar:
    return pa.scalar(moment.astimezone(timezone.utc), pa.timestamp("us", tz="UTC"))


def _by_time(rows: pa.Table) -> pa.Table:
    """Return the rows sorted; of equal times, what was committed first stays first."""
    numbered = rows.append_column("n", pa.array(range(rows.num_rows), pa.int64()))
    return numbered.sort_by([("start_time", "ascending"), ("n", "ascending")]).drop_columns("n")
