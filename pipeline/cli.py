"""The command `stormline`. Each subcommand is a function in a file of `commands/`, imported without its libraries."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from ..operators.errors import SettingsError, StormlineError
from .commands.archive import archive
from .commands.ask import ask
from .commands.broker import broker
from .commands.compact import compact
from .commands.demo import demo
from .commands.eval import evaluate_model
from .commands.export import export
from .commands.import_model import import_model
from .commands.publish import publish
from .commands.report import report
from .commands.results import results
from .commands.run import run
from .commands.search import search
from .commands.serve import serve
from .commands.train import train
from .commands.watch import watch

app = typer.Typer(
    name="stormline",
    help="Watch video streams with a language model: Kafka in, captions and tokens in Parquet out, exactly once.",
    epilog="New here? Try [bold]stormline demo[/]. Then: broker, publish, run, results, ask, in this order.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo,
    broker,
    publish,
    run,
    archive,
    results,
    search,
    ask,
    watch,
    serve,
    export,
    report,
    compact,
    train,
):
    app.command()(command)
app.command("import")(import_model)
app.command("eval")(evaluate_model)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stormline {version('stormline')}")
        raise typer.Exit


@app.callback()
def stormline(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Watch video streams with a language model: Kafka in, captions and tokens in Parquet out, exactly once."""


def main() -> None:
    """Run the command; an error of ours is one message on standard error, exit status 2 for settings and else 1.

    So is one of a file, or of where the output goes.
    """
    try:
        app()
    except StormlineError as e:
        _end(str(e), 2 if isinstance(e, SettingsError) else 1)
    except OSError as e:
        if e.errno is None or isinstance(e, ConnectionError | TimeoutError):
            raise  # no file's: the traceback says more
        what = f"cannot read or write {e.filename}: " if e.filename else ""
        _end(f"{what}{e.strerror}", 1)


def _end(text: str, status: int) -> NoReturn:
    typer.secho(f"stormline: {text}", fg="red", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more, and end with a status of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
