"""`stormline watch`: events as lines, from connection to connection, and what is wrong said at once."""

import io
import json
from itertools import islice

import pytest
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError, StormlineError
from stormline.pipeline.cli import app
from stormline.pipeline.commands import watch as watch_module
from stormline.pipeline.commands.http_client import NoServiceError, service_url
from stormline.pipeline.commands.watch import follow

CAPTION = {"id": "0-1-0", "stream_id": "gate", "kind": "caption", "query_id": "caption", "alert": False,
           "start_time": "2026-01-31T12:00:00Z", "answer": "a \x1b[31mvan"}  # fmt: skip
ALERT = {**CAPTION, "kind": "alert", "query_id": "van", "alert": True}


def event(place, row):
    return f"id: {place}\nevent: {row['kind']}\ndata: {json.dumps(row)}\n\n".encode()


@pytest.fixture
def connections(monkeypatch):
    """Return a list of what each connection gives, an exception to fail; and one of what was asked."""
    given, asked = [], []

    def get(url, key, headers, timeout_s):
        asked.append((url, key, headers))
        answer = given.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(watch_module, "get_stream", get)
    monkeypatch.setattr(watch_module.time, "sleep", lambda seconds: None)
    return given, asked


def test_watch_when_events_come_then_a_line_each_until_it_is_interrupted(connections):
    given, asked = connections
    given += [b"retry: 1000\nid: p0\n\n" + event("p1", CAPTION) + event("p2", ALERT), KeyboardInterrupt()]

    result = CliRunner().invoke(
        app, ["watch", "gate-*", "yard", "--kind", "alert", "--url", "http://h:1/", "--key", "k"]
    )

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "2026-01-31 12:00:00  gate  a �[31mvan",
        "2026-01-31 12:00:00  gate  ALERT van: a �[31mvan",
    ]
    assert asked[0] == ("http://h:1/v1/events?stream=gate-%2A&stream=yard&kind=alert", "k", {})
    assert asked[1][2] == {"Last-Event-ID": "p2"}


def test_watch_when_as_json_then_whole_rows_with_the_place(connections):
    given, asked = connections
    given += [event("p1", CAPTION), KeyboardInterrupt()]

    result = CliRunner().invoke(app, ["watch", "--json", "--after", "p0"])

    assert json.loads(result.stdout) == {"event_id": "p1", **CAPTION}
    assert asked[0][2] == {"Last-Event-ID": "p0"}


def test_follow_when_the_connection_breaks_then_it_goes_on_with_the_last_id_and_waits_longer_each_time(connections):
    given, asked = connections
    busy, gone = StormlineError("too many listen"), NoServiceError("no service at …")
    given += [event("p1", CAPTION) + b": still here\nid: p2\n\n" + b"data: {", gone, busy, gone, event("p3", ALERT)]
    waited = []

    rows = [row for _, row in islice(follow("http://h", None, wait=waited.append), 2)]

    assert rows == [CAPTION, ALERT]
    assert [headers.get("Last-Event-ID") for _, _, headers in asked] == [None, "p2", "p2", "p2", "p2"]
    assert waited == [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("error", [NoServiceError("no service"), SettingsError("wrong key"), StormlineError("full")])
def test_watch_when_it_cannot_begin_then_said_at_once(connections, error):
    connections[0].append(error)

    assert CliRunner().invoke(app, ["watch"]).exception is error


def test_follow_when_the_service_no_longer_takes_the_id_then_said_so(connections):
    connections[0].extend([event("p1", CAPTION), SettingsError("Last-Event-ID: of another folder")])

    with pytest.raises(SettingsError, match="another folder"):
        list(follow("http://h", None, wait=lambda seconds: None))


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_service_url_when_given_with_or_without_its_path_then_the_same(given):
    assert service_url(given, "streams") == "http://h:1/v1/streams"


def test_service_url_when_none_then_refused():
    with pytest.raises(SettingsError, match="expected http://"):
        service_url("h:1", "streams")
