"""Small clips of the generated feed as files, for the tests of archives."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from stormline.models.training.shapes import ShapesSpec, ShapesWorld

MS = Fraction(1, 1000)
OPEN_GOPS = {"x264-params": "open-gop=1:b-adapt=0:scenecut=0"}


def write_clip(path: Path, seconds: float, *, seed: int = 1, fps: int = 8, vfr: bool = False, **options: str) -> Path:
    """Write H.264 with a keyframe each second, two B-frames between others; `vfr` lets its frames jitter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": str(fps), "bf": "2", "preset": "ultrafast", **options}
        stream.codec_context.time_base = MS
        for i, picture in enumerate(ShapesWorld(ShapesSpec(seed=seed, size_px=128)).frames(fps, stop_s=seconds)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i * 1000 // fps + (i * 37 % 60 if vfr else 0), MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a second of silence, with no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        for i in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 44_100, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
