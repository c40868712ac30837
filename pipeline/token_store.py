"""Recent tokens in memory, by stream: what questions about the last minutes are answered from."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray import serve

from ..operators.rows import Chunk, LaneNews, Picture
from .chunk_index import ChunkIndex, PastChunk
from .stream_activity import StreamActivity, StreamRegister

LATENCY_SAMPLES = 4096  # of the newest chunks, for percentiles


@dataclass(frozen=True, eq=False)
class HeldStream:
    """What a store has of one stream."""

    complete_from_ns: int  # of what starts at or after this, nothing is missing
    index: ChunkIndex


class TokenMemory:
    """Chunks of all streams, in order of time within each, the oldest leaving beyond `max_bytes`.

    A chunk that a restarted lane pushes again takes the place of the first one. For each stream it knows from when on
    it has everything: that it may have been started in the middle of a stream, or have dropped chunks, makes what came
    before a matter of the tokens table.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._streams: dict[str, list[Chunk]] = {}
        self._complete_from_ns: dict[str, int] = {}
        self._arrived: deque[tuple[str, str, int]] = deque()

    def put(self, chunk: Chunk) -> None:
        """Take one chunk in, making room for it."""
        chunks = self._streams.setdefault(chunk.stream_id, [])
        self._complete_from_ns.setdefault(chunk.stream_id, chunk.start_ns)
        i = bisect_left(chunks, _order(chunk), key=_order)
        if i < len(chunks) and _order(chunks[i]) == _order(chunk):
            self._n_bytes += chunk.tokens.nbytes - chunks[i].tokens.nbytes
            chunks[i] = chunk
        else:
            chunks.insert(i, chunk)
            self._n_bytes += chunk.tokens.nbytes
            self._arrived.append((chunk.stream_id, chunk.session, chunk.chunk_index))
        while self._n_bytes > self._max_bytes and len(self._arrived) > 1:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        stream_id, session, chunk_index = self._arrived.popleft()
        chunks = self._streams[stream_id]
        for i, chunk in enumerate(chunks):
            if (chunk.session, chunk.chunk_index) == (session, chunk_index):
                self._n_bytes -= chunk.tokens.nbytes
                self._complete_from_ns[stream_id] = max(self._complete_from_ns[stream_id], chunk.end_ns)
                del chunks[i]
                break
        if not chunks:
            del self._streams[stream_id], self._complete_from_ns[stream_id]

    def read(self, stream_id: str, start_ns: int, end_ns: int) -> list[Chunk]:
        """Return the chunks that overlap [start_ns, end_ns), in order; none for an unknown stream."""
        return [c for c in self._streams.get(stream_id, ()) if c.end_ns > start_ns and c.start_ns < end_ns]

    def held(self, stream_id: str) -> HeldStream | None:
        """Return what is held of a stream; None for one of which nothing is."""
        chunks = self._streams.get(stream_id)
        if not chunks:
            return None
        index = ChunkIndex(
            np.array([c.start_ns for c in chunks], np.int64),
            np.array([c.end_ns for c in chunks], np.int64),
            np.array([c.tokens.shape[0] for c in chunks], np.int32),
        )
        return HeldStream(self._complete_from_ns[stream_id], index)

    def pick(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        """Return the chunks that start at these times, in order; those that have left meanwhile are missing."""
        wanted = set(starts_ns.tolist())
        chunks = self._streams.get(stream_id, ())
        return [PastChunk(c.start_ns, c.end_ns, c.tokens) for c in chunks if c.start_ns in wanted]

    def streams(self) -> dict[str, tuple[int, int, int]]:
        """Return for each stream: first start_ns, last end_ns, number of chunks."""
        return {name: (c[0].start_ns, c[-1].end_ns, len(c)) for name, c in self._streams.items()}

    @property
    def n_bytes(self) -> int:
        """Bytes of tokens held."""
        return self._n_bytes


def _order(chunk: Chunk) -> tuple[int, str, int]:
    return chunk.start_ns, chunk.session, chunk.chunk_index


@dataclass(frozen=True)
class PushLatency:
    """From a record's Kafka timestamp to its tokens standing in the store, over the newest chunks."""

    count: int
    p50_ms: float
    p95_ms: float


@serve.deployment(name="TokenStore", max_ongoing_requests=64, max_queued_requests=2048)
class TokenStore:
    """`TokenMemory` behind a Serve handle; one replica."""

    def __init__(self, max_bytes: int):
        self._memory = TokenMemory(max_bytes)
        self._register = StreamRegister()
        self._latencies_ms: deque[float] = deque(maxlen=LATENCY_SAMPLES)

    async def push(self, news: LaneNews) -> None:
        """Take in what a lane tells."""
        now_ns = time.time_ns()
        self._register.take(news)
        for chunk in news.chunks:
            # The array arrives as a view of the request's buffer; own it.
            self._memory.put(replace(chunk, tokens=chunk.tokens.copy()))
            self._latencies_ms.append((now_ns - chunk.append_ns) / 1e6)

    async def held(self, stream_id: str) -> HeldStream | None:
        """Return what is held of a stream, without the tokens."""
        return self._memory.held(stream_id)

    async def pick(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        """Return the chunks that start at these times."""
        return self._memory.pick(stream_id, starts_ns)

    async def streams(self) -> dict[str, tuple[int, int, int]]:
        """Return for each stream: first start_ns, last end_ns, number of chunks."""
        return self._memory.streams()

    async def activity(self) -> Mapping[str, StreamActivity]:
        """Return what was last heard of each stream."""
        return self._register.activity()

    async def picture(self, stream_id: str) -> Picture | None:
        """Return a stream's newest picture."""
        return self._register.picture(stream_id)

    async def stats(self) -> dict[str, Any]:
        """Return streams, bytes held and the latency of pushes."""
        return {
            "streams": self._memory.streams(),
            "n_bytes": self._memory.n_bytes,
            "push_latency": self._push_latency(),
        }

    def _push_latency(self) -> PushLatency | None:
        if len(self._latencies_ms) < 2:
            return None
        cuts = statistics.quantiles(self._latencies_ms, n=20)
        return PushLatency(len(self._latencies_ms), cuts[9], cuts[18])
