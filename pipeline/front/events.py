"""Committed captions and alerts as server-sent events, for browsers and programs that stay connected."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from ...operators.rows import ResultKind
from ..result_feed import ResultFeed
from ..result_tail import Cursor, ResultEvent, newest_cursor
from .api_errors import ApiError, error_answers
from .chat_request import bad_request

KEEP_ALIVE_S = 15.0  # proxies on the way give up a connection that is silent for a minute or so
RETRY_MS = 1000  # after which a browser connects again
RETRY_AFTER_S = 10
MAX_PATTERNS = 64
NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class EventFilter:
    """Which results are wanted; an empty tuple is all."""

    streams: Sequence[str] = ()  # names, or patterns with * ? [ ]
    kinds: Sequence[str] = ()

    def wants(self, event: ResultEvent) -> bool:
        """Tell whether this one is."""
        stream_id, kind = event.values["stream_id"], event.values["kind"]
        named = not self.streams or any(fnmatchcase(stream_id, pattern) for pattern in self.streams)
        return named and (not self.kinds or kind in self.kinds)


class EventSource:
    """Writes a feed as server-sent events, to so many listeners at most.

    Args:
        feed: The results.
        max_listeners: At once.
        keep_alive_s: After so long without an event there is a comment, and the place so far.
        hidden: Gives the ids of queries whose results nobody is told of here.
        clock_s: Any clock that only goes forward.
    """

    def __init__(
        self,
        feed: ResultFeed,
        max_listeners: int,
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        hidden: Callable[[], Collection[str]] = tuple,
        clock_s: Callable[[], float] = time.monotonic,
    ):
        self._feed = feed
        self._max_listeners = max_listeners
        self._keep_alive_s = keep_alive_s
        self._hidden = hidden
        self._clock_s = clock_s
        self._n_listeners = 0

    async def lines(self, after: Cursor, wanted: EventFilter) -> AsyncGenerator[str]:
        """Yield the events from a place on, as text; the first piece comes at once.

        Raises:
            ApiError: 429 before the first piece, where too many listen already.
        """
        if self._n_listeners >= self._max_listeners:
            raise ApiError(
                429,
                f"{self._n_listeners} listen already; expected fewer than {self._max_listeners}: try again later",
                code="too_many_listeners",
                retry_after_s=RETRY_AFTER_S,
            )
        self._n_listeners += 1
        try:
            yield f"retry: {RETRY_MS}\nid: {after}\n\n"
            async with aclosing(self._pieces(after, wanted)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._n_listeners -= 1

    def _hides(self, event: ResultEvent) -> bool:
        return event.values["query_id"] in self._hidden()

    async def _pieces(self, after: Cursor, wanted: EventFilter) -> AsyncGenerator[str]:
        told_s = self._clock_s()
        async with aclosing(self._feed.listen(after, idle_s=self._keep_alive_s)) as items:
            async for item in items:
                place = item if isinstance(item, Cursor) else item.cursor
                if isinstance(item, ResultEvent) and wanted.wants(item) and not self._hides(item):
                    data = json.dumps(item.to_json(), ensure_ascii=False)
                    yield f"id: {place}\nevent: {item.values['kind']}\ndata: {data}\n\n"
                elif self._clock_s() - told_s >= self._keep_alive_s or isinstance(item, Cursor):
                    yield f": still here\nid: {place}\n\n"  # an id without data is kept and shown to nobody
                else:
                    continue
                told_s = self._clock_s()


def event_routes(source: EventSource, root: Path) -> APIRouter:
    """Return the route ``/v1/events``."""
    routes = APIRouter()

    @routes.get(
        "/v1/events",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Events named by kind, the row as JSON, and an id to go on from, should the connection "
                "break.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **error_answers(400, 429),
        },
    )
    async def follow_events(
        stream: Annotated[list[str], Query(max_length=MAX_PATTERNS, description="Names, or patterns: gate-*.")] = [],  # noqa: B006
        kind: Annotated[list[ResultKind], Query(max_length=8)] = [],  # noqa: B006
        last_event_id: Annotated[str | None, Header(description="Go on after this one.")] = None,
        after: Annotated[str | None, Query(description="The same, for those who cannot send a header.")] = None,
    ) -> StreamingResponse:
        """Follow captions and alerts as they are committed; without an id, those to come."""
        place = await _place(root, last_event_id or after)
        lines = source.lines(place, EventFilter(stream, kind))
        first = await anext(lines)  # what is wrong is an error with a status of its own
        return StreamingResponse(prepend(first, lines), media_type="text/event-stream", headers=NO_BUFFER)

    return routes


async def _place(root: Path, text: str | None) -> Cursor:
    newest = await asyncio.to_thread(newest_cursor, root)
    if not text:
        return newest
    try:
        place = Cursor.parse(text)
        if place.is_ahead_of(newest):
            raise ValueError("this id is of another output folder, or of results that were taken back")
    except ValueError as error:
        raise bad_request(f"Last-Event-ID: {error}; leave it out to start with what is new", "Last-Event-ID",
                          "unknown_event_id") from None  # fmt: skip
    return place


async def prepend(first: str, rest: AsyncGenerator[str, Any]) -> AsyncIterator[str]:
    """Yield one piece, then the others; closes them."""
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece
