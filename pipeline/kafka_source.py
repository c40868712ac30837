"""A continuous Kafka source for Ray Data: one read task that polls its partitions and yields for ever.

Ray Data has none: its `read_kafka` is bounded (ray-project/ray issue 40513).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from ..operators.errors import SourceError, TopicAnewError
from ..operators.rows import Barrier, DeadLetter, Position, Segment, block_of
from .lag_policy import LagPolicy
from .lane_source import BarrierTimer, LaneSource
from .query_settings import names_topic
from .secret_references import resolve_secrets
from .sessions import SESSION_IDLE_S, Record, SessionTracker, ends_session, stream_id
from .settings import KafkaSettings, LagRule

if TYPE_CHECKING:
    from kafka import KafkaConsumer
    from kafka.structs import TopicPartition

logger = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 50  # upper bound of how late a barrier can be when nothing arrives
POLL_MAX_RECORDS = 16  # segments are large; more would only wait in this process
BLOCK_ROWS = 4  # in a block, where so many wait: more save little, and a row's answer waits for its block
BLOCK_BYTES = 4 << 20  # of media, from which on a block takes no more rows
STEP_NAME = "source"


@dataclass(frozen=True)
class SourcePlan:
    """What one lane reads, and from where."""

    kafka: KafkaSettings
    partitions: tuple[tuple[str, int], ...]
    next_offsets: Mapping[tuple[str, int], int]  # from the checkpoint; others begin at `kafka.start`
    snapshots: Mapping[tuple[str, int], bytes] = field(default_factory=dict, repr=False)
    barrier_interval_s: float = 2.0
    new_partitions: frozenset[tuple[str, int]] = frozenset()  # found while running: from their beginning, always
    lag: tuple[LagRule, ...] = ()  # what becomes of records that come too late
    session_idle_s: float = SESSION_IDLE_S  # after which a session without records is over


class KafkaSource(LaneSource):
    """Read a lane's partitions in order, for ever, with a barrier every few seconds.

    A block holds what one poll found, `BLOCK_ROWS` at most: a live segment goes alone and at once, a backlog travels
    in company. Each row is a `Segment` or a `Barrier` and carries `lane_seq`, counting up by one from 0. A barrier
    holds the next offset of every partition and the source's own state, both after the last row yielded. Offsets are
    never committed or read back here.
    """

    def __init__(self, plan: SourcePlan):
        super().__init__(read_forever, plan)


def read_forever(plan: SourcePlan) -> Iterator[pa.Table]:
    """Yield blocks of rows as they come; ends only when it is killed.

    Raises:
        SourceError: If the broker cannot be reached or refuses.
        TopicAnewError: If a partition ends before where it was read to.
    """
    consumer = open_consumer(plan.kafka)
    try:
        lane_seq = itertools.count()
        for items in _Reader(consumer, plan).items():
            yield block_of([item.to_row(next(lane_seq)) for item in items])
    finally:
        consumer.close()


class _Reader:
    """Turns what a consumer polls into rows, and knows at each moment what they are complete up to."""

    def __init__(self, consumer: KafkaConsumer, plan: SourcePlan):
        self._consumer = consumer
        self._kafka = plan.kafka
        self._interval_s = plan.barrier_interval_s
        self._tracker = SessionTracker.restore(plan.snapshots, plan.session_idle_s)
        self._lag = LagPolicy(plan.lag)
        with _told_as_ours(plan.kafka, "Taking the partitions"):
            self._assignment, lost = _assign(consumer, plan)
        self._next_offsets = {tp: consumer.position(tp) or 0 for tp in self._assignment}
        self._read_until_ns = dict.fromkeys(self._assignment, 0)  # the newest record's Kafka timestamp
        self._letters = lost  # of records without a row, for the next barrier

    def items(self) -> Iterator[list[Segment | Barrier]]:
        """Yield segments as they come and a barrier whenever its time is due, between two records; block by block."""
        yield [self._barrier()]
        timer = BarrierTimer(self._interval_s)
        while True:
            ready: list[Segment | Barrier] = []
            for tp, record in _poll(self._consumer, self._kafka):
                ready += self._take(tp, _record(record))
                if timer.due:
                    ready.append(self._barrier())
                    timer.restart()
                if len(ready) >= BLOCK_ROWS or sum(_n_bytes(item) for item in ready) >= BLOCK_BYTES:
                    yield ready
                    ready = []
            # Between polls everything that was fetched is handled, so the consumer's own position may be taken:
            # it also steps over control records and aborted transactions, which a poll never returns.
            for tp in self._assignment:
                self._next_offsets[tp] = max(self._next_offsets[tp], self._consumer.position(tp) or 0)
            ends = {tp: self._consumer.highwater(tp) for tp in self._assignment}
            _check_ends(self._kafka, ends, self._next_offsets)
            if timer.due:
                ready.append(self._barrier())
                timer.restart()
            if ready:
                yield ready

    def _take(self, tp: TopicPartition, record: Record) -> list[Segment | Barrier]:
        """Return the ends of sessions that it finds silent, and its segment unless it was seen before or is too old."""
        append_ns = record.append_ns
        stream = (record.topic, record.partition, stream_id(record))
        # The last one of a session stays, however old: with it what waits for the session's end is done.
        skip = self._lag.is_too_old(stream, append_ns) and not ends_session(record)
        ends: list[Segment | Barrier] = [*self._tracker.end_silent(record)]
        segment = self._tracker.skip(record) if skip else self._tracker.take(record)
        self._next_offsets[tp] = record.offset + 1
        self._read_until_ns[tp] = append_ns
        if segment is None:
            return ends
        if skip:
            self._lag.skipped(segment.meta)
            self._letters += segment.dead_letters
            return ends
        self._lag.taken(segment.meta)
        return [*ends, segment]

    def _barrier(self) -> Barrier:
        now_ns = time.time_ns()
        positions = []
        for tp, next_offset in self._next_offsets.items():
            end = self._consumer.highwater(tp)
            lag = max(0, end - next_offset) if end is not None else -1
            until_ns = now_ns if lag == 0 else self._read_until_ns[tp]
            positions.append(Position(tp.topic, tp.partition, next_offset, lag, until_ns))
        letters = [*self._letters, *self._lag.take_letters(), *self._tracker.take_letters()]
        self._letters = []
        counters = dict(self._tracker.counters)
        barrier = Barrier(tuple(positions), made_ns=now_ns, counters=counters, dead_letters=tuple(letters))
        return barrier.with_snapshots(STEP_NAME, self._tracker.snapshot())


def _n_bytes(item: Segment | Barrier) -> int:
    return item.meta.n_bytes if isinstance(item, Segment) else 0


def _poll(consumer: KafkaConsumer, kafka: KafkaSettings) -> Iterable[tuple[TopicPartition, Any]]:
    with _told_as_ours(kafka, "Reading"):
        batches = consumer.poll(timeout_ms=POLL_TIMEOUT_MS, max_records=POLL_MAX_RECORDS)
    return [(tp, record) for tp, records in batches.items() for record in records]


def _record(record: Any) -> Record:
    return Record(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        timestamp_ms=-1 if record.timestamp is None else record.timestamp,
        key=record.key,
        value=record.value,
        headers=record.headers or (),
    )


def _assign(consumer: KafkaConsumer, plan: SourcePlan) -> tuple[list[TopicPartition], list[DeadLetter]]:
    """Take the partitions from where they go on; return them, and what tells of records that retention deleted."""
    from kafka.structs import TopicPartition

    assignment = [TopicPartition(*partition) for partition in plan.partitions]
    consumer.assign(assignment)
    begins = consumer.beginning_offsets(assignment) if assignment else {}
    ends = consumer.end_offsets(assignment) if assignment else {}
    _check_ends(plan.kafka, ends, plan.next_offsets)
    latest = [tp for tp in assignment if plan.kafka.start == "latest" and tuple(tp) not in plan.new_partitions]
    # Looked up once and sought to, so that "latest" is a fixed offset from here on.
    starts = {**begins, **{tp: ends[tp] for tp in latest}}
    lost = []
    for tp in assignment:
        next_offset = plan.next_offsets.get((tp.topic, tp.partition), starts[tp])
        if next_offset < begins[tp]:
            lost.append(_lost_records(tp, next_offset, begins[tp]))
            logger.warning("records_lost partition=%s[%d] offsets=%d..%d", *tp, next_offset, begins[tp] - 1)
        consumer.seek(tp, max(next_offset, begins[tp]))
    return assignment, lost


def _lost_records(tp: TopicPartition, first_offset: int, next_offset: int) -> DeadLetter:
    """Return what tells of records that were deleted before they were read; nothing is known of them but where."""
    n = next_offset - first_offset
    return DeadLetter(
        "retention",
        f"offsets {first_offset} to {next_offset - 1} ({n} records) were deleted before they were read",
        stream_id="",
        session="",
        seq=0,
        topic=tp.topic,
        partition=tp.partition,
        offset=first_offset,
        start_ns=time.time_ns(),
        n_bytes=0,
    )


def client_options(kafka: KafkaSettings, kind: Literal["consumer", "producer"]) -> dict[str, Any]:
    """Return the connection options for a consumer or a producer of kafka-python's, secrets resolved.

    What the other one takes is left out: `kafka.client` is for the consumers of lanes and for results' producers.

    Raises:
        SourceError: If neither has such an option.
    """
    from kafka.consumer.group import KafkaConsumer
    from kafka.producer.kafka import KafkaProducer

    options = {"consumer": KafkaConsumer.DEFAULT_CONFIG, "producer": KafkaProducer.DEFAULT_CONFIG}
    known: set[str] = {*options["consumer"], *options["producer"]}
    if unknown := sorted(kafka.client.keys() - known):
        close = get_close_matches(unknown[0], known, 1)
        raise SourceError(
            f"kafka.client has {', '.join(unknown)}, which kafka-python does not know"
            f"{f'; did you mean {close[0]}?' if close else '.'} Correct kafka.client."
        )
    chosen = {name: value for name, value in kafka.client.items() if name in options[kind]}
    return {"bootstrap_servers": kafka.bootstrap_servers.split(","), **resolve_secrets(chosen)}


def open_consumer(kafka: KafkaSettings, group_id: str | None = None) -> KafkaConsumer:
    """Connect a consumer, without a group unless one is named.

    Raises:
        SourceError: If no broker answers; says which address was tried.
    """
    from kafka import KafkaConsumer
    from kafka.errors import AuthorizationError, KafkaError, SaslAuthenticationFailedError

    options: dict[str, Any] = {
        "group_id": group_id,
        "enable_auto_commit": False,
        "isolation_level": "read_committed",  # aborted records of a transactional publisher never existed
        "auto_offset_reset": "none",  # an offset that is gone is an error to be seen, not a silent jump
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": 4 << 20,  # a larger record still comes, alone
        "bootstrap_timeout_ms": 10_000,
        **client_options(kafka, "consumer"),
    }
    try:
        return KafkaConsumer(**options)
    except (SaslAuthenticationFailedError, AuthorizationError) as e:
        raise _refused(kafka, e) from e
    except (KafkaError, OSError, ValueError, AssertionError) as e:
        raise SourceError(
            f"No Kafka broker answers at {kafka.bootstrap_servers} ({e!r}). Start one (`stormline broker`), or set "
            "kafka.bootstrap_servers, and kafka.client for TLS and SASL."
        ) from e


@contextmanager
def _told_as_ours(kafka: KafkaSettings, doing: str) -> Iterator[None]:
    """Raise what Kafka's client raises as a `SourceError`."""
    from kafka.errors import AuthorizationError, KafkaError, SaslAuthenticationFailedError

    try:
        yield
    except (SaslAuthenticationFailedError, AuthorizationError) as e:
        raise _refused(kafka, e) from e
    except KeyError as e:  # what the client raises for a partition that has no leader, or was deleted
        raise SourceError(
            f"{doing} failed at {kafka.bootstrap_servers}: it knows nothing of {e.args[0] if e.args else e!r}. If the "
            "topic was deleted, lanes go on without it a while later; else see whether all brokers are up."
        ) from e
    except KafkaError as e:
        raise SourceError(
            f"{doing} failed at {kafka.bootstrap_servers}: {e!r}. A lane restarts from its checkpoint; see the "
            "brokers' logs if it goes on."
        ) from e


def _refused(kafka: KafkaSettings, error: Exception) -> SourceError:
    return SourceError(
        f"{kafka.bootstrap_servers} refuses us ({error!r}); expected a user that may read {', '.join(kafka.topics)} "
        f"and commit offsets of the group {kafka.group_id}. Correct kafka.client (sasl_mechanism, sasl_plain_username, "
        "sasl_plain_password, ssl_cafile…), or the brokers' access lists."
    )


@dataclass(frozen=True)
class TopicsThere:
    """What one look at the brokers found of the configured topics."""

    kafka: KafkaSettings
    names: tuple[str, ...]  # of all topics there, sorted
    partitions: tuple[tuple[str, int], ...]  # of the configured ones, sorted

    def check(self, read_before: Collection[str] = ()) -> None:
        """Refuse configured topics that were never there: they would be waited for in silence.

        Args:
            read_before: Topics that a checkpoint knows; these may have been deleted, and may come back.

        Raises:
            SourceError: If a topic does not exist, or a pattern fits none; lists those that do.
        """
        known = {*self.names, *read_before}
        missing = [name for name in self.kafka.topics if not any(names_topic(name, topic) for topic in known)]
        if missing:
            raise SourceError(
                f"No topic {', '.join(missing)} at {self.kafka.bootstrap_servers}; there: "
                f"{', '.join(self.names) or 'none'}. Create it, publish to it once, or set kafka.topics."
            )


def look_for_topics(kafka: KafkaSettings) -> TopicsThere:
    """Return what is there of the configured topics; a name with ``*``, ``?`` or ``[`` is a pattern.

    Raises:
        SourceError: If the brokers cannot be asked.
    """
    consumer = open_consumer(kafka)
    try:
        with _told_as_ours(kafka, "Listing the topics"):
            names = sorted(consumer.topics())
            chosen = [t for t in names if any(names_topic(name, t) for name in kafka.topics)]
            partitions = sorted((t, p) for t in chosen for p in consumer.partitions_for_topic(t) or ())
        return TopicsThere(kafka, tuple(names), tuple(partitions))
    finally:
        consumer.close()


def check_offsets_exist(kafka: KafkaSettings, next_offsets: Mapping[tuple[str, int], int]) -> None:
    """Refuse positions that the broker does not hold yet: they would be waited for in silence.

    A position before a partition's beginning is none of these: the lane goes on at what is left, and records the gap.

    Raises:
        TopicAnewError: If a position lies past a partition's end.
    """
    from kafka.structs import TopicPartition

    # While a transaction is open, what is committed may end before what was read; the embedded broker's does.
    every_record = {**kafka.client, "isolation_level": "read_uncommitted"}
    consumer = open_consumer(kafka.model_copy(update={"client": every_record}))
    try:
        partitions = [TopicPartition(*key) for key in next_offsets]
        with _told_as_ours(kafka, "Looking up where the partitions end"):
            ends = consumer.end_offsets(partitions)
        for tp in partitions:
            next_offset = next_offsets[tp.topic, tp.partition]
            if next_offset > ends[tp]:
                raise TopicAnewError(
                    f"{tp.topic}[{tp.partition}]: reading goes on at offset {next_offset}, but "
                    f"{kafka.bootstrap_servers} ends at {ends[tp]}. Was the topic or the broker made anew? Give back "
                    "the old topic, or set output.path to a new folder."
                )
    finally:
        consumer.close()


def _check_ends(
    kafka: KafkaSettings, ends: Mapping[TopicPartition, int | None], next_offsets: Mapping[Any, int]
) -> None:
    """Refuse to wait until a topic made anew has come as far as the old one: what lies before would be lost.

    Args:
        kafka: Where to ask whether it is so: a replica that follows, or has just begun to lead, may be behind.
        ends: As a replica tells them beside records; None where it has not yet.
        next_offsets: By topic and partition.
    """
    known = {(tp.topic, tp.partition): end for tp, end in ends.items() if end is not None}
    past = {key: n for key, end in known.items() if (n := next_offsets.get(key, 0)) > end}
    if past:
        check_offsets_exist(kafka, past)
