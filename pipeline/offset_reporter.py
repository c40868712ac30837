"""Tell Kafka's consumer group how far a lane has committed, so that lag tools see it. Never read back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .kafka_source import open_consumer
from .settings import KafkaSettings

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger(__name__)

CLOSE_WAIT_S = 5.0


class OffsetReporter:
    """Commit offsets to the group from a thread of its own: best effort, the newest only, never in a lane's way."""

    def __init__(self, kafka: KafkaSettings):
        self._kafka = kafka
        self._newest: Mapping[tuple[str, int], int] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="offset-reporter", daemon=True)

    def __call__(self, next_offsets: Mapping[tuple[str, int], int]) -> None:
        """Report these soon; returns at once."""
        with self._changed:
            self._newest = dict(next_offsets)
            self._changed.notify()

    def __enter__(self) -> OffsetReporter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_WAIT_S)

    def _run(self) -> None:
        consumer = None
        while True:
            with self._changed:
                while self._newest is None and not self._closing:
                    self._changed.wait()
                offsets, self._newest = self._newest, None
                if offsets is None:
                    break
            try:
                consumer = consumer or self._connect()
                self._commit(consumer, offsets)
            except Exception as e:  # noqa: BLE001 (best effort: the checkpoint is what counts)
                logger.warning("group_offsets_not_reported group=%s error=%r", self._kafka.group_id, e)
        if consumer is not None:
            consumer.close()

    def _connect(self):
        return open_consumer(self._kafka, group_id=self._kafka.group_id)

    @staticmethod
    def _commit(consumer, offsets: Mapping[tuple[str, int], int]) -> None:
        from kafka.structs import OffsetAndMetadata, TopicPartition

        partitions = {TopicPartition(*key): OffsetAndMetadata(o, "", -1) for key, o in offsets.items()}
        consumer.assign(list(partitions))
        consumer.commit(partitions)
