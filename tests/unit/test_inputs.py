"""Reading a source packet by packet: live ones that send something, but no video, or no times."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from small_media import make_image, picture

from stormline.pipeline.publish import inputs, timed_pipe
from stormline.pipeline.publish.inputs import TIMEOUT_S, InputError, MediaInput, SourceSpec, expand_sources

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


class CameraPipe:
    """A pipe into which a camera writes a picture each 100 ms: reading waits for it."""

    def __init__(self, pictures):
        self._pictures = iter(pictures)
        self._now_s = 100.0

    def seekable(self) -> bool:
        return False

    def read1(self, size: int) -> bytes:
        self._now_s += 0.1
        return next(self._pictures, b"")

    def monotonic(self) -> float:
        return self._now_s


@pytest.fixture
def camera_pipe(monkeypatch):
    pipe = CameraPipe([make_image("mjpeg", "yuvj420p", i) for i in range(40)])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
    monkeypatch.setattr(timed_pipe, "time", pipe)


def test_jpegs_in_a_pipe_when_they_have_no_times_then_get_those_at_which_they_come(camera_pipe):
    with MediaInput(SourceSpec("-", "stdin", "x")) as source:
        times_s = [float(packet.pts * packet.time_base) for packet in source.packets()]

    assert times_s == pytest.approx([i / 10 for i in range(40)], abs=0.001)


def test_jpegs_in_a_pipe_when_their_rate_is_given_then_have_that_rate(camera_pipe):
    with MediaInput(SourceSpec("-", "stdin", "x"), {"framerate": "50"}) as source:
        times_s = [float(packet.pts * packet.time_base) for packet in source.packets()]

    assert times_s == pytest.approx([i / 50 for i in range(40)], abs=0.001)


def test_file_when_its_name_has_a_colon_then_it_is_no_address(tmp_path, path, monkeypatch):
    name = "2024-05-01T12:30:00.mkv"
    (tmp_path / name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)

    with MediaInput(*expand_sources([name])) as source:
        n_got = len(list(source.packets()))

    assert n_got == N_PICTURES


def test_glob_when_a_link_leads_around_in_a_circle_then_each_file_is_one_stream(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "gate.mkv").touch()
    (tmp_path / "deep" / "up").symlink_to("..")

    specs = expand_sources([str(tmp_path / "**" / "*.mkv")])

    assert [spec.source for spec in specs] == [str(tmp_path / "deep" / "gate.mkv")]


def test_folder_when_a_file_name_is_not_utf_8_then_its_stream_has_a_name_that_is(tmp_path, path):
    (tmp_path / os.fsdecode(b"caf\xe9.mkv")).write_bytes(path.read_bytes())

    (spec,) = expand_sources([str(tmp_path)])
    with MediaInput(spec) as source:
        n_got = len(list(source.packets()))

    assert (spec.stream_id, spec.name) == ("caf\\udce9", f"{tmp_path}/caf\\udce9.mkv")
    assert n_got == N_PICTURES
