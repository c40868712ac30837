"""One lane: rows a second through source, decode pool, encode, annotate; without a model and with it; and the limit.

    python benchmarks/lane.py [--segments 400]

Publishes bikes.mp4 in segments of a second to an embedded broker, then counts the rows that reach the commit of a
lane whose encode and annotate steps hand their rows on; then those of a lane that encodes with the built-in model. A
segment is a second of a stream at 2 fps, so the latter is also how many live streams a lane keeps up with. Beside it,
in the same run, the limit: one process that decodes the same segments with the same code, times the number of decoders
or of cores, whichever is smaller; and for the lane with the model, one that decodes and encodes, times the cores.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from fractions import Fraction

import pyarrow as pa
import ray
from measuring import CpuLog, write_result
from ray.data import DataContext

from stormline.infra.broker import EmbeddedBroker
from stormline.operators.decode import Decode
from stormline.operators.encode import Encode
from stormline.operators.rows import Segment, block_of, rows_of
from stormline.operators.sampling import GridSpec
from stormline.pipeline.commands.demo import street_video
from stormline.pipeline.endless_dataset import actor_step, build_dataset, lane_context
from stormline.pipeline.kafka_source import KafkaSource, SourcePlan, look_for_topics, read_forever
from stormline.pipeline.lane import ANNOTATE_CPUS, DECODE_CPUS, ENCODE_CPUS, LoadFromSettings, iter_rows
from stormline.pipeline.publish.publisher import publish_source
from stormline.pipeline.settings import load_settings

GOAL_ROWS_PER_S = 40
FRAME_HW = (64, 64)
DECODERS = 2
MIN_MS = 0.1  # of a part that is worth telling


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


def alone(plan: SourcePlan, n_segments: int) -> tuple[float, float]:
    """Return the segments a second that one process decodes, and that it decodes and encodes."""
    rows = []
    for table in read_forever(plan):
        rows += rows_of(table)
        n_read = sum(row.kind == Segment.KIND for row in rows)
        if n_read >= min(100, n_segments):
            break
    decode = Decode(fps=Fraction(2), frame_hw=FRAME_HW)
    began_s = time.perf_counter()
    decoded = [decode.decode_row(row) if row.kind == Segment.KIND else row for row in rows]
    decode_s = time.perf_counter() - began_s
    encode = encoder()
    began_s = time.perf_counter()
    for row in decoded:
        list(encode(block_of([row])))
    encode_s = time.perf_counter() - began_s
    return n_read / decode_s, n_read / (decode_s + encode_s)


def encoder() -> Encode:
    """Return the step with the built-in model."""
    return Encode(load=LoadFromSettings(load_settings(None).model), grid=GridSpec(Fraction(2), 2 * 10**9), threads=1)


class EncodeHere:
    """The encode step, built where it runs."""

    def __init__(self) -> None:
        self._encode = encoder()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from self._encode(table)


def through_lane(plan: SourcePlan, n_segments: int, encode: type) -> tuple[float, dict[str, float]]:
    """Return the segments a second through the lane, from its first to its last, and each part's CPU ms a segment."""
    before, after = CpuLog(), CpuLog()
    lane_context(DataContext.get_current())
    dataset = build_dataset(
        KafkaSource(plan),
        {
            "decode": actor_step(
                Decode, {"fps": Fraction(2), "frame_hw": FRAME_HW}, size=DECODERS, num_cpus=DECODE_CPUS
            ),
            "encode": actor_step(encode, {}, num_cpus=ENCODE_CPUS),
            "annotate": actor_step(HandOnAsync, {}, calls=32, num_cpus=ANNOTATE_CPUS),
        },
    )
    n, first_s = 0, 0.0
    for row in iter_rows(dataset):
        if row.kind != "barrier":
            n += 1
            if n == 1:
                before.look(os.getpid())
                first_s = time.perf_counter()
        if n == n_segments:
            break
    took_s = time.perf_counter() - first_s
    after.look(os.getpid())
    ms = {part: 1e3 * (s - before.seconds().get(part, 0.0)) / (n - 1) for part, s in after.seconds().items()}
    return (n - 1) / took_s, {part: round(each, 2) for part, each in sorted(ms.items()) if each >= MIN_MS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=400)
    n_segments = parser.parse_args().segments
    with EmbeddedBroker() as broker:
        broker.create_topic("video", partitions=1)
        publish(broker.bootstrap_servers, n_segments)
        settings = load_settings(None, [f"kafka.bootstrap_servers={broker.bootstrap_servers}"])
        plan = SourcePlan(settings.kafka, look_for_topics(settings.kafka).partitions, {})
        decoding, encoding = alone(plan, n_segments)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=512 << 20,
        )
        rate, spent = through_lane(plan, n_segments, HandOn)
        with_model, spent_with_model = through_lane(plan, n_segments, EncodeHere)
        ray.shutdown()
    cores = os.cpu_count() or 1
    report = {
        "segments": n_segments,
        "lane_rows_per_s": round(rate, 1),
        "goal_rows_per_s": GOAL_ROWS_PER_S,
        "decode_alone_rows_per_s": round(decoding, 1),
        "lane_over_decode_limit": round(rate / (decoding * min(DECODERS, cores)), 3),
        "cpu_ms_a_row": spent,
        "with_model": {
            "live_streams": round(with_model, 1),
            "decode_and_encode_alone_rows_per_s": round(encoding, 1),
            "lane_over_limit": round(with_model / (encoding * cores), 3),
            "cpu_ms_a_row": spent_with_model,
        },
    }
    write_result("lane", report, ["ray", "av"])


if __name__ == "__main__":
    main()
