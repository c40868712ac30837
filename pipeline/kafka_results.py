"""Sends results to Kafka topics, as JSON keyed by stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .settings import KafkaSettings
from .webhooks import DeliveryError

ID_HEADER = "id"
THREADS = 4  # wait for brokers at a time


class KafkaResultSender:
    """Sends messages to any topic of the brokers that video comes from; connects where it is first used.

    Each is waited for until all replicas have it. One that is sent again after a crash has the same `id` header.
    Belongs to one event loop; has threads of its own, so that brokers that are away keep nothing else waiting.

    Args:
        kafka: Where the brokers are.
        timeout_s: For one attempt.
    """

    def __init__(self, kafka: KafkaSettings, *, timeout_s: float):
        self._kafka = kafka
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(THREADS, "kafka-results")
        self._producer: Any = None
        self._connecting: asyncio.Future[None] | None = None

    async def send(self, topic: str, key: str, message_id: str, body: bytes) -> None:
        """Make one attempt.

        Raises:
            DeliveryError: If the brokers do not take it.
        """
        if self._producer is None:
            await self._connect()
        await self._in_thread(self._send, self._producer, topic, key, message_id, body)

    async def _connect(self) -> None:
        """Connect, or wait for it where that is under way: who waits together fails together."""
        if self._connecting is None:
            self._connecting = self._in_thread(self._open)
            self._connecting.add_done_callback(self._connected)
        await asyncio.shield(self._connecting)

    def _connected(self, connecting: asyncio.Future[None]) -> None:
        self._connecting = None
        if not connecting.cancelled():
            connecting.exception()  # seen, also where all who waited were ended

    def _in_thread(self, act: Callable[..., None], *args: object) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._threads, act, *args)

    def _open(self) -> None:
        from kafka.errors import KafkaError

        try:
            self._producer = self._new_producer()
        except (KafkaError, OSError, ValueError, AssertionError) as error:
            raise DeliveryError(f"Kafka at {self._kafka.bootstrap_servers}: {error!r}") from error

    def _send(self, producer: Any, topic: str, key: str, message_id: str, body: bytes) -> None:
        from kafka.errors import KafkaError, MessageSizeTooLargeError

        try:
            sent = producer.send(topic, key=key.encode(), value=body, headers=[(ID_HEADER, message_id.encode())])
            sent.get(self._timeout_s)
        except MessageSizeTooLargeError as error:
            raise DeliveryError(f"topic {topic}: {error}", refused=True) from error
        except (KafkaError, OSError, ValueError, AssertionError) as error:
            raise DeliveryError(f"topic {topic} at {self._kafka.bootstrap_servers}: {error!r}") from error

    def _new_producer(self) -> Any:
        from kafka import KafkaProducer

        from .kafka_source import client_options  # which brings Ray

        timeout_ms = round(self._timeout_s * 1000)
        options: dict[str, Any] = {"bootstrap_timeout_ms": timeout_ms, "max_block_ms": timeout_ms}
        options |= client_options(self._kafka, "producer")
        options |= {"acks": "all", "enable_idempotence": True}
        return KafkaProducer(**options)

    def close(self) -> None:
        """End its connections and threads, when no more is sent; waits for a connecting that is under way."""
        self._close_producer()  # which ends what waits for it
        self._threads.shutdown(cancel_futures=True)
        self._close_producer()  # where it connected meanwhile

    def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close(timeout=1.0)
