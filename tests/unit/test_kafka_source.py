"""The source at the consumer's own level: what the embedded broker cannot do, retention above all."""

from __future__ import annotations

import itertools
import threading
import time
from types import SimpleNamespace

import kafka
import pytest
from kafka.errors import KafkaConnectionError, SaslAuthenticationFailedError, TopicAuthorizationFailedError
from kafka.structs import TopicPartition

from stormline.operators.errors import SourceError, TopicAnewError
from stormline.operators.rows import Barrier, Segment, rows_of
from stormline.pipeline import kafka_source
from stormline.pipeline.kafka_source import (
    SourcePlan,
    check_offsets_exist,
    client_options,
    look_for_topics,
    open_consumer,
    read_forever,
)
from stormline.pipeline.partition_watch import PartitionWatch
from stormline.pipeline.sessions import Record, SessionTracker
from stormline.pipeline.settings import KafkaSettings, LagRule

VIDEO, OTHER = TopicPartition("video", 0), TopicPartition("video", 1)


class FakeConsumer:
    """A consumer over logs that begin and end somewhere."""

    def __init__(self, logs, topics=None, make=None):
        self.logs = logs  # by partition: (first offset that is left, end)
        self.names = topics or {}
        self.make = make or record  # (partition, offset) → record, or None where a compacted topic has a hole
        self.at = {}

    def assign(self, partitions):
        self.at = dict.fromkeys(partitions)

    def seek(self, tp, offset):
        begin, end = self.logs[tp]
        assert begin <= offset <= end, f"offset {offset} of {tp} is out of range"
        self.at[tp] = offset

    def position(self, tp):
        return self.at[tp]

    def beginning_offsets(self, partitions):
        return {tp: self.logs[tp][0] for tp in partitions}

    def end_offsets(self, partitions):
        return {tp: self.logs[tp][1] for tp in partitions}

    def highwater(self, tp):
        return self.logs[tp][1]

    def poll(self, timeout_ms, max_records):
        found = {}
        for tp, (_, end) in self.logs.items():
            if self.at[tp] < end:
                made = self.make(tp, self.at[tp])
                found |= {} if made is None else {tp: [made]}
                self.at[tp] += 1
        return found

    def topics(self):
        return set(self.names)

    def partitions_for_topic(self, topic):
        return set(range(self.names[topic]))

    def close(self):
        pass


def record(tp, offset):
    return SimpleNamespace(
        topic=tp.topic, partition=tp.partition, offset=offset, timestamp=1000 * offset, key=b"cam", value=b"m",
        headers=[("session", b"s"), ("seq", b"%d" % offset), ("start_ns", b"%d" % (offset * 10**9))],
    )  # fmt: skip


@pytest.fixture
def read(monkeypatch):
    """Return a function that reads the first rows of a plan from a fake consumer."""

    def read(logs, n_rows, *, start="earliest", interval_s=1e9, make=None, **plan):
        monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer(logs, make=make))
        partitions = tuple((tp.topic, tp.partition) for tp in logs)
        plan = SourcePlan(KafkaSettings(start=start), partitions, barrier_interval_s=interval_s, **plan)
        rows = itertools.chain.from_iterable(rows_of(block) for block in read_forever(plan))
        return list(itertools.islice(rows, n_rows))

    return read


def test_source_when_retention_deleted_what_it_wants_then_goes_on_and_records_the_gap(read):
    rows = read({VIDEO: (40, 43), OTHER: (0, 1)}, 5, next_offsets={("video", 0): 25, ("video", 1): 0})

    segments = [Segment.from_row(row) for row in rows if row.kind == Segment.KIND]
    mine = [s for s in segments if s.meta.partition == 0]
    assert [s.meta.offset for s in mine] == [40, 41, 42]
    first = Barrier.from_row(rows[0])
    (letter,) = first.dead_letters
    assert (letter.reason, letter.topic, letter.partition, letter.offset) == ("retention", "video", 0, 25)
    assert "offsets 25 to 39 (15 records)" in letter.detail
    assert [p.next_offset for p in first.positions] == [40, 0]


def test_source_when_a_stream_falls_silent_then_its_session_ends_before_the_record_that_shows_it(read):
    def make(tp, offset):
        key = b"silent" if offset < 3 else b"cam"
        return SimpleNamespace(**vars(record(tp, offset)) | {"key": key, "timestamp": 1000 * (offset + 1)})

    rows = read({VIDEO: (0, 100)}, 100, next_offsets={}, make=make, session_idle_s=40.0)

    metas = [Segment.from_row(row).meta for row in rows if row.kind == Segment.KIND]
    at = next(i for i, meta in enumerate(metas) if meta.end)
    end, following = metas[at], metas[at + 1]
    assert (end.stream_id, end.session, end.seq, end.n_bytes) == ("silent", "s", 3, 0)
    assert (end.offset, following.stream_id, following.offset) == (43, "cam", 43)
    assert sum(meta.end for meta in metas) == 1
    assert [row.lane_seq for row in rows] == list(range(100))


def test_source_when_retention_left_nothing_then_told_once_and_nothing_waits(read):
    rows = read({VIDEO: (40, 40)}, 3, interval_s=0.0, next_offsets={("video", 0): 25})

    barriers = [Barrier.from_row(row) for row in rows]
    assert [(b.positions[0].next_offset, b.positions[0].lag) for b in barriers] == [(40, 0)] * 3
    assert [[letter.reason for letter in b.dead_letters] for b in barriers] == [["retention"], [], []]


def test_source_when_the_first_record_that_retention_left_is_a_repeat_then_the_gap_is_told_all_the_same(read):
    seen = SessionTracker()
    seen.take(Record("video", 0, 24, 0, b"cam", b"m", record(VIDEO, 40).headers))
    plan = {"next_offsets": {("video", 0): 25}, "snapshots": seen.snapshot()}

    rows = read({VIDEO: (40, 41)}, 3, interval_s=0.0, **plan)

    barriers = [Barrier.from_row(row) for row in rows]
    assert barriers[-1].positions[0].next_offset == 41
    assert barriers[-1].counters["duplicates"] == 1
    assert [letter.reason for b in barriers for letter in b.dead_letters] == ["retention"]


@pytest.mark.parametrize(("new", "expected"), [((), 7), ((("video", 0),), 3)])
def test_source_when_it_starts_at_the_latest_then_a_partition_found_later_still_comes_whole(read, new, expected):
    rows = read({VIDEO: (3, 7)}, 1, start="latest", next_offsets={}, new_partitions=frozenset(new))

    assert Barrier.from_row(rows[0]).positions[0].next_offset == expected


def test_partitions_when_a_topic_is_a_pattern_then_all_that_fit_but_kafkas_own(monkeypatch):
    topics = {"cam-1": 2, "cam-2": 1, "other": 1, "__cam-offsets": 9}
    monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer({}, topics))

    def partitions(*names):
        there = look_for_topics(KafkaSettings(topics=list(names)))
        there.check()
        return list(there.partitions)

    assert partitions("cam-*", "cam-1") == [("cam-1", 0), ("cam-1", 1), ("cam-2", 0)]
    assert partitions("*")[-1] == ("other", 0)
    with pytest.raises(SourceError, match=r"No topic gate-\*.*there: .*cam-1"):
        partitions("cam-1", "gate-*")


def test_offsets_when_past_the_end_then_refused_and_before_the_beginning_let_through(monkeypatch):
    monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer({VIDEO: (40, 43)}))

    check_offsets_exist(KafkaSettings(), {("video", 0): 25})
    with pytest.raises(SourceError, match=r"goes on at offset 44, .* ends at 43"):
        check_offsets_exist(KafkaSettings(), {("video", 0): 44})


class HighwaterConsumer(FakeConsumer):
    """Says `highwater` of where its logs end once it is at `end`, with a log that ends at `asked` from then on."""

    def __init__(self, end, highwater, asked):
        super().__init__({VIDEO: (0, end)})
        self.end, self.said, self.asked = end, highwater, asked

    def highwater(self, tp):
        return self.said if self.at[tp] == self.end else self.end

    def end_offsets(self, partitions):
        ends = super().end_offsets(partitions)
        return ends if self.at[VIDEO] != self.end else dict.fromkeys(ends, self.asked)


def read_from(consumer, monkeypatch, n_rows, next_offset=0):
    monkeypatch.setattr(kafka_source, "open_consumer", lambda settings: consumer)
    plan = SourcePlan(KafkaSettings(), (("video", 0),), {("video", 0): next_offset}, barrier_interval_s=0.0)
    rows = itertools.chain.from_iterable(rows_of(block) for block in read_forever(plan))
    return list(itertools.islice(rows, n_rows))


@pytest.mark.parametrize("highwater", [0, 2])
def test_source_when_the_topic_is_made_anew_while_it_is_read_then_refused(monkeypatch, highwater):
    consumer = HighwaterConsumer(3, highwater, asked=highwater)

    with pytest.raises(TopicAnewError, match=rf"video\[0\]: .* goes on at offset 3, .* ends at {highwater}\."):
        read_from(consumer, monkeypatch, 20)


@pytest.mark.parametrize(
    ("highwater", "asked"),
    [(None, 3), (3, 3), (4, 4), (2, 3)],
    ids=["not known yet", "all read", "more there", "of a replica that is behind"],
)
def test_source_when_the_end_is_not_before_what_was_read_then_it_goes_on(monkeypatch, highwater, asked):
    rows = read_from(HighwaterConsumer(3, highwater, asked), monkeypatch, 20)

    assert Barrier.from_row(rows[-1]).positions[0].next_offset == 3


def test_source_when_a_transaction_is_open_as_a_lane_starts_then_it_goes_on(monkeypatch):
    """The embedded broker then says that what is committed ends at 0."""

    class OpenTransaction(FakeConsumer):
        def end_offsets(self, partitions):
            return dict.fromkeys(partitions, 0)

    def open_consumer(settings):
        every_record = settings.client.get("isolation_level") == "read_uncommitted"
        return (FakeConsumer if every_record else OpenTransaction)({VIDEO: (0, 3)})

    monkeypatch.setattr(kafka_source, "open_consumer", open_consumer)
    plan = SourcePlan(KafkaSettings(), (("video", 0),), {("video", 0): 3}, barrier_interval_s=0.0)

    (row,) = rows_of(next(read_forever(plan)))

    assert Barrier.from_row(row).positions[0].next_offset == 3


def test_source_when_a_lane_goes_on_past_the_end_of_a_topic_made_anew_then_refused(monkeypatch):
    with pytest.raises(TopicAnewError, match=r"goes on at offset 44, .* ends at 43"):
        read_from(FakeConsumer({VIDEO: (0, 43)}), monkeypatch, 1, next_offset=44)


def test_source_when_a_compacted_topic_has_holes_then_the_rest_comes_and_positions_step_over_them(read):
    """The fake does what Kafka's consumer does at a hole: it polls nothing there, and its position goes on."""
    rows = read(
        {VIDEO: (0, 6)},
        20,
        interval_s=0.0,
        next_offsets={},
        make=lambda tp, offset: None if offset in (1, 2, 5) else record(tp, offset),
    )

    segments = [Segment.from_row(row).meta for row in rows if row.kind == Segment.KIND]
    assert [(s.offset, s.gap_segments) for s in segments] == [(0, 0), (3, 2), (4, 0)]
    assert Barrier.from_row(rows[-1]).positions[0].next_offset == 6


def test_source_when_a_transaction_was_aborted_then_its_records_never_existed_and_no_gap_is_told(read):
    """The client leaves aborted records and control markers out and steps over them; the fake does, too."""
    kept = {0: 0, 4: 1, 9: 2}  # offset → seq; 1 is a marker, 2 an aborted second segment, and so on

    def make(tp, offset):
        made = record(tp, offset)
        made.headers = [("session", b"s"), ("seq", b"%d" % kept.get(offset, 0))]
        return made if offset in kept else None

    rows = read({VIDEO: (0, 11)}, 30, interval_s=0.0, next_offsets={}, make=make)

    segments = [Segment.from_row(row) for row in rows if row.kind == Segment.KIND]
    assert [(s.meta.offset, s.meta.seq, s.meta.gap_segments, s.dead_letters) for s in segments] == [
        (0, 0, 0, ()),
        (4, 1, 0, ()),
        (9, 2, 0, ()),
    ]
    position = Barrier.from_row(rows[-1]).positions[0]
    assert (position.next_offset, position.lag) == (11, 0), "what was aborted last would be lag for ever"


def aged(spacing_s, n, stream=b"cam"):
    """Return a maker of records, the newest of `n` as old as now, each so much older than the one after it."""
    now_ms = time.time_ns() // 1_000_000

    def make(tp, offset):
        made = record(tp, offset)
        made.timestamp = now_ms - round((n - 1 - offset) * spacing_s * 1000)
        made.key = stream
        return made

    return make


def test_source_when_a_backlog_is_too_old_then_it_is_skipped_to_the_lower_limit_and_told(read):
    rows = read(
        {VIDEO: (0, 12)},
        40,
        next_offsets={},
        make=aged(1000, 12),
        interval_s=0.0,
        lag=(LagRule(streams="cam", policy="skip", max_lag_s=5500, resume_lag_s=2500),),
    )

    taken = [Segment.from_row(row).meta for row in rows if row.kind == Segment.KIND]
    assert [(meta.offset, meta.gap_segments) for meta in taken] == [(9, 9), (10, 0), (11, 0)]
    told = 0
    for row in rows[: rows.index(next(row for row in rows if row.kind == Segment.KIND))]:
        barrier = Barrier.from_row(row)
        told += len(barrier.dead_letters)
        assert barrier.positions[0].next_offset == told, "a barrier steps over what it does not tell of"
        assert {letter.reason for letter in barrier.dead_letters} <= {"skipped"}
    assert told == 9


def test_source_when_it_skips_between_two_barriers_then_one_letter_has_the_range_and_the_times(read, monkeypatch):
    clock = itertools.count(0.0, 1.0)  # a second passes with each look
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    rows = read({VIDEO: (0, 8)}, 5, next_offsets={}, make=aged(1000, 8), interval_s=13.0,
                lag=(LagRule(policy="skip", max_lag_s=2500, resume_lag_s=2500),))  # fmt: skip

    (letter,) = [d for row in rows if row.kind == Barrier.KIND for d in Barrier.from_row(row).dead_letters]
    assert "5 records, offsets 0 to 4, 1970-01-01T00:00:00.000+00:00 to 1970-01-01T00:00:04.000+00:00" in letter.detail
    assert "older than 2500 s when their turn came" in letter.detail
    assert (letter.stream_id, letter.offset, letter.n_bytes) == ("cam", 0, 5)


def accounted(rows, n):
    """Return what became of each offset: taken or skipped, by the rows that are committed."""
    fate = {}
    for row in rows:
        if row.kind == Segment.KIND:
            meta = Segment.from_row(row).meta
            fate.setdefault(meta.offset, []).append("taken")
            continue
        for letter in Barrier.from_row(row).dead_letters:
            numbers = letter.detail.split("offsets ")[1].split(",")[0].split(" to ")
            for offset in range(int(numbers[0]), int(numbers[1]) + 1):
                fate.setdefault(offset, []).append(letter.reason)
    return [fate.get(offset) for offset in range(n)]


@pytest.mark.parametrize("n_before", range(1, 12))
def test_source_when_a_lane_that_skips_crashes_anywhere_then_each_record_is_accounted_for_once(read, n_before):
    plan = {
        "make": aged(1000, 12),
        "interval_s": 0.0,
        "lag": (LagRule(policy="skip", max_lag_s=5500, resume_lag_s=2500),),
    }
    before = read({VIDEO: (0, 12)}, n_before, next_offsets={}, **plan)
    while before[-1].kind != Barrier.KIND:  # what came after the last barrier was not committed
        before.pop()
    barrier = Barrier.from_row(before[-1])
    committed = {("video", 0): barrier.positions[0].next_offset}
    snapshots = {(key.topic, key.partition): bytes(data) for key, data in barrier.snapshots.items()}

    after = read({VIDEO: (0, 12)}, 30, next_offsets=committed, snapshots=snapshots, **plan)

    fate = accounted([*before, *after], 12)
    assert [len(each) for each in fate] == [1] * 12
    taken = [Segment.from_row(row) for row in [*before, *after] if row.kind == Segment.KIND]
    assert [s.meta.offset for s in taken][-2:] == [10, 11]
    assert "gap" not in [letter.reason for s in taken for letter in s.dead_letters]
    assert taken[0].meta.gap_segments == taken[0].meta.offset
    assert taken[0].meta.session_start_ns == 0, "the grid's origin is that of the first record, skipped or not"


def test_source_when_the_last_record_of_a_session_is_too_old_then_it_is_taken_all_the_same(read):
    def make(tp, offset):
        made = aged(1000, 100)(tp, offset)
        made.headers = [*made.headers, ("end", b"1")] if offset == 2 else made.headers
        return made

    rule = LagRule(policy="skip", max_lag_s=1)
    rows = read({VIDEO: (0, 3)}, 20, next_offsets={}, make=make, interval_s=0.0, lag=(rule,))

    (last,) = [Segment.from_row(row).meta for row in rows if row.kind == Segment.KIND]
    assert (last.offset, last.end, last.gap_segments) == (2, True, 2)


@pytest.mark.parametrize("timestamp", [None, -1, 1_700_000_000_000_000], ids=["none", "-1", "microseconds"])
def test_source_when_records_have_no_usable_timestamp_then_none_is_too_old_and_one_ends_what_is_skipped(
    read, timestamp
):
    def make(tp, offset):
        made = aged(1000, 100)(tp, offset)
        made.timestamp = made.timestamp if offset == 0 else timestamp
        return made

    rows = read({VIDEO: (0, 4)}, 20, next_offsets={}, make=make, interval_s=0.0, lag=(LagRule(policy="skip"),))

    metas = [Segment.from_row(row).meta for row in rows if row.kind == Segment.KIND]
    assert [(meta.offset, meta.gap_segments) for meta in metas] == [(1, 1), (2, 0), (3, 0)]


def test_source_when_a_stream_waits_then_another_of_its_partition_may_still_be_skipped(read):
    def make(tp, offset):
        made = aged(1000, 100)(tp, offset // 2)
        made.key, made.offset = (b"late", b"kept")[offset % 2], offset
        return made

    rules = (LagRule(streams=["late", "none-*"], policy="skip", max_lag_s=60), LagRule(streams="*"))
    rows = read({VIDEO: (0, 8)}, 5, next_offsets={}, make=make, lag=rules)

    assert [Segment.from_row(row).meta.stream_id for row in rows if row.kind == Segment.KIND] == ["kept"] * 4


def test_barrier_when_behind_or_at_the_end_then_it_says_up_to_when_all_was_read(read):
    behind = read({VIDEO: (0, 9)}, 4, next_offsets={}, interval_s=0.0)
    at_end = read({VIDEO: (0, 1)}, 4, next_offsets={}, interval_s=0.0)

    first, second = [Barrier.from_row(row) for row in behind if row.kind == Barrier.KIND][:2]
    assert (first.positions[0].lag, first.positions[0].until_ns) == (9, 0)
    assert (second.positions[0].lag, second.positions[0].until_ns) == (8, 0 * 10**9)
    last = Barrier.from_row([row for row in at_end if row.kind == Barrier.KIND][-1])
    assert (last.positions[0].lag, last.positions[0].until_ns) == (0, last.made_ns)


def test_source_when_the_broker_refuses_the_user_then_the_error_says_so_and_what_to_correct(monkeypatch):
    """The embedded broker has no users; the client's answer is faked."""

    def refuse(**options):
        raise SaslAuthenticationFailedError("Authentication failed: Invalid username or password")

    monkeypatch.setattr(kafka, "KafkaConsumer", refuse)

    with pytest.raises(SourceError, match=r"refuses us \(.*Invalid username.*Correct kafka\.client"):
        look_for_topics(KafkaSettings())


class FailingConsumer(FakeConsumer):
    """Fails once it has come to some offset, as the client does when brokers are away or rights are taken."""

    def __init__(self, logs, at, error):
        super().__init__(logs)
        self.fails_at, self.error = at, error

    def poll(self, timeout_ms, max_records):
        if any(offset >= self.fails_at for offset in self.at.values()):
            raise self.error
        return super().poll(timeout_ms, max_records)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KafkaConnectionError("broker restarting"), r"Reading failed at .*broker restarting.*restarts from its checkp"),
        (TopicAuthorizationFailedError("video"), r"refuses us .*may read video.*access lists"),
    ],
)
def test_source_when_the_broker_goes_and_comes_back_with_its_offsets_then_each_record_comes_once(
    read, monkeypatch, error, said
):
    """The embedded broker forgets everything when it stops; what the client tells of a restart is faked."""
    rows = []
    failing = FailingConsumer({VIDEO: (0, 6)}, 3, error)
    monkeypatch.setattr(kafka_source, "open_consumer", lambda settings: failing)
    blocks = read_forever(SourcePlan(KafkaSettings(), (("video", 0),), {}, barrier_interval_s=0.0))
    with pytest.raises(SourceError, match=said):
        rows.extend(row for block in blocks for row in rows_of(block))
    last = next(i for i in reversed(range(len(rows))) if rows[i].kind == Barrier.KIND)
    barrier = Barrier.from_row(rows[last])
    snapshots = {(key.topic, key.partition): bytes(data) for key, data in barrier.snapshots.items()}

    rows[last + 1 :] = read(
        {VIDEO: (0, 6)},
        20,
        interval_s=0.0,
        next_offsets={("video", 0): barrier.positions[0].next_offset},
        snapshots=snapshots,
    )

    metas = [Segment.from_row(row).meta for row in rows if row.kind == Segment.KIND]
    assert [(m.offset, m.seq, m.gap_segments) for m in metas] == [(n, n, 0) for n in range(6)]


def test_watch_when_partitions_are_added_and_brokers_are_away_for_a_while_then_each_is_found_once(monkeypatch):
    asked, answers = threading.Event(), [{"video": 2}, None, {"video": 3}, {"video": 3, "video-2": 1}]

    class Consumer(FakeConsumer):
        def topics(self):
            if self.names is None:
                raise KafkaConnectionError("away")
            return super().topics()

    def open_consumer(settings):
        if not answers:
            asked.set()
        consumer = Consumer({}, {"video": 3, "video-2": 1})
        consumer.names = answers.pop(0) if answers else consumer.names
        return consumer

    monkeypatch.setattr(kafka_source, "open_consumer", open_consumer)
    watch = PartitionWatch(KafkaSettings(topics=["video*"], discover_s=0.001), [("video", 0), ("video", 1)])
    watch.start()
    assert asked.wait(20)
    watch.stop()

    assert watch.take() == [("video", 2), ("video-2", 0)]
    assert watch.take() == []


def test_watch_when_a_topic_is_gone_for_two_looks_then_said_once_and_new_when_it_is_back(monkeypatch):
    both, one = {"cam-1": 1, "cam-2": 1}, {"cam-1": 1}
    asked, answers = threading.Event(), [one, both, one, one, one, both]

    def open_consumer(settings):
        if len(answers) == 1:
            asked.set()
        return FakeConsumer({}, answers.pop(0) if len(answers) > 1 else answers[0])

    monkeypatch.setattr(kafka_source, "open_consumer", open_consumer)
    watch = PartitionWatch(KafkaSettings(topics=["cam-*"], discover_s=0.001), [("cam-1", 0), ("cam-2", 0)])
    watch.start()
    assert asked.wait(20)
    watch.stop()
    watch._thread.join(20)

    assert watch.take_gone() == [("cam-2", 0)]
    assert watch.take() == [("cam-2", 0)]
    assert watch.take_gone() == []


def test_watch_when_a_topic_comes_and_goes_between_two_calls_then_it_is_not_new(monkeypatch):
    asked, answers = threading.Event(), [{"cam-1": 1, "cam-2": 1}, {"cam-1": 1}, {"cam-1": 1}, {"cam-1": 1}]

    def open_consumer(settings):
        if len(answers) == 1:
            asked.set()
        return FakeConsumer({}, answers.pop(0) if len(answers) > 1 else answers[0])

    monkeypatch.setattr(kafka_source, "open_consumer", open_consumer)
    watch = PartitionWatch(KafkaSettings(topics=["cam-*"], discover_s=0.001), [("cam-1", 0)])
    watch.start()
    assert asked.wait(20)
    watch.stop()
    watch._thread.join(20)

    assert (watch.take_gone(), watch.take()) == ([("cam-2", 0)], [])


@pytest.mark.parametrize(
    ("topics", "before", "after", "gone", "found"),
    [
        (["video", "extra"], {"video": 1, "extra": 1}, {"video": 2}, [("extra", 0)], [("video", 1)]),
        (["cam-*"], {"cam-1": 1}, {}, [("cam-1", 0)], []),
    ],
    ids=["named outright", "last of a pattern"],
)
def test_watch_when_nothing_is_left_of_a_configured_topic_then_said_and_others_are_still_looked_at(
    monkeypatch, topics, before, after, gone, found
):
    asked, answers = threading.Event(), [after] * 3

    def open_consumer(settings):
        if len(answers) == 1:
            asked.set()
        return FakeConsumer({}, answers.pop(0) if len(answers) > 1 else answers[0])

    monkeypatch.setattr(kafka_source, "open_consumer", open_consumer)
    watch = PartitionWatch(KafkaSettings(topics=topics, discover_s=0.001), [(topic, 0) for topic in before])
    watch.start()
    assert asked.wait(20)
    watch.stop()
    watch._thread.join(20)

    assert (watch.take_gone(), watch.take()) == (gone, found)


def test_topics_when_a_checkpoint_knows_one_that_is_gone_then_not_refused(monkeypatch):
    monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer({}, {"cam-1": 1}))

    there = look_for_topics(KafkaSettings(topics=["cam-*", "gate-*", "video"]))

    assert there.partitions == (("cam-1", 0),)
    there.check(read_before=["gate-1", "video"])
    with pytest.raises(SourceError, match=r"No topic video at .*; there: cam-1\."):
        there.check(read_before=["gate-1"])


def test_offsets_when_the_client_knows_nothing_of_a_partition_then_told_as_ours(monkeypatch):
    monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer({}))

    with pytest.raises(SourceError, match=r"knows nothing of .*partition=0"):
        check_offsets_exist(KafkaSettings(), {("video", 0): 25})


def test_options_when_they_are_for_one_kind_of_client_then_the_other_does_without():
    kafka = KafkaSettings(client={"max_partition_fetch_bytes": 1 << 24, "compression_type": "gzip", "client_id": "me"})

    for_both = {"bootstrap_servers", "client_id"}
    assert client_options(kafka, "consumer").keys() == for_both | {"max_partition_fetch_bytes"}
    assert client_options(kafka, "producer").keys() == for_both | {"compression_type"}


def test_options_when_no_client_has_one_then_said_what_was_meant():
    with pytest.raises(SourceError, match=r"sasl_mechansm.*did you mean sasl_mechanism\?"):
        open_consumer(KafkaSettings(client={"sasl_mechansm": "PLAIN"}))
