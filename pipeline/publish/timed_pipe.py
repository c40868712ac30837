"""When the bytes of a pipe came: the only times that there are, where its format holds none (raw H.264, JPEGs…)."""

from __future__ import annotations

import threading
import time
from collections import deque
from fractions import Fraction
from select import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import BufferedReader

    import av

POLL_S = 0.25  # between two looks at whether a silent pipe is to be read on
SHORTEST_FRAME_S = 0.001  # what Matroska can tell apart


class TimedPipe:
    """A pipe for PyAV to read, which takes what is there and waits for no more.

    FFmpeg reads seconds of video before it gives the first packet, so it is of the bytes that the times are kept.

    Args:
        pipe: Which.
        stop: Once it is set, a pipe that is silent has ended.

    Attributes:
        keeps_times: Set it to False where nothing is to be stamped: what was kept would only grow.
    """

    def __init__(self, pipe: BufferedReader, stop: threading.Event | None = None):
        self.keeps_times = True
        self._pipe = pipe
        self._stop = stop
        self._n_bytes = 0
        self._reads: deque[tuple[int, float]] = deque()  # bytes there after each, and when; the oldest of use first
        self._first_s: float | None = None  # when the first packet came
        self._last_s = 0.0  # the last packet's time

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, at least one before the end."""
        while self._stop is not None and not select([self._pipe], [], [], POLL_S)[0]:
            if self._stop.is_set():
                return b""
        data = self._pipe.read1(size)
        self._n_bytes += len(data)
        if self.keeps_times:
            self._reads.append((self._n_bytes, time.monotonic()))
        return data

    def stamp(self, packet: av.Packet) -> None:
        """Set the next packet's times to when its first byte came, since the first packet's did; they rise."""
        while len(self._reads) > 1 and self._reads[0][0] <= (packet.pos or 0):
            self._reads.popleft()
        came_s = self._reads[0][1]
        if self._first_s is None:
            self._first_s, self._last_s = came_s, -SHORTEST_FRAME_S
        self._last_s = max(came_s - self._first_s, self._last_s + SHORTEST_FRAME_S)
        packet.pts = packet.dts = round(self._last_s / Fraction(packet.time_base))
