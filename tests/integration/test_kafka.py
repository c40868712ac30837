"""The source over the real broker: transactions, and several partitions."""

from __future__ import annotations

import itertools

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from stormline.operators.rows import Barrier, Segment, rows_of
from stormline.pipeline.kafka_source import SourcePlan, read_forever
from stormline.pipeline.settings import KafkaSettings


def create_topic(bootstrap, name, partitions):
    admin = AdminClient({"bootstrap.servers": bootstrap})  # its futures end with it
    for future in admin.create_topics([NewTopic(name, partitions, 1)]).values():
        future.result(20)


def read_until(bootstrap, topic, n_partitions, end):
    """Read until a barrier says that so many offsets of each partition are behind it; return segments and barrier."""
    partitions = tuple((topic, p) for p in range(n_partitions))
    plan = SourcePlan(KafkaSettings(bootstrap_servers=bootstrap, topics=[topic]), partitions, {}, {}, 0.05)
    segments = []
    for row in itertools.chain.from_iterable(rows_of(block) for block in read_forever(plan)):
        if row.kind == Segment.KIND:
            segments.append(Segment.from_row(row))
            continue
        barrier = Barrier.from_row(row)
        if {p.partition: p.next_offset for p in barrier.positions} == end:
            return segments, barrier
    raise AssertionError("unreachable")


def headers(seq):
    return {"session": "s", "seq": str(seq)}


def test_source_when_a_producer_is_transactional_then_its_records_come_and_control_markers_are_stepped_over(broker):
    """Aborted transactions are tested with a fake client: the embedded broker hands out their records to everybody."""
    create_topic(broker, "transactions", 1)
    producer = Producer({"bootstrap.servers": broker, "transactional.id": "camera"})
    producer.init_transactions(20)
    for seq in range(3):
        producer.begin_transaction()
        producer.produce("transactions", b"media", "cam", headers=headers(seq))
        producer.commit_transaction(20)

    segments, barrier = read_until(broker, "transactions", 1, {0: 6})

    assert [(s.meta.offset, s.meta.seq, s.meta.gap_segments) for s in segments] == [(0, 0, 0), (2, 1, 0), (4, 2, 0)]
    assert [(p.next_offset, p.lag) for p in barrier.positions] == [(6, 0)]


def test_source_when_several_partitions_have_records_and_repeats_then_each_stream_is_whole_and_in_order(broker):
    create_topic(broker, "several", 3)
    producer = Producer({"bootstrap.servers": broker})
    for seq in (0, 1, 1, 0, 2):
        for partition in range(3):
            producer.produce("several", b"media", f"cam-{partition}", partition=partition, headers=headers(seq))
    assert producer.flush(20) == 0

    segments, barrier = read_until(broker, "several", 3, {0: 5, 1: 5, 2: 5})

    for partition in range(3):
        mine = [s.meta for s in segments if s.meta.partition == partition]
        assert [(m.stream_id, m.seq) for m in mine] == [(f"cam-{partition}", seq) for seq in range(3)]
    assert barrier.counters["duplicates"] == 6
