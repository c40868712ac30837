"""What a person sees of a run: lines as it goes, a summary at its end."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..operators.rows import Result
    from .supervisor import RunStatus

STATUS_EVERY_S = 10.0


class NewResults:
    """Tells which results of a status were not shown before."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str, int], None] = {}

    def of(self, status: RunStatus) -> list[Result]:
        """Return the new ones, oldest first."""
        new = []
        for result in sorted(status.newest, key=lambda r: r.emitted_ns):
            key = (result.query_id, result.stream_id, result.session, result.start_ns)
            if key not in self._seen:
                self._seen[key] = None
                new.append(result)
        for key in list(self._seen)[:-1000]:
            del self._seen[key]
        return new


class PlainProgress:
    """One line a phase, one a caption, and one every ten seconds with the counts."""

    def __init__(self, console: Console, captions: bool = True):
        self._console = console
        self._captions = captions
        self._new = NewResults()
        self._shown_s = 0.0

    def phase(self, text: str) -> None:
        """Show what is being done."""
        self._console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(text)}", soft_wrap=True)

    def status(self, status: RunStatus) -> None:
        """Show new captions, and the counts when it is time."""
        if self._captions:
            for result in self._new.of(status):
                self._console.print(caption_line(result), soft_wrap=True)
        if status.phase == "running" and time.monotonic() - self._shown_s >= STATUS_EVERY_S:
            self._shown_s = time.monotonic()
            self._console.print(f"[dim]{time.strftime('%H:%M:%S')} {escape(counts_line(status))}[/]", soft_wrap=True)


def caption_line(result: Result) -> str:
    """Return one caption or alert as a line of rich markup: stream, window, text."""
    start, end = clock_time(result.start_ns), clock_time(result.end_ns)
    text = escape(result.answer)
    if result.kind == "alert":
        mark = "[bold red]ALERT[/]" if result.alert else "[green]over[/]"
        text = f"{mark} {escape(result.query_id)}: {escape(result.prompt)} {text}"
    return f"[bold cyan]{escape(result.stream_id)}[/] [dim]{start}–{end}[/] {text}"


def clock_time(time_ns: int) -> str:
    """Return a time as HH:MM:SS in UTC."""
    return datetime.fromtimestamp(time_ns / 1e9, timezone.utc).strftime("%H:%M:%S")


def counts_line(status: RunStatus) -> str:
    """Return the counts in one line."""
    text = (
        f"lanes {status.lanes_up}/{status.lanes} · segments {status.segments} · chunks {status.chunks} · "
        f"results {status.results} · lag {lag_of(status)} · committed in {status.commit_p50_ms / 1e3:.1f} s (p50)"
    )
    if status.skipped:
        text += f" · skipped {status.skipped}"
    if status.dead_letters:
        text += f" · dead letters {status.dead_letters}"
    if status.restarts:
        text += f" · restarts {status.restarts}"
    return text


def lag_of(status: RunStatus) -> str:
    """Return how far behind the lanes are, in records and, where some wait, in seconds."""
    if status.lag_records < 0:
        return "?"
    late = f", {status.lag_s:,.0f} s" if status.lag_records and status.lag_s >= 0 else ""
    return f"{status.lag_records:,} records{late}"


def summary_table(status: RunStatus, path: Path) -> Table:
    """Return what a run did, for its end."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    lag = "unknown" if status.lag_records < 0 else lag_of(status)
    rows = [
        ("segments", f"{status.segments:,} ({status.duplicates:,} repeated ones dropped)"),
        ("frames", f"{status.frames:,} came, {status.sampled:,} looked at"),
        ("chunks", f"{status.chunks:,}"),
        ("captions and alerts", f"{status.results:,}"),
        ("skipped as too old", f"{status.skipped:,} records"),
        ("dead letters", f"{status.dead_letters:,}"),
        ("lag at the end", lag),
        (
            "from Kafka to a committed row",
            f"{status.commit_p50_ms / 1e3:.1f} s median, {status.commit_p95_ms / 1e3:.1f} s for 95 %",
        ),
        ("lane restarts", f"{status.restarts}"),
        ("Parquet in", f"{path}/"),
    ]
    for name, value in rows:
        table.add_row(f"[dim]{name}[/]", escape(value))
    return table
