"""One session of one stream: from an opened source to its last segment.

A session is what a consumer may take as one run of frames without a break: all passes over a looped file, or one
connection to a live source.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TextIO

from ...operators.errors import PublishError
from .inputs import InputError, MediaInput, ShapesInput
from .options import PublishOptions
from .producer import SegmentHeader, StreamSender
from .segmenter import GopTooLargeError, MediaSegment, ParametersChangedError, Segmenter

MS_NS = 1_000_000


@dataclass(frozen=True)
class SentSegment:
    """One segment that was handed to the producer."""

    stream_id: str
    session: str
    seq: int
    start_ns: int  # UTC
    first_ms: int  # since the session's start
    stop_ms: int
    n_frames: int
    n_bytes: int
    end: bool


def new_session() -> str:
    """Return a name that no other session has, and that sorts by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"


class PublishSession:
    """Cuts, paces and sends one session; `run` is called once.

    Args:
        name: Of the session.
        sender: Of the stream.
        options: How to publish.
        start_ns: UTC time of the first frame; None: when the first keyframe is read.
        stop: Ends the session early, with `end` on the segment at hand.
        on_segment: Called after each segment.
        on_notice: Told what a user should know.
    """

    def __init__(
        self,
        name: str,
        sender: StreamSender,
        options: PublishOptions,
        *,
        start_ns: int | None,
        stop: threading.Event,
        on_segment: Callable[[SentSegment], None],
        on_notice: Callable[[str], None],
    ):
        self.name = name
        self.n_segments = 0
        self.segmenter = Segmenter(
            segment_ms=round(options.segment_s * 1000),
            method=options.method,
            bitrate=options.bitrate,
            on_notice=on_notice,
        )
        self._sender = sender
        self._options = options
        self._start_ns = start_ns
        self._stop = stop
        self._on_segment = on_segment
        self._ended = False
        self._first_key_s: float | None = None  # monotonic, when the first keyframe was read
        self._pace_origin_s: float | None = None  # monotonic; None: not paced
        self._truth: TruthWriter | None = None

    def run(self, source: MediaInput | ShapesInput, reopen: Callable[[], MediaInput | ShapesInput]) -> None:
        """Publish the source to its end, and each further pass; closes it. Everything is acknowledged at return.

        Raises:
            InputError: If reading fails, or `copy` cannot go on. What came before was sent, with `end` on the last
                segment.
            PublishError: If a segment is too large or was not delivered; then nothing more is sent.
        """
        if self._options.speed > 0 and not source.is_live:
            self._pace_origin_s = time.monotonic()
        if self._options.truth is not None and isinstance(source, ShapesInput):
            self._truth = TruthWriter(self._options.truth.open("w"), source.truth_lines(self._options.truth_window_s))
        lost: InputError | None = None
        try:
            self._run_passes(source, reopen)
        except InputError as error:
            lost = error
        except ParametersChangedError as error:
            lost = InputError(
                f"{source.spec.name} changes its codec parameters after {error.first_ms / 1000:.3f} s, so it cannot be "
                "copied as one session; use --transcode, or neither of the two, which transcodes from there"
            )
        except GopTooLargeError as error:
            raise self._sender.too_large(error.first_ms, error.n_bytes, is_whole=False) from error
        finally:
            source.close()
        self._finish()
        if lost is not None:
            raise lost

    def _run_passes(self, source: MediaInput | ShapesInput, reopen: Callable[[], MediaInput | ShapesInput]) -> None:
        n_passes = 1 if source.is_live else self._options.loop
        self._run_pass(source)
        passed = 1
        while passed != n_passes and not self._ended and not self._stop.is_set():
            if passed == 1 and not self.segmenter.has_frames:
                return  # nothing in it: looping for ever would spin
            with reopen() as again:
                self._run_pass(again)
            passed += 1

    def _run_pass(self, source: MediaInput | ShapesInput) -> None:
        self.segmenter.start_pass(source.stream, self._live_ms if source.is_live else None)
        try:
            for packet in source.packets(self._stop):
                if packet.is_keyframe and self._first_key_s is None:
                    self._first_key_s = time.monotonic()
                if self._start_ns is None and packet.is_keyframe:
                    self._start_ns = time.time_ns() // MS_NS * MS_NS
                self._send_all(self.segmenter.push(packet))
                if self._ended:
                    return
        except InputError:
            self._send_all(self.segmenter.end_pass())  # what was read is whole, and the last of it carries `end`
            raise
        self._send_all(self.segmenter.end_pass())

    def _live_ms(self) -> int:
        """Return how long ago the first keyframe was read."""
        return round((time.monotonic() - (self._first_key_s or time.monotonic())) * 1000)

    def _finish(self) -> None:
        if not self._ended:
            last = self.segmenter.finish()
            if last is not None:
                self._send(last)
        if self._truth is not None:
            self._truth.close()
        self._sender.flush()

    def _send_all(self, segments: Iterable[MediaSegment]) -> None:
        for segment in segments:
            self._send(segment)
            if self._ended:
                return

    def _send(self, segment: MediaSegment) -> None:
        """Send one segment when its time has come, with `end` if we were asked to stop while waiting."""
        if self._pace_origin_s is not None:
            due_s = self._pace_origin_s + segment.stop_ms / 1000 / self._options.speed
            self._stop.wait(max(0.0, due_s - time.monotonic()))
        if self._stop.is_set():
            segment = replace(segment, end=True)
        start_ns = (self._start_ns or 0) + segment.first_ms * MS_NS
        header = SegmentHeader(self.name, self.n_segments, start_ns, segment.end)
        self._sender.send(segment, header)
        self.n_segments += 1
        self._ended = segment.end
        if self._truth is not None:
            self._truth.write_until(segment.stop_ms / 1000)
        self._on_segment(
            SentSegment(
                stream_id=self._sender.stream_id,
                session=self.name,
                seq=header.seq,
                start_ns=start_ns,
                first_ms=segment.first_ms,
                stop_ms=segment.stop_ms,
                n_frames=segment.n_frames,
                n_bytes=len(segment.data),
                end=segment.end,
            )
        )


class TruthWriter:
    """Writes the generated feed's truth as the feed passes: a line is there once its segment was sent."""

    def __init__(self, file: TextIO, lines: Iterator[str]):
        self._file = file
        self._lines = lines
        self._next = next(lines, None)

    def write_until(self, position_s: float) -> None:
        """Write every line about what lies before this time."""
        while self._next is not None and _passed_s(self._next) <= position_s:
            self._file.write(self._next + "\n")
            self._next = next(self._lines, None)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _passed_s(line: str) -> float:
    """Return when what a line tells is over."""
    record = json.loads(line)
    return float(record.get("stop_s", record.get("t_s", 0.0)))


def no_frames_error(name: str) -> PublishError:
    """Return the error for a source that gave nothing to publish."""
    return PublishError(
        f"{name} holds no frames that can be published; does `ffprobe` show a video stream with a keyframe?"
    )
