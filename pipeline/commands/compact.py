"""`stormline compact`: few large Parquet files instead of many small ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...operators.errors import CommitError, SettingsError
from .. import durations

if TYPE_CHECKING:
    from ..compaction import DatePlan, DateReport


def compact(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `stormline run` writes to.")] = Path(
        "out"
    ),
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only results, tokens or dead_letters. May be repeated."),
    ] = None,
    target_mb: Annotated[
        float, typer.Option(min=1.0, metavar="MB", help="Size of a merged file; files of half of it stay as they are.")
    ] = 128.0,
    min_age: Annotated[
        str, typer.Option(metavar="TIME", help="Leave what was written since then: 90, 10m, 1h, 1d.")
    ] = "10m",
    min_files: Annotated[
        int, typer.Option(min=2, metavar="N", help="Leave dates with fewer small files than that.")
    ] = 8,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Keep the old files so long for readers that were just listing them.")
    ] = "5s",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and leave.")] = False,
) -> None:
    """Merge the many small Parquet files into few large ones. `stormline run` may go on meanwhile.

    Of each table and date. A reader of the folder sees a date's small files or its large ones, never both and never
    neither; one that has listed the small files and then finds them gone fails with "no such file", and does not
    read less: run the query again, or under the lock that keeps a compaction waiting, as below. What is asked of
    stormline itself (results, ask, watch, events, webhooks) goes on undisturbed.

    It can be killed at any moment; the next one clears away what is left. The newest few commits of each lane stay as
    they are, as a checkpoint may have to be taken back.

    [bold]Examples[/]

      stormline compact out --dry-run

      stormline compact out                               # every night, say

      stormline compact out --table tokens --target-mb 512 --min-age 1d

      flock --shared out/.files.lock duckdb -c "select count(*) from 'out/results/**/*.parquet'"
    """
    from rich.console import Console

    from ..compaction import Compaction, CompactionSpec, check_tables, total
    from ..table_reader import check_output_folder

    check_output_folder(out)
    if not math.isfinite(target_mb):
        raise SettingsError(f"--target-mb {target_mb} is no size; expected megabytes, such as 128.")
    spec = CompactionSpec(
        tables=check_tables(table or ()),
        target_bytes=int(target_mb * 1e6),
        min_age_s=_seconds(min_age, "--min-age"),
        min_files=min_files,
        grace_s=_seconds(grace, "--grace"),
    )
    compaction = Compaction(out.absolute(), spec)
    console = Console(highlight=False)
    plans = compaction.plan()
    if not plans:
        console.print(f"Nothing to merge in {out}: no date has {min_files} small files that are {min_age} old.")
        return
    if dry_run:
        for plan in plans:
            console.print(_plan_line(plan, spec.target_bytes), soft_wrap=True)
        return
    report = compaction.run(on_date=lambda done: console.print(_line(done.name, done), soft_wrap=True))
    for failure in report.failures:
        console.print(f"[red]left as it is[/] {failure}", soft_wrap=True)
    console.print(_line("[bold]all[/]", total(report.dates)), soft_wrap=True)
    if report.failures:
        raise CommitError(f"{len(report.failures)} date(s) were left as they are, for the reasons above.")


def _seconds(text: str, option: str) -> float:
    try:
        return durations.parse_duration_s(text)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}") from None


def _plan_line(plan: DatePlan, target_bytes: int) -> str:
    at_most = max(1, -(-plan.n_bytes // target_bytes))
    return f"{plan.name}: {len(plan.files):,} files of {_size(plan.n_bytes)} would become {at_most:,} at most"


def _line(name: str, done: DateReport) -> str:
    return (
        f"{name}: {done.n_rows:,} rows, {done.files_before:,} files of {_size(done.bytes_before)} are now "
        f"{done.files_after:,} of {_size(done.bytes_after)}"
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"
