"""What a person sees of an archive's run: a live view or lines as it goes, a summary at its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .outcomes import Outcome, count_states, outcomes
from .run_log import RunLog, RunSample
from .work_list import RANGES_PER_VIDEO, WorkList, committed_offsets, newest_versions

if TYPE_CHECKING:
    from ..supervisor import RunStatus

FIRST_LINE_S = 3.0
LINE_EVERY_S = 10.0
BUSY_OVER_S = 30.0  # what the live view says of how busy each step is
IDLE_SHARE = 0.5  # where no step is busier, none of them is the bottleneck
LIVE_HZ = 2.0
SHOWN_FAILURES = 10
STEPS = {"read": "reading", "decode": "decode", "encode": "encode", "llm": "LLM"}


@dataclass(frozen=True)
class Now:
    """How a run stands."""

    n_videos: int
    n_done: int  # well or not
    n_failed: int
    video_s: float  # looked at in this run
    took_s: float
    left_s: float | None
    answers: int
    restarts: int
    busy: Mapping[str, float]  # of each step's workers, the share of the time, 0 to 1
    newest: str = ""

    @property
    def speed(self) -> float:
        """Return seconds of video a second."""
        return self.video_s / self.took_s if self.took_s > 0 else 0.0

    def line(self) -> str:
        """Return it on one line."""
        failed = f" ({self.n_failed:,} failed)" if self.n_failed else ""
        parts = [f"videos {self.n_done:,}/{self.n_videos:,}{failed}", f"{long_time(self.video_s)} of video"]
        if self.speed:
            parts.append(f"{self.speed:.1f} x real time")
        if self.left_s is not None:
            parts.append(f"{long_time(self.left_s)} left")
        parts.append(f"{self.answers:,} answers")
        if self.busy:
            parts.append(f"busy: {busy_text(self.busy)}")
        if self.restarts:
            parts.append(f"restarts {self.restarts}")
        return " · ".join(parts)


def busy_text(busy: Mapping[str, float]) -> str:
    """Return how busy each step is, and which one holds the others up.

    >>> busy_text({"decode": 0.31, "encode": 0.97})
    'decode 31 %, encode 97 %, bottleneck: encode'
    """
    text = ", ".join(f"{STEPS.get(step, step)} {share:.0%}".replace("%", " %") for step, share in busy.items())
    return f"{text}, bottleneck: {bottleneck(busy)}"


def bottleneck(busy: Mapping[str, float]) -> str:
    """Return the step that is busiest, or none of them where all wait for each other or for the machine."""
    step = max(busy, key=lambda name: busy[name], default="")
    return STEPS.get(step, step) if step and busy[step] >= IDLE_SHARE else "none of them"


class ArchiveProgress:
    """In a terminal a view that changes in its place, elsewhere a line every ten seconds; a context manager.

    Args:
        console: Where to.
        root: The output folder.
        fps: Of the sampling grid: turns frames looked at into hours of video.
        decoders: Of one lane.
        clock_s: Any clock that only goes forward.
    """

    def __init__(
        self,
        console: Console,
        root: Path,
        fps: float,
        decoders: int = 1,
        clock_s: Callable[[], float] = time.monotonic,
    ):
        self._console = console
        self._root = root
        self._fps = fps
        self._decoders = decoders
        self._clock_s = clock_s
        self._began_s: float | None = None
        self._next_s = 0.0
        self._todo_bytes = 0
        self._list = WorkList(root)
        self._n_listed: dict[int, int] = {}  # videos by partition
        self._offsets: dict[int, int] = {}  # committed, by partition
        self._failures = (-1, 0)  # dead letters when failures were counted, and the failures
        self._busy: deque[tuple[float, Mapping[str, float]]] = deque()  # (clock, seconds by step)
        self._log = RunLog(root)
        self._now: Now | None = None
        self._live: Live | None = None
        self.video_s = 0.0  # looked at in this run
        self.took_s = 0.0
        self.busy: Mapping[str, float] = {}  # over the whole run

    def __enter__(self) -> ArchiveProgress:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._view, refresh_per_second=LIVE_HZ, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._now is not None:
            self._log.add(self._sample(self._now), last=True)

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
            self._offsets = committed_offsets(self._root)

    def status(self, status: RunStatus) -> None:
        """Take in the counts, and show them when it is time."""
        if self._began_s is None:
            return
        now_s = self._clock_s()
        self.video_s = status.sampled / self._fps
        self.took_s = now_s - self._began_s
        self._now = self._measure(status, now_s)
        self._log.add(self._sample(self._now))
        if self._live is None and now_s >= self._next_s:
            self._next_s = now_s + LINE_EVERY_S
            self._console.print(f"[dim]{time.strftime('%H:%M:%S')} {escape(self._now.line())}[/]", soft_wrap=True)

    def _measure(self, status: RunStatus, now_s: float) -> Now:
        for item in self._list.follow():
            self._n_listed[item.partition] = self._n_listed.get(item.partition, 0) + 1
        for (_, partition), next_offset in status.next_offsets.items():
            self._offsets[partition] = max(next_offset, self._offsets.get(partition, 0))
        n_done = sum(
            min(n, self._offsets.get(partition, 0) // RANGES_PER_VIDEO) for partition, n in self._n_listed.items()
        )
        if self._failures[0] != status.dead_letters:
            self._failures = status.dead_letters, count_states(outcomes(self._root))["failed"]
        newest = max(status.newest, key=lambda result: result.emitted_ns, default=None)
        return Now(
            n_videos=sum(self._n_listed.values()),
            n_done=n_done,
            n_failed=self._failures[1],
            video_s=self.video_s,
            took_s=self.took_s,
            left_s=self._left_s(status),
            answers=status.results,
            restarts=status.restarts,
            busy=self._busy_shares(status, now_s),
            newest=f"{newest.stream_id}: {newest.answer}" if newest else "",
        )

    def _left_s(self, status: RunStatus) -> float | None:
        if not status.n_bytes or not self.took_s:
            return None
        return max(0, self._todo_bytes - status.n_bytes) * self.took_s / status.n_bytes

    def _busy_shares(self, status: RunStatus, now_s: float) -> Mapping[str, float]:
        """Return how busy each step was of late; a lane tells it with each commit."""
        if not status.busy_s:
            return {}
        if not self._busy or self._busy[-1][1] != status.busy_s:
            self._busy.append((now_s, dict(status.busy_s)))
        while len(self._busy) > 2 and self._busy[1][0] < now_s - BUSY_OVER_S:
            self._busy.popleft()
        self.busy = self._shares((self._began_s or 0.0, {}), self._busy[-1], status.lanes)
        return self._shares(self._busy[0], self._busy[-1], status.lanes) if len(self._busy) > 1 else {}

    def _shares(
        self, before: tuple[float, Mapping[str, float]], after: tuple[float, Mapping[str, float]], lanes: int
    ) -> dict[str, float]:
        took_s = max(1e-3, after[0] - before[0]) * max(1, lanes)
        workers = {"decode": self._decoders}
        return {
            step: min(1.0, max(0.0, after[1][step] - before[1].get(step, 0.0)) / took_s / workers.get(step, 1))
            for step in STEPS
            if step in after[1]
        }

    def _sample(self, now: Now) -> RunSample:
        return RunSample(
            time_s=time.time(),
            took_s=round(now.took_s, 1),
            video_s=round(now.video_s, 1),
            n_done=now.n_done,
            n_videos=now.n_videos,
            answers=now.answers,
            busy={step: round(share, 3) for step, share in now.busy.items()},
        )

    def _view(self) -> Group | Text:
        """Return what the terminal shows; called by the view's own thread."""
        now = self._now
        if now is None:
            return Text()
        head = Table.grid(padding=(0, 1))
        failed = f" · [bold red]{now.n_failed:,} failed[/]" if now.n_failed else ""
        left = "" if now.left_s is None else f" · {long_time(now.left_s)} left"
        bar = ProgressBar(total=max(1, now.n_videos), completed=now.n_done, width=30)
        head.add_row(bar, f"[bold]{now.n_done:,}[/]/{now.n_videos:,} videos{failed}{left}")
        facts = f"{long_time(now.video_s)} of video in {long_time(now.took_s)} · [bold]{now.speed:.1f} x real time[/]"
        facts += f" · {now.answers:,} answers" + (f" · restarts {now.restarts}" if now.restarts else "")
        steps = Table.grid(padding=(0, 1))
        slowest = bottleneck(now.busy)
        for step, share in now.busy.items():
            name = STEPS[step]
            mark = " [bold yellow]bottleneck[/]" if name == slowest else ""
            steps.add_row(f"[dim]{name}[/]", ProgressBar(total=1.0, completed=share, width=20), f"{share:4.0%}{mark}")
        newest = Text(" ".join(now.newest.split()), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(head, Text.from_markup(facts), steps, newest)


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


def summary_table(
    progress: ArchiveProgress, status: RunStatus | None, found: Sequence[Outcome], overview: str
) -> Table:
    """Return how it went, for the end; `overview` is where the table of all videos is."""
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
        if progress.busy:
            rows.append(("busy", busy_text(progress.busy)))
        rows.append(("answers", f"{status.results:,}, {status.chunks:,} chunks of tokens"))
        rows.append(("lane restarts", f"{status.restarts}"))
    rows.append(("every video", overview))
    for name, value in rows:
        table.add_row(f"[dim]{name}[/]", escape(value))
    return table


def failure_lines(found: Sequence[Outcome]) -> list[str]:
    """Return a line for each video that failed, the first ten."""
    failed = [outcome for outcome in found if outcome.state == "failed"]
    lines = [f"{o.item.stream_id}: {o.reason}: {o.detail}" for o in failed[:SHOWN_FAILURES]]
    return [*lines, *([f"and {len(failed) - SHOWN_FAILURES:,} more"] if len(failed) > SHOWN_FAILURES else [])]
