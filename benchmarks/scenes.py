"""Scene cuts on generated feeds against their truth: precision and recall of the online detector.

    python benchmarks/scenes.py [--worlds 4] [--minutes 5]

Renders worlds of shapes whose background changes every 24 s or every 60 s, sends them through H.264 as a publisher
would, decodes and encodes them as a lane does, and compares where scenes begin with where the background changed; a
cut counts as found where a scene begins within one chunk of it. Objects come, go and move all the while. Beside it the
same with the mean of the tower's last layer, which follows objects, to see what the choice of features does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch

from stormline.models.loading import load_model
from stormline.models.training.clips import FEEDS_SEED
from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.operators.encode import _scene_score
from stormline.operators.rows import Chunk
from stormline.operators.scenes import SceneSpec, step_scenes
from stormline.pipeline.lane import scenes_of
from stormline.pipeline.settings import load_settings

RESULT = Path(__file__).parent / "results" / "scenes.json"
FPS, GRID_FPS, CHUNK_FRAMES, CHUNK_S = 10, 2, 4, 2.0
FIRST_SEED = FEEDS_SEED + 20_000
SCENE_EPISODES = (2, 5)  # of 12 s each: 24 s and 60 s


def frames_through_h264(world: ShapesWorld, seconds: float, size_px: int) -> Iterator[np.ndarray]:
    """Yield the frames of the sampling grid, encoded and decoded, at the model's size."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width = encoder.height = world.spec.size_px
    encoder.pix_fmt, encoder.framerate = "yuv420p", FPS
    encoder.time_base = 1 / encoder.framerate
    encoder.options = {"preset": "veryfast", "tune": "zerolatency"}
    decoder = av.CodecContext.create("h264", "r")
    n = 0

    def decoded(packets: list[av.Packet]) -> Iterator[np.ndarray]:
        nonlocal n
        for packet in packets:
            for frame in decoder.decode(packet):
                if n % (FPS // GRID_FPS) == 0:
                    yield frame.reformat(size_px, size_px, "rgb24").to_ndarray()
                n += 1

    for i, image in enumerate(world.frames(FPS, 0.0, seconds)):
        frame = av.VideoFrame.from_ndarray(image, "rgb24")
        frame.pts = i
        yield from decoded(encoder.encode(frame))
    yield from decoded(encoder.encode(None))
    yield from decoded([None])  # type: ignore[list-item]


def chunk_of(index: int, score: float) -> Chunk:
    start_ns = round(index * CHUNK_S * 1e9)
    end_ns = start_ns + round(CHUNK_S * 1e9)
    return Chunk("s", "s", index, start_ns, end_ns, 0, CHUNK_FRAMES, score, "t", 0, 0, 0, np.zeros((0, 0), np.float16))


def cuts_of(scores: list[float], spec: SceneSpec) -> list[float]:
    """Return when scenes begin, without those that begin because the one before was the longest that may be."""
    state, found = None, []
    for index, score in enumerate(scores):
        state, cuts = step_scenes(state, chunk_of(index, score), spec)
        found += [(index - 1) * CHUNK_S] if cuts.previous else []
    return found


def scores_of(model, world: ShapesWorld, seconds: float) -> dict[str, list[float]]:
    """Return the distance of each chunk from the one before, by what each place looks like and by the last layer."""
    state, before, scores = model.init_stream_state(), None, {"looks": [], "last layer": []}
    frames: list[np.ndarray] = []
    for frame in frames_through_h264(world, seconds, model.config.image_size):
        frames.append(frame)
        if len(frames) < CHUNK_FRAMES:
            continue
        batch = torch.from_numpy(np.stack(frames))[None]
        encoded = model.encode_chunks(batch, [state])[0]
        with torch.inference_mode():
            mean = model._features(model._pixels(batch)).mean((1, 2, 3))[0]
        state, frames = encoded.state, []
        unit = torch.nn.functional.normalize(mean, dim=0)
        now = {"looks": encoded.look.numpy(), "last layer": unit[None, None].numpy()}
        for name, look in now.items():
            scores[name].append(_scene_score(None if before is None else before[name], look))
        before = now
    return scores


def compare(found: list[float], truth: list[float]) -> np.ndarray:
    """Return (cuts that were found, scenes that begin at one, scenes, cuts)."""
    near = [[abs(f - t) <= CHUNK_S for t in truth] for f in found]
    hit_cuts = sum(any(row[i] for row in near) for i in range(len(truth)))
    return np.array([hit_cuts, sum(any(row) for row in near), len(found), len(truth)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(None, device="cpu")
    spec = replace(scenes_of(load_settings(None)), max_ns=10**15)
    seconds = args.minutes * 60
    total: dict[str, np.ndarray] = {}
    for i in range(args.worlds):
        world = ShapesWorld(ShapesSpec(seed=FIRST_SEED + i, scene_episodes=SCENE_EPISODES[i % 2]))
        truth = [e.t_s for e in world.events(0.0, seconds) if e.kind == "background changes"]
        for name, scores in scores_of(loaded.model, world, seconds).items():
            total[name] = total.get(name, 0) + compare(cuts_of(scores, spec), truth)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "model": loaded.name,
        "worlds": args.worlds,
        "minutes_each": args.minutes,
        "codec": "h264",
        "sensitivity": spec.sensitivity,
    }
    for name, (hit_cuts, hits, n_found, n_cuts) in total.items():
        report[name] = {
            "cuts": int(n_cuts),
            "found": int(hit_cuts),
            "scenes_begun": int(n_found),
            "precision": round(float(hits / n_found), 3) if n_found else None,
            "recall": round(float(hit_cuts / n_cuts), 3) if n_cuts else None,
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
