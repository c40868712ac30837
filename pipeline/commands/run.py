"""`stormline run`: the lanes, from a settings file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..settings import ServeSettings
    from ..supervisor import RunStatus


def run(
    settings_path: Annotated[
        Path | None, typer.Option("--settings", "-s", metavar="FILE.yaml", help="Settings; without it the defaults.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, over the file: lanes.count=2. May be repeated."),
    ] = None,
    until_idle_s: Annotated[
        float | None,
        typer.Option("--until-idle", metavar="SECONDS", help="Stop when nothing has come for so long. For batches."),
    ] = None,
    serve: Annotated[
        bool | None,
        typer.Option("--serve/--no-serve", help="Answer questions over HTTP, too; same as --set serve.enabled=true."),
    ] = None,
    captions: Annotated[bool, typer.Option(help="Show captions as they are committed.")] = True,
    show: Annotated[bool, typer.Option("--show-settings", help="Print the settings in force and leave.")] = False,
) -> None:
    """Watch the streams: read Kafka, encode, caption, and commit everything to Parquet, until stopped.

    Starts Ray on this machine unless [bold]ray.address[/] names a cluster. Ctrl-C or SIGTERM stops cleanly after
    the next commit; started again, it goes on exactly there: no row is missing and none is there twice.

    [bold]Examples[/]

      stormline run                                   # 127.0.0.1:9092, topic video, folder out/

      stormline run -s cameras.yaml --set lanes.count=2

      stormline run --serve                           # and ask: stormline ask gate "What happened?"

      stormline run --set kafka.bootstrap_servers=kafka:9092 --set 'kafka.topics=\\[gate, yard]'

    [bold]A settings file[/]

      kafka:   {bootstrap_servers: "kafka:9092", topics: \\[video], client: {security_protocol: SASL_SSL,
               sasl_mechanism: PLAIN, sasl_plain_username: me, sasl_plain_password: "${env:KAFKA_PASSWORD}"}}

      output:  {path: /data/out}

      queries: [{id: caption, streams: "gate-*", prompt: "Describe what happens.", window_s: 10},
               {id: smoke, kind: alert, prompt: "Is there smoke?", window_s: 4, sinks: {kafka: {topic: alerts}}}]
    """
    wanted = [] if serve is None else [f"serve.enabled={str(serve).lower()}"]
    given = [*(overrides or []), *wanted]
    if show:
        _show(settings_path, given)
        return

    from ..fork_server import fork_server_ahead

    with fork_server_ahead() as ahead:  # it imports while we do
        from rich.console import Console

        from ..embedded_ray import may_fork
        from ..front.address import check_port
        from ..progress import PlainProgress
        from ..ray_watch import begin_again
        from ..settings import load_settings
        from ..stop_signals import on_stop_signal
        from ..supervisor import Supervisor

        settings = load_settings(settings_path, given)
        if not may_fork(settings):
            ahead.close()
        if settings.serve.enabled:
            check_port(settings.serve)
        console = Console(highlight=False)
        progress = PlainProgress(console, captions=captions)
        supervisor = Supervisor(settings, on_phase=progress.phase, leave=begin_again)
        with on_stop_signal(supervisor.request_stop, progress.phase):
            status = supervisor.run(
                until_idle_s=until_idle_s,
                on_status=progress.status,
                on_ready=lambda: progress.phase(_ready_line(settings.serve)),
            )
    _print_end(console, status, settings.output.path)


def _show(settings_path: Path | None, given: list[str]) -> None:
    import yaml

    from ..settings import load_settings, masked

    typer.echo(yaml.safe_dump(masked(load_settings(settings_path, given)), sort_keys=False))


def _ready_line(serve: ServeSettings) -> str:
    from ..front.address import base_url

    asked = f"; questions to {base_url(serve)}, or `stormline ask`" if serve.enabled else ""
    return f"watching{asked}; Ctrl-C stops cleanly"


def _print_end(console: object, status: RunStatus, path: Path) -> None:
    from ..progress import summary_table

    console.print(summary_table(status, path))  # type: ignore[attr-defined]
