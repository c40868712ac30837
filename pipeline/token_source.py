"""One place to get a stream's tokens from: the newest out of the store's memory, what is older out of Parquet."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from ..operators.rows import Picture
from .chunk_index import ChunkIndex, PastChunk
from .stream_activity import StreamActivity
from .token_files import TokenFiles
from .token_store import HeldStream

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 2.0  # without an answer by then, Parquet has to do; a store that restarts is back soon
STORE_PAUSE_S = 5.0  # for which it is then not asked, so that a question does not wait several times
HELD_FOR_S = 0.1  # what the store said goes for so long: many ask about the same stream, and a chunk takes two seconds
_NS_PER_US = 1_000
T = TypeVar("T")


class Store(Protocol):
    """What is asked of the token store; `pipeline.serving.StoreReader` is one."""

    async def held(self, stream_id: str) -> HeldStream | None:
        """Return what is held of a stream."""
        ...

    async def pick(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        """Return the chunks that start at these times, those that are still there."""
        ...

    async def streams(self) -> dict[str, tuple[int, int, int]]:
        """Return for each stream: first start_ns, last end_ns, number of chunks."""
        ...

    async def activity(self) -> Mapping[str, StreamActivity]:
        """Return what was last heard of each stream."""
        ...

    async def picture(self, stream_id: str) -> Picture | None:
        """Return a stream's newest picture."""
        ...


@dataclass(frozen=True)
class StreamSpan:
    """From when to when a stream has tokens."""

    start_ns: int
    end_ns: int
    n_chunks: int


@dataclass(frozen=True, eq=False)
class RangeIndex:
    """A stream's chunks in a range, and which of them the store holds."""

    stream_id: str
    chunks: ChunkIndex
    in_store: np.ndarray  # (n,) bool


class StreamView:
    """What there is of one stream, without its tokens: what the store held when it was looked up, and the files.

    The files are looked at once, however many ask the view, and never before the store has said what it holds: what
    left the store is in them.

    Args:
        stream_id: The stream.
        files: The tokens table.
        held: What the store says; None where it holds nothing or is away.
    """

    def __init__(self, stream_id: str, files: TokenFiles, held: HeldStream | None):
        self.stream_id = stream_id
        self._files = files
        self._held = held
        self._reading: asyncio.Future[None] | None = None

    async def last_ns(self) -> int | None:
        """Return when the newest chunk ends; None for a stream without tokens."""
        newest = [] if self._held is None else [int(self._held.index.end_ns.max())]
        if self._held is None:
            await self._read_files()
        if (span := self._files.span(self.stream_id)) is not None:
            newest.append(span[1])
        return max(newest, default=None)

    async def index(self, start_ns: int, end_ns: int) -> RangeIndex:
        """Return which chunks overlap [start_ns, end_ns), in order."""
        held = self._held
        # Times in Parquet are rounded down to microseconds: the boundary is, too, or a chunk at it would come twice.
        complete_from_ns = end_ns if held is None else held.complete_from_ns // _NS_PER_US * _NS_PER_US
        if start_ns < complete_from_ns:
            await self._read_files()
        # What the files had when they were last looked at costs no reading, and is asked in any case: a session that
        # came later may have earlier times than an older one, which the store then has not.
        old = self._files.index(self.stream_id, start_ns, end_ns)
        if held is None:
            return RangeIndex(self.stream_id, old, np.zeros(len(old), bool))
        near = held.index.overlapping(start_ns, end_ns + _NS_PER_US)
        in_memory = near.start_ns // _NS_PER_US * _NS_PER_US
        old = old.where((old.start_ns < complete_from_ns) | ~np.isin(old.start_ns, in_memory))
        new = held.index.overlapping(start_ns, end_ns)
        new = new.where(np.flatnonzero(new.start_ns >= complete_from_ns))
        both = ChunkIndex.join([old, new])
        order = np.argsort(both.start_ns, kind="stable")
        return RangeIndex(self.stream_id, both.where(order), (np.arange(len(both)) >= len(old))[order])

    async def _read_files(self) -> None:
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._files.refresh))
        reading = self._reading
        try:
            await asyncio.shield(reading)  # others wait for it, too
        except Exception:
            if self._reading is reading:
                self._reading = None  # the next one tries again
            raise


class TokenSource:
    """The tokens of all streams, by stream and time.

    Each chunk comes once. A range that the store holds whole does not touch the disk; where the store was restarted
    or does not answer, committed Parquet files do, so that at most what was not yet committed is missing for a moment.

    Args:
        files: The tokens table.
        store: The token store.
        clock_s: Any clock that only goes forward.
    """

    def __init__(self, files: TokenFiles, store: Store, clock_s: Callable[[], float] = time.monotonic):
        self._files = files
        self._store = store
        self._clock_s = clock_s
        self._ask_store_from_s = 0.0
        self._views: dict[str, tuple[float, asyncio.Future[StreamView]]] = {}  # when the store was asked

    async def streams(self) -> dict[str, StreamSpan]:
        """Return every stream that has tokens, with its first and last time, sorted by name."""
        await asyncio.to_thread(self._files.refresh)
        spans = {name: StreamSpan(*span) for name, span in self._files.streams().items()}
        for name, (start_ns, end_ns, n_chunks) in (await self._ask(self._store.streams) or {}).items():
            old = spans.get(name, StreamSpan(start_ns, end_ns, n_chunks))
            spans[name] = StreamSpan(min(old.start_ns, start_ns), max(old.end_ns, end_ns), max(old.n_chunks, n_chunks))
        return dict(sorted(spans.items()))

    async def activity(self) -> Mapping[str, StreamActivity]:
        """Return what was last heard of each stream that a lane has told of; nothing while the store is away."""
        return await self._ask(self._store.activity) or {}

    async def picture(self, stream_id: str) -> Picture | None:
        """Return a stream's newest picture, if there is one."""
        return await self._ask(lambda: self._store.picture(stream_id))

    async def look_up(self, stream_id: str) -> StreamView:
        """Return what there is of a stream now, as the store said within `HELD_FOR_S`."""
        now_s = self._clock_s()
        for name in [name for name, (asked_s, _) in self._views.items() if now_s - asked_s >= HELD_FOR_S]:
            del self._views[name]
        if stream_id not in self._views:
            self._views[stream_id] = (now_s, asyncio.ensure_future(self._view(stream_id)))
        return await asyncio.shield(self._views[stream_id][1])

    async def _view(self, stream_id: str) -> StreamView:
        return StreamView(stream_id, self._files, await self._ask(lambda: self._store.held(stream_id)))

    async def read(self, found: RangeIndex, chosen: np.ndarray) -> list[PastChunk]:
        """Return chunks with their tokens, in order of start.

        Args:
            found: From `StreamView.index`.
            chosen: (n,) positions in it.
        """
        starts_ns, in_store = found.chunks.start_ns[chosen], found.in_store[chosen]
        wanted = starts_ns[in_store]
        picked = await self._ask(lambda: self._store.pick(found.stream_id, wanted)) if len(wanted) else []
        picked = picked or []
        have = {chunk.start_ns for chunk in picked}
        # What left the store since the index was made has been committed, but for a store that just died.
        left = [start // _NS_PER_US * _NS_PER_US for start in wanted.tolist() if start not in have]
        from_files = np.concatenate([starts_ns[~in_store], np.array(left, np.int64)])
        older: list[PastChunk] = []
        if len(from_files):
            if left:
                await asyncio.to_thread(self._files.refresh)
            older = await asyncio.to_thread(self._files.read, found.stream_id, from_files)
        return sorted([*older, *picked], key=lambda chunk: chunk.start_ns)

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T | None:
        if self._clock_s() < self._ask_store_from_s:
            return None
        try:
            return await asyncio.wait_for(question(), STORE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 (the edge to another process: whatever came out of it)
            self._ask_store_from_s = self._clock_s() + STORE_PAUSE_S
            logger.warning("store_not_answering error=%s; reading Parquet instead", type(error).__name__)
            return None
