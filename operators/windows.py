"""Windows of standing queries: which chunks belong together, and when a window is whole.

Window k of a session is ``[session_start + k * window, session_start + (k + 1) * window)``. A chunk belongs to the
window that its first frame lies in. A window closes with the chunk that reaches its end, or when a chunk of a later one
arrives, or when its session ends: by the stream's own times alone, so that a replay closes the same windows with the
same chunks.

Windows may be scenes instead (`scenes`): one begins where the detector says, which for the chunk before the newest one
is known only when that has come.

A window is asked about as its query was when it began. A query that is new, or changed, waits for the next window's
start: half a window would be answered as if it were a whole one.

Of a long window only so much is held as its query may yet choose from (`worth_holding`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..models.selection import worth_holding
from .queries import StandingQuery
from .rows import Chunk
from .scenes import SceneCuts


@dataclass(frozen=True)
class OpenWindow:
    """The window of one query on one stream that is still filling."""

    query: StandingQuery  # as it was when the window began
    session: str
    window_index: int
    chunks: tuple[Chunk, ...]
    passed: bool = False  # it is waited out: it was asked about already, or the query came in its midst
    first_ns: int | None = None  # start of its first chunk, where that is held no more

    @property
    def origin_ns(self) -> int:
        """Time that the chunks' times are told from: where the window begins."""
        if self.query.scenes:
            return self.start_ns
        return self.chunks[0].session_start_ns + self.window_index * self.query.window_ns

    @property
    def start_ns(self) -> int:
        """Time of its first chunk's first frame."""
        return self.chunks[0].start_ns if self.first_ns is None else self.first_ns

    @property
    def end_ns(self) -> int:
        """Time just after its last chunk's last frame."""
        return self.chunks[-1].end_ns


NO_CUTS = SceneCuts()
Windows = Mapping[str, OpenWindow]  # of one stream, by the query's id


def add_chunk(
    windows: Windows, chunk: Chunk, queries: Mapping[str, StandingQuery], cuts: SceneCuts = NO_CUTS
) -> tuple[dict[str, OpenWindow], list[OpenWindow]]:
    """Take one stream's next chunk.

    Args:
        windows: Those that are open, none at the stream's first chunk.
        chunk: The next of its stream.
        queries: In force for this stream now, by id. One that is missing finishes its window, and begins no other.
        cuts: Where its scenes begin.

    Returns:
        The windows that are open after `chunk`, and those that it closed, in the order of the queries.
    """
    after: dict[str, OpenWindow] = {}
    closed: list[OpenWindow] = []
    for query_id in dict.fromkeys((*queries, *windows)):
        window, query = windows.get(query_id), queries.get(query_id)
        if window is not None and window.query.scenes and window.session == chunk.session:
            window, full = _cut(window, query, cuts)
            closed += full
        if window is not None and _belongs(chunk, window, cuts):
            window = _with(window, chunk)
        else:
            closed += [window] if window is not None and not window.passed else []
            window = None if query is None else _begin(query, chunk, window, cuts)
        if window is not None and not window.passed and _is_full(window):
            closed.append(window)
            window = replace(window, chunks=(), passed=True, first_ns=None)
        if window is not None:
            after[query_id] = window
    return after, closed


def close_session(windows: Windows, session: str) -> tuple[dict[str, OpenWindow], list[OpenWindow]]:
    """Return what is open after `session` has ended, and the windows that its end closed."""
    after = {query_id: window for query_id, window in windows.items() if window.session != session}
    return after, [w for w in windows.values() if w.session == session and not w.passed]


def _cut(
    window: OpenWindow, query: StandingQuery | None, cuts: SceneCuts
) -> tuple[OpenWindow | None, list[OpenWindow]]:
    """Return what is open of a scene, and what a cut before its newest chunk closed."""
    if not cuts.previous:
        return window, []
    full = replace(window, chunks=window.chunks[:-1])
    closed = [full] if full.chunks and not full.passed else []
    if query is None or not query.scenes:
        return None, closed
    return OpenWindow(query, window.session, window.window_index + 1, window.chunks[-1:]), closed


def _with(window: OpenWindow, chunk: Chunk) -> OpenWindow:
    if not window.passed:
        return _held(window, (*window.chunks, chunk))
    # Of what is not asked about, a scene keeps the one chunk that may turn out to begin the next.
    return replace(window, chunks=(chunk,)) if window.query.scenes else window


def _held(window: OpenWindow, chunks: tuple[Chunk, ...]) -> OpenWindow:
    """Return the window with those chunks that its query may yet choose from: it may be a whole night."""
    query = window.query
    n_tokens = [len(c.tokens) for c in chunks]
    held = worth_holding([c.chunk_index for c in chunks], n_tokens, query.token_budget, query.token_policy)
    return replace(
        window, chunks=tuple(chunks[i] for i in held), first_ns=window.start_ns if held[0] else window.first_ns
    )


def _belongs(chunk: Chunk, window: OpenWindow, cuts: SceneCuts) -> bool:
    if window.query.scenes:
        return window.session == chunk.session and not cuts.here
    return (window.session, window.window_index) == (chunk.session, _index(window.query, chunk))


def _is_full(window: OpenWindow) -> bool:
    """Tell whether no later chunk can belong to it: chunks of a session do not overlap."""
    return not window.query.scenes and window.end_ns >= window.origin_ns + window.query.window_ns


def _index(query: StandingQuery, chunk: Chunk) -> int:
    return (chunk.start_ns - chunk.session_start_ns) // query.window_ns


def _begin(query: StandingQuery, chunk: Chunk, before: OpenWindow | None, cuts: SceneCuts) -> OpenWindow:
    """Return the window that `chunk` is in; one that cannot be its first finds it half over, and waits it out."""
    if query.scenes:
        index = before.window_index + 1 if before is not None and before.session == chunk.session else 0
        return OpenWindow(query, chunk.session, index, (chunk,), passed=not (cuts.here or chunk.chunk_index == 0))
    follows = before is not None and before.session == chunk.session and before.query.window_s == query.window_s
    into_ns = (chunk.start_ns - chunk.session_start_ns) % query.window_ns
    first = follows or chunk.chunk_index == 0 or into_ns < chunk.end_ns - chunk.start_ns
    return OpenWindow(query, chunk.session, _index(query, chunk), (chunk,) if first else (), passed=not first)
