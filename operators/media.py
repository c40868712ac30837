"""Opening media that nobody vouches for: bytes from Kafka, files from somebody's folder.

What FFmpeg would do with hostile bytes, tried: a record that is a `concat` list makes it open the local files that
the list names, even when PyAV is given an `io_open` that refuses. So only containers that hold their media
themselves are let in, by `format_whitelist`. A picture's size is limited before its memory is taken.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import av
import av.error
import av.logging

from ..models.video_files import choose_video_stream, is_cover
from .errors import MediaError
from .rows import table_text

if TYPE_CHECKING:
    from av.codec.context import CodecContext
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from .rows import Buffer

log = logging.getLogger(__name__)

MAX_FRAME_PX = 8192 * 4352
"""Coded pixels of one frame of video: 8K (7680 × 4320) and a little more; level 6.2 of H.264, H.265 and AV1 allows no
larger ones. A hostile record of a few hundred bytes can claim gigabytes: of such frames a decoder may hold twenty."""

MAX_IMAGE_PX = 8192 * 8192
"""Pixels of one JPEG or PNG image, of which there is one: 100 MB in 4:2:0, 270 MB as RGBA."""

CONTAINERS = (
    # video
    *("matroska", "webm", "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "mpegts", "mpeg", "flv", "live_flv", "avi", "asf"),
    *("ogg", "ivf", "nut", "mxf", "gxf", "dv", "wtv", "gif", "apng", "yuv4mpegpipe"),
    # elementary streams, without timestamps
    *("h264", "hevc", "vvc", "obu", "av1", "m4v", "mpegvideo", "mjpeg"),
    # images other than those of `sniff_image`
    *("jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "jpegxl_pipe", "jpegxl_anim"),
    # audio: so that its refusal can say that it is audio
    *("mp3", "wav", "aac", "flac", "ac3", "eac3"),
)
"""FFmpeg's names of the containers that may be opened. None of them names further files."""

IMAGE_CODECS = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG\r\n\x1a\n": "png"}  # first bytes: FFmpeg's decoder


ONE_FRAME_PER_PACKET = frozenset(
    {"h264", "hevc", "vvc", "av1", "libdav1d", "vp9", "mpeg2video", "mjpeg", "ffv1", "png"}
)
"""Decoders that show a frame for every packet (progressive video; VP8 and packed MPEG-4 do not), so that what they
drop without a word can be counted: leading frames of open GOPs, frames until the first keyframe."""

FALLBACK_FPS = Fraction(25)  # FFmpeg's own assumption for elementary streams, which carry no timestamps


def sniff_image(data: Buffer) -> str | None:
    """Return FFmpeg's decoder for a single JPEG or PNG image, by its first bytes, or None.

    A PNG that is animated (its `acTL` chunk comes before the first `IDAT`) is a video to be opened, not an image.
    """
    head = bytes(memoryview(data)[:4096])
    if b"acTL" in head.partition(b"IDAT")[0]:
        return None
    return next((codec for magic, codec in IMAGE_CODECS.items() if head.startswith(magic)), None)


SEEK_MARGIN_S = 1  # containers seek by decoding times, which may lie this much before those of a keyframe's display,
SEEK_MARGIN_FRAMES = 16  # or so many frames: H.264 and HEVC hold back no more to reorder them
REMOTE_READ_BYTES = 1 << 20  # of a file that is not on a disk of ours, at once


@contextmanager
def opened_uri(uri: str | Path) -> Iterator[str | Path | IO[bytes]]:
    """Give what `open_media` takes: a local path as it is, an address of `pyarrow.fs` (s3://…, gs://…) as a file.

    Raises:
        OSError: If the file cannot be opened.
    """
    if not is_address(uri):
        yield uri
        return
    from pyarrow.fs import FileSystem

    system, path = FileSystem.from_uri(str(uri))
    with system.open_input_file(path) as file:
        yield cast("IO[bytes]", file)


def is_address(uri: str | Path) -> bool:
    """Tell an address of `pyarrow.fs` from a local path."""
    return isinstance(uri, str) and re.match(r"[a-z][a-z0-9+.-]*://", uri) is not None


def stat_file(uri: str) -> tuple[int, int]:
    """Return the size and the time of change in ns of what `opened_uri` opens.

    Raises:
        OSError: If it is not there, or cannot be: an address of no file system that `pyarrow.fs` knows, a path with a
            NUL.
    """
    try:
        if not is_address(uri):
            stat = os.stat(uri)
            return stat.st_size, stat.st_mtime_ns
        from pyarrow.fs import FileSystem, FileType

        system, path = FileSystem.from_uri(uri)
        info = system.get_file_info(path)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), uri) from error
    if info.type == FileType.NotFound:
        raise FileNotFoundError(2, "no such file", uri)
    return info.size or 0, info.mtime_ns or 0


def check_unchanged(uri: str, n_bytes: int, mtime_ns: int) -> None:
    """Refuse a file that is not the one that was found.

    Raises:
        MediaError: `changed`.
        OSError: If it is not there.
    """
    now = stat_file(uri)
    if now != (n_bytes, mtime_ns):
        raise MediaError(
            "changed", f"{table_text(uri)} changed after it was found ({n_bytes} bytes then, {now[0]} now); "
            "the next run takes it up as a new version"
        )  # fmt: skip


def open_media(source: Buffer | str | Path | IO[bytes], *, max_frame_px: int = MAX_FRAME_PX) -> InputContainer:
    """Open a container for reading; close it, or use it in a `with`.

    Args:
        source: Its bytes, the path of a local file, or an open file that can seek.
        max_frame_px: Refuse larger frames.

    Raises:
        MediaError: `not_media`: no container of `CONTAINERS`, or one that is broken from its start.
        OSError: If a file cannot be read.
    """
    options = {"format_whitelist": ",".join(CONTAINERS), "max_pixels": str(max_frame_px)}
    options["protocol_whitelist"] = "file" if isinstance(source, (str, Path)) else "none"
    with ffmpeg_errors() as errors:
        if isinstance(source, (str, Path)):
            Path(source).open("rb").close()  # the OSError that says it best
            file, name = f"file:{source}", str(source)
        elif isinstance(source, (bytes, memoryview)):
            file, name = io.BytesIO(source), f"{memoryview(source).nbytes} bytes"
        else:
            file, name = source, "a remote file"
        try:
            buffer_bytes = REMOTE_READ_BYTES if file is source else 32_768
            return av.open(file, "r", options=options, metadata_errors="replace", buffer_size=buffer_bytes)
        except (av.error.FFmpegError, ValueError) as error:
            said = first_line(errors) or str(error)
            raise MediaError("not_media", f"{name} are no media that can be read: FFmpeg says {said!r}") from error


def open_video_stream(container: InputContainer, *, max_frame_px: int = MAX_FRAME_PX) -> VideoStream:
    """Return a container's video stream, ready to decode on the calling thread alone.

    Of several, it is the largest that is not a still picture attached as cover art. One thread, because a decode
    worker has one core, and because then FFmpeg's messages and errors come back with the packet that they are of.

    Raises:
        MediaError: `no_video`, `no_decoder` or `too_large`.
    """
    stream: VideoStream | None = choose_video_stream(container)
    if all(is_cover(s) for s in container.streams.video):
        kinds = ", ".join(sorted({s.type or "unknown" for s in container.streams})) or "none"
        raise MediaError("no_video", f"{container.format.name} without a video stream; its streams: {kinds}")
    if stream is None:
        raise MediaError("no_decoder", f"{container.format.name} with a video codec that this FFmpeg cannot decode")
    n_px = (stream.width or 0) * (stream.height or 0)
    if n_px > max_frame_px:
        raise MediaError(
            "too_large", f"{stream.codec_context.name} frames of {stream.width}x{stream.height}, {n_px} pixels; "
            f"at most {max_frame_px} are decoded"
        )  # fmt: skip
    limit_decoder(stream.codec_context, max_frame_px)
    return stream


def demuxed(container: InputContainer, *streams: VideoStream) -> Iterator[av.Packet]:
    """Yield the streams' packets (all streams' if none is named) up to the end, the last of each empty.

    PyAV 18 raises IndexError at the end of a file in which a further stream has begun on the way; all packets have come
    by then.

    Raises:
        av.error.FFmpegError: If the container breaks off.
    """
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except IndexError:
            log.debug("container with a stream that begins later")
            return
        if packet is None:
            return
        yield packet


def limit_decoder(context: CodecContext, max_frame_px: int) -> None:
    """Set one thread and the size limit, before the decoder is opened."""
    context.thread_count = 1
    context.thread_type = "NONE"
    context.options = {"max_pixels": str(max_frame_px)}


@contextmanager
def ffmpeg_errors() -> Iterator[list[tuple[int, str, str]]]:
    """Collect FFmpeg's error messages of this thread as (level, component, text), and print none.

    The first use in a process turns PyAV's forwarding of errors on, for good (switching it off again would race with
    other threads), and keeps what other threads' FFmpeg says out of Python's logs. A process that has set
    `av.logging`'s level itself keeps it.
    """
    if av.logging.get_level() is None:
        logging.getLogger("libav").setLevel(logging.CRITICAL + 1)
        av.logging.set_skip_repeated(False)  # else the same message about the next segment is swallowed
        av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as errors:
        yield errors


def first_line(errors: list[tuple[int, str, str]]) -> str:
    """Return the first message that `ffmpeg_errors` collected, or ""."""
    return f"{errors[0][1]}: {errors[0][2].strip()}" if errors else ""


class TimestampChoice:
    """Chooses between a frame's two timestamps: its own, and the decoding time of the packet that brought it out.

    Much as FFmpeg's `best_effort_timestamp`, which PyAV does not show (`guess_correct_pts` in libavcodec/decode.c):
    its own one, unless those have fallen back more often. AVI has no timestamps, and FFmpeg's guesses at those of H.264
    with B-frames do.
    """

    def __init__(self) -> None:
        self.last_pts: int | None = None
        self.last_dts: int | None = None
        self.n_faulty_pts = 0
        self.n_faulty_dts = 0

    def __call__(self, pts: int | None, dts: int | None) -> int | None:
        """Return the next frame's timestamp, or None where it has none that can be believed."""
        if dts is not None:
            self.n_faulty_dts += self.last_dts is not None and dts <= self.last_dts
        if pts is not None:
            self.n_faulty_pts += self.last_pts is not None and pts <= self.last_pts
        self.last_dts = pts if dts is None else dts
        self.last_pts = dts if pts is None else pts
        return dts if pts is None or self.n_faulty_pts > self.n_faulty_dts else pts


class VideoReader:
    """The good frames of a video stream in presentation order, with counts of the others. Iterate once.

    Frames come as (timestamp in `time_base`, frame). A missing timestamp is taken from the decoding order, or the
    frame rate.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        errors: Sequence[tuple[int, str, str]],
        pts_range: tuple[int | None, int | None] = (None, None),
        keep_from_pts: int | None = None,
    ):
        self.container = container
        self.stream = stream
        self.errors = errors  # filled by `ffmpeg_errors` while reading
        self.pts_range = pts_range
        self.keep_from_pts = keep_from_pts  # what is shown before is decoded for reference only
        self.time_base = stream.time_base or Fraction(1, 1_000_000)
        self.first_packet_ticks: int | None = None
        self.n_packets = 0
        self.n_frames = 0  # decoded, corrupt or not
        self.n_errors = 0  # packets that the decoder refused
        self.n_corrupt = 0
        self.interlaced = False
        self.source = self.packets()

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        rate = self.stream.average_rate or self.stream.guessed_rate or FALLBACK_FPS
        step_ticks = max(1, round(1 / (rate * self.time_base)))
        next_ticks = self.first_packet_ticks or 0
        choose = TimestampChoice()
        for frame in self.decoded():
            chosen = choose(frame.pts, frame.dts)
            ticks = next_ticks if chosen is None else chosen
            next_ticks = ticks + step_ticks
            if self.is_before(ticks):
                continue
            self.n_frames += 1
            self.interlaced |= frame.interlaced_frame
            if frame.is_corrupt:
                self.n_corrupt += 1
            else:
                yield ticks, frame

    def decoded(self) -> Iterator[VideoFrame]:
        """Yield whatever the decoder gives, going on past packets that it refuses."""
        for packet in self.source:
            self.count(packet)
            yield from self.attempt(packet)
        yield from self.attempt(None)  # flush: what it held back to reorder

    def attempt(self, packet: av.Packet | None) -> list[VideoFrame]:
        """Decode a packet; one that the decoder refuses gives nothing and is counted."""
        try:
            return self.stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            self.n_errors += 1
            return []

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the range. A container that breaks off has simply ended, with an error to count."""
        start_pts, stop_pts = self.pts_range
        if start_pts is not None:
            rate = self.stream.average_rate or self.stream.guessed_rate or FALLBACK_FPS
            margin_s = max(SEEK_MARGIN_S, SEEK_MARGIN_FRAMES / rate)
            self.container.seek(start_pts - round(margin_s / self.time_base), stream=self.stream)
        started = start_pts is None
        try:
            for packet in demuxed(self.container, self.stream):
                pts = packet.pts if packet.is_keyframe else None
                if stop_pts is not None and pts is not None and pts >= stop_pts:
                    return
                started = started or (pts is not None and start_pts is not None and pts >= start_pts)
                if started and packet.size:
                    yield packet
        except av.error.FFmpegError as error:
            log.debug("container broke off error=%s", error)
            self.n_errors += 1

    def read_ahead(self, max_bytes: int) -> list[av.Packet] | None:
        """Read all packets before any is decoded, or None if they are more; either way iterate afterwards."""
        source, ahead, n_bytes = self.source, [], 0
        for packet in source:
            ahead.append(packet)
            n_bytes += packet.size
            if n_bytes > max_bytes:
                break
        self.source = chain(ahead, source)
        return ahead if n_bytes <= max_bytes else None

    def count(self, packet: av.Packet) -> None:
        """Count a packet that should become a frame, and keep the first one's timestamp."""
        if not self.is_shown(packet):
            return
        if not self.n_packets:
            self.first_packet_ticks = packet.pts
        self.n_packets += 1

    def is_shown(self, packet: av.Packet) -> bool:
        """Tell whether a packet's frame is wanted, rather than decoded for reference only (as of an edit list's)."""
        return not (packet.is_discard or self.is_before(packet.pts))

    def is_before(self, ticks: int | None) -> bool:
        """Tell whether a time lies before what is wanted."""
        return self.keep_from_pts is not None and ticks is not None and ticks < self.keep_from_pts

    def losses(self) -> list[str]:
        """Return what was lost so far, in words; empty for a sound segment."""
        n_missing = self.n_errors
        if self.stream.codec_context.name in ONE_FRAME_PER_PACKET and not self.interlaced:
            n_missing = max(n_missing, self.n_packets - self.n_frames)
        said = [text.strip() for _, component, text in self.errors if component == self.container.format.name]
        return [
            *([f"{n_missing} could not be decoded"] if n_missing else []),
            *([f"{self.n_corrupt} came out corrupt"] if self.n_corrupt else []),
            *([f"the container is damaged ({said[0]})"] if said else []),
        ]

    def failure(self) -> MediaError:
        """Return the error of a stream that gave no frame."""
        what = f"{self.container.format.name}/{self.stream.codec_context.name}"
        said = f"; FFmpeg says {first_line(list(self.errors))!r}" if self.errors else ""
        if any("Picture size" in text for _, _, text in self.errors):
            return MediaError("too_large", f"{what} frames over the limit on pixels{said}")
        why = ", ".join(self.losses()) or "it ends before the first"
        return MediaError("no_frames", f"{what} gave no frame of {self.n_packets} packets: {why}{said}")


class ImageReader:
    """An image, read as a video of one frame."""

    def __init__(self, frame: VideoFrame):
        self.frame = frame
        self.time_base = Fraction(1, 1000)
        self.first_packet_ticks = 0

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        yield 0, self.frame

    def losses(self) -> list[str]:
        """Return what was lost: nothing, an image is whole or it is refused."""
        return []

    def failure(self) -> MediaError:
        """Return the error of an image whose frame lies outside the limits."""
        return MediaError("no_frames", "an image without a frame")


def decode_image(data: Buffer, codec: str, *, max_frame_px: int = MAX_IMAGE_PX) -> VideoFrame:
    """Decode one JPEG or PNG image.

    Raises:
        MediaError: `no_frames` or `too_large`.
    """
    with ffmpeg_errors() as errors:
        decoder = cast("VideoCodecContext", av.VideoCodecContext.create(codec, "r"))
        limit_decoder(decoder, max_frame_px)
        frames: list[VideoFrame] = []
        try:
            frames = [*decoder.decode(av.Packet(bytes(data))), *decoder.decode(None)]
        except av.error.FFmpegError as error:
            log.debug("image refused codec=%s error=%s", codec, error)
        if frames and not frames[0].is_corrupt:
            return frames[0]
        if any("Picture size" in text for _, _, text in errors):
            raise MediaError("too_large", f"{codec} image over {max_frame_px} pixels: {first_line(errors)!r}")
        raise MediaError("no_frames", f"a damaged {codec} image: FFmpeg says {first_line(errors) or 'corrupt'!r}")
