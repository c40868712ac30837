"""What streams there are, how they look, and what was found in them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel

from ...operators.errors import SettingsError
from ...operators.rows import ResultKind
from ..durations import format_moment, parse_since
from ..file_times import FileTimes
from ..result_tail import plain_row
from ..stream_activity import StreamActivity
from ..table_reader import RowFilter, TableReader
from ..token_source import StreamSpan, TokenSource
from .api_errors import ApiError, error_answers
from .chat_request import bad_request

LIVE_S = 30.0  # without anything new for so long, a stream is quiet
MAX_ROWS = 1000
State = Literal["live", "quiet", "ended"]


class StreamEntry(BaseModel):
    """One stream."""

    id: str
    object: Literal["stream"] = "stream"
    state: State
    session: str | None  # that its newest chunk is of; null where unknown
    first_time: str
    last_time: str
    chunks: int
    lag_s: float | None  # from the newest frame that can be asked about to now; null for a stream that is not live
    lag_records: int | None  # that wait in its partition, its own and others'; null where unknown
    picture_time: str | None  # of the frame that `/picture` shows; null for no picture


class StreamList(BaseModel):
    """All streams."""

    object: Literal["list"] = "list"
    data: list[StreamEntry]


class ResultRow(BaseModel):
    """One caption or alert; times are those of the video."""

    query_id: str
    kind: str
    stream_id: str
    session: str
    start_time: str
    end_time: str
    prompt: str
    answer: str
    alert: bool
    tokens_used: int
    token_policy: str
    latency_ms: float
    model: str
    emitted_time: str


class ResultList(BaseModel):
    """Results, the oldest first."""

    object: Literal["list"] = "list"
    data: list[ResultRow]
    has_more: bool  # there are older ones that match


@dataclass(frozen=True)
class _Asked:
    """Which results are wanted."""

    stream: str | None
    kind: str | None
    since: str | None
    until: str | None
    limit: int


Since = Annotated[str | None, Query(description="10m (ago), or a time such as 2026-01-31T12:00 (UTC).")]
Until = Annotated[str | None, Query(description="Only what began before: 10m (ago), or a time.")]
Limit = Annotated[int, Query(ge=1, le=MAX_ROWS)]


def stream_routes(source: TokenSource, out: Path) -> APIRouter:
    """Return the routes ``/v1/streams`` and ``/v1/results``."""
    routes, times = APIRouter(), FileTimes()

    @routes.get("/v1/streams")
    async def list_streams() -> StreamList:
        """List the streams that have video to ask about, and how they fare."""
        spans, activity = await asyncio.gather(source.streams(), source.activity())
        now_ns = time.time_ns()
        return StreamList(data=[describe(name, span, activity.get(name), now_ns) for name, span in spans.items()])

    @routes.get("/v1/streams/{stream_id:path}/captions", responses=error_answers(400))
    async def list_captions(stream_id: str, since: Since = None, until: Until = None, limit: Limit = 100) -> ResultList:
        """List the newest committed captions and alerts of a stream, the oldest first."""
        pattern = re.sub(r"([*?\[])", r"[\1]", stream_id)  # the name itself, whatever is in it
        return await asyncio.to_thread(_results, out, times, _Asked(pattern, None, since, until, limit))

    @routes.get(
        "/v1/streams/{stream_id:path}/picture",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, **error_answers(404)},
    )
    async def show_picture(stream_id: str) -> Response:
        """Show a stream's newest frame, as a JPEG of at most 320 pixels a side."""
        picture = await source.picture(stream_id)
        if picture is None:
            message = (
                f"no picture of stream {stream_id!r}; they come while it runs, unless lanes.picture_interval_s is 0"
            )
            raise ApiError(404, message, code="no_picture")
        headers = {"Cache-Control": "no-store", "X-Frame-Time": format_moment(picture.time_ns)}
        return Response(picture.jpeg, media_type="image/jpeg", headers=headers)

    @routes.get("/v1/results", responses=error_answers(400))
    async def list_results(
        stream: Annotated[str | None, Query(description="A name, or a pattern: gate-*.")] = None,
        kind: ResultKind | None = None,
        since: Since = None,
        until: Until = None,
        limit: Limit = 100,
    ) -> ResultList:
        """List the newest committed results of all streams, the oldest first."""
        return await asyncio.to_thread(_results, out, times, _Asked(stream, kind, since, until, limit))

    return routes


def describe(name: str, span: StreamSpan, seen: StreamActivity | None, now_ns: int) -> StreamEntry:
    """Return a stream's entry.

    It is live while chunks come, and ended once its publisher said so. Where no lane has told of it, as with a
    finished folder, its newest frame says how long ago it was.

    Args:
        name: Its id.
        span: What there is of it.
        seen: What was last heard of it.
        now_ns: By the clock on the wall.
    """
    heard_ns = seen.heard_ns if seen else span.end_ns
    live = now_ns - heard_ns < LIVE_S * 1e9
    state: State = "ended" if seen and seen.ended else "live" if live else "quiet"
    return StreamEntry(
        id=name,
        state=state,
        session=seen.session if seen else None,
        first_time=format_moment(span.start_ns),
        last_time=format_moment(span.end_ns),
        chunks=span.n_chunks,
        lag_s=round(max(0, now_ns - span.end_ns) / 1e9, 3) if state == "live" else None,
        lag_records=seen.lag_records if seen else None,
        picture_time=format_moment(seen.picture_ns) if seen and seen.picture_ns is not None else None,
    )


def _results(out: Path, times: FileTimes, asked: _Asked) -> ResultList:
    wanted = RowFilter(
        kind=asked.kind, stream=asked.stream, since=_moment(asked.since, "since"), until=_moment(asked.until, "until")
    )
    try:
        rows: Sequence[Mapping[str, Any]] = TableReader(out, "results", wanted, times=times).newest(asked.limit + 1)
    except SettingsError:
        rows = []  # nothing was committed yet
    data = [ResultRow.model_validate(plain_row(row)) for row in rows[-asked.limit :]]
    return ResultList(data=data, has_more=len(rows) > asked.limit)


def _moment(text: str | None, param: str) -> datetime | None:
    try:
        return None if text is None else parse_since(text, datetime.now(timezone.utc))
    except ValueError as error:
        raise bad_request(str(error), param) from None
