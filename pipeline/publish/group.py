"""Publishes several sources at once, a thread each, and shows how far they are."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ...operators.errors import StormlineError
from ..stop_signals import on_stop_signal
from .inputs import CALLED_KINDS
from .publisher import StreamPublisher

if TYPE_CHECKING:
    from rich.console import Console

    from .inputs import SourceSpec
    from .options import PublishOptions
    from .producer import SegmentProducer
    from .session import SentSegment

PLAIN_EVERY_S = 10.0  # between two rounds of progress lines, where there is no terminal
LIVE_EVERY_S = 0.25


class PublishGroup:
    """Publishes sources side by side; one that fails does not stop the others. Call `run` once, on the main thread.

    Of several live sources one that is not there yet is waited for: the others are published meanwhile.

    Args:
        specs: What to publish.
        producer: Shared by all of them; not closed here.
        options: The same for all of them.
        console: Where progress, notices and the summary go.
    """

    def __init__(self, specs: list[SourceSpec], producer: SegmentProducer, options: PublishOptions, console: Console):
        self._console = console
        self._where = f"{producer.topic} at {producer.bootstrap}"
        self._stop = threading.Event()
        n_called = sum(spec.kind in CALLED_KINDS for spec in specs)
        options = replace(options, awaits_start=options.awaits_start or n_called > 1)
        self._streams = [_Stream(self, spec, producer, options, self._stop) for spec in specs]

    def run(self) -> int:
        """Publish everything, until done or SIGINT or SIGTERM; return how many sources failed."""
        threads = [
            threading.Thread(target=stream.run, name=f"publish-{stream.name}", daemon=True) for stream in self._streams
        ]
        with on_stop_signal(self._stop.set, lambda text: self.say(text, "yellow")):
            for thread in threads:
                thread.start()
            self._show_until_done(threads)
        return self._say_end()

    def say(self, text: str, style: str = "") -> None:
        """Print one line."""
        self._console.print(escape(text), style=style, soft_wrap=True)

    def _show_until_done(self, threads: list[threading.Thread]) -> None:
        if self._console.is_terminal:
            with Live(self._table(), console=self._console, transient=True) as live:
                while _any_alive(threads):
                    live.update(self._table())
            return
        self.say(f"publishing {len(self._streams)} stream{'s' * (len(self._streams) > 1)} to {self._where}")
        shown_s = time.monotonic()
        while _any_alive(threads):
            if time.monotonic() - shown_s >= PLAIN_EVERY_S:
                shown_s = time.monotonic()
                for stream in self._streams:
                    self.say(stream.line())

    def _table(self) -> Table:
        table = Table(title=f"publishing to {self._where}", title_justify="left", box=None, pad_edge=False)
        table.add_column("stream")
        for name in ("position", "segments", "MB"):
            table.add_column(name, justify="right")
        table.add_column("")
        for stream in self._streams:
            table.add_row(*(escape(cell) for cell in stream.cells()))
        return table

    def _say_end(self) -> int:
        failed = [stream for stream in self._streams if stream.error is not None]
        for stream in self._streams:
            if stream.error is None:
                self.say(stream.line())
        for stream in failed:
            self.say(stream.line(), "red")
        n_done = len(self._streams) - len(failed)
        self.say(
            f"published {n_done} of {len(self._streams)} to {self._where}" + (", stopped early" * self._stop.is_set())
        )
        return len(failed)


class _Stream:
    """One source of the group: its publisher, and what a person sees of it."""

    def __init__(
        self,
        group: PublishGroup,
        spec: SourceSpec,
        producer: SegmentProducer,
        options: PublishOptions,
        stop: threading.Event,
    ):
        self.name = spec.stream_id
        self.error: BaseException | None = None
        self._position_ms = 0
        self._is_done = False
        self._publisher = StreamPublisher(
            spec,
            producer,
            options,
            stop,
            on_segment=self._advance,
            on_notice=lambda text: group.say(f"{self.name}: {text}", "yellow"),
        )
        self._group = group

    def run(self) -> None:
        """Publish the source; say at once why it failed, where it did, for the others may go on for ever."""
        try:
            self._publisher.run()
        except StormlineError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 (the edge of a thread; told, with exit status 1)
            self.error = RuntimeError(f"unexpected {type(error).__name__}: {error}; please report it")
        if self.error is not None:
            self._group.say(f"{self.name} failed: {self.error}", "red")
        self._is_done = True

    def cells(self) -> tuple[str, ...]:
        """Return the stream's row of the table."""
        report = self._publisher.report
        state = "failed" if self.error else "done" if self._is_done else ""
        return self.name, _clock(self._position_ms), str(report.n_segments), f"{report.n_bytes / 1e6:.2f}", state

    def line(self) -> str:
        """Return the same as one line, with what was lost."""
        name, position, segments, megabytes, state = self.cells()
        report = self._publisher.report
        text = f"{name}: {position} in {segments} segments, {report.n_frames} frames, {megabytes} MB"
        if len(report.sessions) > 1:
            text += f", {len(report.sessions)} sessions"
        if report.n_dropped_frames:
            text += f", {report.n_dropped_frames} leading frames of open GOPs dropped"
        return f"{text}, {state}" if state else text

    def _advance(self, sent: SentSegment) -> None:
        self._position_ms = sent.stop_ms


def _any_alive(threads: list[threading.Thread]) -> bool:
    """Wait a little for the first thread that still runs; return whether one does."""
    alive: Any = next((t for t in threads if t.is_alive()), None)
    if alive is not None:
        alive.join(LIVE_EVERY_S)
    return alive is not None


def _clock(ms: int) -> str:
    seconds = ms // 1000
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{ms % 1000:03d}"
