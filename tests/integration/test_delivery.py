"""Committed results on their way to a webhook and a Kafka topic: a real HTTP server, the real broker, and kills."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import subprocess
import sys
import time

import pytest
from kafka import KafkaConsumer

from stormline.operators.rows import Position, Result
from stormline.pipeline.delivery import FOLDER, UNDELIVERED_NAME, DeliveryThread
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.query_registry import QueryRegistry
from stormline.pipeline.query_settings import Query, WebhookSink
from stormline.pipeline.recovery import recover
from stormline.pipeline.settings import load_settings
from stormline.pipeline.webhooks import DeliveryError, WebhookSender

S_NS = 10**9
LIMIT_S = 30
IDENTITY = {"model": "m"}
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef").decode()


def until(condition, what):
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {LIMIT_S} s: {what()}"
        time.sleep(0.02)


class Folder:
    """An output folder that a lane writes alerts to."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        start = recover(root, lanes=1, identity=IDENTITY).for_lane(0, (("v", 0),))
        self._writer = EpochWriter(start, model="m", identity=IDENTITY)
        self._n = 0

    def commit(self, *answers, query="smoke", alert=True):
        results = [self._result(answer, query, alert) for answer in answers]
        self._writer.commit(results=results, positions=[Position("v", 0, self._n)], snapshots={})

    def _result(self, answer, query, alert):
        self._n += 1
        start_ns = 1_769_860_800 * S_NS + self._n * S_NS
        return Result(query, "alert", "gate", "s", start_ns, start_ns + S_NS, "Smoke?", answer, alert, 16, "recent",
                      1.0, "m", start_ns)  # fmt: skip

    def ask(self, **sinks):
        query = {"id": "smoke", "kind": "alert", "prompt": "Smoke?", "sinks": sinks}
        QueryRegistry(self.root).add(Query.model_validate(query))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "out")


@contextlib.contextmanager
def delivering(folder, broker="127.0.0.1:1", **delivery):
    settings = load_settings(None, [f"kafka.bootstrap_servers={broker}"])
    chosen = {"allow_private": True, "retry_wait_s": 0.05, "timeout_s": 5, **delivery}
    with DeliveryThread(folder.root, settings.delivery.model_copy(update=chosen), settings.kafka):
        yield


def test_webhook_when_an_alert_is_committed_then_posted_once_signed_and_over_nothing_sent(
    folder, receiver, monkeypatch
):
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    folder.commit("before the query was there")
    folder.ask(webhook={"url": receiver.url, "secret": "${env:HOOK_SECRET}"})
    folder.commit("yes")
    folder.commit("no", alert=False)
    folder.commit("yes", query="another")

    with delivering(folder):
        until(lambda: receiver.got, lambda: "nothing came")
        folder.commit("yes again")
        until(lambda: len(receiver.got) == 2, lambda: receiver.got)
    with delivering(folder):
        folder.commit("after a restart")
        until(lambda: len(receiver.got) == 3, lambda: receiver.got)

    assert receiver.answers_told == ["yes", "yes again", "after a restart"]
    headers, body = receiver.got[0]
    headers = {name.lower(): value for name, value in headers.items()}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(b"0123456789abcdef", signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    told = json.loads(body)
    assert (told["type"], told["id"]) == ("alert", headers["webhook-id"])
    assert (told["data"]["stream_id"], told["data"]["alert"]) == ("gate", True)
    assert len(set(receiver.ids)) == 3


def test_webhook_when_the_receiver_is_away_then_again_until_it_is_back_under_the_same_id(folder, receiver):
    receiver.answers = [500, None, 503, 429]
    folder.ask(webhook={"url": receiver.url})
    folder.commit("one", "two")

    with delivering(folder):
        until(lambda: len(receiver.got) == 6, lambda: receiver.answers_told)

    assert receiver.answers_told == ["one"] * 5 + ["two"]
    assert len(set(receiver.ids[:5])) == 1
    assert not (folder.root / FOLDER / UNDELIVERED_NAME).exists()


def test_webhook_when_it_is_refused_or_away_for_too_long_then_set_down_and_the_next_is_sent(folder, receiver):
    receiver.answers = [400, 301, 400]
    folder.ask(webhook={"url": receiver.url})
    folder.commit("refused", "fine")
    with delivering(folder):
        until(lambda: "fine" in receiver.answers_told, lambda: receiver.answers_told)
    receiver.answers = [503] * 100
    folder.commit("too late")
    with delivering(folder, give_up_after_s=0.2):
        undelivered = folder.root / FOLDER / UNDELIVERED_NAME
        until(lambda: len(undelivered.read_text().splitlines()) == 2, undelivered.read_text)

    lines = [json.loads(line) for line in undelivered.read_text().splitlines()]
    assert [(line["query_id"], line["sink"], line["data"]["answer"]) for line in lines] == [
        ("smoke", "webhook", "refused"),
        ("smoke", "webhook", "too late"),
    ]
    assert "answered 400" in lines[0]["error"]
    assert receiver.answers_told[:4] == ["refused"] * 3 + ["fine"]  # a redirect is not followed


def test_topic_when_the_webhook_of_the_same_query_is_dead_then_gets_all_the_same(folder, broker):
    folder.ask(webhook={"url": "http://127.0.0.1:9/dead"}, kafka={"topic": "alerts-out"})
    folder.commit("one", "two")

    with delivering(folder, broker):
        consumer = KafkaConsumer(
            "alerts-out",
            bootstrap_servers=broker,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            consumer_timeout_ms=LIMIT_S * 1000,
            metadata_max_age_ms=200,
        )
        records = [next(consumer), next(consumer)]
        consumer.close()

    assert [json.loads(r.value)["data"]["answer"] for r in records] == ["one", "two"]
    assert [r.key for r in records] == [b"gate"] * 2
    assert [dict(r.headers)["id"].decode() for r in records] == [json.loads(r.value)["id"] for r in records]


DELIVER = """
import sys, threading
from pathlib import Path
from stormline.pipeline.delivery import DeliveryThread
from stormline.pipeline.settings import load_settings

settings = load_settings(None, ["delivery.allow_private=true", "delivery.timeout_s=60"])
with DeliveryThread(Path(sys.argv[1]), settings.delivery, settings.kafka):
    threading.Event().wait(60)
"""


def test_deliverer_when_killed_while_it_sends_then_nothing_is_lost_and_ids_stay(folder, receiver):
    folder.ask(webhook={"url": receiver.url})
    folder.commit(*(f"result {i}" for i in range(6)))
    for n_answered in (2, 4):
        receiver.hold_after = n_answered
        process = subprocess.Popen([sys.executable, "-c", DELIVER, str(folder.root)])
        until(lambda: len(receiver.got) > n_answered, lambda: receiver.answers_told)  # noqa: B023
        process.kill()
        process.wait(10)
    receiver.hold_after = None

    with delivering(folder):
        until(lambda: len(set(receiver.ids)) == 6, lambda: receiver.answers_told)

    first = list(dict.fromkeys(receiver.answers_told))
    assert first == [f"result {i}" for i in range(6)]
    assert len(receiver.got) == 6 + 2, "more was sent again than what was on its way"
    by_answer = dict(zip(receiver.answers_told, receiver.ids, strict=True))
    assert all(by_answer[told] == id for told, id in zip(receiver.answers_told, receiver.ids, strict=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_webhook_when_its_name_stands_for_a_private_address_then_nothing_is_sent(receiver, host):
    async def send():
        sender = WebhookSender(allow_private=False, timeout_s=5)
        try:
            await sender.send(WebhookSink(url=receiver.url.replace("127.0.0.1", host), secret=None), "id", b"{}")
        finally:
            await sender.close()

    with pytest.raises(DeliveryError, match="private network"):
        asyncio.run(send())

    assert receiver.got == []
