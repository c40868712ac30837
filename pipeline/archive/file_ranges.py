"""Where a file can be cut into ranges that decode on their own, in one pass over its packets, decoding nothing.

A range begins with a keyframe's frames. Frames that are shown before that keyframe but stored after it (leading frames
of an open GOP) need the GOP before: the range then starts to decode one GOP earlier and keeps nothing of that. So all
ranges together give each frame once, the same ones as the file in one go. What cannot be cut safely stays one range:
also all that follows where the codec's parameters change on the way, which a decoder that begins later is not told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import av.error

from ...operators.media import demuxed, ffmpeg_errors, first_line, open_media, open_video_stream, opened_uri
from ..publish.gops import CodecParameters, h264_starts_clean
from ..publish.segmenter import has_true_pts

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

Errors = list[tuple[int, str, str]]  # of `ffmpeg_errors`

MIN_SCANNED_RANGES = 2  # a file shorter than so many ranges is one, and read once only


@dataclass(frozen=True)
class CutRange:
    """One range of a file; see `operators.rows.FileRange` for the first four."""

    start_pts: int | None = None
    keep_from_pts: int | None = None
    stop_pts: int | None = None
    origin_pts: int | None = None
    elapsed_ns: int = 0  # of its first frame, since the file's first
    n_bytes: int = 0  # of its packets
    last: bool = True
    broken: str = ""  # of the last: why reading did not reach the file's end


@dataclass
class _Gop:
    """What is known of the packets from one keyframe up to the next."""

    key_pts: int | None
    clean: bool  # its first picture is a whole one
    first_pts: int | None = None  # shown first
    last_pts: int | None = None  # shown last
    timed: bool = True  # every packet has a time
    has_other_parameters: bool = False  # than at the file's start: its decoder was configured anew on the way
    n_bytes: int = 0

    def take(self, packet: av.Packet) -> None:
        self.n_bytes += packet.size
        pts = packet.pts
        if pts is None:
            self.timed = False
        elif not packet.is_discard:  # hidden by an edit list
            self.first_pts = pts if self.first_pts is None else min(self.first_pts, pts)
            self.last_pts = pts if self.last_pts is None else max(self.last_pts, pts)

    @property
    def leads(self) -> bool:
        """Whether frames are shown before its keyframe."""
        return self.first_pts is None or self.key_pts is None or self.first_pts < self.key_pts


def cut_file(uri: str, range_s: float) -> Iterator[CutRange]:
    """Yield a file's ranges in order, as reading finds them; at least one.

    The same file gives the same ranges.

    Args:
        uri: A local path or an address of `pyarrow.fs`.
        range_s: Length to aim at; never shorter than from keyframe to keyframe.

    Raises:
        MediaError: If it is no video that can be decoded.
        OSError: If it cannot be opened.
    """
    with opened_uri(uri) as source, ffmpeg_errors() as errors, open_media(source) as container:
        stream = open_video_stream(container)
        short = container.duration is not None and container.duration <= MIN_SCANNED_RANGES * range_s * 1e6
        if short or stream.time_base is None or not has_true_pts(stream):
            yield CutRange(n_bytes=container.size)
            return
        yield from _cut(container, stream, range_s, errors)


def _cut(
    container: InputContainer, stream: VideoStream, range_s: float, errors: list[tuple[int, str, str]]
) -> Iterator[CutRange]:
    time_base = stream.time_base or Fraction(1)
    gops = _Gops(container, stream)
    before: _Gop | None = None
    origin_pts: int | None = None
    start = CutRange()  # of the range that is open
    start_first_pts: int | None = None
    shown_until: int | None = None
    n_bytes = 0
    cuttable = True
    for gop in gops:
        cuttable &= gop.timed and not gop.has_other_parameters
        if before is None:
            # Leading frames of the first GOP have nothing to refer to, and are never shown.
            origin_pts = gop.key_pts if gop.leads and gop.key_pts is not None else gop.first_pts
            start_first_pts = origin_pts
        elif (
            cuttable
            and gop.clean
            and None not in (gop.key_pts, gop.first_pts, start_first_pts, shown_until, origin_pts, before.key_pts)
            and gop.first_pts > shown_until  # type: ignore[operator]
            and (gop.first_pts - start_first_pts) * time_base >= range_s  # type: ignore[operator]
        ):
            yield CutRange(
                start.start_pts, start.keep_from_pts, gop.key_pts, origin_pts, start.elapsed_ns, n_bytes, last=False
            )
            elapsed_ns = int((gop.first_pts - origin_pts) * time_base * 1_000_000_000)  # type: ignore[operator]
            opening = (before.key_pts, gop.first_pts) if gop.leads else (gop.key_pts, None)
            start = CutRange(*opening, elapsed_ns=elapsed_ns)
            start_first_pts, n_bytes = gop.first_pts, 0
        n_bytes += gop.n_bytes
        if gop.last_pts is not None:
            shown_until = gop.last_pts if shown_until is None else max(shown_until, gop.last_pts)
        before = gop
    broken = f"reading broke off: {gops.error}; FFmpeg says {first_line(errors)!r}" if gops.error else ""
    yield CutRange(
        start.start_pts, start.keep_from_pts, None, origin_pts, start.elapsed_ns, n_bytes, last=True, broken=broken
    )


class _Gops:
    """A stream's GOPs in order; iterate once. `error` is then what ended it early, or empty."""

    def __init__(self, container: InputContainer, stream: VideoStream):
        self._container = container
        self._stream = stream
        self.error = ""

    def __iter__(self) -> Iterator[_Gop]:
        context = self._stream.codec_context
        is_h264, parameters = context.name == "h264", CodecParameters(context.extradata)
        has_other_parameters = False
        gop: _Gop | None = None
        try:
            for packet in demuxed(self._container, self._stream):
                if not packet.size:
                    continue
                has_other_parameters |= parameters.change_with(packet)
                if packet.is_keyframe:
                    clean = not is_h264 or h264_starts_clean(bytes(packet), parameters.nal_length_bytes)
                    if gop is not None:
                        yield gop
                    gop = _Gop(packet.pts, clean)
                if gop is not None:  # nothing can be made of packets before the first keyframe
                    gop.has_other_parameters = has_other_parameters
                    gop.take(packet)
        except av.error.FFmpegError as error:
            logger.debug("container broke off error=%s", error)
            self.error = str(error)
        if gop is not None:
            yield gop
