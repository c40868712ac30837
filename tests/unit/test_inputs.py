"""Reading a source packet by packet: live ones that send something, but no video, or no times."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from small_media import picture

from stormline.pipeline.publish import inputs
from stormline.pipeline.publish.inputs import TIMEOUT_S, InputError, MediaInput, SourceSpec

FPS = 25
N_PICTURES, N_SOUNDS = 5, 100


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Return a recording in which sound goes on after the pictures have ended."""
    path = tmp_path_factory.mktemp("media") / "sound-goes-on.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for i in range(N_PICTURES):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(i))))
        container.mux(video.encode(None))
        for i in range(N_SOUNDS):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            sound.sample_rate, sound.pts = 8000, i * 800
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return path


class Clock:
    """Goes on by a second whenever it is looked at, and sets an event after so many looks."""

    def __init__(self, stop: threading.Event | None = None, n_looks: int = 0):
        self.n_looks = 0
        self._stop, self._stop_after = stop, n_looks

    def monotonic(self) -> float:
        self.n_looks += 1
        if self._stop is not None and self.n_looks == self._stop_after:
            self._stop.set()
        return float(self.n_looks)


def test_live_source_when_its_video_stops_and_sound_goes_on_then_it_is_lost(path, monkeypatch):
    monkeypatch.setattr(inputs, "time", Clock())
    got = []

    with (
        MediaInput(SourceSpec(str(path), "url", "x")) as source,
        pytest.raises(InputError, match=f"no video for {TIMEOUT_S:g} s"),
    ):
        got.extend(source.packets())

    assert len(got) == N_PICTURES


def test_live_source_when_its_video_stops_and_sound_goes_on_then_it_can_be_stopped(path, monkeypatch):
    stop = threading.Event()
    clock = Clock(stop, N_PICTURES + 4)
    monkeypatch.setattr(inputs, "time", clock)

    with MediaInput(SourceSpec(str(path), "url", "x")) as source:
        n_got = len(list(source.packets(stop)))

    assert (n_got, clock.n_looks) == (N_PICTURES, N_PICTURES + 4)


@pytest.mark.parametrize("kind", ["file", "stdin"])
def test_recording_when_its_sound_is_longer_than_its_video_then_it_is_read_to_the_end(path, monkeypatch, kind):
    monkeypatch.setattr(inputs, "time", Clock())

    with path.open("rb") as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        with MediaInput(SourceSpec(str(path), kind, "x")) as source:
            n_got = len(list(source.packets()))

    assert n_got == N_PICTURES
