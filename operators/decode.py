"""Decode: the bytes of a segment become the frames that the sampling grid may need. Stateless.

Only those frames are converted, straight to the model's size. The rest are decoded where others need them
(`sparse_reader`), and forgotten. What could not be decoded is counted and told in a dead letter: a segment keeps its
good frames, and one that has none comes out as failed, which later steps treat as a gap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from av.error import FFmpegError

from ..models.video_files import orientation
from .decode_apart import DecodeProcess, ProcessDiedError
from .errors import MediaError
from .frame_times import DecodeLimits, FrameTimer, TimedFrames
from .in_hand import DEATHS_ALLOWED, MarkFile, RecordKey, Suspect
from .media import (
    ImageReader,
    VideoReader,
    check_unchanged,
    decode_image,
    ffmpeg_errors,
    open_media,
    open_video_stream,
    opened_uri,
    sniff_image,
)
from .pictures import PicturePace, make_jpeg
from .rgb import RgbConverter
from .rows import (
    Barrier,
    Buffer,
    DeadLetter,
    DecodedSegment,
    FileRange,
    Row,
    Segment,
    SegmentMeta,
    block_of,
    rows_of,
    table_text,
)
from .sampling import DEFAULT_MAX_HOLD_NS, NS_PER_S, GridSpec, MediaClock, walk_grid
from .sparse_reader import DenseStreams, SparseReader, SparseReadingError
from .worker_limits import ended_after, limit_memory

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

log = logging.getLogger(__name__)

STEP_NAME = "decode"

REASONS = {
    # nothing of the segment could be used
    "empty": "a record without bytes that is not its session's last",
    "not_media": "no container or image that is let in, or one that is broken from its start",
    "no_video": "a container without a video stream, such as audio alone",
    "no_decoder": "a video codec that this FFmpeg cannot decode",
    "too_large": "frames over the limit on pixels",
    "no_frames": "a video stream of which no frame could be decoded",
    "crashes": "its decoder or the encoder died of it, or of something else while at it, three times",
    "unreadable": "a file of an archive that could not be opened or read",
    "changed": "a file of an archive is not the one that was found: it changed meanwhile, and is done again as that",
    "error": "an error of ours; the log has its traceback",
    # notices: the segment was used
    "damaged": "some frames were lost",
    "too_long": "the frames after the limit on a segment's length were not used",
}
"""Every `reason` of a dead letter that decoding writes, and of a `MediaError`."""


def decode_segment(
    data: Buffer,
    meta: SegmentMeta,
    *,
    grid: GridSpec,
    frame_hw: tuple[int, int],
    limits: DecodeLimits | None = None,
    with_picture: bool = False,
    dense_streams: DenseStreams | None = None,
) -> DecodedSegment:
    """Decode a segment on the calling thread and sample it on the session's grid.

    The segment's first frame is at `meta.start_ns`, the others as far from it as their timestamps are; all times
    are then rounded to whole milliseconds since the session's start (`MediaClock`). Frames that are corrupt or whose
    time falls back are dropped and counted; rotated video is set upright; JPEG and PNG images are one frame.

    Args:
        data: Any container of `media.CONTAINERS`, or one JPEG or PNG image. What follows the image in its record
            (phones append depth and gain maps) is not looked at; a bare run of JPEGs needs a content type `video/…`.
        meta: Which segment it is.
        grid: The lane's grid.
        frame_hw: Size of the frames that come out; the aspect is not kept.
        limits: What it may cost; by default `DecodeLimits()`.
        with_picture: Whether the tail is to come as a small JPEG, too.
        dense_streams: Of which every frame is decoded. The segment's is added where leaving out what is not needed
            went wrong, which costs time only.

    Returns:
        The sampled frames and the tail, with dead letters `damaged` or `too_long` where frames were lost. An empty
        record that ends its session is failed without a dead letter: it only says that the session is over.

    Raises:
        MediaError: If it gives no frame at all; `reason` is one of `REASONS`.
    """
    limits = limits or DecodeLimits()
    if not memoryview(data).nbytes:
        if meta.end:
            return failed_segment(meta, frame_hw)
        raise MediaError("empty", f"a record without bytes: {meta.where}; expected media, or the header `end`")
    codec = None if meta.content_type.startswith("video/") else sniff_image(data)
    if codec is not None:
        frame = decode_image(data, codec, max_frame_px=limits.max_image_px)
        return sample_frames(
            ImageReader(frame), meta, None, grid=grid, frame_hw=frame_hw, limits=limits, with_picture=with_picture
        )
    return decode_container(
        lambda: open_media(data, max_frame_px=limits.max_frame_px),
        meta,
        grid=grid,
        frame_hw=frame_hw,
        limits=limits,
        with_picture=with_picture,
        dense_streams=dense_streams,
    )


def decode_file(
    path: str | Path,
    meta: SegmentMeta,
    *,
    grid: GridSpec,
    frame_hw: tuple[int, int],
    pts_range: tuple[int | None, int | None] = (None, None),
    keep_from_pts: int | None = None,
    origin_pts: int | None = None,
    limits: DecodeLimits | None = None,
    with_picture: bool = False,
    dense_streams: DenseStreams | None = None,
) -> DecodedSegment:
    """Decode a file, or the part of it between two keyframes, as a segment.

    With the file's first timestamp as `origin_pts`, all parts of a file lie on one clock that starts at
    `meta.session_start_ns`, and give the frames that the same file gives when it is published in segments.

    Args:
        path: The file, or its address (`media.opened_uri`).
        meta: Which part of which session it is.
        grid: The lane's grid.
        frame_hw: Size of the frames that come out.
        pts_range: [start, stop) timestamps of the keyframes that bound the part, in the stream's time base; None
            for the file's start or end. Cut only where what follows needs nothing before it: of an open GOP the
            leading frames are lost, and counted; to keep them, start a GOP earlier.
        keep_from_pts: Frames shown before are not of this part; None: all are.
        origin_pts: Timestamp of the frame at the session's start; None if it is this part's first frame, at
            `meta.start_ns`.
        limits: As for `decode_segment`.
        with_picture: Likewise.
        dense_streams: Likewise.

    Raises:
        MediaError: As for `decode_segment`.
        OSError: If the file cannot be read.
    """
    limits = limits or DecodeLimits()

    @contextmanager
    def opened() -> Iterator[InputContainer]:
        with opened_uri(path) as source, open_media(source, max_frame_px=limits.max_frame_px) as container:
            yield container

    return decode_container(
        opened,
        meta,
        origin_pts,
        pts_range=pts_range,
        keep_from_pts=keep_from_pts,
        grid=grid,
        frame_hw=frame_hw,
        limits=limits,
        with_picture=with_picture,
        dense_streams=dense_streams,
    )


def decode_container(
    opened: Callable[[], AbstractContextManager[InputContainer]],
    meta: SegmentMeta,
    origin_pts: int | None = None,
    *,
    pts_range: tuple[int | None, int | None] = (None, None),
    keep_from_pts: int | None = None,
    grid: GridSpec,
    frame_hw: tuple[int, int],
    limits: DecodeLimits,
    with_picture: bool = False,
    dense_streams: DenseStreams | None = None,
) -> DecodedSegment:
    """Decode a container that can be opened, twice if need be; see `decode_segment` and `decode_file`."""

    def decode(container: InputContainer, *, sparsely: bool) -> DecodedSegment:
        with ffmpeg_errors() as errors:
            stream = open_video_stream(container, max_frame_px=limits.max_frame_px)
            reader = VideoReader(container, stream, errors, pts_range, keep_from_pts)
            clock = None
            if origin_pts is not None and stream.time_base is not None:
                clock = MediaClock(stream.time_base, origin_pts, meta.session_start_ns, meta.session_start_ns)
            frames: VideoReader | SparseReader = reader
            if sparsely:
                planned = SparseReader.planned(reader, meta, clock, grid, limits, frame_hw)
                frames = planned or reader
            return sample_frames(
                frames, meta, clock, grid=grid, frame_hw=frame_hw, limits=limits, with_picture=with_picture
            )

    dense_streams = dense_streams or DenseStreams()
    if not dense_streams.take(meta.stream_id):
        try:
            with opened() as container:
                return decode(container, sparsely=True)
        except SparseReadingError as error:
            log.info("decoding all frames for a while where=%s cause=%s", meta.where, error)
            dense_streams.add(meta.stream_id)
    with opened() as container:
        return decode(container, sparsely=False)


def sample_frames(
    reader: VideoReader | SparseReader | ImageReader,
    meta: SegmentMeta,
    clock: MediaClock | None,
    *,
    grid: GridSpec,
    frame_hw: tuple[int, int],
    limits: DecodeLimits,
    with_picture: bool = False,
) -> DecodedSegment:
    """Run a reader's frames over the grid and convert those that are needed.

    Raises:
        MediaError: If there is no frame.
    """
    frames: TimedFrames[VideoFrame | None] = reader
    timer = FrameTimer(frames, meta, clock, limits)
    to_rgb = RgbConverter(frame_hw)
    indices: list[int] = []
    images: list[np.ndarray] = []
    for index, frame in walk_grid(timer, grid):
        if len(images) >= limits.max_sampled(frame_hw):
            timer.too_long = f"max_sampled_bytes={limits.max_sampled_bytes}"
            break
        assert frame is not None, f"the frame of grid index {index} was not decoded"
        indices.append(index)
        images.append(to_rgb(frame))
    if timer.tail is None:
        raise reader.failure()
    images.append(to_rgb(timer.tail))
    return DecodedSegment(
        meta=meta,
        grid_indices=np.array(indices, np.int64),
        frames=np.stack(images),
        first_ns=timer.first_ns,
        tail_ns=timer.tail_ns,
        n_frames=timer.n_kept,
        dead_letters=notices(reader, timer, meta),
        jpeg=jpeg_of(timer.tail) if with_picture else b"",
    )


def jpeg_of(frame: VideoFrame) -> bytes:
    """Return a frame as a small JPEG; nothing where FFmpeg cannot: a segment is not lost for its picture."""
    try:
        return make_jpeg(frame, orientation(frame))
    except FFmpegError as error:
        log.debug("no picture: %s", error)
        return b""


def notices(
    reader: VideoReader | SparseReader | ImageReader, timer: FrameTimer[Any], meta: SegmentMeta
) -> tuple[DeadLetter, ...]:
    """Say what of a segment that was used could not be."""
    letters = []
    losses = reader.losses() if not timer.too_long else []  # what was not read is not lost
    if timer.n_fallen:
        losses.append(f"{timer.n_fallen} have a timestamp that falls back or leaps ahead")
    if losses:
        detail = f"kept {timer.n_kept} frames; of the others {', '.join(losses)}"
        letters.append(DeadLetter.of(meta, "damaged", detail))
    if timer.too_long:
        detail = f"kept the first {timer.n_kept} frames; the rest is over the limit on a segment, {timer.too_long}"
        letters.append(DeadLetter.of(meta, "too_long", detail))
    return tuple(letters)


def failed_segment(
    meta: SegmentMeta, frame_hw: tuple[int, int], dead_letters: tuple[DeadLetter, ...] = ()
) -> DecodedSegment:
    """Return what stands for a segment without a usable frame."""
    frames = np.zeros((0, *frame_hw, 3), np.uint8)
    return DecodedSegment(meta, np.zeros(0, np.int64), frames, meta.start_ns, meta.start_ns, 0, dead_letters)


class Decode:
    """The decode step of a lane: for `map_batches(Decode, batch_size=None, batch_format="pyarrow")`.

    Ray Data makes one in each process of the actor pool and calls it once a block, in any order and on any of
    them; the pool puts the blocks back into order. It keeps no state that shows in what it returns. Every row comes
    out with its `lane_seq`: a segment as a `DecodedSegment`, failed if need be, with the dead letters that it came
    with first; a barrier untouched.

    A record that ends its process is not met unprepared again: it comes back as one of `suspects`, and its stream is
    decoded in a process apart, whose death ends nothing else. After three deaths it is set aside.

    Args:
        fps: The grid, as a Fraction, a number, or text such as "30000/1001".
        frame_hw: Size of the frames that come out: the model's.
        max_hold_s: See `GridSpec.max_hold_ns`.
        dead_letter_bytes: How many bytes of an unusable record to keep.
        picture_interval_s: Between two small pictures of a stream that this process makes, for people; 0 for none.
        limits: What a segment may cost.
        limit_s: A record that takes longer ends this process; 0 for none.
        memory_bytes: That this process may take beyond what it has at its start (`limit_memory`); 0 for no limit.
        marks: Folder for the mark of the record in hand (`MarkFile`); None for none.
        suspects: Records that processes died of, or while at them.
    """

    def __init__(
        self,
        *,
        fps: Fraction | float | str,
        frame_hw: tuple[int, int],
        max_hold_s: float = DEFAULT_MAX_HOLD_NS / NS_PER_S,
        dead_letter_bytes: int = 1 << 20,
        picture_interval_s: float = 0.0,
        limits: DecodeLimits | None = None,
        limit_s: float = 0.0,
        memory_bytes: int = 0,
        marks: Path | None = None,
        suspects: Iterable[Suspect] = (),
    ):
        self.grid = GridSpec(Fraction(str(fps)), round(max_hold_s * NS_PER_S))
        self.frame_hw = frame_hw
        self.dead_letter_bytes = dead_letter_bytes
        self.limits = limits or DecodeLimits()
        self.limit_s = limit_s
        self.pace = PicturePace(picture_interval_s)
        self.marks = MarkFile(marks, STEP_NAME)
        self.suspects = {suspect.key: suspect for suspect in sorted(suspects, key=lambda s: s.deaths)}
        self.streams_apart = {s.stream_id for s in self.suspects.values() if s.step == STEP_NAME}
        options = {
            "fps": str(fps),
            "frame_hw": frame_hw,
            "max_hold_s": max_hold_s,
            "dead_letter_bytes": dead_letter_bytes,
            "picture_interval_s": picture_interval_s,
            "limits": vars(self.limits),
            "memory_bytes": memory_bytes,
        }
        self.dense_streams = DenseStreams()
        limit_memory(memory_bytes)
        self.apart = DecodeProcess(options, limit_s)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Decode:
        """Build one from options that were sent as JSON."""
        limits = DecodeLimits(**options["limits"])
        return cls(**{**options, "frame_hw": tuple(options["frame_hw"]), "limits": limits})

    def __call__(self, table: pa.Table) -> pa.Table:
        """Decode the segments of a block.

        Raises:
            ValueError: If a row is neither a segment nor a barrier.
            ProcessDiedError: If a suspect hangs once more; the lane restarts.
        """
        return block_of([row if row.kind == Barrier.KIND else self._timed(row) for row in rows_of(table)])

    def _timed(self, row: Row) -> Row:
        began_s = time.monotonic()
        decoded = self.decode_row(row)
        return replace(decoded, header={**decoded.header, "decode_s": time.monotonic() - began_s})

    def decode_row(self, row: Row) -> Row:
        """Decode one segment: here, apart, or not at all."""
        if row.kind != Segment.KIND:
            raise ValueError(f"decode got a row of kind {row.kind!r} at lane_seq={row.lane_seq}, expected a segment")
        segment = Segment.from_row(row)
        meta = segment.meta
        suspect = None if meta.by_silence else self.suspects.get(RecordKey.of(meta))
        if suspect is not None and suspect.is_poison:
            return self.set_aside(segment, suspect).to_row(row.lane_seq)
        if meta.stream_id in self.streams_apart:
            return self.decode_apart(row, segment, suspect)
        with self.marks.holding(meta), ended_after(self.limit_s):
            decoded = self.decode(segment)
        return with_dead_letters(decoded, segment.dead_letters).to_row(row.lane_seq)

    def decode_apart(self, row: Row, segment: Segment, suspect: Suspect | None) -> Row:
        """Decode a segment in another process, as often as that dies; then set it aside.

        Raises:
            ProcessDiedError: If the process hung and may be tried again: the lane would stand still for too long.
        """
        meta = segment.meta
        deaths, cause = suspect.deaths if suspect and suspect.step == STEP_NAME else 0, ""
        while deaths <= DEATHS_ALLOWED:
            try:
                with self.marks.holding(meta, deaths):
                    return rows_of(self.apart(block_of([row])))[0]
            except ProcessDiedError as died:
                log.warning("decoder died where=%s cause=%s", meta.where, died.cause)
                deaths, cause = deaths + 1, died.cause
                if died.hung and deaths <= DEATHS_ALLOWED:
                    self.marks.mark(self.marks.suspect(meta, deaths - 1, cause))
                    raise
        proven = self.marks.suspect(meta, deaths, cause)
        self.marks.set_aside(proven)
        return self.set_aside(segment, proven).to_row(row.lane_seq)

    def set_aside(self, segment: Segment, suspect: Suspect) -> DecodedSegment:
        """Return what stands for a segment that is touched no more."""
        return with_dead_letters(self.failed(segment, "crashes", suspect.detail), segment.dead_letters)

    def decode(self, segment: Segment) -> DecodedSegment:
        """Decode a segment, or say why not: one bad record must not stop a lane, which would meet it again."""
        meta = segment.meta
        try:
            if segment.file is not None:
                return self.decode_range(segment.file, meta)
            return decode_segment(
                segment.data,
                meta,
                grid=self.grid,
                frame_hw=self.frame_hw,
                limits=self.limits,
                with_picture=self.pace.due(meta.stream_id),
                dense_streams=self.dense_streams,
            )
        except MediaError as error:
            return self.failed(segment, error.reason, str(error))
        except MemoryError:
            raise  # perhaps this process's trouble, not the record's: it counts as a death
        except Exception as error:  # the edge of the worker
            log.exception("decode failed where=%s", meta.where)
            return self.failed(segment, "error", f"{type(error).__name__}: {error}")

    def failed(self, segment: Segment, reason: str, detail: str) -> DecodedSegment:
        """Return what stands for a segment that could not be used, with its bytes up to the limit."""
        data = bytes(segment.data[: self.dead_letter_bytes])
        letter = DeadLetter.of(segment.meta, reason, detail, data)
        return failed_segment(segment.meta, self.frame_hw, (letter,))

    def decode_range(self, file: FileRange, meta: SegmentMeta) -> DecodedSegment:
        """Decode a part of a file, within `DecodeLimits.of_file`.

        Raises:
            MediaError: As `decode_segment`; and `unreadable`, and `changed`, also while it was read.
        """
        try:
            check_unchanged(file.uri, file.n_bytes, file.mtime_ns)
            decoded = decode_file(
                file.uri,
                meta,
                grid=self.grid,
                frame_hw=self.frame_hw,
                pts_range=(file.start_pts, file.stop_pts),
                keep_from_pts=file.keep_from_pts,
                origin_pts=file.origin_pts,
                limits=self.limits.of_file(),
                with_picture=self.pace.due(meta.stream_id),
                dense_streams=self.dense_streams,
            )
            check_unchanged(file.uri, file.n_bytes, file.mtime_ns)
            return decoded
        except OSError as error:
            reason = f"cannot read {table_text(file.uri)}: {error.strerror or error}"
            raise MediaError("unreadable", reason) from error


def with_dead_letters(decoded: DecodedSegment, earlier: tuple[DeadLetter, ...]) -> DecodedSegment:
    """Return the segment with the dead letters that it came with before its own."""
    fields = {**vars(decoded), "dead_letters": (*earlier, *decoded.dead_letters)}
    return DecodedSegment(**fields)
