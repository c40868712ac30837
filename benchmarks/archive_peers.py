"""What people write instead of `stormline archive`: a plain loop, and Ray Data's `read_videos` with `map_batches`.

    python benchmarks/archive_peers.py loop|read_videos FOLDER OUT

The same model, the same grid of 2 fps, chunks of four frames, tokens into Parquet, a caption for every 30 s. Neither
resumes, tells of bad files, or keeps a video's times; videos are whole minutes here, so that no window is cut short.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

from stormline.models.generation import generate_answers
from stormline.models.loading import load_model
from stormline.models.prompts import VideoPrompt
from stormline.models.selection import VideoChunk
from stormline.operators.rgb import SCALING

FPS, CHUNK_FRAMES, WINDOW_S = 2, 4, 30
WINDOW_CHUNKS = WINDOW_S * FPS // CHUNK_FRAMES
PROMPT, MAX_NEW_TOKENS = "Describe what happens.", 48


def bare_frames(path: str, side_px: int, threads: str = "NONE") -> Iterator[np.ndarray]:
    """Yield the frames on the grid, resized, with PyAV and nothing around it."""
    reformatter, last, due_s = VideoReformatter(), None, 0.0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        base = float(stream.time_base or 0)
        for frame in container.decode(stream):
            while last is not None and frame.pts * base > due_s:
                small = reformatter.reformat(last, side_px, side_px, "rgb24", interpolation=SCALING, threads=1)
                yield small.to_ndarray()
                due_s += 1 / FPS
            last = frame
        while last is not None and due_s <= last.pts * base:
            yield reformatter.reformat(last, side_px, side_px, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
            due_s += 1 / FPS


class Watcher:
    """The model over one video after the other: frames in, chunks of tokens out, captions of whole windows."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self.loaded = torch, load_model(None, device="cpu")
        self.side_px = self.loaded.model.config.image_size
        self.path = ""

    def begin(self, path: str) -> None:
        """Begin with a video's first frame."""
        self.path, self.pending, self.n_chunks = path, [], 0
        self.state = self.loaded.model.init_stream_state()

    def take(self, image: np.ndarray) -> VideoChunk | None:
        """Take the next frame; returns the chunk that it completes."""
        self.pending.append(image)
        if len(self.pending) < CHUNK_FRAMES:
            return None
        encoded = self.loaded.model.encode_chunks(np.stack(self.pending)[None], [self.state])[0]
        start_s = self.n_chunks * CHUNK_FRAMES / FPS
        self.state, self.pending, self.n_chunks = encoded.state, [], self.n_chunks + 1
        tokens = encoded.tokens.to(self._torch.float16).numpy()
        return VideoChunk(start_s, start_s + CHUNK_FRAMES / FPS, tokens)


def describe(loaded: Any, windows: list[list[VideoChunk]]) -> list[str]:
    """Return a caption for each window, all written together."""
    prompts = [VideoPrompt(PROMPT, tuple(window), max_new_tokens=MAX_NEW_TOKENS) for window in windows]
    return [answer.text for answer in generate_answers(loaded.model, loaded.processor, prompts)]


def windows_of(chunks: list[VideoChunk]) -> list[list[VideoChunk]]:
    return [chunks[i : i + WINDOW_CHUNKS] for i in range(0, len(chunks), WINDOW_CHUNKS)]


def by_loop(folder: Path, out: Path) -> None:
    """Watch one video after the other, in one process, with all cores for decoder and model."""
    watcher = Watcher(os.cpu_count() or 1)
    out.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        watcher.begin(str(path))
        chunks = [c for image in bare_frames(str(path), watcher.side_px, "AUTO") if (c := watcher.take(image))]
        captions = describe(watcher.loaded, windows_of(chunks))
        tokens = [{"stream": path.name, "start_s": c.start_s, "tokens": c.tokens.ravel()} for c in chunks]
        pq.write_table(pa.Table.from_pylist(tokens), out / f"{path.stem}.tokens.parquet")
        told = [{"stream": path.name, "caption": caption} for caption in captions]
        pq.write_table(pa.Table.from_pylist(told), out / f"{path.stem}.captions.parquet")


class EncodeFrames:
    """A `map_batches` actor: frames of one video after the other."""

    def __init__(self) -> None:
        self.watcher = Watcher(1)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        found: dict[str, list] = {"stream": [], "start_s": [], "tokens": []}
        for path, image in zip(batch["path"], batch["frame"], strict=True):
            if path != self.watcher.path:
                self.watcher.begin(path)
            chunk = self.watcher.take(image)
            if chunk is not None:
                found["stream"].append(os.path.basename(path))
                found["start_s"].append(chunk.start_s)
                found["tokens"].append(chunk.tokens)
        return found


class Caption:
    """A `map_batches` actor: adds a caption to the first chunk of each whole window in the batch."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.loaded = load_model(None, device="cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        chunks = [
            VideoChunk(s, s + CHUNK_FRAMES / FPS, t) for s, t in zip(batch["start_s"], batch["tokens"], strict=True)
        ]
        captions = describe(self.loaded, windows_of(chunks))
        text = [""] * len(chunks)
        text[::WINDOW_CHUNKS] = captions
        tokens = [c.tokens.ravel() for c in chunks]
        return {"stream": batch["stream"], "start_s": batch["start_s"], "tokens": tokens, "caption": np.array(text)}


def by_read_videos(folder: Path, out: Path) -> None:
    """Watch with Ray Data: frames read and resized by `read_videos`, one actor that encodes, one that captions."""
    import ray

    n_cores = os.cpu_count() or 1
    ray.init(num_cpus=n_cores + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    side_px = load_model(None, device="cpu").model.config.image_size
    files = sorted(str(path) for path in folder.iterdir())
    rows = ray.data.read_videos(
        files, fps=FPS, resize=(side_px, side_px), include_paths=True, override_num_blocks=len(files)
    )
    # decord's stride is a whole number of frames: it takes a few more than 2 fps, which are left out here.
    rows = rows.filter(expr=f"frame_index < {frames_wanted(files[0])}")
    chunks = rows.map_batches(EncodeFrames, batch_size=60, concurrency=1)
    captions = chunks.map_batches(Caption, batch_size=2 * WINDOW_CHUNKS, concurrency=1)
    captions.write_parquet(str(out))
    ray.shutdown()


def frames_wanted(path: str) -> int:
    """Return the index of the frame after the last one on the grid, with decord's stride."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        rate, seconds = float(stream.average_rate or 0), (container.duration or 0) / 1e6
    return round(rate / FPS) * round(seconds * FPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=("loop", "read_videos"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    {"loop": by_loop, "read_videos": by_read_videos}[options.way](options.folder, options.out)


if __name__ == "__main__":
    main()
