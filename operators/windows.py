"""Windows of standing queries: which chunks belong together, and when a window is whole.

Window k of a session is ``[session_start + k * window, session_start + (k + 1) * window)``. A chunk belongs to the
window that its first frame lies in. A window closes when a chunk of a later one arrives, or when its session ends:
by the stream's own times alone, so that a replay closes the same windows with the same chunks.

A window is asked about as its query was when it began. A query that is new, or changed, waits for the next window's
start: half a window would be answered as if it were a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .queries import StandingQuery
from .rows import Chunk


@dataclass(frozen=True)
class OpenWindow:
    """The window of one query on one stream that is still filling."""

    query: StandingQuery  # as it was when the window began
    session: str
    window_index: int
    chunks: tuple[Chunk, ...]
    joined: bool = False  # the query came in its midst: it is waited out, without its chunks

    @property
    def start_ns(self) -> int:
        """Time of its first chunk's first frame."""
        return self.chunks[0].start_ns

    @property
    def end_ns(self) -> int:
        """Time just after its last chunk's last frame."""
        return self.chunks[-1].end_ns


Windows = Mapping[str, OpenWindow]  # of one stream, by the query's id


def add_chunk(
    windows: Windows, chunk: Chunk, queries: Mapping[str, StandingQuery]
) -> tuple[dict[str, OpenWindow], list[OpenWindow]]:
    """Take one stream's next chunk.

    Args:
        windows: Those that are open, none at the stream's first chunk.
        chunk: The next of its stream.
        queries: In force for this stream now, by id. One that is missing finishes its window, and begins no other.

    Returns:
        The windows that are open after `chunk`, and those that it closed, in the order of the queries.
    """
    after: dict[str, OpenWindow] = {}
    closed: list[OpenWindow] = []
    for query_id in dict.fromkeys((*queries, *windows)):
        window = windows.get(query_id)
        if window is not None and _belongs(chunk, window):
            after[query_id] = window if window.joined else replace(window, chunks=(*window.chunks, chunk))
            continue
        if window is not None and not window.joined:
            closed.append(window)
        query = queries.get(query_id)
        if query is not None:
            after[query_id] = _begin(query, chunk, window)
    return after, closed


def close_session(windows: Windows, session: str) -> tuple[dict[str, OpenWindow], list[OpenWindow]]:
    """Return what is open after `session` has ended, and the windows that its end closed."""
    after = {query_id: window for query_id, window in windows.items() if window.session != session}
    return after, [w for w in windows.values() if w.session == session and not w.joined]


def _belongs(chunk: Chunk, window: OpenWindow) -> bool:
    return (window.session, window.window_index) == (chunk.session, _index(window.query, chunk))


def _index(query: StandingQuery, chunk: Chunk) -> int:
    return (chunk.start_ns - chunk.session_start_ns) // query.window_ns


def _begin(query: StandingQuery, chunk: Chunk, before: OpenWindow | None) -> OpenWindow:
    """Return the window that `chunk` is in, joined where it cannot be its first."""
    follows = before is not None and before.session == chunk.session and before.query.window_ns == query.window_ns
    into_ns = (chunk.start_ns - chunk.session_start_ns) % query.window_ns
    first = follows or chunk.chunk_index == 0 or into_ns < chunk.end_ns - chunk.start_ns
    return OpenWindow(query, chunk.session, _index(query, chunk), (chunk,) if first else (), joined=not first)
