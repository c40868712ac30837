"""`stormline ask`: a question to a running service, its answer printed as it is written."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import IO, Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import typer

from ...operators.errors import SettingsError, StormlineError
from ..durations import parse_duration_s
from ..front.stream_urls import make_stream_url, parse_stream_url

DEFAULT_URL = "http://127.0.0.1:8000"
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
    with _post(f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions", body, key) as response:
        for event in _events(response):
            if "error" in event:
                raise StormlineError(f"the answer broke off: {event['error']['message']}")
            notes = event.get("stormline", notes)
            for choice in event["choices"]:
                typer.echo(_printable(choice["delta"].get("content", "")), nl=False)
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


def _post(url: str, body: dict[str, Any], key: str | None) -> IO[bytes]:
    """Send it.

    Raises:
        SettingsError: If the service is not there, or the key or the request is wrong.
        StormlineError: If it cannot answer just now.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"--url {url!r} is no address of a service; expected http://HOST:PORT")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")  # no proxy knows the way to this machine
    opener = build_opener(ProxyHandler({})) if local else build_opener()
    try:
        return opener.open(Request(url, json.dumps(body).encode(), headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        raise _refused(error, bool(key)) from None
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SettingsError(
            f"no service at {parts.scheme}://{parts.netloc} ({reason}). Start one with `stormline run --serve` or "
            f"`stormline serve OUT`, or name it with --url."
        ) from None


def _refused(error: HTTPError, with_key: bool) -> StormlineError:
    try:
        message = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {error.code} {error.reason}; is this a service of stormline?"
    if error.code == 401:
        hint = "Correct" if with_key else "Give"
        return SettingsError(f"{message}. {hint} --key, or STORMLINE_KEY in the environment.")
    return StormlineError(message) if error.code == 429 or error.code >= 500 else SettingsError(message)


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


def _printable(text: str) -> str:
    """Take out what could steer the terminal: the text comes from a model that saw other people's pictures."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _use_line(use: dict[str, Any]) -> str:
    seen = f"{use['tokens_used']} of {use['tokens_in_range']} tokens, {use['token_policy']}"
    return f"{_printable(use['stream'])}: {use['first']} to {use['last']} ({seen}); [00:00] is {use['start']}"
