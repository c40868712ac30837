"""The frames of a video stream of which few are wanted: what can be left out is not decoded.

What comes out is what `VideoReader` gives, less the frames that nobody asked for, to the last bit; with H.264 and
H.265 in two thirds of the time. It is all planned from the packets before anything is decoded, and each frame that
comes out is held against the plan. Only one thing differs: damage in a frame that was left out is not noticed. Where
all are decoded, concealing it can spoil frames that follow; here it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from .frame_times import DecodeLimits, FrameTimer
from .needed_packets import can_leave_out, needed_packets, roles_of, shown_in_sound_order
from .sampling import GridSpec, walk_grid

if TYPE_CHECKING:
    import av
    from av.video.frame import VideoFrame

    from .errors import MediaError
    from .media import VideoReader
    from .rows import SegmentMeta
    from .sampling import MediaClock

MAX_AHEAD_BYTES = 64 << 20  # of packets, read before the first is decoded: ten seconds at 50 Mbit/s

TIMED_CONTAINERS = frozenset({"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpegts", "flv", "nut"})
"""Those that store when each frame is shown. In others (AVI, elementary streams) FFmpeg guesses it, and how it guessed
shows only once all frames are decoded."""

DENSE_SEGMENTS = 100
"""Segments of a stream that are decoded whole once leaving frames out went wrong: a stream that is always refused costs
one hundredth more, and one that was damaged once is read sparsely again."""


class SparseReadingError(Exception):
    """A frame came out otherwise than planned. Decode all frames, which says what is wrong with them."""


class DenseStreams:
    """Streams all of whose frames are decoded for a while, because leaving some out went wrong."""

    def __init__(self) -> None:
        self.segments_left: dict[str, int] = {}

    def add(self, stream_id: str) -> None:
        """Begin with a stream."""
        self.segments_left[stream_id] = DENSE_SEGMENTS

    def take(self, stream_id: str) -> bool:
        """Tell whether a stream's next segment is to be decoded whole, and count it."""
        left = self.segments_left.pop(stream_id, 0)
        if left > 1:
            self.segments_left[stream_id] = left - 1
        return left > 0


@dataclass(frozen=True)
class TicksAlone:
    """Frames that are not decoded yet: each is its own timestamp."""

    ticks: list[int]  # rising
    time_base: Fraction
    first_packet_ticks: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((tick, tick) for tick in self.ticks)


class SparseReader:
    """All frames in presentation order as (timestamp, frame), None for those that were not decoded. Iterate once.

    Take it from `planned`. Where a `VideoReader` goes, this goes, too.

    Raises:
        SparseReadingError: While iterating.
    """

    def __init__(self, reader: VideoReader, packets: Sequence[av.Packet], needed: Sequence[bool], times: TicksAlone):
        self.reader = reader
        self.packets = packets
        self.needed = needed
        self.time_base = times.time_base
        self.first_packet_ticks = times.first_packet_ticks

    @classmethod
    def planned(
        cls,
        reader: VideoReader,
        meta: SegmentMeta,
        clock: MediaClock | None,
        grid: GridSpec,
        limits: DecodeLimits,
        frame_hw: tuple[int, int],
    ) -> SparseReader | None:
        """Return a reader that decodes what the grid needs; None if that is everything, or is not known for sure.

        Args:
            reader: Not iterated yet; to be iterated instead where this returns None.
            meta: As for `FrameTimer`, like the clock and the limits.
            clock: Likewise.
            grid: Whose frames are wanted, and the last frame.
            limits: Likewise.
            frame_hw: Size in pixels that wanted frames will have: of it so many are allowed.
        """
        codec = reader.stream.codec_context
        if not can_leave_out(codec) or reader.container.format.name not in TIMED_CONTAINERS:
            return None
        packets = reader.read_ahead(MAX_AHEAD_BYTES)
        if packets is None:
            return None
        if reader.n_errors or reader.errors or not shown_in_sound_order(packets, codec):
            return None
        shown = [packet for packet in packets if reader.is_shown(packet)]
        ticks = sorted(map(_pts, shown))
        if not shown or ticks[0] < _pts(packets[0]):  # leading frames of an open GOP, which cannot be decoded
            return None
        times = TicksAlone(ticks, reader.time_base, _pts(shown[0]))
        timer = FrameTimer(times, meta, clock, limits)
        sampled = [tick for _, tick in walk_grid(timer, grid)]
        if timer.n_fallen or timer.too_long or len(sampled) > limits.max_sampled(frame_hw):
            return None
        wanted = {*sampled, ticks[-1]}
        needed = needed_packets(roles_of(packets, codec), [packet.pts in wanted for packet in packets])
        return None if all(needed) else cls(reader, packets, needed, times)

    def __iter__(self) -> Iterator[tuple[int, VideoFrame | None]]:
        sent = {_pts(packet) for packet, needed in zip(self.packets, self.needed, strict=True) if needed}
        frames = self.decoded()
        for ticks in sorted(_pts(packet) for packet in self.packets if not packet.is_discard):
            frame = None
            if ticks in sent:
                frame = next(frames, None)
                if frame is None or frame.pts != ticks:
                    raise SparseReadingError(f"a frame of {frame and frame.pts} ticks where {ticks} was due")
            if not self.reader.is_before(ticks):
                yield ticks, frame
        if next(frames, None) is not None:
            raise SparseReadingError("a frame more than there should be")

    def decoded(self) -> Iterator[VideoFrame]:
        """Yield the frames of the packets that are needed.

        Raises:
            SparseReadingError: As soon as the decoder complains of anything.
        """
        reader = self.reader
        for packet, needed in zip((*self.packets, None), (*self.needed, True), strict=True):
            for frame in reader.attempt(packet) if needed else ():
                if frame.is_corrupt:
                    raise SparseReadingError("a corrupt frame")
                yield frame
            if reader.n_errors or reader.errors:
                raise SparseReadingError(f"FFmpeg says {list(reader.errors)[:1]}")

    def losses(self) -> list[str]:
        """Return what was lost: nothing, or reading would have failed."""
        return []

    def failure(self) -> MediaError:
        """Return the error of a stream that gave no frame."""
        return self.reader.failure()


def _pts(packet: av.Packet) -> int:
    assert packet.pts is not None  # `shown_in_sound_order`
    return packet.pts
