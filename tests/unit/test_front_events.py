"""Server-sent events, what streams there are and how they look: over real committed files, without Ray."""

import asyncio
import json
import time
from contextlib import aclosing

import numpy as np
import pytest
from starlette.testclient import TestClient

from stormline.operators.rows import Chunk, LaneNews, Picture
from stormline.pipeline.front.answering import Answerer
from stormline.pipeline.front.api_errors import ApiError
from stormline.pipeline.front.app import Backend, build_app
from stormline.pipeline.front.events import EventFilter, EventSource
from stormline.pipeline.front.streams import LIVE_S, describe
from stormline.pipeline.query_registry import QueryRegistry
from stormline.pipeline.query_settings import Query
from stormline.pipeline.result_feed import ResultFeed
from stormline.pipeline.result_tail import Cursor, newest_cursor
from stormline.pipeline.settings import ServeSettings
from stormline.pipeline.stream_activity import StreamActivity
from stormline.pipeline.token_files import TokenFiles
from stormline.pipeline.token_source import StreamSpan, TokenSource

from .test_front import EchoLlm, MemoryStore
from .test_result_feed import NOON_NS, Lanes

S_NS = 10**9


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def parse(pieces):
    """Read server-sent events as a browser does: (id, event, data)."""
    events = []
    for block in "".join(pieces).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            events.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return events


async def take(lines, n):
    return [await anext(lines) for _ in range(n)]


def test_events_when_followed_then_those_wanted_come_with_an_id_to_go_on_from(tmp_path):
    lanes = Lanes(tmp_path, count=2)
    lanes.commit(1, lane=0)
    lanes.commit(2, lane=1)
    source = EventSource(ResultFeed(tmp_path, poll_s=0), 2)

    async def follow():
        async with aclosing(source.lines(Cursor(), EventFilter(("cam-1",), ("caption",)))) as lines:
            first = await take(lines, 2)
        (event,) = parse(first)
        async with aclosing(source.lines(Cursor.parse(event[0]), EventFilter())) as lines:
            return first, event, parse(await take(lines, 2))

    first, (place, kind, row), rest = asyncio.run(follow())
    assert first[0].startswith("retry: 1000\nid: ")
    assert (kind, row["stream_id"], row["answer"], row["id"]) == ("caption", "cam-1", "1", "1-1-0")
    assert row["start_time"] == "2026-01-31T12:00:00Z"
    assert [(event, row["answer"]) for _, event, row in rest] == [("caption", "2")]
    assert Cursor.parse(place).partial == (1, 1, 1)


def test_events_when_nothing_comes_then_a_comment_with_the_place(tmp_path):
    lanes = Lanes(tmp_path)
    source = EventSource(ResultFeed(tmp_path, poll_s=0), 1, keep_alive_s=0)

    async def follow():
        async with aclosing(source.lines(Cursor(), EventFilter(("nobody",)))) as lines:
            await take(lines, 2)
            lanes.commit(3)
            place = newest_cursor(tmp_path)
            pieces = [await anext(lines)]
            while pieces[-1] != f": still here\nid: {place}\n\n":
                pieces.append(await anext(lines))
            return pieces

    assert parse(asyncio.run(follow())) == []


def test_events_when_a_query_asks_for_none_then_nobody_is_told_of_its_results(tmp_path):
    lanes = Lanes(tmp_path)
    registry = QueryRegistry(tmp_path)
    registry.add(Query.model_validate({"id": "q", "sinks": {"events": False}}))
    source = EventSource(ResultFeed(tmp_path, poll_s=0), 1, keep_alive_s=0, hidden=registry.hidden)

    async def follow():
        async with aclosing(source.lines(Cursor(), EventFilter())) as lines:
            await take(lines, 2)
            lanes.commit(3)
            place, pieces = newest_cursor(tmp_path), []
            while not pieces or pieces[-1] != f": still here\nid: {place}\n\n":
                pieces.append(await anext(lines))
            registry.remove("q")
            lanes.commit(1)
            while "data: " not in pieces[-1]:
                pieces.append(await anext(lines))
            return pieces

    assert len(parse(asyncio.run(follow()))) == 1


def test_events_when_a_connection_breaks_again_and_again_then_the_next_goes_on_with_none_missed(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(50)
    source = EventSource(ResultFeed(tmp_path, poll_s=0), 1)

    async def follow():
        place, seen, n_connections = Cursor(), [], 0
        while len(seen) < 50:
            n_connections += 1
            until = min(50, len(seen) + 7)
            lines = source.lines(place, EventFilter())
            async for piece in lines:
                for place_text, _, row in parse([piece]):
                    seen.append(row["answer"])
                    place = Cursor.parse(place_text)
                if len(seen) >= until:
                    break
            await lines.aclose()
        return seen, n_connections

    seen, n_connections = asyncio.run(follow())
    assert seen == [str(n) for n in range(50)]
    assert n_connections > 3


def test_events_when_too_many_listen_then_429_until_one_leaves(tmp_path):
    source = EventSource(ResultFeed(tmp_path, poll_s=0), 1)

    async def follow():
        first = source.lines(Cursor(), EventFilter())
        await anext(first)
        with pytest.raises(ApiError, match="1 listen already") as refused:
            await anext(source.lines(Cursor(), EventFilter()))
        await first.aclose()
        await anext(source.lines(Cursor(), EventFilter()))
        return refused.value

    error = asyncio.run(follow())
    assert (error.status, error.retry_after_s) == (429, 10)


def make_client(tmp_path, store=None):
    limits = ServeSettings.model_validate({"max_listeners": 0})
    source = TokenSource(TokenFiles(tmp_path), store or MemoryStore())
    backend = Backend(Answerer(source, EchoLlm(), limits), source, tmp_path, limits)
    return TestClient(build_app(backend), base_url="http://localhost")


@pytest.mark.parametrize("given", ["nonsense", str(Cursor({0: 9}))])
def test_events_when_the_id_is_not_of_this_folder_then_an_error_that_says_so(tmp_path, given):
    client = make_client(tmp_path)

    by_header = client.get("/v1/events", headers={"Last-Event-ID": given})
    by_query = client.get("/v1/events", params={"after": given})

    for answer in (by_header, by_query):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_event_id")


def test_events_when_asked_wrongly_or_full_then_an_error_of_the_api(tmp_path):
    client = make_client(tmp_path)

    assert client.get("/v1/events?kind=gossip").status_code == 400
    assert client.get("/v1/events").headers["Retry-After"] == "10"


# Streams.

SPAN = StreamSpan(NOON_NS, NOON_NS + 60 * S_NS, 30)


@pytest.mark.parametrize(
    ("seen", "now_s", "expected"),
    [
        (StreamActivity(NOON_NS + 61 * S_NS, False, 3, NOON_NS), 62, ("live", 2.0, 3)),
        (StreamActivity(NOON_NS + 61 * S_NS, True, 0, None), 62, ("ended", None, 0)),
        (StreamActivity(NOON_NS + 61 * S_NS, False, 0, None), 62 + LIVE_S, ("quiet", None, 0)),
        (None, 62, ("live", 2.0, None)),
        (None, 5000, ("quiet", None, None)),
        (None, 0, ("live", 0.0, None)),  # a clock ahead of ours
    ],
)
def test_stream_when_described_then_its_state_and_lag(seen, now_s, expected):
    entry = describe("cam", SPAN, seen, NOON_NS + int(now_s * S_NS))

    assert (entry.state, entry.lag_s, entry.lag_records) == expected
    assert (entry.first_time, entry.last_time) == ("2026-01-31T12:00:00.000Z", "2026-01-31T12:01:00.000Z")


def test_streams_when_listed_then_pictures_and_states(tmp_path):
    store = MemoryStore()
    now_ns = time.time_ns()
    fresh = Chunk("gate", "s", 60, now_ns, now_ns + S_NS, 0, 4, 0, "v", 0, 0, 0, np.zeros((4, 3), np.float16))
    store.memory.put(fresh)
    store.register.take(LaneNews((fresh,), pictures={"gate": Picture(NOON_NS, b"\xff\xd8jpeg")}, lags={("v", 0): 2}))
    client = make_client(tmp_path, store)

    gate, yard = client.get("/v1/streams").json()["data"]
    picture = client.get("/v1/streams/gate/picture")
    none = client.get("/v1/streams/yard/picture")

    assert (gate["state"], gate["lag_records"], gate["picture_time"]) == ("live", 2, "2026-01-31T12:00:00.000Z")
    assert (gate["session"], yard["session"]) == ("s", None)
    assert (yard["state"], yard["lag_s"], yard["picture_time"]) == ("quiet", None, None)
    assert (picture.content, picture.headers["content-type"]) == (b"\xff\xd8jpeg", "image/jpeg")
    assert picture.headers["cache-control"] == "no-store"
    assert (none.status_code, none.json()["error"]["code"]) == (404, "no_picture")


def test_results_when_listed_then_by_stream_kind_and_time(tmp_path):
    lanes = Lanes(tmp_path, count=2)
    lanes.commit(2, lane=0, day=0)
    lanes.commit(3, lane=1, day=1)
    client = make_client(tmp_path)

    def answers(query):
        listed = client.get(f"/v1/results?{query}").json()
        return [row["answer"] for row in listed["data"]], listed["has_more"]

    assert answers("") == (["0", "1", "2", "3", "4"], False)
    assert answers("limit=2") == (["3", "4"], True)
    assert answers("stream=cam-0") == (["0", "1"], False)
    assert answers("until=2026-02-01") == (["0", "1"], False)
    assert answers("since=2026-02-01T00:00&until=2026-02-01T12:00") == ([], False)
    assert answers("kind=alert") == ([], False)
    assert client.get("/v1/results?since=noon").status_code == 400
