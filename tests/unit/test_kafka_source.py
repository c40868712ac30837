"""The source at the consumer's own level: what the embedded broker cannot do, retention above all."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from kafka.structs import TopicPartition

from stormline.operators.errors import SourceError
from stormline.operators.rows import Barrier, Segment, rows_of
from stormline.pipeline import kafka_source
from stormline.pipeline.kafka_source import SourcePlan, check_offsets_exist, list_partitions, read_forever
from stormline.pipeline.settings import KafkaSettings

VIDEO, OTHER = TopicPartition("video", 0), TopicPartition("video", 1)


class FakeConsumer:
    """A consumer over logs that begin and end somewhere."""

    def __init__(self, logs, topics=None):
        self.logs = logs  # by partition: (first offset that is left, end)
        self.names = topics or {}
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
                found[tp] = [record(tp, self.at[tp])]
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

    def read(logs, n_rows, *, start="earliest", interval_s=1e9, **plan):
        monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer(logs))
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
    (letter,) = [d for s in segments for d in s.dead_letters if d.reason == "retention"]
    assert (letter.topic, letter.partition, letter.offset, letter.stream_id) == ("video", 0, 25, "")
    assert "offsets 25 to 39 (15 records)" in letter.detail
    assert letter in mine[0].dead_letters


def test_source_when_nothing_is_left_yet_then_no_barrier_steps_over_the_gap(read):
    rows = read({VIDEO: (40, 40)}, 3, interval_s=0.0, next_offsets={("video", 0): 25})

    positions = [Barrier.from_row(row).positions[0].next_offset for row in rows]
    assert positions == [25, 25, 25]


@pytest.mark.parametrize(("new", "expected"), [((), 7), ((("video", 0),), 3)])
def test_source_when_it_starts_at_the_latest_then_a_partition_found_later_still_comes_whole(read, new, expected):
    rows = read({VIDEO: (3, 7)}, 1, start="latest", next_offsets={}, new_partitions=frozenset(new))

    assert Barrier.from_row(rows[0]).positions[0].next_offset == expected


def test_partitions_when_a_topic_is_a_pattern_then_all_that_fit_but_kafkas_own(monkeypatch):
    topics = {"cam-1": 2, "cam-2": 1, "other": 1, "__cam-offsets": 9}
    monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer({}, topics))

    assert list_partitions(KafkaSettings(topics=["cam-*", "cam-1"])) == [("cam-1", 0), ("cam-1", 1), ("cam-2", 0)]
    assert list_partitions(KafkaSettings(topics=["*"]))[-1] == ("other", 0)
    with pytest.raises(SourceError, match=r"No topic gate-\*.*there: .*cam-1"):
        list_partitions(KafkaSettings(topics=["cam-1", "gate-*"]))


def test_offsets_when_past_the_end_then_refused_and_before_the_beginning_let_through(monkeypatch):
    monkeypatch.setattr(kafka_source, "open_consumer", lambda kafka: FakeConsumer({VIDEO: (40, 43)}))

    check_offsets_exist(KafkaSettings(), {("video", 0): 25})
    with pytest.raises(SourceError, match=r"goes on at offset 44, .* ends at 43"):
        check_offsets_exist(KafkaSettings(), {("video", 0): 44})
