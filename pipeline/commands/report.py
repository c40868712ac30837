"""`stormline report`: an archive on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...operators.errors import SettingsError


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `stormline archive` writes to.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Where to.", show_default="OUT/report.html")
    ] = None,
) -> None:
    """Write the report of an archive anew: speed over time, what failed and why, a contact sheet with captions.

    One HTML file that loads nothing from elsewhere; `stormline archive` writes it at its end. Of more than 240 videos
    the pictures are of an even choice.
    """
    from ..archive.report import REPORT_NAME, write_report
    from ..archive.work_list import WorkList
    from ..result_index import open_result_index

    if not WorkList(out).path.exists():
        raise SettingsError(f"{out} is no archive: expected archive/work.jsonl in it, as `stormline archive` writes.")
    path = to or out / REPORT_NAME
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; the report is one file: give its name with --to {path / 'NAME.html'}")
    try:
        with open_result_index(out) as index:
            write_report(out, index, path)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error}") from error
    typer.echo(f"{path}")
