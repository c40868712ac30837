"""One lane with a null encoder: rows a second through source, decode pool, encode, annotate; and its limit.

    python benchmarks/lane.py [--segments 400]

Publishes bikes.mp4 in segments of a second to an embedded broker, then counts the rows that reach the commit of a
lane whose encode and annotate steps hand their rows on. Beside it, in the same run, the limit: one process that
decodes the same segments with the same code, times the number of decoders or of cores, whichever is smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import ray
from ray.data import DataContext

from stormline.infra.broker import EmbeddedBroker
from stormline.operators.decode import Decode
from stormline.operators.rows import Segment
from stormline.pipeline.commands.demo import street_video
from stormline.pipeline.endless_dataset import actor_step, build_dataset, lane_context
from stormline.pipeline.kafka_source import KafkaSource, SourcePlan, list_partitions, read_forever
from stormline.pipeline.lane import ANNOTATE_CPUS, DECODE_CPUS, ENCODE_CPUS, iter_rows
from stormline.pipeline.publish.publisher import publish_source
from stormline.pipeline.settings import load_settings

GOAL_ROWS_PER_S = 40
FRAME_HW = (64, 64)
DECODERS = 2
RESULT = Path(__file__).parent / "results" / "lane.json"


class HandOn:
    """A step without work."""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield table


class HandOnAsync:
    """A step without work, with many calls under way."""

    async def __call__(self, table: pa.Table):
        yield table


def publish(bootstrap: str, n_segments: int) -> None:
    publish_source(
        str(street_video()),
        bootstrap=bootstrap,
        topic="video",
        stream_id="bikes",
        method="transcode",
        segment_s=1.0,
        loop=-(-n_segments // 10),
    )


def decode_alone(plan: SourcePlan, n_segments: int) -> float:
    """Return the segments a second that one process decodes."""
    from stormline.operators.rows import rows_of

    rows = (row for table in read_forever(plan) for row in rows_of(table) if row.kind == Segment.KIND)
    segments = [next(rows) for _ in range(min(100, n_segments))]
    decode = Decode(fps=Fraction(2), frame_hw=FRAME_HW)
    began_s = time.perf_counter()
    for row in segments:
        decode.decode_row(row)
    return len(segments) / (time.perf_counter() - began_s)


def through_lane(plan: SourcePlan, n_segments: int) -> float:
    """Return the segments a second through the lane, from its first to its last."""
    lane_context(DataContext.get_current())
    dataset = build_dataset(
        KafkaSource(plan),
        {
            "decode": actor_step(
                Decode, {"fps": Fraction(2), "frame_hw": FRAME_HW}, size=DECODERS, num_cpus=DECODE_CPUS
            ),
            "encode": actor_step(HandOn, {}, num_cpus=ENCODE_CPUS),
            "annotate": actor_step(HandOnAsync, {}, calls=32, num_cpus=ANNOTATE_CPUS),
        },
    )
    n, first_s = 0, 0.0
    for row in iter_rows(dataset):
        if row.kind != "barrier":
            n += 1
            first_s = first_s or time.perf_counter()
        if n == n_segments:
            break
    return (n - 1) / (time.perf_counter() - first_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=400)
    n_segments = parser.parse_args().segments
    with EmbeddedBroker() as broker:
        broker.create_topic("video", partitions=1)
        publish(broker.bootstrap_servers, n_segments)
        settings = load_settings(None, [f"kafka.bootstrap_servers={broker.bootstrap_servers}"])
        plan = SourcePlan(settings.kafka, tuple(list_partitions(settings.kafka)), {})
        alone = decode_alone(plan, n_segments)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=512 << 20,
        )
        rate = through_lane(plan, n_segments)
        ray.shutdown()
    limit = alone * min(DECODERS, os.cpu_count() or 1)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "ray": ray.__version__,
        "segments": n_segments,
        "lane_rows_per_s": round(rate, 1),
        "goal_rows_per_s": GOAL_ROWS_PER_S,
        "decode_alone_rows_per_s": round(alone, 1),
        "lane_over_decode_limit": round(rate / limit, 3),
        "load_average_before": os.getloadavg()[1],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
