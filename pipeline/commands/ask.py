"""`stormline ask`: a question to a running service, its answer printed as it is written."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import IO, Annotated, Any

import typer

from ...operators.errors import SettingsError, StormlineError
from ..durations import parse_duration_s
from ..front.stream_urls import make_stream_url, parse_stream_url
from .http_client import DEFAULT_URL, post_json, printable, service_url

TIMEOUT_S = 180.0  # between two pieces of an answer; the service gives up before


def ask(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Which stream; an unknown name lists the known.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask, in quotes.")],
    last: Annotated[
        str | None, typer.Option(metavar="TIME", help="How much of its newest video: 90s, 10m, 2h. Default: 10m.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on, instead: 2026-01-31T12:00 (UTC).")
    ] = None,
    end: Annotated[str | None, typer.Option(metavar="TIME", help="With --start: until then. Default: now.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Longest answer.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to look at: auto, recent, uniform, global_local, relevant or changes."),
    ] = None,
    url: Annotated[
        str, typer.Option(metavar="URL", envvar="STORMLINE_URL", help="Where the service is.")
    ] = DEFAULT_URL,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="STORMLINE_KEY", help="Bearer key, where it wants one.")
    ] = None,
) -> None:
    """Ask what a stream has shown; the answer is printed as it is written.

    Needs a service: [bold]stormline run --serve[/] beside running lanes, or [bold]stormline serve OUT[/] for a
    finished folder. What was looked at is said at the end, on standard error.

    [bold]Examples[/]

      stormline ask gate "Did a red van come by?" --last 10m

      stormline ask gate "What happened first?" --start 2026-01-31T12:00 --end 2026-01-31T12:30

      STORMLINE_KEY=sk-… stormline ask yard "How many?" --url http://gpu-1:8000
    """
    body = _body(stream, question, last, start, end)
    body |= {name: value for name, value in (("max_tokens", max_tokens), ("token_policy", policy)) if value is not None}
    notes: dict[str, Any] = {}
    with post_json(service_url(url, "chat/completions"), body, key, TIMEOUT_S) as response:
        for event in _events(response):
            if "error" in event:
                raise StormlineError(f"the answer broke off: {event['error']['message']}")
            notes = event.get("stormline", notes)
            for choice in event["choices"]:
                typer.echo(printable(choice["delta"].get("content", "")), nl=False)
    typer.echo()
    for use in notes.get("video", []):
        typer.secho(_use_line(use), dim=True, err=True)


def _body(stream: str, question: str, last: str | None, start: str | None, end: str | None) -> dict[str, Any]:
    """Return the request; wrong times are found here already.

    Raises:
        SettingsError: On such.
    """
    try:
        if last is not None:
            parse_duration_s(last)
        video = make_stream_url(stream, last=last, start=start, end=end)
        parse_stream_url(video)
    except ValueError as error:
        raise SettingsError(f"{error}. Give --last 10m, or --start TIME with --end TIME or without.") from None
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "stream": True}


def _events(response: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the answer's server-sent events.

    Raises:
        StormlineError: If it ends before its end.
    """
    try:
        for line in response:
            data = line.decode().strip().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StormlineError(f"the answer broke off ({error}); ask again") from None
    raise StormlineError("the answer broke off; ask again")


def _use_line(use: dict[str, Any]) -> str:
    seen = f"{use['tokens_used']} of {use['tokens_in_range']} tokens, {use['token_policy']}"
    return f"{printable(use['stream'])}: {use['first']} to {use['last']} ({seen}); [00:00] is {use['start']}"
