"""Reading from Kafka: our source against a bare poll loop, and against Ray Data's own bounded reader.

    python benchmarks/kafka_source.py [--megabytes 256]

Topics with messages of 64 KB, 1 MB and 4 MB at an embedded broker, read from their beginning to their end, in turns:

    ours        `read_forever`, the lane's source: sessions, sequence, barriers, and blocks of rows for Ray
    bare        a KafkaConsumer with the same options, polled; what is read is dropped. The limit
    Ray Data    `ray.data.read_kafka`, which ends at the topic's end; with and without its start-up

Ours runs in a process without Ray here, as it does inside its one read task. Latency is from `send` to the row being
there, of single messages of 64 KB on a quiet topic.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import pyarrow.compute as pc
import ray
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from measuring import in_turns, spent_on, write_result

from stormline.infra.broker import EmbeddedBroker
from stormline.operators.rows import Segment, rows_of
from stormline.pipeline.kafka_source import SourcePlan, open_consumer, read_forever
from stormline.pipeline.settings import KafkaSettings, load_settings

SIZES = {"64 KB": 64 << 10, "1 MB": 1 << 20, "4 MB": 4_000_000}
GOAL = 0.8


def publish(bootstrap: str, topic: str, n: int, n_bytes: int) -> None:
    """Send messages of random bytes: what they are does not matter before they are decoded."""
    producer = KafkaProducer(bootstrap_servers=bootstrap, max_request_size=16 << 20)
    value = os.urandom(n_bytes)
    for seq in range(n):
        producer.send(topic, value, key=b"cam", headers=[("session", b"s"), ("seq", str(seq).encode())])
    producer.flush()
    producer.close()


def by_ours(kafka: KafkaSettings, topic: str, n: int) -> None:
    """Read so many segments."""
    found = 0
    for block in read_forever(SourcePlan(kafka, ((topic, 0),), {})):
        kinds = block.column("rows").combine_chunks().flatten().field("kind")
        found += pc.sum(pc.equal(kinds, Segment.KIND)).as_py()
        if found >= n:
            return


def by_bare(kafka: KafkaSettings, topic: str, n: int) -> None:
    """Poll so many records."""
    consumer: KafkaConsumer = open_consumer(kafka)
    consumer.assign([TopicPartition(topic, 0)])
    consumer.seek_to_beginning()
    found = 0
    while found < n:
        found += sum(len(records) for records in consumer.poll(timeout_ms=50, max_records=16).values())
    consumer.close()


def by_ray(bootstrap: str, topic: str, n: int) -> None:
    """Read the topic as a bounded dataset."""
    dataset = ray.data.read_kafka(topic, bootstrap_servers=bootstrap, timeout_ms=60_000)
    found = sum(batch.num_rows for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    if found != n:
        raise RuntimeError(f"read_kafka gave {found} rows; expected {n}")


def latency_ms(kafka: KafkaSettings, bootstrap: str, n: int) -> dict[str, float]:
    """Return the time from a message's sending to its row, one message after the other."""
    producer = KafkaProducer(bootstrap_servers=bootstrap, max_request_size=16 << 20)
    rows = (row for block in read_forever(SourcePlan(kafka, (("latency", 0),), {})) for row in rows_of(block))
    next(rows)  # the first barrier: it is connected
    took = []
    for seq in range(n):
        began_s = time.perf_counter()
        producer.send("latency", bytes(64 << 10), key=b"cam", headers=[("session", b"s"), ("seq", str(seq).encode())])
        producer.flush()
        while next(rows).kind != Segment.KIND:
            pass
        took.append((time.perf_counter() - began_s) * 1e3)
    producer.close()
    return {"p50": round(statistics.median(took), 1), "p95": round(sorted(took)[int(0.95 * n)], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256, help="in each topic")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    told: dict[str, Any] = {"megabytes": options.megabytes, "goal_ours_over_bare": GOAL, "messages": {}}
    with EmbeddedBroker() as broker:
        bootstrap = broker.bootstrap_servers
        kafka = load_settings(None, [f"kafka.bootstrap_servers={bootstrap}"]).kafka
        broker.create_topic("latency", partitions=1)
        told["latency_ms"] = latency_ms(kafka, bootstrap, 100)
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=1 << 30,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        broker.create_topic("empty", partitions=1)
        publish(bootstrap, "empty", 1, 100)
        for name, n_bytes in SIZES.items():
            topic, n = name.replace(" ", ""), max(8, options.megabytes * (1 << 20) // n_bytes)
            broker.create_topic(topic, partitions=1)
            publish(bootstrap, topic, n, n_bytes)
            took = in_turns(
                {
                    "ours": lambda t=topic, n=n: by_ours(kafka, t, n),
                    "bare": lambda t=topic, n=n: by_bare(kafka, t, n),
                    "ray": lambda t=topic, n=n: by_ray(bootstrap, t, n),
                    "ray's start": lambda: by_ray(bootstrap, "empty", 1),
                },
                options.rounds,
            )
            working_s = max(1e-3, took["ray"] - took["ray's start"])
            spent = spent_on(lambda t=topic, n=n: by_ours(kafka, t, n), times=1)
            told["messages"][name] = each = {
                "ours_mb_per_s": round(n * n_bytes / took["ours"] / 1e6, 1),
                "ours_messages_per_s": round(n / took["ours"], 1),
                "ours_over_bare": round(took["bare"] / took["ours"], 2),
                "ours_over_ray": round(took["ray"] / took["ours"], 2),
                "ours_over_ray_without_its_start": round(working_s / took["ours"], 2),
                "spent_on": spent,
            }
            print(f"{name}: {each}", flush=True)
        ray.shutdown()
    write_result("kafka_source", told, ["ray", "kafka-python"])


if __name__ == "__main__":
    main()
