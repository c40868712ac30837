"""Publishes one source as one stream, and tries again where it is live.

A file is one session, however often it is looped; a live source starts a new one with every connection. The last
segment of each carries `end`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...operators.errors import PublishError, SettingsError
from ..waits import doubled_wait_s
from .inputs import InputError, MediaInput, ShapesInput, SourceSpec, expand_sources, open_input
from .options import PublishOptions, PublishReport
from .producer import SegmentProducer
from .session import PublishSession, SentSegment, new_session, no_frames_error

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0


def publish_source(
    source: str,
    *,
    bootstrap: str,
    topic: str,
    stream_id: str | None = None,
    max_bytes: int | None = None,
    client: Mapping[str, Any] | None = None,
    stop: threading.Event | None = None,
    on_segment: Callable[[SentSegment], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    **options: Any,
) -> PublishReport:
    """Publish one source as one stream, and return when it is over and acknowledged.

    Args:
        source: A file, device, URL, ``-`` (standard input) or ``shapes:?…``.
        bootstrap: ``host:port`` of Kafka.
        topic: Where to.
        stream_id: The records' key; by default taken from the source.
        max_bytes: Largest record; None asks the broker.
        client: Passed to kafka-python: ``security_protocol``, ``sasl_mechanism``…
        stop: Set it from another thread to end early: the segment at hand is sent with `end`.
        on_segment: Called after each segment was handed over, in this thread.
        on_notice: Told what a user should know: transcoding, lost connections.
        **options: The fields of `PublishOptions`: ``speed``, ``loop``, ``session``, ``start_ns``, ``segment_s``…

    Raises:
        PublishError: If the source cannot be read or a segment is not delivered.
        SettingsError: If an option is out of range.
    """
    chosen = PublishOptions(**options)
    specs = expand_sources([source], stream_id)
    if len(specs) != 1:
        raise PublishError(f"{source} holds {len(specs)} videos; publish_source takes one")
    with SegmentProducer(bootstrap, topic, max_bytes=max_bytes, client=client) as producer:
        publisher = StreamPublisher(specs[0], producer, chosen, stop, on_segment=on_segment, on_notice=on_notice)
        return publisher.run()


class StreamPublisher:
    """Publishes one source; `run` is called once, from any thread.

    Attributes:
        report: What was handed to the producer so far; may be read while `run` runs, and after it failed.
    """

    def __init__(
        self,
        spec: SourceSpec,
        producer: SegmentProducer,
        options: PublishOptions,
        stop: threading.Event | None = None,
        *,
        on_segment: Callable[[SentSegment], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ):
        if options.truth is not None and spec.kind != "shapes":
            raise SettingsError(f"--truth: only the generated feed (shapes:) knows its truth, {spec.name} does not")
        self.report = PublishReport(spec.stream_id)
        self._spec = spec
        # The feed is encoded here with clean keyframes: there is nothing to decide, and nothing to decode.
        self._options = replace(options, method="copy") if spec.kind == "shapes" else options
        self._is_live = True  # as far as is known before it is open
        self._sender = producer.stream(spec.stream_id)
        self._stop = stop or threading.Event()
        self._tell_segment = on_segment or (lambda sent: None)
        self._tell_notice = on_notice or (lambda text: None)

    def run(self) -> PublishReport:
        """Publish until the source's end, for ever if it is live, or until stopped.

        Raises:
            PublishError: If the source cannot be read or a segment is not delivered. What was acknowledged stays.
        """
        failures = 0
        while True:
            n_before = self.report.n_segments
            reason = "nothing that can be published came"
            try:
                is_over = self._run_session()
            except InputError as error:
                is_over = self._spec.kind == "stdin" and self._stop.is_set()  # it was silent, and is no video so far
                if not is_over:
                    if not self._may_reconnect():
                        raise
                    reason = str(error)
                    self._notice(reason)
            if is_over or self._stop.is_set():
                self.report = replace(self.report, stopped=self._stop.is_set())
                return self.report
            failures = 0 if self.report.n_segments > n_before else failures + 1
            limit = self._options.max_reconnects
            if limit is not None and failures > limit:
                what = "is lost, and was not back after" if self.report.sessions else "was not there in"
                raise PublishError(f"{self._spec.name} {what} {failures} tries; the last one: {reason}")
            self._wait_to_reconnect(failures)

    def _run_session(self) -> bool:
        """Publish one session; return whether the source is over for good."""
        source = self._open()
        self._is_live = source.is_live
        is_last = not self._may_reconnect(is_open=True)
        session = PublishSession(
            self._session_name(),
            self._sender,
            self._options,
            start_ns=None if self.report.sessions else self._options.start_ns,
            stop=self._stop,
            on_segment=self._count,
            on_notice=self._notice,
        )
        try:
            session.run(source, self._open)
        finally:
            self._count_losses(session)
        if is_last and not session.n_segments and not self._stop.is_set():
            raise no_frames_error(self._spec.name)
        return is_last

    def _open(self) -> MediaInput | ShapesInput:
        return open_input(self._spec, self._options.input_options, self._stop)

    def _session_name(self) -> str:
        n = len(self.report.sessions) + 1
        fixed = self._options.session
        if fixed is None:
            return new_session()
        return fixed if n == 1 else f"{fixed}-{n}"

    def _may_reconnect(self, *, is_open: bool = False) -> bool:
        """Whether a source is worth another try: an address that was there before, or that is to be waited for.

        A recording is not, once it is open: another try would publish it again from its start.
        """
        if self._spec.kind != "url" or not self._is_live or self._options.max_reconnects == 0:
            return False
        return is_open or self._spec.waits_for_sender or self._options.awaits_start or bool(self.report.sessions)

    def _wait_to_reconnect(self, failures: int) -> None:
        wait_s = doubled_wait_s(FIRST_BACKOFF_S, failures, LONGEST_BACKOFF_S)
        what, how = ("connection lost", ", as a new session") if self.report.sessions else ("not there yet", "")
        self._notice(f"{what}; next try in {wait_s:g} s{how}")
        self._stop.wait(wait_s)

    def _count(self, sent: SentSegment) -> None:
        report = self.report
        sessions = report.sessions if sent.seq else (*report.sessions, sent.session)
        self.report = replace(
            report,
            sessions=sessions,
            n_segments=report.n_segments + 1,
            n_frames=report.n_frames + sent.n_frames,
            n_bytes=report.n_bytes + sent.n_bytes,
            media_ms=report.media_ms + sent.stop_ms - sent.first_ms,
        )
        self._tell_segment(sent)

    def _count_losses(self, session: PublishSession) -> None:
        segmenter = session.segmenter
        self.report = replace(
            self.report,
            n_dropped_frames=self.report.n_dropped_frames + segmenter.n_dropped,
            n_skipped_packets=self.report.n_skipped_packets + segmenter.n_skipped,
            transcoded=self.report.transcoded or segmenter.transcoding,
        )

    def _notice(self, text: str) -> None:
        log.info("stream=%s %s", self._spec.stream_id, text)
        self.report = replace(self.report, notices=(*self.report.notices, text))
        self._tell_notice(text)
