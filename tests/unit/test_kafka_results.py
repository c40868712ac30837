import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stormline.pipeline.kafka_results import KafkaResultSender
from stormline.pipeline.settings import KafkaSettings
from stormline.pipeline.webhooks import DeliveryError

LIMIT_S = 10


class Producer:
    """Takes everything at once."""

    def __init__(self):
        self.closed = False

    def send(self, topic, **message):
        return self

    def get(self, timeout_s):
        assert not self.closed

    def close(self, timeout):
        self.closed = True


class HeldSender(KafkaResultSender):
    """Connects, or fails to, once it is let go on."""

    def __init__(self, producer):
        super().__init__(KafkaSettings(), timeout_s=LIMIT_S)
        self._made = producer
        self.connecting, self.go_on = threading.Event(), threading.Event()
        self.n_tries = 0

    def _new_producer(self):
        self.n_tries += 1
        self.connecting.set()
        assert self.go_on.wait(LIMIT_S)
        if self._made is None:
            raise OSError("no brokers")
        return self._made


async def begin(sender, n):
    """Send so many messages; returns when a thread is about to connect."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    sending = [asyncio.create_task(sender.send("alerts", "gate", f"id{i}", b"{}")) for i in range(n)]
    await asyncio.wait_for(asyncio.to_thread(sender.connecting.wait), LIMIT_S)
    return sending


def test_brokers_when_away_then_nothing_else_waits_for_them_and_all_who_do_fail_together():
    sender = HeldSender(None)

    async def send():
        sending = await begin(sender, 8)
        sender.go_on.set()
        return await asyncio.gather(*sending, return_exceptions=True)

    failed = asyncio.run(send())

    sender.close()
    assert {str(error) for error in failed} == {"Kafka at 127.0.0.1:9092: OSError('no brokers')"}
    assert sender.n_tries == 1


def test_brokers_when_back_then_the_next_attempt_connects():
    sender = HeldSender(None)
    sender.go_on.set()

    async def send():
        with pytest.raises(DeliveryError, match="no brokers"):
            await sender.send("alerts", "gate", "id", b"{}")
        sender._made = Producer()
        await asyncio.gather(*[sender.send("alerts", "gate", f"id{i}", b"{}") for i in range(3)])

    asyncio.run(send())

    sender.close()
    assert sender.n_tries == 2


def test_sender_when_closed_while_it_connects_then_that_connection_is_ended_too():
    producer = Producer()
    sender = HeldSender(producer)

    async def send():
        (sending,) = await begin(sender, 1)
        sending.cancel()
        await asyncio.wait([sending])
        closing = asyncio.create_task(asyncio.to_thread(sender.close))
        await asyncio.sleep(0)
        sender.go_on.set()
        await closing

    asyncio.run(send())

    assert producer.closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kafka-results")]
