"""What can be published, and opening it: files, devices, network addresses, standard input, the generated feed."""

from __future__ import annotations

import glob
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ...operators.errors import PublishError
from ...operators.rows import table_text
from .segmenter import round_ms
from .timed_pipe import TimedPipe

if TYPE_CHECKING:
    from io import BufferedReader

    import av
    from av.container import InputContainer

Kind = Literal["file", "device", "url", "stdin", "shapes"]

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv"}
    | {".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
FINITE_SCHEMES = ("http", "https", "rtsp", "rtsps")  # these may also give files, not only live streams
STREAM_SUFFIXES = VIDEO_SUFFIXES | {".cgi", ".m3u8", ".mpd", ".sdp"}  # at an address's end; others tell streams apart
# What recorders and cameras call their streams by in an address; the rest of its query may be secret, or new each time.
QUERY_NAMES = (
    "camera",
    "cam",
    "channel",
    "ch",
    "id",
    "input",
    "profile",
    "stream",
    "streamid",
    "streamtype",
    "subtype",
)
PLAYLIST_FORMATS = ("hls", "dash")
WALL_CLOCK = "use_wallclock_as_timestamps"  # FFmpeg's option: a packet's time is when it came
TIMING_OPTIONS = (WALL_CLOCK, "framerate")  # with either the user says what times video without any has
CALLED_KINDS = ("url", "device")  # that must answer in time; a pipe may be silent for as long as it likes
TIMEOUT_S = 10.0  # for connecting, and for a live stream that falls silent
SHAPES_KEYFRAME_MS = 1000


class InputError(PublishError):
    """A source cannot be opened or read any more. A live one may come back."""


@dataclass(frozen=True)
class SourceSpec:
    """One thing to publish as one stream."""

    source: str = field(repr=False)  # as it was given; a URL may hold a password
    kind: Kind
    stream_id: str

    @property
    def name(self) -> str:
        """Return the source for messages, without a password."""
        return without_password(self.source) if self.kind == "url" else table_text(self.source)

    @property
    def waits_for_sender(self) -> bool:
        """Whether opening it listens until somebody connects."""
        return self.kind == "url" and "listen=1" in urlsplit(self.source).query


def expand_sources(sources: Sequence[str], stream_id: str | None = None) -> list[SourceSpec]:
    """Turn what the user named into streams: a folder or a glob gives one for each video file.

    Args:
        sources: Files, folders, globs, devices, URLs, ``-`` or ``shapes:?…``.
        stream_id: Name of the stream, where there is only one.

    Raises:
        PublishError: If something is not there, holds no videos, is no address, or two streams would have one name.
    """
    specs = [spec for source in sources for spec in _expand(source)]
    if stream_id is not None:
        if len(specs) != 1:
            raise PublishError(
                f"--stream-id names one stream, but {', '.join(map(without_password, sources))} gives {len(specs)}; "
                "leave it out"
            )
        return [replace(specs[0], stream_id=table_text(stream_id))]
    by_id: dict[str, SourceSpec] = {}
    for spec in specs:
        other = by_id.setdefault(spec.stream_id, spec)
        if other is not spec:
            raise PublishError(
                f"{other.name} and {spec.name} would both be stream {spec.stream_id!r}; "
                "rename one, or publish them one by one with --stream-id"
            )
    return specs


def _expand(source: str) -> list[SourceSpec]:
    if source == "-":
        return [SourceSpec(source, "stdin", "stdin")]
    if source.startswith("shapes:"):
        return [SourceSpec(source, "shapes", f"shapes-{_shapes(source)[0].seed}")]
    if re.match(r"^[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        return [SourceSpec(source, "url", _url_stream_id(source))]
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if not files:
            raise PublishError(f"folder {source} holds no video files; for others, give a glob such as '{path}/*.bin'")
        return [_file_spec(p) for p in files]
    if path.exists():
        return [_file_spec(path)]
    files = [p for p in sorted(map(Path, glob_once(source))) if not p.is_dir()]
    if not files:
        raise PublishError(f"{source} is no file, folder, glob that matches a file, device or URL")
    return [_file_spec(p) for p in files]


def glob_once(pattern: str) -> list[str]:
    """Return what a glob matches, sorted, each entry of a folder once: a link to a folder may lead around in a circle.

    Of several paths to it, it is the one that goes through the fewest folders.
    """
    real_folder = cache(os.path.realpath)
    reached: dict[tuple[str, str], str] = {}
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (path.count(os.sep), path)):
        folder, name = os.path.split(path)
        reached.setdefault((real_folder(folder), name), path)
    return sorted(reached.values())


def _file_spec(path: Path) -> SourceSpec:
    if path.is_char_device():
        return SourceSpec(str(path), "device", path.name)
    return SourceSpec(str(path), "file", table_text(path.stem))


def _url_stream_id(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # Not `from error`: it quotes what it took for a port, often a piece of a password.
        raise PublishError(
            f"{url.partition('://')[0]}://…: its host or port cannot be read; in a user's name or a password write "
            "%23 for #, %2F for /, %3F for ?, %40 for @, %5B for ["
        ) from None
    path = PurePosixPath(parts.path)
    path = path.with_suffix("") if path.suffix.lower() in STREAM_SUFFIXES else path
    said = [value for name, value in parse_qsl(parts.query) if name.lower() in QUERY_NAMES]
    text = "-".join((parts.hostname or "", str(port or ""), str(path).strip("."), *said))
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-") or "stream"


def without_password(url: str) -> str:
    """Return a URL with ``***`` in place of its user and password."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


class MediaInput:
    """An opened file, device, URL or standard input: one pass over its video, the largest where there are several.

    Use it in a `with` block, or `close` it.

    Args:
        spec: What to open.
        options: Passed to FFmpeg's demuxer (``rtsp_transport=udp``); ``format`` names the demuxer itself.
        stop: Once it is set, a pipe that is silent has ended.

    Raises:
        InputError: If it cannot be opened or has no video.
    """

    def __init__(self, spec: SourceSpec, options: Mapping[str, str] | None = None, stop: threading.Event | None = None):
        from ...models.video_files import choose_video_stream

        options = options or {}
        self.spec = spec
        is_pipe = spec.kind == "stdin" and not sys.stdin.buffer.seekable()
        pipe = TimedPipe(cast("BufferedReader", sys.stdin.buffer), stop) if is_pipe else None
        self._container = _open(spec, options, pipe)
        self.is_live = _is_live(spec, self._container)
        lacks_times = self.is_live and options.keys().isdisjoint(TIMING_OPTIONS) and _has_no_times(self._container)
        if lacks_times and spec.kind == "url" and not spec.waits_for_sender:  # a sender may not come again
            self._container.close()
            self._container = _open(spec, {**options, WALL_CLOCK: "1"})
        if pipe is not None:
            pipe.keeps_times = lacks_times
        self._timed_pipe = pipe if lacks_times else None
        stream = choose_video_stream(self._container)
        if stream is None:
            self._container.close()
            raise InputError(f"{spec.name} has no video stream that this FFmpeg can decode")
        self.stream: av.VideoStream = stream

    def packets(self, stop: threading.Event | None = None) -> Iterator[av.Packet]:
        """Yield the video's packets in decode order, up to the end, or until `stop` is set.

        Raises:
            InputError: If reading fails, or what we called sends no video for `TIMEOUT_S`, whatever else it sends.
        """
        from av.error import FFmpegError

        from ...operators.media import demuxed

        # Of a live source all streams: where sound goes on alone, its packets are the moments to look up.
        packets = demuxed(self._container, *(() if self.is_live else (self.stream,)))
        may_be_silent = not (self.is_live and self.spec.kind in CALLED_KINDS)
        asked_s = time.monotonic()
        while stop is None or not stop.is_set():
            try:
                packet = next(packets, None)
            except (FFmpegError, OSError) as error:
                raise InputError(f"reading {self.spec.name} failed: {_reason(error)}") from error
            if packet is None:
                return
            if packet.stream_index == self.stream.index and packet.size:  # the last one is empty, to flush a decoder
                if self._timed_pipe is not None:
                    self._timed_pipe.stamp(packet)
                yield packet
                asked_s = time.monotonic()
            elif not may_be_silent and time.monotonic() - asked_s > TIMEOUT_S:
                raise InputError(f"{self.spec.name} has sent no video for {TIMEOUT_S:g} s, only sound or other data")

    def close(self) -> None:
        """Close it; a second call does nothing."""
        self._container.close()

    def __enter__(self) -> MediaInput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShapesInput:
    """The generated feed, encoded with a keyframe each second: looks like a `MediaInput`.

    Args:
        spec: Its source is ``shapes:?seed=1&size=256&fps=10&duration=60``; without a duration it never ends.

    Raises:
        PublishError: If the source cannot be read.
    """

    is_live = False

    def __init__(self, spec: SourceSpec):
        from ...models.training.shapes import ShapesWorld
        from .transcode import FrameEncoder

        self.spec = spec
        shapes, self._fps, self._duration_s = _shapes(spec.source)
        self.world = ShapesWorld(shapes)
        rate = Fraction(self._fps).limit_denominator(1001)
        self._encoder = FrameEncoder(shapes.size_px, shapes.size_px, rate, keyframe_ms=SHAPES_KEYFRAME_MS)
        self._frame_time = 1 / rate
        self.stream: av.VideoStream = self._encoder.template

    def packets(self, stop: threading.Event | None = None) -> Iterator[av.Packet]:
        """Yield the encoded frames, up to the duration, or until `stop` is set."""
        import av

        for i, picture in enumerate(self.world.frames(self._fps, stop_s=self._duration_s)):
            if stop is not None and stop.is_set():
                break
            ms = round_ms(i, self._frame_time)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            yield from self._encoder.encode(frame, ms, round_ms(i + 1, self._frame_time) - ms)
        yield from self._encoder.flush()

    def truth_lines(self, window_s: float) -> Iterator[str]:
        """Yield what the feed shows as lines of JSON, in order; times are seconds since the session's start."""
        return self.world.truth_lines(0.0, self._duration_s, window_s)

    def close(self) -> None:
        """Do nothing: there is nothing open."""

    def __enter__(self) -> ShapesInput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_input(
    spec: SourceSpec, options: Mapping[str, str] | None = None, stop: threading.Event | None = None
) -> MediaInput | ShapesInput:
    """Open a source for one pass; see `MediaInput`.

    Raises:
        InputError: If it cannot be opened or has no video.
    """
    return ShapesInput(spec) if spec.kind == "shapes" else MediaInput(spec, options, stop)


def _is_live(spec: SourceSpec, container: InputContainer) -> bool:
    if spec.kind != "url":
        return spec.kind in ("device", "stdin")
    if urlsplit(spec.source).scheme.lower() not in FINITE_SCHEMES:
        return True
    has_duration = (container.duration or 0) > 0
    # A size is a file's, unless it is that of a playlist: a live one has a size, too, but no duration.
    is_file = container.size > 0 and container.format.name not in PLAYLIST_FORMATS
    return not (has_duration or is_file)


def _has_no_times(container: InputContainer) -> bool:
    """Whether neither the format nor the codec tells when frames are shown: FFmpeg would count them as 25 a second.

    With B-frames the order in which they come is another one than that in which they are shown: those are left as are.
    """
    from av.format import Flags

    from ...models.video_files import choose_video_stream

    stream = choose_video_stream(container)
    if stream is None or stream.codec_context.framerate or stream.codec_context.has_b_frames:
        return False
    return bool(Flags.no_timestamps.value & container.format.flags)


def _open(spec: SourceSpec, options: Mapping[str, str], pipe: TimedPipe | None = None) -> InputContainer:
    import av
    from av.error import FFmpegError

    options = dict(options)
    media_format = options.pop("format", "v4l2" if spec.kind == "device" else None)
    timeout = (TIMEOUT_S, TIMEOUT_S) if spec.kind in CALLED_KINDS else None
    if spec.source.lower().startswith("rtsp"):
        options.setdefault("rtsp_transport", "tcp")  # over UDP, lost packets become broken pictures
    file: Any = (pipe or sys.stdin.buffer) if spec.kind == "stdin" else spec.source
    if spec.kind == "file":
        file = f"file:{file}"  # else a name with a colon is taken for an address
    try:
        return cast("InputContainer", av.open(file, "r", format=media_format, options=options, timeout=timeout))
    except (FFmpegError, OSError, ValueError) as error:
        raise InputError(f"cannot open {spec.name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shapes(source: str) -> tuple[Any, float, float | None]:
    from ...models.training.shapes import parse_shapes_url

    try:
        return parse_shapes_url(source)
    except ValueError as error:
        raise PublishError(str(error)) from error
