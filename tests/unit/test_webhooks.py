import asyncio
import json
from dataclasses import replace
from datetime import datetime, timezone

import pytest

from stormline.pipeline.delivery import (
    FOLDER,
    UNDELIVERED_NAME,
    Deliverer,
    DeliveryPlace,
    Route,
    result_id,
    routes_of,
)
from stormline.pipeline.query_registry import QueryRegistry
from stormline.pipeline.query_settings import Query, WebhookSink
from stormline.pipeline.result_tail import Cursor, ResultEvent
from stormline.pipeline.settings import DeliverySettings, KafkaSettings
from stormline.pipeline.webhooks import DeliveryError, WebhookSender, sign


def test_signature_when_made_then_that_of_the_specifications_example():
    signature = sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", ["whsec_hunter2!", "whsec_hunter2é"])
def test_signature_when_the_secret_is_not_as_it_says_then_said_without_it(secret):
    with pytest.raises(DeliveryError, match="no base64 after whsec_") as raised:
        sign(secret, "id", 1, b"")

    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "１２７.0.0.1", "127。0。0。1", "①②⑦.⓪.⓪.①"])
def test_sender_when_a_host_stands_for_a_private_address_then_nothing_is_sent(host):
    async def send():
        sender = WebhookSender(allow_private=False, timeout_s=1.0)
        try:
            await sender.send(WebhookSink(url=f"http://{host}:9/hook", secret=None), "id", b"{}")
        finally:
            await sender.close()

    with pytest.raises(DeliveryError, match="is an address of this machine or of a private network"):
        asyncio.run(send())


def row(**fields):
    names = ("query_id", "kind", "alert", "stream_id", "session", "start_time", "end_time")
    return {name: name for name in names} | fields


def test_result_id_when_the_row_is_the_same_then_the_same_and_else_another():
    assert result_id(row()) == result_id(row(answer="said otherwise the second time"))
    assert len({result_id(row()), *(result_id(row(**{name: "other"})) for name in row())}) == 8


def test_routes_when_only_a_querys_question_changes_then_the_same_and_with_other_sinks_new_ones(tmp_path):
    registry = QueryRegistry(tmp_path)
    hook = {"webhook": {"url": "https://example.org/a"}, "kafka": {"topic": "alerts"}}

    def asked(**fields):
        return Query.model_validate({"id": "q", "sinks": hook, **fields})

    registry.add(asked())
    registry.add(Query.model_validate({"id": "quiet"}))
    before = routes_of(registry.stored())
    registry.replace(asked(prompt="Else?"))
    same = routes_of(registry.stored())
    registry.replace(asked(sinks={"webhook": {"url": "https://example.org/b"}}))
    other = routes_of(registry.stored())

    assert [(r.query_id, r.kind, r.target) for r in before] == [
        ("q", "webhook", "https://example.org/a"),
        ("q", "kafka", "alerts"),
    ]
    assert same == before
    assert [r.target for r in other] == ["https://example.org/b"]


def test_place_when_an_address_is_corrected_then_what_waited_for_the_old_one_goes_to_the_new(tmp_path):
    (tmp_path / FOLDER).mkdir()
    wrong = Route("q", WebhookSink(url="https://exmple.org/a", secret=None), since=str(Cursor({0: 3})))
    DeliveryPlace(tmp_path, wrong)  # nothing was sent yet

    place = DeliveryPlace(
        tmp_path, replace(wrong, sink=WebhookSink(url="https://example.org/a", secret=None), since=str(Cursor({0: 9})))
    )

    assert place.cursor == Cursor({0: 3})


def test_place_when_a_sink_was_taken_out_then_it_begins_anew_when_it_is_back(tmp_path):
    registry = QueryRegistry(tmp_path)
    (tmp_path / FOLDER).mkdir()
    asked = Query.model_validate({"id": "q", "sinks": {"webhook": {"url": "https://example.org/a"}}})
    registry.add(asked)
    (route,) = routes_of(registry.stored())
    DeliveryPlace(tmp_path, route).keep(Cursor({0: 3}))
    registry.replace(Query.model_validate({"id": "q"}))

    async def look():
        Deliverer(tmp_path, DeliverySettings(), KafkaSettings())._follow_queries(asyncio.Event())

    asyncio.run(look())

    assert DeliveryPlace(tmp_path, replace(route, since=str(Cursor({0: 9})))).cursor == Cursor({0: 9})


class OneResult:
    """A feed that has one result, and then a place after it."""

    async def listen(self, cursor, *, idle_s):
        now = datetime(2026, 1, 31, tzinfo=timezone.utc)
        values = row(kind="caption", alert=False, start_time=now, end_time=now, emitted_time=now)
        yield ResultEvent(0, 1, 0, values, Cursor({0: 1}))
        yield Cursor({0: 1})


class Waits:
    """Passes time while nobody waits; ends a test in which somebody waits on and on."""

    def __init__(self):
        self.now_s = 0.0

    def clock_s(self):
        return self.now_s

    async def sleep(self, seconds):
        self.now_s += seconds
        assert self.now_s < 1000, "tried for ever"


def test_delivery_when_the_secrets_file_cannot_be_read_then_the_result_is_undelivered_after_its_time(tmp_path, caplog):
    (tmp_path / FOLDER).mkdir()
    secret = tmp_path / "hook.key"
    secret.write_bytes(b"hunter2\xff")
    hook = WebhookSink(url="https://example.org/a", secret=f"${{file:{secret}}}")
    waits, closing = Waits(), asyncio.Event()
    settings = DeliverySettings(retry_wait_s=1.0, give_up_after_s=60.0)
    deliverer = Deliverer(tmp_path, settings, KafkaSettings(), sleep=waits.sleep, clock_s=waits.clock_s)
    deliverer._feed = OneResult()
    closing.set()

    asyncio.run(deliverer._keep_delivering(Route("query_id", hook, since=str(Cursor())), closing))

    (line,) = (tmp_path / FOLDER / UNDELIVERED_NAME).read_text().splitlines()
    assert json.loads(line)["error"] == (
        f"sinks.webhook.secret: what the secret file {secret} holds is not UTF-8; write the secret as text."
    )
    assert waits.now_s >= 60
    assert "hunter2" not in caplog.text
