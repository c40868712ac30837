"""A live source that is lost, or not there yet: when it is called again, and when it is given up."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from list_producer import ListProducer, ListSender

from stormline.pipeline.publish import publisher
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
    def open_input(spec, options):
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
