"""Reads past tokens from the table `tokens` of an output folder, also while lanes write to it.

A lane writes a file every few seconds, so that ten hours are thousands of them. What each holds, without the tokens
themselves, is read once and kept: about 28 bytes a chunk, 1.2 MB a day of a stream at two frames a second. A question
then opens only the files that have chunks it wants. Days that nothing was written to since are not looked at again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from .checkpoint import list_committed, list_lanes
from .chunk_index import ChunkIndex, PastChunk
from .parquet_sink import FoundFile, find_data_files
from .tables import TOKENS

logger = logging.getLogger(__name__)

TABLE = "tokens"
FILES_AT_ONCE = 256  # of which the index is read in one go
CACHE_BYTES = 64 << 20  # of chunks that were read of late
SETTLED_S = 2.0  # a folder's time of change says nothing of a second change in the same tick of the clock
_INDEX_COLUMNS = ["stream_id", "start_time", "end_time", "token_count", "__filename"]
_NS_PER_US = 1_000


@dataclass
class _StreamFiles:
    """What one stream has on disk, in order of `start_ns`."""

    index: ChunkIndex = field(default_factory=ChunkIndex.empty)
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # where each chunk is: into `_paths`


@dataclass
class _Folder:
    """What was seen of one date's folder."""

    changed_ns: int = -1  # its time of change when it was last read whole; -1: read it again
    known: set[str] = field(default_factory=set)  # names of files that are in the index


class TokenFiles:
    """The committed chunks of an output folder. Safe to call from several threads.

    Args:
        root: The output folder; it may have nothing in it yet.
    """

    def __init__(self, root: Path):
        self._root = root
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._cached: OrderedDict[tuple[str, int], PastChunk] = OrderedDict()  # the least used first
        self._cached_bytes = 0
        self._streams: dict[str, _StreamFiles] = {}
        self._folders: dict[str, _Folder] = {}
        self._paths: list[str] = []

    def refresh(self) -> None:
        """Take in what was committed since the last call; the first call reads what every file holds."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        committed = {lane: epochs[0] for lane in list_lanes(self._root) if (epochs := list_committed(self._root, lane))}
        fresh = [file for date in self._changed_dates() for file in self._fresh_files(date, committed)]
        fresh.sort(key=lambda file: (file.date, file.epoch))
        for start in range(0, len(fresh), FILES_AT_ONCE):
            batch = fresh[start : start + FILES_AT_ONCE]
            self._take_in(batch)
            for file in batch:
                self._folders[file.date].known.add(file.path.name)

    def _changed_dates(self) -> Iterator[str]:
        table = self._root / TABLE
        for entry in os.scandir(table) if table.is_dir() else ():
            date, changed_ns = entry.name.removeprefix("date="), entry.stat().st_mtime_ns
            folder = self._folders.setdefault(date, _Folder())
            if entry.is_dir() and folder.changed_ns != changed_ns:
                settled = time.time_ns() - changed_ns > SETTLED_S * 1e9
                folder.changed_ns = changed_ns if settled else -1
                yield date

    def _fresh_files(self, date: str, committed: dict[int, int]) -> Iterator[FoundFile]:
        folder = self._folders[date]
        for file in find_data_files(self._root, [TABLE], date=date):
            if file.temporary or file.path.name in folder.known:
                continue
            if file.epoch <= committed.get(file.lane, 0):
                yield file
            else:
                folder.changed_ns = -1  # it may be committed without another change of the folder

    def _take_in(self, files: Sequence[FoundFile]) -> None:
        numbers = {str(file.path): len(self._paths) + i for i, file in enumerate(files)}
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

    def _add(self, stream_id: str, index: ChunkIndex, files: np.ndarray) -> None:
        stream = self._streams.setdefault(stream_id, _StreamFiles())
        joined, files = ChunkIndex.join([stream.index, index]), np.concatenate([stream.files, files])
        order = np.argsort(joined.start_ns, kind="stable")
        stream.index, stream.files = joined.where(order), files[order]

    def streams(self) -> dict[str, tuple[int, int, int]]:
        """Return for each stream: first start_ns, last end_ns, number of chunks."""
        with self._lock:
            return {
                name: (int(s.index.start_ns[0]), int(s.index.end_ns.max()), len(s.index))
                for name, s in self._streams.items()
            }

    def index(self, stream_id: str, start_ns: int, end_ns: int) -> ChunkIndex:
        """Return the chunks that overlap [start_ns, end_ns), in order, without their tokens."""
        with self._lock:
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
            # Recovery went back beyond a damaged checkpoint and took files away: what is left is read anew.
            with self._lock:
                self._forget()
                self._refresh()
            return self._read(stream_id, starts_ns)

    def _read(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        with self._lock:
            found = self._take_cached(stream_id, starts_ns)
            missing = np.array([start for start in starts_ns.tolist() if start not in found], np.int64)
            stream = self._streams.get(stream_id, _StreamFiles())
            numbers = np.unique(stream.files[np.isin(stream.index.start_ns, missing)])
            paths = [self._paths[number] for number in numbers]
        if paths:
            read = self._read_files(paths, stream_id, missing)
            found |= {chunk.start_ns: chunk for chunk in read}
            with self._lock:
                self._cache(stream_id, read)
        return [found[start] for start in sorted(found)]

    def _take_cached(self, stream_id: str, starts_ns: np.ndarray) -> dict[int, PastChunk]:
        found = {}
        for start in starts_ns.tolist():
            chunk = self._cached.get((stream_id, start))
            if chunk is not None:
                self._cached.move_to_end((stream_id, start))
                found[start] = chunk
        return found

    def _cache(self, stream_id: str, chunks: Iterable[PastChunk]) -> None:
        for chunk in chunks:
            if (stream_id, chunk.start_ns) not in self._cached:
                self._cached[stream_id, chunk.start_ns] = chunk
                self._cached_bytes += chunk.tokens.nbytes
        while self._cached_bytes > CACHE_BYTES:
            _, oldest = self._cached.popitem(last=False)
            self._cached_bytes -= oldest.tokens.nbytes

    def _read_files(self, paths: list[str], stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        starts = pa.array(starts_ns // _NS_PER_US, pa.int64()).cast(TOKENS.field("start_time").type)
        wanted = (ds.field("stream_id") == stream_id) & ds.field("start_time").isin(starts)
        columns = ["start_time", "end_time", "token_count", "token_dim", "tokens"]
        rows = ds.dataset(paths, schema=TOKENS, format="parquet").to_table(columns, filter=wanted)
        return list(_chunks(rows))


def _chunks(rows: pa.Table) -> Iterator[PastChunk]:
    starts, ends = _ns(rows["start_time"]), _ns(rows["end_time"])
    counts, widths = rows["token_count"].to_numpy(), rows["token_dim"].to_numpy()
    for i, tokens in enumerate(rows["tokens"]):
        # A copy: a view would keep the whole file's tokens in memory.
        values = tokens.values.to_numpy(zero_copy_only=False).reshape(counts[i], widths[i]).copy()
        yield PastChunk(int(starts[i]), int(ends[i]), values)


def _ns(times: pa.ChunkedArray) -> np.ndarray:
    return times.cast(pa.int64()).to_numpy() * _NS_PER_US
