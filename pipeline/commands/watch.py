"""`stormline watch`: captions and alerts of a running service, as they are committed."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from ...operators.errors import SettingsError, StormlineError
from .http_client import DEFAULT_URL, NoServiceError, get_stream, header_value, printable, service_url

SILENCE_S = 60.0  # the service says that it is still there every fifteen; without it the connection is lost
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0


def watch(
    streams: Annotated[
        list[str] | None, typer.Argument(metavar="[STREAM]...", help="Only these; * ? [ ] match several: 'gate-*'.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="Only caption or alert. May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with the id to go on from.")] = False,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Go on after this event: `event_id` of --json.")
    ] = None,
    url: Annotated[
        str, typer.Option(metavar="URL", envvar="STORMLINE_URL", help="Where the service is.")
    ] = DEFAULT_URL,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="STORMLINE_KEY", help="Bearer key, where it wants one.")
    ] = None,
) -> None:
    """Print captions and alerts as they are committed, until Ctrl-C.

    Needs a service: [bold]stormline run --serve[/]. If the connection breaks it connects again and goes on where it
    was: nothing is missed and nothing is there twice. For a folder without a service: [bold]stormline results -f[/].

    [bold]Examples[/]

      stormline watch

      stormline watch 'gate-*' yard --kind alert

      stormline watch --json | jq .answer
    """
    query = urlencode([*(("stream", name) for name in streams or ()), *(("kind", name) for name in kind or ())])
    try:
        for event_id, row in follow(service_url(url, f"events?{query}"), key, after):
            typer.echo(json.dumps({"event_id": event_id, **row}, ensure_ascii=False) if as_json else _line(row))
    except KeyboardInterrupt:
        return


def follow(
    url: str, key: str | None, after: str | None = None, wait: Callable[[float], object] = time.sleep
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield events for ever, from connection to connection.

    Args:
        url: Of the events.
        key: Bearer key, if any.
        after: Id of the event to go on after; None: from now on.
        wait: Called with seconds before it connects again.

    Yields:
        The id to go on from, and the row.

    Raises:
        SettingsError: If the service is not there at the start, or does not take the request.
    """
    wait_s, connected = FIRST_WAIT_S, False
    while True:
        try:
            headers = {"Last-Event-ID": header_value(after, "--after")} if after else {}
            with get_stream(url, key, headers, SILENCE_S) as response:
                connected, wait_s = True, FIRST_WAIT_S
                for event_id, row in read_events(response):
                    after = event_id or after
                    if row is not None:
                        yield after or "", row
        except StormlineError as error:
            refused = isinstance(error, SettingsError) and not isinstance(error, NoServiceError)
            if refused or not connected:
                raise
        except (OSError, http.client.HTTPException, ValueError):
            pass  # broke off
        wait(wait_s)
        wait_s = min(LONGEST_WAIT_S, 2 * wait_s)


def read_events(lines: Iterable[bytes]) -> Iterator[tuple[str | None, dict[str, Any] | None]]:
    """Yield (id, row) of server-sent events; either may be None."""
    event_id, data = None, None
    for raw in lines:
        name, _, value = raw.decode().rstrip("\r\n").partition(": ")
        if name == "id":
            event_id = value
        elif name == "data":
            data = value
        elif not name and (event_id or data):
            yield event_id, json.loads(data) if data else None
            event_id, data = None, None


def _line(row: dict[str, Any]) -> str:
    moment = printable(row["start_time"]).replace("T", " ")[:19]
    text = f"{moment}  {printable(row['stream_id'])}  "
    if row["kind"] == "alert":
        word = "ALERT" if row["alert"] else "over"
        return text + typer.style(f"{word} {printable(row['query_id'])}: {printable(row['answer'])}", "red", bold=True)
    return text + printable(row["answer"])
