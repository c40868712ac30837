import json
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone

import pytest
from starlette.testclient import TestClient

from stormline.operators.errors import SettingsError
from stormline.pipeline.front.app import Backend, build_app
from stormline.pipeline.front.queries import QueryRules
from stormline.pipeline.query_registry import MAX_QUERIES, QueryConflictError, QueryNotFoundError, QueryRegistry
from stormline.pipeline.query_settings import Query, check_sinks, is_public
from stormline.pipeline.settings import ServeSettings, load_settings

ALERT = {"id": "smoke", "kind": "alert", "prompt": "Is there smoke?", "streams": ["gate-*"]}


def query(id="q", **fields):
    return Query.model_validate({"id": id, **fields})


class Clock:
    def __init__(self):
        self.now = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)

    def __call__(self):
        self.now += timedelta(seconds=1)
        return self.now


def ids(registry):
    return [(s.query.id, s.source) for s in registry.stored()]


def test_registry_when_opened_again_then_has_what_was_added_and_the_settings_of_now(tmp_path):
    registry = QueryRegistry(tmp_path, Clock())
    registry.take_settings([query("a"), query("b")])
    registry.add(query("mine"))

    later = QueryRegistry(tmp_path)
    later.take_settings([query("b"), query("c")])

    assert ids(later) == ids(registry) == [("b", "settings"), ("c", "settings"), ("mine", "api")]
    assert [q.id for q in later.for_lanes()] == ["b", "c", "mine"]
    assert not hasattr(later.for_lanes()[0], "sinks")


def test_registry_when_nothing_changes_then_the_file_stays_and_times_too(tmp_path):
    registry = QueryRegistry(tmp_path, Clock())
    registry.take_settings([query("a")])
    before = (tmp_path / "queries.json").stat().st_ino, registry.get("a")

    registry.take_settings([query("a")])

    assert ((tmp_path / "queries.json").stat().st_ino, registry.get("a")) == before


def test_registry_when_a_query_changes_then_it_keeps_its_place_and_when_it_was_made(tmp_path):
    registry = QueryRegistry(tmp_path, Clock())
    registry.add(query("a"))
    registry.add(query("b"))

    changed = registry.replace(query("a", prompt="What else?"))

    assert [q.id for q in registry.for_lanes()] == ["a", "b"]
    assert registry.get("a").query.prompt == "What else?"
    assert changed.created < changed.changed


def test_registry_when_a_settings_query_is_to_go_then_refused(tmp_path):
    registry = QueryRegistry(tmp_path)
    registry.take_settings([query("a")])

    with pytest.raises(QueryConflictError, match="'a' stands in the settings file"):
        registry.remove("a")
    with pytest.raises(QueryConflictError, match="'a' stands in the settings file"):
        registry.replace(query("a", prompt="Else?"))
    with pytest.raises(QueryConflictError, match="there is a query 'a' already"):
        registry.add(query("a"))
    with pytest.raises(QueryNotFoundError, match="no query 'b' here; there: a"):
        registry.remove("b")


def test_registry_when_the_settings_take_an_id_of_the_apis_then_refused_and_nothing_changes(tmp_path):
    registry = QueryRegistry(tmp_path)
    registry.add(query("a"))

    with pytest.raises(SettingsError, match="the id 'a' is taken by a query that was added over the API"):
        registry.take_settings([query("a")])

    assert ids(registry) == [("a", "api")]


def test_registry_when_full_then_says_so(tmp_path):
    registry = QueryRegistry(tmp_path)
    registry.take_settings([query(f"q{i}") for i in range(MAX_QUERIES)])

    with pytest.raises(QueryConflictError, match=f"there are {MAX_QUERIES} queries"):
        registry.add(query("one-more"))


def test_registry_when_the_file_is_damaged_or_gone_then_lanes_are_told_rather_than_left_without_queries(tmp_path):
    registry = QueryRegistry(tmp_path)
    registry.take_settings([query("a")])

    (tmp_path / "queries.json").write_text('{"version": 1, "queries": [{"query": {}}]}')
    with pytest.raises(SettingsError, match=r"queries\.json cannot be read"):
        registry.for_lanes()
    (tmp_path / "queries.json").unlink()
    with pytest.raises(SettingsError, match="is gone"):
        registry.for_lanes()


@pytest.fixture
def client(tmp_path):
    registry = QueryRegistry(tmp_path)
    registry.take_settings([query("caption")])
    backend = Backend(None, None, tmp_path, ServeSettings(), QueryRules(input_topics=("video",)))
    return TestClient(build_app(backend), base_url="http://localhost")


def test_api_when_a_query_is_added_changed_and_removed_then_each_shows(client):
    added = client.post("/v1/queries", json=ALERT)
    shown = client.get("/v1/queries/smoke").json()
    changed = client.put("/v1/queries/smoke", json={**shown, "condition": {"contains": "smoke"}})
    listed = client.get("/v1/queries").json()
    removed = client.delete("/v1/queries/smoke")

    assert (added.status_code, added.json()) == (201, shown)
    assert shown["condition"] == {"answer": "yes", "contains": None, "matches": None}
    assert (shown["object"], shown["source"], shown["window_s"]) == ("query", "api", 10.0)
    assert changed.json()["condition"]["contains"] == "smoke"
    assert [(q["id"], q["source"]) for q in listed["data"]] == [("caption", "settings"), ("smoke", "api")]
    assert removed.json() == {"id": "smoke", "object": "query", "deleted": True}
    assert client.get("/v1/queries/smoke").status_code == 404


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"id": "x", "kind": "alert"}, None, "an alert needs a prompt"),
        ({**ALERT, "condition": {"matches": "(a"}}, "condition.matches", "condition.matches: no regular expression"),
        ({**ALERT, "widow_s": 3}, "widow_s", "widow_s: unknown field"),
        ({**ALERT, "window_s": -1}, "window_s", "window_s: Input should be greater than 0"),
        ({**ALERT, "sinks": {"kafka": {"topic": "video"}}}, "sinks.kafka.topic", "a topic that video is read from"),
        ({**ALERT, "sinks": {"kafka": {"topic": "a b"}}}, "sinks.kafka.topic", "should match pattern"),
        ({**ALERT, "sinks": {"webhook": {"url": "ftp://a/b"}}}, "sinks.webhook.url", "expected a URL such as https"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://me:pw@a.org"}}}, "sinks.webhook.url", "no name and password"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://10.0.0.7/x"}}}, "sinks.webhook.url", "of a private network"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://[::1]:80/x"}}}, "sinks.webhook.url", "of a private network"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://LOCALHOST./"}}}, "sinks.webhook.url", "of this machine"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://ⓛocalhost/"}}}, "sinks.webhook.url", "of this machine"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://１２７.0.0.1:8/"}}}, "sinks.webhook.url", ": 127.0.0.1 is an"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://127。0。0。1/"}}}, "sinks.webhook.url", ": 127.0.0.1 is an"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://①②⑦.⓪.⓪.①/"}}}, "sinks.webhook.url", ": 127.0.0.1 is an"),
        ({**ALERT, "sinks": {"webhook": {"url": "http://a:99999/"}}}, "sinks.webhook.url", "expected a URL such as"),
        (
            {**ALERT, "sinks": {"webhook": {"url": "http://a.org/", "secret": "hunter2"}}},
            "sinks.webhook.secret",
            "never a secret itself",
        ),
        ([], None, "the body is a JSON list"),
    ],
)
def test_api_when_a_query_is_wrong_then_400_names_the_place_and_what_was_expected(client, body, param, said):
    answer = client.post("/v1/queries", json=body)

    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert said in error["message"]
    assert "hunter2" not in answer.text
    assert len(client.get("/v1/queries").json()["data"]) == 1


def test_api_when_a_settings_query_or_an_unknown_one_is_meant_then_409_or_404(client):
    for answer in (
        client.delete("/v1/queries/caption"),
        client.put("/v1/queries/caption", json={"prompt": "What?"}),
        client.post("/v1/queries", json={"id": "caption"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "query_conflict")
    for answer in (client.delete("/v1/queries/nope"), client.put("/v1/queries/nope", json={"prompt": "What?"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "query_not_found")
    assert client.put("/v1/queries/caption", json={"id": "other"}).json()["error"]["param"] == "id"


def test_api_when_the_file_is_damaged_then_said_without_its_content(client, tmp_path):
    (tmp_path / "queries.json").write_text(json.dumps({"version": 9}))

    answer = client.get("/v1/queries")

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "queries_unreadable")


def test_settings_when_a_query_may_not_go_where_it_says_then_refused_unless_allowed():
    hook = "queries=[{id: a, sinks: {webhook: {url: 'http://127.0.0.1:9/x'}}}]"

    with pytest.raises(SettingsError, match=r"delivery\.allow_private=true"):
        load_settings(None, [hook])
    with pytest.raises(SettingsError, match=r"queries\.0\.sinks\.webhook\.scret: unknown key; known here: url, secret"):
        load_settings(None, ["queries=[{id: a, sinks: {webhook: {scret: x}}}]"])
    assert load_settings(None, [hook, "delivery.allow_private=true"]).queries[0].sinks.webhook is not None


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("fe80::1%eth0", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("gate.example.org", False),
    ],
)
def test_address_when_looked_at_then_public_or_not(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("name", "refused"), [("cam-*", True), ("cam-alerts", True), ("cam", False), ("gate-?", False)]
)
def test_sinks_when_a_topic_fits_what_video_is_read_from_then_refused(name, refused):
    asked = query(sinks={"kafka": {"topic": "cam-alerts"}})

    with pytest.raises(ValueError, match="video is read from") if refused else nullcontext():
        check_sinks(asked, allow_private=False, input_topics=["video", name])
