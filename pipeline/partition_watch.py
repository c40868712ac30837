"""Looks for topics and partitions that come, or go, while lanes run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from ..operators.errors import SourceError
from .settings import KafkaSettings

logger = logging.getLogger(__name__)


class PartitionWatch:
    """Asks the brokers every so often, in a thread of its own.

    Args:
        kafka: With `topics` and `discover_s`.
        known: Partitions that are read already.
    """

    def __init__(self, kafka: KafkaSettings, known: Iterable[tuple[str, int]]):
        self._kafka = kafka
        self._known = set(known)
        self._found: list[tuple[str, int]] = []
        self._missed: set[tuple[str, int]] = set()  # at the last look; gone if they are missed at the next one, too
        self._gone: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="partition-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; the thread ends with its present question."""
        self._stop.set()

    def take(self) -> list[tuple[str, int]]:
        """Return what was found since the last call and is still there, sorted."""
        with self._lock:
            found, self._found = self._found, []
        return sorted(found)

    def take_gone(self) -> list[tuple[str, int]]:
        """Return what was missed at two looks in a row since the last call, sorted; a topic that was deleted."""
        with self._lock:
            gone, self._gone = self._gone, []
        return sorted(gone)

    def _run(self) -> None:
        from .kafka_source import look_for_topics

        while not self._stop.wait(self._kafka.discover_s):
            try:
                there = set(look_for_topics(self._kafka).partitions)
            except SourceError as error:  # brokers that are away for a while; the lanes tell of it
                logger.info("partitions_not_listed error=%s", error)
                continue
            new, missed = there - self._known, self._known - there
            gone, self._missed = missed & self._missed, missed
            self._known = (self._known | new) - gone  # one that comes back is new again
            with self._lock:
                self._found = [*(p for p in self._found if p not in gone), *new]
                self._gone += gone
