"""Sends results to Kafka topics, as JSON keyed by stream."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from .settings import KafkaSettings
from .webhooks import DeliveryError

ID_HEADER = "id"


class KafkaResultSender:
    """Sends messages to any topic of the brokers that video comes from; connects where it is first used.

    Each is waited for until all replicas have it. One that is sent again after a crash has the same `id` header.

    Args:
        kafka: Where the brokers are.
        timeout_s: For one attempt.
    """

    def __init__(self, kafka: KafkaSettings, *, timeout_s: float):
        self._kafka = kafka
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._producer: Any = None

    async def send(self, topic: str, key: str, message_id: str, body: bytes) -> None:
        """Make one attempt.

        Raises:
            DeliveryError: If the brokers do not take it.
        """
        await asyncio.to_thread(self._send, topic, key, message_id, body)

    def _send(self, topic: str, key: str, message_id: str, body: bytes) -> None:
        from kafka.errors import KafkaError, MessageSizeTooLargeError

        try:
            sent = self._connected().send(
                topic, key=key.encode(), value=body, headers=[(ID_HEADER, message_id.encode())]
            )
            sent.get(self._timeout_s)
        except MessageSizeTooLargeError as error:
            raise DeliveryError(f"topic {topic}: {error}", refused=True) from error
        except (KafkaError, OSError, ValueError, AssertionError) as error:
            raise DeliveryError(f"topic {topic} at {self._kafka.bootstrap_servers}: {error!r}") from error

    def _connected(self) -> Any:
        from kafka import KafkaProducer

        from .kafka_source import client_options  # which brings Ray

        with self._lock:
            if self._producer is None:
                timeout_ms = round(self._timeout_s * 1000)
                options: dict[str, Any] = {"bootstrap_timeout_ms": timeout_ms, "max_block_ms": timeout_ms}
                options |= client_options(self._kafka, "producer")
                options |= {"acks": "all", "enable_idempotence": True}
                self._producer = KafkaProducer(**options)
            return self._producer

    def close(self) -> None:
        """End its connections."""
        with self._lock:
            if self._producer is not None:
                self._producer.close(timeout=1.0)
                self._producer = None
