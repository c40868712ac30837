"""`stormline export`: subtitles, JSON lines, and a folder for Hugging Face's `datasets`."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...operators.errors import SettingsError

if TYPE_CHECKING:
    from ..export.subtitle_files import Written
    from ..table_reader import RowFilter

STANDARD_OUTPUT = Path("-")


class ExportFormat(str, Enum):
    """What is written."""

    VTT = "vtt"
    SRT = "srt"
    JSONL = "jsonl"
    DATASETS = "datasets"


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `stormline run` or `archive` writes to.")],
    to: Annotated[Path, typer.Argument(metavar="DEST", help="A folder; with jsonl a file, or - for standard output.")],
    export_format: Annotated[ExportFormat, typer.Option("--to", help="What to write, see above.")],
    stream: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this stream; * ? [ ] match several: 'holiday/*'.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only caption or alert.", show_default="caption for subtitles"),
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Subtitles: only this query's. May be repeated.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="datasets: the tokens, too, which are most of it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Write what was found for other programs. Reads the Parquet files; stormline may be running meanwhile.

    [bold]vtt[/], [bold]srt[/]: a file of subtitles for each stream, in the stream's own folders, times from the video's
    first frame on: beside the videos, players show them by themselves. A stream of several sessions has one for each.
    Answers to questions have the question before them; what is about a whole video is a note in vtt, and in srt left
    out, unless --query names it.

    [bold]jsonl[/]: a line of JSON for each result, by the day on which its window begins, and within a day in the order
    in which they were committed.

    [bold]datasets[/]: a folder for Hugging Face's datasets.load_dataset: results, dead letters, of an archive its
    videos, and with --tokens the tokens.

    [bold]Examples[/]

      stormline export night videos/ --to srt                  # subtitles beside the videos

      stormline export night subtitles/ --to vtt --query caption

      stormline export out - --to jsonl --stream 'gate-*' | jq .answer

      stormline export night night-dataset --to datasets --tokens
    """
    from ..table_reader import RowFilter, check_output_folder

    check_output_folder(out)
    subtitles = export_format in (ExportFormat.VTT, ExportFormat.SRT)
    if query and not subtitles:
        raise SettingsError("--query is for subtitles; elsewhere the column query_id tells.")
    if tokens and export_format is not ExportFormat.DATASETS:
        raise SettingsError("--tokens is for --to datasets.")
    if to == STANDARD_OUTPUT and export_format is not ExportFormat.JSONL:
        raise SettingsError(f"--to {export_format.value} writes files: give a folder.")
    if to != STANDARD_OUTPUT and to.resolve().is_relative_to(out.resolve()):
        raise SettingsError(f"{to} is in {out}, whose folders are read as tables; give another.")
    try:
        if subtitles:
            written = _write_subtitles(out, to, export_format, stream, kind, query or [], overwrite)
            unit = "cues"
        elif export_format is ExportFormat.JSONL:
            written = _write_jsonl(out, to, RowFilter(kind, stream), overwrite)
            unit = "rows"
        else:
            from ..export.row_files import write_dataset

            written = write_dataset(out, to, RowFilter(kind, stream), tokens=tokens, overwrite=overwrite)
            unit = "rows"
    except OSError as error:
        raise SettingsError(f"cannot write {error.filename or to}: {error.strerror or error}") from error
    where = "standard output" if to == STANDARD_OUTPUT else f"{to}"
    typer.echo(f"{written.n_rows:,} {unit} in {written.n_files:,} file(s): {where}", err=True)
    if not written.n_rows:
        typer.echo(f"`stormline results {out}` shows what there is.", err=True)


def _write_subtitles(
    out: Path,
    folder: Path,
    export_format: ExportFormat,
    stream: str | None,
    kind: str | None,
    query_ids: list[str],
    overwrite: bool,
) -> Written:
    from ..export.subtitle_files import write_subtitles
    from ..result_index import Wanted, open_result_index

    wanted = Wanted(stream, kind or (None if query_ids else "caption"), query_ids)
    with open_result_index(out) as index:
        return write_subtitles(index, out, folder, export_format.value, wanted, overwrite=overwrite)


def _write_jsonl(out: Path, path: Path, wanted: RowFilter, overwrite: bool) -> Written:
    from ..durable_files import draft_of
    from ..export.row_files import write_jsonl

    if path == STANDARD_OUTPUT:
        try:
            written = write_jsonl(out, sys.stdout, wanted)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        return written
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; --to jsonl writes one file: give its name.")
    if path.exists() and not path.is_file():  # a pipe or a device takes what it is given, and stays
        with path.open("w", encoding="utf-8", newline="\n") as file:
            return write_jsonl(out, file, wanted)
    if path.exists() and not overwrite:
        raise SettingsError(f"{path} is there already; --overwrite replaces it.")
    path = path.resolve()  # of a link what it leads to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        return write_jsonl(out, file, wanted)
