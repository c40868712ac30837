"""Times for the frames of a segment, and the limits on what one may cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, Protocol, TypeVar

from .media import MAX_FRAME_PX, MAX_IMAGE_PX
from .rows import SegmentMeta
from .sampling import NS_PER_S, MediaClock

Frame = TypeVar("Frame")
FrameOut = TypeVar("FrameOut", covariant=True)


FILE_FRAMES = 216_000  # of a part of a file, which may be all of it: 2.4 hours at 25 fps, ten minutes' work in 1080p


@dataclass(frozen=True)
class DecodeLimits:
    """What one segment may cost. The defaults are far over anything meant to be a segment."""

    max_frame_px: int = MAX_FRAME_PX  # coded pixels of a frame of video
    max_image_px: int = MAX_IMAGE_PX  # of a JPEG or PNG image
    max_frames: int = 36_000  # frames decoded of a segment: ten minutes at 60 fps
    max_sampled_bytes: int = 1 << 30  # RGB of a segment's sampled frames: 1,783 of 448x448, 15 minutes at 2 fps
    max_span_ns: int = 3600 * NS_PER_S  # a frame's time from the first: one wild timestamp must not end a session
    max_leap_ns: int = 3600 * NS_PER_S  # and from the frame before, which is what counts in a long part of a file

    def of_file(self) -> DecodeLimits:
        """Return the limits on a part of a file. One that cannot be cut is a single part, however long it is."""
        return replace(self, max_frames=FILE_FRAMES, max_span_ns=FILE_FRAMES * self.max_leap_ns)

    def max_sampled(self, frame_hw: tuple[int, int]) -> int:
        """Return how many sampled frames of a size `max_sampled_bytes` are."""
        return max(1, self.max_sampled_bytes // (frame_hw[0] * frame_hw[1] * 3))


class TimedFrames(Protocol[FrameOut]):
    """Frames in presentation order as (timestamp in `time_base`, frame)."""

    @property
    def time_base(self) -> Fraction:
        """Seconds per tick."""
        ...

    @property
    def first_packet_ticks(self) -> int | None:
        """Timestamp of the first packet that is to become a frame; known when the first frame comes."""
        ...

    def __iter__(self) -> Iterator[tuple[int, FrameOut]]: ...


class FrameTimer(Generic[Frame]):
    """Puts times on a reader's frames and keeps those that can be used; iterate once.

    Yields (elapsed ns, frame), never falling, and remembers the first and the last of them.
    """

    def __init__(self, reader: TimedFrames[Frame], meta: SegmentMeta, clock: MediaClock | None, limits: DecodeLimits):
        self.reader = reader
        self.meta = meta
        self.clock = clock
        self.limits = limits
        self.n_kept = 0
        self.n_fallen = 0  # frames with a time before an earlier one's, or too far from the first's or the last's
        self.too_long = ""  # the limit that was reached
        self.first_ns = meta.start_ns
        self.tail_ns = meta.start_ns
        self.tail: Frame | None = None

    def __iter__(self) -> Iterator[tuple[int, Frame]]:
        for ticks, frame in self.reader:
            clock = self.clock = self.clock or self.clock_of_segment(ticks)
            time_ns = clock.time_ns(ticks)
            if self.n_kept and not self.tail_ns <= time_ns <= self.latest_ns:
                self.n_fallen += 1
                continue
            if self.n_kept >= self.limits.max_frames:
                self.too_long = f"max_frames={self.limits.max_frames}"
                return
            self.first_ns = time_ns if not self.n_kept else self.first_ns
            self.n_kept += 1
            self.tail_ns, self.tail = time_ns, frame
            yield time_ns - self.meta.session_start_ns, frame

    @property
    def latest_ns(self) -> int:
        """Return the latest time that the next frame may have."""
        return min(self.first_ns + self.limits.max_span_ns, self.tail_ns + self.limits.max_leap_ns)

    def clock_of_segment(self, ticks: int) -> MediaClock:
        """Return the clock that puts the segment's first frame at its `start_ns`.

        That is the first packet's frame even where it could not be decoded, or the first good frame where that is
        shown earlier (leading frames of an open GOP).
        """
        first = self.reader.first_packet_ticks
        origin = ticks if first is None else min(ticks, first)
        return MediaClock(self.reader.time_base, origin, self.meta.start_ns, self.meta.session_start_ns)
