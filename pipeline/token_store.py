"""Recent tokens in memory, by stream: what questions about the last minutes are answered from."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from ..operators.rows import Chunk

LATENCY_SAMPLES = 4096  # of the newest chunks, for percentiles


class TokenMemory:
    """Chunks of all streams, in order of time within each, the oldest leaving beyond `max_bytes`.

    A chunk that a restarted lane pushes again takes the place of the first one.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._streams: dict[str, list[Chunk]] = {}
        self._arrived: deque[tuple[str, str, int]] = deque()

    def put(self, chunk: Chunk) -> None:
        """Take one chunk in, making room for it."""
        chunks = self._streams.setdefault(chunk.stream_id, [])
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
                del chunks[i]
                break
        if not chunks:
            del self._streams[stream_id]

    def read(self, stream_id: str, start_ns: int, end_ns: int) -> list[Chunk]:
        """Return the chunks that overlap [start_ns, end_ns), in order; none for an unknown stream."""
        return [c for c in self._streams.get(stream_id, ()) if c.end_ns > start_ns and c.start_ns < end_ns]

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
        self._latencies_ms: deque[float] = deque(maxlen=LATENCY_SAMPLES)

    async def push(self, chunks: Sequence[Chunk]) -> None:
        """Take the chunks in."""
        now_ns = time.time_ns()
        for chunk in chunks:
            # The array arrives as a view of the request's buffer; own it.
            self._memory.put(replace(chunk, tokens=chunk.tokens.copy()))
            self._latencies_ms.append((now_ns - chunk.append_ns) / 1e6)

    async def read(self, stream_id: str, start_ns: int, end_ns: int) -> list[Chunk]:
        """Return the chunks that overlap [start_ns, end_ns)."""
        return self._memory.read(stream_id, start_ns, end_ns)

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
