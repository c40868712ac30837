"""A live source that is lost, or not there yet: when it is called again, and when it is given up."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import pytest
from list_producer import ListProducer, ListSender
from rich.console import Console

from stormline.operators.errors import PublishError
from stormline.pipeline.publish import publisher
from stormline.pipeline.publish.group import PublishGroup
from stormline.pipeline.publish.inputs import InputError, SourceSpec
from stormline.pipeline.publish.options import PublishOptions
from stormline.pipeline.publish.publisher import StreamPublisher

CAMERA = SourceSpec("tcp://camera:1", "url", "camera")


class StopAfterWaits(threading.Event):
    """Keeps how long it was waited for, waits for nothing, and is set with the last wait."""

    def __init__(self, n_waits: int):
        super().__init__()
        self._n_waits = n_waits
        self.waits_s: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits_s.append(timeout)
        if len(self.waits_s) == self._n_waits:
            self.set()
        return self.is_set()


@pytest.fixture
def camera_that_is_off(monkeypatch):
    def open_input(spec, options, stop):
        raise InputError(f"cannot open {spec.name}: Connection refused")

    monkeypatch.setattr(publisher, "open_input", open_input)


def make_publisher(stop: threading.Event, **options) -> StreamPublisher:
    return StreamPublisher(CAMERA, ListProducer(ListSender()), PublishOptions(**options), stop)


def test_camera_when_it_is_off_for_half_a_day_then_it_is_still_called(camera_that_is_off):
    stop = StopAfterWaits(1500)
    gone = make_publisher(stop)
    gone.report = replace(gone.report, sessions=("before",))

    report = gone.run()

    assert report.stopped
    assert stop.waits_s[:6] == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert set(stop.waits_s[6:]) == {30.0}


def test_camera_when_it_is_off_at_the_start_and_alone_then_an_error_at_once(camera_that_is_off):
    stop = StopAfterWaits(1)

    with pytest.raises(InputError, match="cannot open tcp://camera:1: Connection refused"):
        make_publisher(stop).run()

    assert stop.waits_s == []


def test_camera_when_it_is_off_at_the_start_and_to_be_waited_for_then_given_up_after_the_tries_allowed(
    camera_that_is_off,
):
    stop = StopAfterWaits(100)
    publisher = make_publisher(stop, awaits_start=True, max_reconnects=3)

    with pytest.raises(PublishError, match=r"was not there in 4 tries; the last one: .*Connection refused"):
        publisher.run()

    assert stop.waits_s == [2.0, 4.0, 8.0]
    assert publisher.report.notices[:2] == (
        "cannot open tcp://camera:1: Connection refused",
        "not there yet; next try in 2 s",
    )


class TalkingGroup(PublishGroup):
    """Keeps what it says, and tells when something cannot be opened; stops when that was said six times."""

    def __init__(self, *names):
        self.said: list[str] = []
        self.says = threading.Event()
        specs = [SourceSpec(name, "url" if "://" in name else "file", name) for name in names]
        producer = ListProducer(ListSender())
        producer.topic, producer.bootstrap = "video", "kafka:9092"
        super().__init__(specs, producer, PublishOptions(), Console(file=io.StringIO()))

    def say(self, text, style=""):
        self.said.append(text)
        if "cannot open" in text:
            self.says.set()
        if sum("cannot open" in said for said in self.said) == 6:
            self._stop.set()


def test_group_when_one_source_fails_then_it_says_why_while_the_others_go_on(monkeypatch):
    group = TalkingGroup("bad.mp4", "long.mp4")
    waited = []

    def open_input(spec, options, stop):
        if spec.source == "long.mp4":
            waited.append(group.says.wait(20))
        raise InputError(f"cannot open {spec.name}: {'End of file' if waited else 'Invalid data'}")

    monkeypatch.setattr(publisher, "open_input", open_input)

    n_failed = group.run()

    assert (n_failed, waited) == (2, [True])
    assert "bad.mp4 failed: cannot open bad.mp4: Invalid data" in group.said
    assert sum("Invalid data" in text for text in group.said) == 1


def test_group_of_cameras_when_one_is_off_at_the_start_then_it_is_called_again(camera_that_is_off, monkeypatch):
    monkeypatch.setattr(publisher, "LONGEST_BACKOFF_S", 0.0)
    group = TalkingGroup("rtsp://one", "rtsp://two")

    n_failed = group.run()

    assert n_failed == 0
    assert sum("not there yet; next try" in text for text in group.said) >= 4
