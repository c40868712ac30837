"""What a person sees of an archive's run: lines as it goes, a summary at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .outcomes import Outcome, count_states, outcomes
from .work_list import newest_versions

if TYPE_CHECKING:
    from ..supervisor import RunStatus

FIRST_LINE_S = 3.0
LINE_EVERY_S = 10.0
SHOWN_FAILURES = 10


class ArchiveProgress:
    """A line every ten seconds: how many videos are done, how fast it goes, and how long it will take.

    Args:
        console: Where to.
        root: The output folder.
        fps: Of the sampling grid: turns frames looked at into hours of video.
        clock_s: Any clock that only goes forward.
    """

    def __init__(self, console: Console, root: Path, fps: float, clock_s: Callable[[], float] = time.monotonic):
        self._console = console
        self._root = root
        self._fps = fps
        self._clock_s = clock_s
        self._began_s: float | None = None
        self._next_s = 0.0
        self._todo_bytes = 0
        self.video_s = 0.0  # looked at in this run
        self.took_s = 0.0

    def phase(self, text: str) -> None:
        """Show what is being done."""
        self._console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(text)}", soft_wrap=True)

    def ready(self) -> None:
        """Begin to count time; what came before was starting."""
        self._start()
        self.phase("at work; Ctrl-C stops cleanly, and the same command goes on")

    def _start(self) -> None:
        if self._began_s is None:
            self._began_s = self._clock_s()
            self._next_s = self._began_s + FIRST_LINE_S
            waiting = (o for o in outcomes(self._root) if o.state == "waiting")
            self._todo_bytes = sum(max(0, o.item.n_bytes) for o in waiting)

    def status(self, status: RunStatus) -> None:
        """Take in the counts, and show them when it is time."""
        now_s = self._clock_s()
        self.video_s = status.sampled / self._fps
        self.took_s = now_s - self._began_s if self._began_s is not None else 0.0
        if self._began_s is not None and now_s >= self._next_s:
            self._next_s = now_s + LINE_EVERY_S
            self._console.print(f"[dim]{time.strftime('%H:%M:%S')} {escape(self.line(status))}[/]", soft_wrap=True)

    def line(self, status: RunStatus) -> str:
        """Return the present state in one line."""
        found = outcomes(self._root)
        states = count_states(found)
        done = len(found) - states["waiting"]
        text = f"videos {done:,}/{len(found):,}"
        if states["failed"]:
            text += f" ({states['failed']:,} failed)"
        text += f" · {long_time(self.video_s)} of video"
        if self.took_s > 0 and self.video_s:
            text += f" · {self.video_s / self.took_s:.1f} x real time"
        left_s = self._left_s(status)
        if left_s is not None:
            text += f" · {long_time(left_s)} left"
        text += f" · {status.results:,} answers"
        if status.restarts:
            text += f" · restarts {status.restarts}"
        return text

    def _left_s(self, status: RunStatus) -> float | None:
        if not status.n_bytes or not self.took_s:
            return None
        return max(0, self._todo_bytes - status.n_bytes) * self.took_s / status.n_bytes


def long_time(seconds: float) -> str:
    """Return a length of time as people say it.

    >>> long_time(59), long_time(3_600 * 7.5), long_time(90_000)
    ('59 s', '7 h 30 min', '25 h 0 min')
    """
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest_s} s"
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def present(found: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of each video's newest version."""
    newest = {item: None for item in newest_versions(outcome.item for outcome in found).values()}
    return [outcome for outcome in found if outcome.item in newest]


def summary_table(progress: ArchiveProgress, status: RunStatus | None, found: Sequence[Outcome], path: Path) -> Table:
    """Return how it went, for the end."""
    states = count_states(found)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = [("videos", f"{states['done'] + states['damaged']:,} done, {states['failed']:,} failed")]
    if states["damaged"]:
        rows.append(("", f"{states['damaged']:,} of those done had damaged places"))
    if states["waiting"]:
        rows.append(("still to do", f"{states['waiting']:,}; the same command goes on"))
    if status is not None:
        rows.append(("video", f"{long_time(progress.video_s)} in {long_time(progress.took_s)}"))
        if progress.took_s > 0:
            rows.append(("speed", f"{progress.video_s / progress.took_s:.1f} x real time"))
        rows.append(("answers", f"{status.results:,}, {status.chunks:,} chunks of tokens"))
        rows.append(("lane restarts", f"{status.restarts}"))
    rows.append(("every video", f"{path}"))
    for name, value in rows:
        table.add_row(f"[dim]{name}[/]", escape(value))
    return table


def failure_lines(found: Sequence[Outcome]) -> list[str]:
    """Return a line for each video that failed, the first ten."""
    failed = [outcome for outcome in found if outcome.state == "failed"]
    lines = [f"{o.item.stream_id}: {o.reason}: {o.detail}" for o in failed[:SHOWN_FAILURES]]
    return [*lines, *([f"and {len(failed) - SHOWN_FAILURES:,} more"] if len(failed) > SHOWN_FAILURES else [])]
