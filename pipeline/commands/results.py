"""`stormline results`: what the lanes have found, from the Parquet files, also while they run."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...operators.errors import SettingsError
from .. import durations

if TYPE_CHECKING:
    from ..table_reader import TableReader

POLL_S = 1.0


class OutputFormat(str, Enum):
    """How rows are printed."""

    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


def results(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `stormline run` writes to.")] = Path(
        "out"
    ),
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only caption or alert.")] = None,
    stream: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this stream; * ? [ ] match several: 'gate-*'.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only what began then or later: 10m, 2h, 1d ago, or 2026-01-31T12:00 (UTC)."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="At most so many rows, the newest.")] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new rows as they are committed; Ctrl-C ends it.")
    ] = False,
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="For people, or for programs.")
    ] = OutputFormat.TABLE,
    dead_letters: Annotated[bool, typer.Option("--dead-letters", help="Show what could not be used, and why.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show the chunks of tokens, without the numbers.")] = False,
) -> None:
    """Show captions, alerts and answers, the newest last. Reads the Parquet files; stormline need not run.

    Only committed rows are shown, so that none appears twice after a crash. Times are those of the video, in UTC.

    [bold]Examples[/]

      stormline results                                  # the last 50 of folder out/

      stormline results out --follow --kind alert        # alerts as they happen

      stormline results out --stream 'gate-*' --since 10m --format jsonl

      stormline results out --dead-letters               # what could not be used, and why

    [bold]The same with SQL[/]: any Parquet reader takes a table as a plain folder. The date is a column.

      duckdb -c "from 'out/results/**/*.parquet' where kind = 'caption' order by start_time desc limit 10"

      python -c "import duckdb; duckdb.sql(\\"from 'out/results/**/*.parquet'\\").show()"
    """
    from ..table_reader import RowFilter, TableReader

    if dead_letters and tokens:
        raise SettingsError("--dead-letters and --tokens are two tables: give one of them.")
    table = "dead_letters" if dead_letters else "tokens" if tokens else "results"
    wanted = RowFilter(kind, stream, parse_since(since, datetime.now(timezone.utc)))
    reader = TableReader(out, table, wanted)
    rows = reader.newest(limit)
    if not rows:
        typer.echo(_nothing(out, table, wanted != RowFilter(), follow), err=True)
    if output_format is OutputFormat.TABLE and not follow:
        _print_table(table, rows)
        return
    show = _printer(output_format, table)
    show(rows)
    if follow:
        follow_rows(reader, show)


def parse_since(text: str | None, now: datetime) -> datetime | None:
    """Read ``10m`` (that long before `now`) or an ISO 8601 time (UTC where it names no zone).

    Raises:
        SettingsError: If it is neither.
    """
    try:
        return None if text is None else durations.parse_since(text, now)
    except ValueError as error:
        raise SettingsError(f"--since: {error}, or how long ago: 30s, 10m, 2h, 1d") from error


def follow_rows(
    reader: TableReader,
    show: Callable[[Sequence[Mapping[str, Any]]], None],
    wait: Callable[[float], object] | None = None,
) -> None:
    """Show new rows as they are committed, until Ctrl-C; `wait` replaces `time.sleep`."""
    wait = wait or time.sleep
    try:
        while True:
            wait(POLL_S)
            show(reader.fresh())
    except KeyboardInterrupt:
        return


def _nothing(out: Path, table: str, filtered: bool, follow: bool) -> str:
    name = table.replace("_", " ")
    if filtered:
        message = f"no {name} in {out} that match; leave options out to see more."
    elif table == "dead_letters":
        message = f"no dead letters in {out}: everything could be used so far."
    else:
        message = f"no {name} in {out} yet: they come with the first commit after a chunk of video is full."
    return f"{message} Waiting for new ones; Ctrl-C ends it." if follow else message


def _printer(output_format: OutputFormat, table: str) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    if output_format is OutputFormat.JSONL:
        return _print_jsonl
    if output_format is OutputFormat.CSV:
        return _CsvPrinter(table)
    return lambda rows: _print_lines(table, rows)


def _print_jsonl(rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False, default=_plain))


class _CsvPrinter:
    """Prints rows as CSV, below one line of names."""

    def __init__(self, table: str):
        from ..tables import TABLES

        self._columns = [name for name in TABLES[table].names if name not in ("tokens", "data")]
        self._begun = False

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if not self._begun:
            writer.writeheader()
            self._begun = True
        writer.writerows({k: _plain(v) for k, v in row.items()} for row in rows)
        typer.echo(text.getvalue(), nl=False)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _print_table(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name, _ in _CELLS[table]:
        grid.add_column(name, overflow="fold", no_wrap=name == "start (UTC)")
    for row in rows:
        style = "bold red" if row.get("alert") else ""
        grid.add_row(*(Text(_printable(cell(row)), style) for _, cell in _CELLS[table]))
    Console(highlight=False).print(grid)


def _print_lines(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a row per line, for rows that come one by one: the widths of those to come are not known."""
    for row in rows:
        line = "  ".join(_printable(cell(row)) for _, cell in _CELLS[table])
        typer.secho(line, fg="red" if row.get("alert") else None, bold=bool(row.get("alert")))


def _printable(text: str) -> str:
    """Put answers on one line, and take out what could steer the terminal: names and texts come from outside."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def _start(row: Mapping[str, Any]) -> str:
    return row["start_time"].strftime("%Y-%m-%d %H:%M:%S")


def _length(row: Mapping[str, Any]) -> str:
    return f"{(row['end_time'] - row['start_time']).total_seconds():.1f} s"


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['topic']}[{row['partition']}]@{row['offset']}"


def _score(row: Mapping[str, Any]) -> str:
    return "–" if row["scene_score"] is None else f"{row['scene_score']:.2f}"


_CELLS: dict[str, list[tuple[str, Callable[[Mapping[str, Any]], str]]]] = {
    "results": [
        ("start (UTC)", _start),
        ("length", _length),
        ("stream", lambda row: row["stream_id"]),
        ("kind", lambda row: row["kind"]),
        ("answer", lambda row: row["answer"]),
    ],
    "tokens": [
        ("start (UTC)", _start),
        ("length", _length),
        ("stream", lambda row: row["stream_id"]),
        ("chunk", lambda row: str(row["chunk_index"])),
        ("tokens", lambda row: f"{row['token_count']} × {row['token_dim']}"),
        ("scene", _score),
        ("from", _place),
    ],
    "dead_letters": [
        ("start (UTC)", _start),
        ("stream", lambda row: row["stream_id"]),
        ("from", _place),
        ("reason", lambda row: row["reason"]),
        ("bytes", lambda row: f"{row['n_bytes']:,}"),
        ("detail", lambda row: row["detail"]),
    ],
}
