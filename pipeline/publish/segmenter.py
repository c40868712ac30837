"""Cuts one session of a video stream into segments that decode on their own, without re-encoding where it can.

    packets ──GopReader──▶ groups ──(copied, or decoded and encoded again)──▶ SegmentGrouper ──▶ segments

A segment is as many whole groups of pictures as fit within the target; a longer group stays whole. Times are whole
milliseconds since the session's first frame (Matroska's unit), the same for copied and transcoded frames.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from ...operators.errors import PublishError
from .clock_jumps import JumpFinder
from .gops import Gop, GopReader

if TYPE_CHECKING:
    import av

    from .transcode import Transcoder

Method = Literal["auto", "copy", "transcode"]

MS = Fraction(1, 1000)  # Matroska's time base
CONTENT_TYPE = "video/x-matroska"
UNCODED = ("rawvideo", "wrapped_avframe", "v210", "v410", "r210", "yuv4", "bitpacked")  # far too large to send
MOST_PENDING_BYTES = 256 << 20  # of one group of pictures; more is a stream that has no keyframes. Of a segment, too
# bitexact leaves out what differs from run to run; times must not be shifted where dts are below 0.
MATROSKA_OPTIONS = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}


@dataclass(frozen=True)
class TimedPacket:
    """A packet with its time in the session."""

    packet: av.Packet = field(repr=False)
    pts_ms: int
    duration_ms: int

    @property
    def stop_ms(self) -> int:
        """Return when its frame ends."""
        return self.pts_ms + self.duration_ms


@dataclass(frozen=True)
class MediaSegment:
    """A piece of one session that decodes on its own."""

    data: bytes = field(repr=False)  # Matroska
    first_ms: int  # time of its first frame shown, since the session's start
    stop_ms: int  # when its last frame ends
    n_frames: int
    end: bool  # last one of the session


class GopTooLargeError(Exception):
    """A group of pictures outgrew what may be held in memory."""

    def __init__(self, first_ms: int, n_bytes: int):
        super().__init__(f"group of pictures at {first_ms} ms has {n_bytes} bytes so far")
        self.first_ms = first_ms
        self.n_bytes = n_bytes


class ParametersChangedError(Exception):
    """`copy` met packets of which the stream's template knows nothing: an encoder has changed its parameters."""

    def __init__(self, first_ms: int):
        super().__init__(f"changes its codec parameters at {first_ms} ms")
        self.first_ms = first_ms


def round_ms(pts: int, time_base: Fraction) -> int:
    """Return a time in whole milliseconds, halves up."""
    num, den = time_base.numerator * 1000, time_base.denominator
    return (2 * pts * num + den) // (2 * den)


class PassClock:
    """Turns one pass's pts into session time: the pass's first frame is at `offset_ms`."""

    def __init__(self, time_base: Fraction, offset_ms: int):
        self.time_base = time_base
        self.offset_ms = offset_ms
        self.origin_pts: int | None = None

    def start_at(self, pts: int) -> None:
        """Say which pts is the pass's first frame; only the first call counts."""
        if self.origin_pts is None:
            self.origin_pts = pts

    def ms(self, pts: int) -> int:
        """Return the session time of a pts."""
        return self.offset_ms + round_ms(pts - (self.origin_pts or 0), self.time_base)


class Segmenter:
    """One session of one stream: packets in, segments out, in order.

    Call `start_pass` with the opened stream, `push` for each of its packets, `end_pass` at its end; again for each
    loop over the same file; and `finish` once.

    Args:
        segment_ms: Target length.
        method: `copy` never re-encodes and drops leading frames of open groups (counted in `n_dropped`),
            `transcode` always does, `auto` copies until something cannot be copied and transcodes from there.
        bitrate: Of transcoded video in bits a second; None for constant quality.
        max_pending_bytes: A group larger than this raises before it is complete, to bound memory; a segment is cut
            before it has more, whatever its length.
        on_notice: Told in a sentence what a user should know, once each.
    """

    def __init__(
        self,
        *,
        segment_ms: int = 2000,
        method: Method = "auto",
        bitrate: int | None = None,
        max_pending_bytes: int = MOST_PENDING_BYTES,
        on_notice: Callable[[str], None] | None = None,
    ):
        self._segment_ms = segment_ms
        self._method = method
        self._bitrate = bitrate
        self._max_pending_bytes = max_pending_bytes
        self._notify = on_notice or (lambda text: None)
        self._grouper = SegmentGrouper(segment_ms, max_pending_bytes)
        self._transcoder: Transcoder | None = None
        self._encoded = GopReader("encoded")
        self.transcoding = method == "transcode"
        self.n_dropped = 0  # leading frames left out by `copy`
        self.n_skipped = 0  # packets before the first keyframe, or the first one of new times; with wild times
        self._has_told_of_jumps = False

    @property
    def has_frames(self) -> bool:
        """Whether anything came that can be sent."""
        return self._grouper.stop_ms > 0

    def start_pass(self, stream: av.VideoStream, live_ms: Callable[[], int] | None = None) -> None:
        """Begin reading a stream from its start; its first frame follows on the last one of the pass before.

        Args:
            stream: Opened.
            live_ms: Tells the session's time by the clock on the wall, for a source where that counts: what comes after
                its timestamps have jumped is put there, or right after what came before, whichever is later.

        Raises:
            PublishError: If `copy` is asked of a codec that cannot be copied.
        """
        self._stream = stream
        self._live_ms = live_ms
        self._jumps = JumpFinder(stream.time_base or MS)
        self._start_run(self._grouper.stop_ms)

    def _start_run(self, offset_ms: int) -> None:
        """Begin with packets whose times belong together; the first frame is at `offset_ms`."""
        stream, context = self._stream, self._stream.codec_context
        self._clock = PassClock(stream.time_base or MS, offset_ms)
        self._gops = GopReader(context.name, context.extradata, merge_unclean=self._method == "copy")
        self._previous: Gop | None = None
        if not self.transcoding:
            self._template, reason = template_of(stream), uncopyable(stream)
            if self._template is None:
                reason = f"Matroska cannot hold codec {context.name} as it is here"
            if reason is not None and self._method == "copy":
                raise PublishError(f"{reason}, so it cannot be copied; use --transcode")
            if reason is not None:
                self._start_transcoding(reason)
        if self.transcoding:
            self._transcoder = self._new_transcoder()

    def push(self, packet: av.Packet) -> Iterator[MediaSegment]:
        """Take the next packet; yield the segments that it completes.

        A keyframe whose time falls back, or leaps far ahead, begins a segment that follows on what came before.

        Raises:
            PublishError: If `copy` meets packets without times.
            GopTooLargeError: If a group outgrows `max_pending_bytes`.
            ParametersChangedError: If `copy` meets packets that its template does not fit.
        """
        for placed in self._jumps.push(packet):
            yield from self._push(placed.packet, placed.jump_s)

    def _push(self, packet: av.Packet, jump_s: float) -> Iterator[MediaSegment]:
        if jump_s:
            yield from self._start_anew(jump_s)
        if self._transcoder is not None:
            yield from self._group_encoded(self._transcoder.push(packet))
            return
        gop = self._gops.push(packet)
        if gop is not None:
            yield from self._take(gop)
        if self._transcoder is None:
            yield from self._cut_before_growing()

    def end_pass(self) -> Iterator[MediaSegment]:
        """Take in what is left at the end of the input; yield what is complete, always leaving something open."""
        for placed in self._jumps.flush():
            yield from self._push(placed.packet, placed.jump_s)
        self.n_skipped += self._jumps.n_skipped
        yield from self._end_run()

    def _start_anew(self, jump_s: float) -> Iterator[MediaSegment]:
        """Go on with packets of other times, as after a loop; nothing of before and after shares a segment."""
        if not self._has_told_of_jumps:
            how = "fall back" if jump_s < 0 else "leap ahead"
            self._notify(
                f"has timestamps that {how} by {abs(jump_s):,.1f} s: "
                "what follows is taken as going on after what came before (told once a session)"
            )
        self._has_told_of_jumps = True
        yield from self._end_run()
        open_segment = self._grouper.close()
        if open_segment is not None:
            yield open_segment
        if self.transcoding:
            self._stream.codec_context.flush_buffers()  # it was drained
        self._start_run(max(self._grouper.stop_ms, self._live_ms() if self._live_ms else 0))

    def _end_run(self) -> Iterator[MediaSegment]:
        if self._transcoder is None:
            gop = self._gops.flush()
            self.n_skipped += self._gops.n_skipped
            if gop is not None:
                yield from self._take(gop, is_last=True)
        if self._transcoder is not None:
            yield from self._group_encoded(self._transcoder.flush())
            self.n_skipped += self._transcoder.n_undecodable
            last = self._encoded.flush()
            if last is not None:
                yield from self._grouper.add(_encoded_packets(last), self._transcoder.template, may_close=False)
            self._transcoder = None

    def finish(self) -> MediaSegment | None:
        """Return the session's last segment, with `end`; None if nothing at all came."""
        return self._grouper.close(end=True)

    def _take(self, gop: Gop, *, is_last: bool = False) -> Iterator[MediaSegment]:
        problem = gop.problem()
        if problem is not None and self._method == "auto":
            yield from self._switch(problem, gop)
            return
        if gop.has_new_parameters:
            raise ParametersChangedError(self._grouper.stop_ms)
        timed = self._timed(gop)
        self._previous = gop
        yield from self._grouper.add(timed, self._template, may_close=not is_last)

    def _timed(self, gop: Gop) -> list[TimedPacket]:
        """Give each packet its session time, leaving out leading frames."""
        if any(p.pts is None for p in gop.packets):
            raise PublishError("some packets have no presentation time, so they cannot be copied; use --transcode")
        dropped = {id(p) for p in gop.leading}
        if dropped and not self.n_dropped:
            self._notify(
                "has open GOPs: --copy drops their leading frames, which need the GOP before; --transcode keeps them"
            )
        self.n_dropped += len(dropped)
        kept = [p for p in gop.packets if id(p) not in dropped]
        ptss = sorted(int(p.pts or 0) for p in kept)
        self._clock.start_at(ptss[0])
        usual = _usual_duration(ptss, self._stream)
        return [
            TimedPacket(p, self._clock.ms(p.pts or 0), self._duration_ms(p.pts or 0, p.duration or usual)) for p in kept
        ]

    def _duration_ms(self, pts: int, duration: int) -> int:
        """Return a frame's length such that its end is rounded once, not twice."""
        return max(1, self._clock.ms(pts + duration) - self._clock.ms(pts))

    def _cut_before_growing(self) -> Iterator[MediaSegment]:
        """Close the open segment as soon as the growing group cannot join it, before that one is complete."""
        if self._gops.pending_bytes > self._max_pending_bytes:
            raise GopTooLargeError(self._grouper.stop_ms, self._gops.pending_bytes)
        first_ms, pts = self._grouper.first_ms, self._gops.pending_pts
        if first_ms is None or pts is None or self._clock.origin_pts is None:
            return
        is_full = self._grouper.n_bytes + self._gops.pending_bytes > self._max_pending_bytes
        if is_full or self._clock.ms(pts) - first_ms >= self._segment_ms:
            segment = self._grouper.close()
            if segment is not None:
                yield segment

    def _switch(self, problem: str, gop: Gop) -> Iterator[MediaSegment]:
        """Transcode from this group on: the decoder is warmed with the group before, whose frames were sent."""
        open_segment = self._grouper.close()
        if open_segment is not None:
            yield open_segment
        self._start_transcoding(f"it {problem}")
        self._transcoder = self._new_transcoder()
        warm_up = self._previous.packets if self._previous else ()
        first_pts = min((p.pts for p in gop.packets if p.pts is not None), default=None)
        self._transcoder.warm_up(warm_up, first_pts)
        for packet in (*gop.packets, *self._gops.pending):
            yield from self._group_encoded(self._transcoder.push(packet))

    def _start_transcoding(self, reason: str) -> None:
        self.transcoding = True
        self._notify(f"is transcoded to H.264: {reason} (--copy never transcodes)")

    def _new_transcoder(self) -> Transcoder:
        from .transcode import Transcoder

        return Transcoder(
            self._stream,
            self._clock,
            keyframe_ms=self._segment_ms,
            bitrate=self._bitrate,
            trust_pts=has_true_pts(self._stream),
        )

    def _group_encoded(self, packets: Iterator[av.Packet]) -> Iterator[MediaSegment]:
        assert self._transcoder is not None
        for packet in packets:
            gop = self._encoded.push(packet)
            if gop is not None:
                yield from self._grouper.add(_encoded_packets(gop), self._transcoder.template)


class SegmentGrouper:
    """Puts whole groups of pictures together into segments of about one length, and of so many bytes at most."""

    def __init__(self, segment_ms: int, max_bytes: int):
        self._segment_ms = segment_ms
        self._max_bytes = max_bytes
        self._packets: list[TimedPacket] = []
        self.n_bytes = 0  # of the open segment
        self._template: av.VideoStream | None = None
        self.first_ms: int | None = None  # of the open segment
        self.stop_ms = 0  # of everything taken

    def add(
        self, gop: Sequence[TimedPacket], template: av.VideoStream | None, *, may_close: bool = True
    ) -> Iterator[MediaSegment]:
        """Take a group; yield the segment before it if it does not fit, and its own if one more would not.

        That the next group will be as long as this one is a guess that saves waiting for it; the result depends on
        the packets alone. `may_close=False` keeps the group open: it may be the session's last.
        """
        first_ms = min(p.pts_ms for p in gop)
        stop_ms = max(p.stop_ms for p in gop)
        n_bytes = sum(p.packet.size for p in gop)
        is_full = self.n_bytes + n_bytes > self._max_bytes
        if self.first_ms is not None and (is_full or stop_ms - self.first_ms > self._segment_ms):
            yield from self._closed()
        if self.first_ms is None:
            self.first_ms = first_ms
        self._packets.extend(gop)
        self.n_bytes += n_bytes
        self._template = template
        self.stop_ms = max(self.stop_ms, stop_ms)
        if may_close and (stop_ms - self.first_ms) + (stop_ms - first_ms) > self._segment_ms:
            yield from self._closed()

    def close(self, *, end: bool = False) -> MediaSegment | None:
        """Return the open segment, if there is one."""
        if self.first_ms is None:
            return None
        data = write_matroska(self._template, self._packets)
        segment = MediaSegment(data, self.first_ms, self.stop_ms, len(self._packets), end)
        self._packets = []
        self.n_bytes = 0
        self.first_ms = None
        return segment

    def _closed(self) -> Iterator[MediaSegment]:
        segment = self.close()
        if segment is not None:
            yield segment


def uncopyable(stream: av.VideoStream) -> str | None:
    """Say why nothing of a stream can be copied; None where it can."""
    name = stream.codec_context.name
    if name in UNCODED:
        return f"its pictures are not compressed ({name})"
    if not has_true_pts(stream):
        return "its container, AVI, does not tell the order of B-frames"
    return None


def has_true_pts(stream: av.VideoStream) -> bool:
    """Whether frames carry their own times: FFmpeg makes them up for H.264 and HEVC with B-frames in AVI."""
    context = stream.codec_context
    return stream.container.format.name != "avi" or context.name not in ("h264", "hevc") or not context.has_b_frames


def template_of(stream: av.VideoStream) -> av.VideoStream | None:
    """Copy a stream's codec parameters, to outlive its container; None if Matroska cannot hold them."""
    import av
    from av.error import FFmpegError

    holder = av.open(io.BytesIO(), "w", format="matroska", options=MATROSKA_OPTIONS)
    try:
        template = holder.add_stream_from_template(stream, opaque=True)  # also where there is no encoder
        holder.start_encoding()
    except (FFmpegError, ValueError):
        return None
    return template


def write_matroska(template: Any, packets: Sequence[TimedPacket]) -> bytes:
    """Put packets, in decode order, into a Matroska file of their own; their bytes stay as they are.

    Decoding times are made anew from the sorted presentation times: inputs often lack them, Matroska stores none.
    """
    import av

    shown = sorted(p.pts_ms for p in packets)
    delay_ms = max(s - p.pts_ms for s, p in zip(shown, packets, strict=True))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options=MATROSKA_OPTIONS) as container:
        stream = container.add_stream_from_template(template, opaque=True)
        stream.time_base = MS
        for dts_ms, timed in zip(shown, packets, strict=True):
            packet = timed.packet
            own_times = packet.time_base, packet.pts, packet.dts, packet.duration
            packet.stream, packet.time_base = stream, MS
            packet.pts, packet.dts, packet.duration = timed.pts_ms, dts_ms - delay_ms, timed.duration_ms
            container.mux_one(packet)
            # Put back: a transcoder that starts after this segment shows the packet to its decoder again.
            packet.time_base, packet.pts, packet.dts, packet.duration = own_times
    return buffer.getvalue()


def _usual_duration(ptss: Sequence[int], stream: av.VideoStream) -> int:
    """Return a frame's length in the stream's time base, for packets that do not say."""
    if len(ptss) > 1:
        return max(1, ptss[-1] - ptss[-2])
    if stream.average_rate and stream.time_base:
        return max(1, round(1 / (stream.average_rate * stream.time_base)))
    return 1


def _encoded_packets(gop: Gop) -> list[TimedPacket]:
    return [TimedPacket(p, int(p.pts or 0), max(1, int(p.duration or 0))) for p in gop.packets]
