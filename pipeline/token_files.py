"""Reads past tokens from the table `tokens` of an output folder, also while lanes write to it.

A lane writes a file every few seconds, so that ten hours are thousands of them. What each holds, without the tokens
themselves, is read once and kept: about 28 bytes a chunk, 1.2 MB a day of a stream at two frames a second. A question
then opens only the files that have chunks it wants. Days that nothing was written to since are not looked at again,
unless one of their files is damaged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from ..models.last_used import LastUsed
from ..operators.errors import TableError
from .checkpoint import newest_committed
from .chunk_index import ChunkIndex, PastChunk
from .compacted_files import compacted_in, damage_told, read_parts, while_files_move
from .parquet_sink import data_files_in, list_date_folders
from .tables import TOKENS

logger = logging.getLogger(__name__)

TABLE = "tokens"
FILES_AT_ONCE = 256  # of which the index is read in one go
CACHE_BYTES = 64 << 20  # of chunks that were read of late
SETTLED_S = 2.0  # a folder's time of change says nothing of a second change in the same tick of the clock
_INDEX_COLUMNS = ["stream_id", "start_time", "end_time", "token_count", "__filename"]
_NS_PER_US = 1_000
_UNREAD = (-1, -1)


class _TokenFile(NamedTuple):
    date: str
    epoch: int  # the first, of a compacted one
    path: Path


@dataclass(frozen=True, eq=False)
class _StreamFiles:
    """What one stream has on disk, in order of `start_ns`."""

    index: ChunkIndex = field(default_factory=ChunkIndex.empty)
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # where each chunk is: into `_paths`


@dataclass
class _Folder:
    """What was seen of one date's folder."""

    changed: tuple[int, int] = _UNREAD  # its inode and time of change when last read whole; -1: read it again
    known: set[str] = field(default_factory=set)  # names of files that are in the index


class TokenFiles:
    """The committed chunks of an output folder. Safe to call from several threads.

    `refresh` and `read` go to the disk. What is asked besides is answered from what the last whole refresh found, and
    never waits for one that is under way.

    Args:
        root: The output folder; it may have nothing in it yet.
    """

    def __init__(self, root: Path):
        self._root = root
        self._streams: Mapping[str, _StreamFiles] = {}  # replaced as a whole
        self._paths: list[str] = []  # only grows
        self._refreshing = threading.Lock()  # guards what follows, for as long as files are listed and read
        self._found: dict[str, _StreamFiles] = {}
        self._folders: dict[str, _Folder] = {}
        self._damaged: set[Path] = set()  # that were told of
        self._caching = threading.Lock()  # guards what follows, for moments
        self._cached: LastUsed[tuple[str, int], PastChunk] = LastUsed(CACHE_BYTES, attrgetter("tokens.nbytes"))

    def refresh(self) -> None:
        """Take in what was committed since the last call; the first call reads what every file holds.

        A damaged file is left out and told of once in the log; it is taken in when it was brought back.

        Raises:
            OSError: If the disk, or a limit on open files, does not let it; the next call begins where this one did.
        """
        with self._refreshing:
            while_files_move(self._refresh)

    def _refresh(self) -> None:
        committed = newest_committed(self._root)
        dates: list[str] = []
        fresh: list[_TokenFile] = []
        try:
            for date in self._changed_dates():
                dates.append(date)
                fresh += self._fresh_files(date, committed)
            fresh.sort(key=lambda file: (file.date, file.epoch))
            for start in range(0, len(fresh), FILES_AT_ONCE):
                self._take_in_sound(fresh[start : start + FILES_AT_ONCE])
        except BaseException:
            for date in dates:
                self._folders[date].changed = _UNREAD  # not all of it was taken in: to be listed again
            raise
        self._streams = dict(self._found)

    def _changed_dates(self) -> Iterator[str]:
        table = self._root / TABLE
        for entry in os.scandir(table) if table.is_dir() else ():
            date, stat = entry.name.removeprefix("date="), entry.stat()
            folder = self._folders.setdefault(date, _Folder())
            changed = stat.st_ino, stat.st_mtime_ns
            if entry.is_dir() and folder.changed != changed:
                settled = time.time_ns() - stat.st_mtime_ns > SETTLED_S * 1e9
                folder.changed = changed if settled else _UNREAD
                yield date

    def _fresh_files(self, date: str, committed: dict[int, int]) -> Iterator[_TokenFile]:
        """Yield the committed files of a date that are not in the index; takes out those that were compacted."""
        known = self._folders[date]
        for folder in list_date_folders(self._root, [TABLE], date=date):
            if gone := known.known - set(folder.names):
                self._take_out({str(folder.path / name) for name in gone})
                known.known -= gone
            for path in compacted_in(folder):
                if path.name not in known.known:
                    with self._left_out_if_damaged(date, path), damage_told(path):
                        yield _TokenFile(date, read_parts(path)[0].epoch, path)
            for file in data_files_in(folder):
                if file.temporary or file.path.name in known.known:
                    continue
                if file.epoch <= committed.get(file.lane, 0):
                    yield _TokenFile(date, file.epoch, file.path)
                else:
                    known.changed = _UNREAD  # it may be committed without another change of the folder

    def _take_out(self, paths: set[str]) -> None:
        gone = np.flatnonzero([path in paths for path in self._paths])
        for name, stream in list(self._found.items()):
            left = ~np.isin(stream.files, gone)
            if left.any():
                self._found[name] = _StreamFiles(stream.index.where(left), stream.files[left])
            else:
                del self._found[name]

    def _take_in_sound(self, files: Sequence[_TokenFile]) -> None:
        try:
            self._take_in(files)
        except TableError:
            for file in files:  # which of them it is
                with self._left_out_if_damaged(file.date, file.path):
                    self._take_in([file])

    @contextmanager
    def _left_out_if_damaged(self, date: str, path: Path) -> Iterator[None]:
        try:
            yield
        except TableError as error:
            self._folders[date].changed = _UNREAD  # it may be brought back without another change of the folder
            if path not in self._damaged:
                self._damaged.add(path)
                logger.error("token_file_left_out error=%s", error)

    def _take_in(self, files: Sequence[_TokenFile]) -> None:
        numbers = {str(file.path): len(self._paths) + i for i, file in enumerate(files)}
        with damage_told(files[0].path):
            rows = ds.dataset(list(numbers), schema=TOKENS, format="parquet").to_table(_INDEX_COLUMNS)
        self._paths += numbers
        names = rows["__filename"].combine_chunks().dictionary_encode()
        file_numbers = np.array([numbers[name] for name in names.dictionary.to_pylist()], np.int32)
        files_of_rows = file_numbers[names.indices.to_numpy()] if len(rows) else np.zeros(0, np.int32)
        index = ChunkIndex(_ns(rows["start_time"]), _ns(rows["end_time"]), rows["token_count"].to_numpy())
        streams = rows["stream_id"].combine_chunks().dictionary_encode()
        stream_of_rows = streams.indices.to_numpy()
        for i, stream_id in enumerate(streams.dictionary.to_pylist()):
            mine = stream_of_rows == i
            self._add(stream_id, index.where(mine), files_of_rows[mine])
        for file in files:
            self._folders[file.date].known.add(file.path.name)

    def _add(self, stream_id: str, index: ChunkIndex, files: np.ndarray) -> None:
        stream = self._found.get(stream_id, _StreamFiles())
        joined, files = ChunkIndex.join([stream.index, index]), np.concatenate([stream.files, files])
        order = np.argsort(joined.start_ns, kind="stable")
        self._found[stream_id] = _StreamFiles(joined.where(order), files[order])

    def streams(self) -> dict[str, tuple[int, int, int]]:
        """Return for each stream: first start_ns, last end_ns, number of chunks."""
        return {name: _span(stream) for name, stream in self._streams.items()}

    def span(self, stream_id: str) -> tuple[int, int, int] | None:
        """Return the same for one stream; None for one without chunks."""
        stream = self._streams.get(stream_id)
        return _span(stream) if stream else None

    def index(self, stream_id: str, start_ns: int, end_ns: int) -> ChunkIndex:
        """Return the chunks that overlap [start_ns, end_ns), in order, without their tokens."""
        stream = self._streams.get(stream_id)
        return stream.index.overlapping(start_ns, end_ns) if stream else ChunkIndex.empty()

    def read(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        """Return the chunks that start at these times, in order, with their tokens.

        Opens only files that hold one of them, and none for chunks that were read of late.

        Args:
            stream_id: Whose.
            starts_ns: (n,) int64, from `index`.
        """
        try:
            return self._read(stream_id, starts_ns)
        except FileNotFoundError:
            # Compacted since; or recovery went back beyond a damaged checkpoint and took files away.
            return while_files_move(lambda: self._read_moved(stream_id, starts_ns))

    def _read_moved(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        with self._refreshing:
            for folder in self._folders.values():
                folder.changed = _UNREAD
            self._refresh()
        return self._read(stream_id, starts_ns)

    def _read(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        with self._caching:
            known = [self._cached.get((stream_id, start)) for start in starts_ns.tolist()]
        found = {chunk.start_ns: chunk for chunk in known if chunk is not None}
        missing = np.array([start for start in starts_ns.tolist() if start not in found], np.int64)
        stream = self._streams.get(stream_id, _StreamFiles())
        numbers = np.unique(stream.files[np.isin(stream.index.start_ns, missing)])
        paths = [self._paths[number] for number in numbers]
        if paths:
            read = self._read_files(paths, stream_id, missing)
            found |= {chunk.start_ns: chunk for chunk in read}
            with self._caching:
                for chunk in read:
                    self._cached.put((stream_id, chunk.start_ns), chunk)
        return [found[start] for start in sorted(found)]

    def _read_files(self, paths: list[str], stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        starts = pa.array(np.unique(starts_ns // _NS_PER_US), pa.int64()).cast(TOKENS.field("start_time").type)
        time = ds.field("start_time")
        # The range besides: a row group is left out by its smallest and largest value.
        in_range = (time >= starts[0]) & (time <= starts[-1]) if len(starts) else ds.scalar(False)
        wanted = (ds.field("stream_id") == stream_id) & in_range & time.isin(starts)
        columns = ["start_time", "end_time", "token_count", "token_dim", "tokens"]
        rows = ds.dataset(paths, schema=TOKENS, format="parquet").to_table(columns, filter=wanted)
        return list(_chunks(rows))


def _span(stream: _StreamFiles) -> tuple[int, int, int]:
    return int(stream.index.start_ns[0]), int(stream.index.end_ns.max()), len(stream.index)


def _chunks(rows: pa.Table) -> Iterator[PastChunk]:
    starts, ends = _ns(rows["start_time"]), _ns(rows["end_time"])
    counts, widths = rows["token_count"].to_numpy(), rows["token_dim"].to_numpy()
    for i, tokens in enumerate(rows["tokens"]):
        # A copy: a view would keep the whole file's tokens in memory.
        values = tokens.values.to_numpy(zero_copy_only=False).reshape(counts[i], widths[i]).copy()
        yield PastChunk(int(starts[i]), int(ends[i]), values)


def _ns(times: pa.ChunkedArray) -> np.ndarray:
    return times.cast(pa.int64()).to_numpy() * _NS_PER_US
