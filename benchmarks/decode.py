"""Decoding a segment to its sampled frames: against bare PyAV that does the same, and against other decoders.

    python benchmarks/decode.py [--rounds 5]

Segments of ten seconds, made here from a real street video and from generated ones, in H.264, HEVC, VP9 and AV1. Each
decoder gets the same bytes and gives frames on the same 2 fps grid at the model's size, on one thread, in turns:

    ours        `decode_segment`: times, sampling, damage counted, limits, resizing by swscale's exact paths; what
                the grid does not need and nothing refers to is not decoded
    ours, all   the same with every frame decoded, as where the plan for a stream did not hold
    PyAV        demux, decode, and resize those frames that are the last before a grid time
    PyAV, no unreferenced; keyframes alone   the same with a decoder that skips, whether or not the grid needs what it
                skips. Other frames come out, so these are no peers of ours: the first is about the limit
    decord, torchcodec   where they are installed: they seek to the frames and resize themselves
"""

from __future__ import annotations

import argparse
import importlib.util
import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from measuring import in_turns, spent_on, write_result

from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.operators.decode import decode_segment
from stormline.operators.rgb import SCALING
from stormline.operators.rows import SegmentMeta
from stormline.operators.sampling import GridSpec
from stormline.operators.sparse_reader import DenseStreams
from stormline.pipeline.commands.demo import street_video

SECONDS, FPS, GRID_FPS, SIDE_PX = 10, 24, 2, 224
GOAL = 0.9
CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
OPTIONS = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "veryfast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"},
    "libsvtav1": {"preset": "10"},
}
SKIPS = {"PyAV, no unreferenced": "NONREF", "PyAV, keyframes alone": "NONKEY"}
SIZES = {"street 1280x544": (544, 1280), "generated 640x360": (360, 640)}


def frames_of(name: str, height: int, width: int) -> list[np.ndarray]:
    """Return ten seconds of RGB frames."""
    if name.startswith("street"):
        with av.open(str(street_video())) as container:
            found = [f.to_ndarray(format="rgb24", width=width, height=height) for f in container.decode(video=0)]
        return [found[i % len(found)] for i in range(SECONDS * FPS)]
    world = ShapesWorld(ShapesSpec(seed=1, size_px=128))
    reformatter = VideoReformatter()
    return [
        reformatter.reformat(
            av.VideoFrame.from_ndarray(world.render(i / FPS), "rgb24"), width, height, "rgb24"
        ).to_ndarray()
        for i in range(SECONDS * FPS)
    ]


def encode(frames: list[np.ndarray], codec: str) -> bytes:
    """Return a Matroska segment with a keyframe every two seconds."""
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 2 * FPS
        stream.options = OPTIONS[codec]
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def ours(data: bytes, *, all_frames: bool = False) -> int:
    """Return how many frames our step samples."""
    meta = SegmentMeta("bench", "s", 0, 0, 0, "video/x-matroska", True, 0, "bench", 0, 0, 0, len(data))
    grid = GridSpec(Fraction(GRID_FPS), 2 * 10**9)
    dense = DenseStreams()
    if all_frames:
        dense.add(meta.stream_id)
    return len(decode_segment(data, meta, grid=grid, frame_hw=(SIDE_PX, SIDE_PX), dense_streams=dense).frames)


def bare(data: bytes, skip: str = "DEFAULT") -> int:
    """Return how many frames PyAV gives on the same grid, with nothing around it, of those that are not skipped."""
    reformatter, found, last, due_s = VideoReformatter(), [], None, 0.0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_count, stream.thread_type = 1, "NONE"
        stream.codec_context.skip_frame = skip
        base = float(stream.time_base or 0)
        for frame in container.decode(stream):
            while last is not None and frame.pts * base > due_s:
                small = reformatter.reformat(last, SIDE_PX, SIDE_PX, "rgb24", interpolation=SCALING, threads=1)
                found.append(small.to_ndarray())
                due_s += 1 / GRID_FPS
            last = frame
    return len(found)


def peers() -> dict[str, Callable[[bytes], int]]:
    """Return other decoders that are installed."""
    found: dict[str, Callable[[bytes], int]] = {}
    wanted = [round(i * FPS / GRID_FPS) for i in range(SECONDS * GRID_FPS)]
    if importlib.util.find_spec("decord"):
        import decord  # type: ignore[import-not-found]

        def by_decord(data: bytes) -> int:
            reader = decord.VideoReader(io.BytesIO(data), width=SIDE_PX, height=SIDE_PX, num_threads=1)
            return len(reader.get_batch(wanted).asnumpy())

        found["decord"] = by_decord
    try:
        import torch
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, OSError, RuntimeError):  # not there, or built for another FFmpeg or torch
        return found

    def by_torchcodec(data: bytes) -> int:
        frames = VideoDecoder(data, num_ffmpeg_threads=1).get_frames_at(wanted).data
        return len(torch.nn.functional.interpolate(frames.float(), (SIDE_PX, SIDE_PX), mode="bicubic"))

    found["torchcodec"] = by_torchcodec
    return found


def can_decode(peer: str, codec: str) -> bool:
    """Whether a peer has a decoder for it: decord's wheel brings an FFmpeg without one for AV1."""
    return (peer, codec) != ("decord", "av1")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "sampled_fps": GRID_FPS,
        "frame_px": SIDE_PX,
        "goal_ours_over_bare": GOAL,
        "segments": {},
    }
    for size, (height, width) in SIZES.items():
        frames = frames_of(size, height, width)
        for codec, encoder in CODECS.items():
            data = encode(frames, encoder)
            works = {"ours": lambda d=data: ours(d), "ours, all": lambda d=data: ours(d, all_frames=True)}
            works["PyAV"] = lambda d=data: bare(d)
            works |= {name: (lambda d=data, s=skip: bare(d, s)) for name, skip in SKIPS.items()}
            works |= {n: (lambda d=data, w=work: w(d)) for n, work in peers().items() if can_decode(n, codec)}
            counts = {name: work() for name, work in works.items()}
            told = {name: round(counts[name] / s, 1) for name, s in in_turns(works, options.rounds).items()}
            ratio = round(told["ours"] / told["PyAV"], 2)
            report["segments"][f"{size}, {codec}"] = {
                "sampled_frames_per_s": told,
                "ours_over_bare": ratio,
                "ours_all_over_bare": round(told["ours, all"] / told["PyAV"], 2),
                "spent_on": spent_on(works["ours"]),
            }
            print(f"{size}, {codec}: {told}, ours over PyAV {ratio}", flush=True)
    write_result("decode", report, ["av"])


if __name__ == "__main__":
    main()
