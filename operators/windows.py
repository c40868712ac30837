"""Windows of a standing query: which chunks belong together, and when a window is whole.

Window k of a session is ``[session_start + k * window, session_start + (k + 1) * window)``. A chunk belongs to the
window that its first frame lies in. A window closes when a chunk of a later one arrives, or when its session ends:
by the stream's own times alone, so that a replay closes the same windows with the same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .rows import Chunk


@dataclass(frozen=True)
class OpenWindow:
    """The window of one query on one stream that is still filling."""

    session: str
    window_index: int
    chunks: tuple[Chunk, ...] = ()

    @property
    def start_ns(self) -> int:
        """Time of its first chunk's first frame."""
        return self.chunks[0].start_ns

    @property
    def end_ns(self) -> int:
        """Time just after its last chunk's last frame."""
        return self.chunks[-1].end_ns


def add_chunk(window: OpenWindow | None, chunk: Chunk, window_ns: int) -> tuple[OpenWindow, OpenWindow | None]:
    """Return the window that is open after `chunk`, and the one that it closed, if any.

    Args:
        window: The open one, None at the stream's first chunk.
        chunk: The next of its stream.
        window_ns: Length of a window, more than 0.
    """
    index = (chunk.start_ns - chunk.session_start_ns) // window_ns
    if window is not None and (window.session, window.window_index) == (chunk.session, index):
        return replace(window, chunks=(*window.chunks, chunk)), None
    return OpenWindow(chunk.session, index, (chunk,)), window


def close_session(window: OpenWindow | None, session: str) -> tuple[OpenWindow | None, OpenWindow | None]:
    """Return what is open after `session` has ended, and the window that its end closed, if any."""
    if window is not None and window.session == session:
        return None, window
    return window, None
