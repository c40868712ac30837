"""What the length of a stream costs: ours, against re-encoding a sliding window and against keeping everything.

    python benchmarks/flat.py [--chunks 100000]

One stream, chunk after chunk, with the model that stormline ships. At chunks 10, 1,000 and the last it measures, in
turns, one chunk (decoded frames in, tokens and new state out), the bytes of the state and the process's memory. In
between the stream is advanced by the recurrent part alone: the vision tower sees one chunk at a time whatever came
before. At each of these lengths it also measures a question with a budget of 512 tokens.

The two things people do without a recurrent state, with the same parts: encode the newest 128 frames anew for every
chunk; and keep all tokens and read them all for every question, as far as the language model's context goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from measuring import RESULTS, median_s, write_result

from stormline.models.generation import generate_answers
from stormline.models.loading import LoadedModel, load_model
from stormline.models.prompts import VideoPrompt
from stormline.models.selection import VideoChunk
from stormline.models.storm import StreamState

WINDOW_FRAMES, BUDGET_TOKENS, WORDS = 128, 512, 16
GOAL = 1.05
LENGTHS = (8, 32, 128, 256)  # chunks, for the two others' curves


@torch.inference_mode()
def advance(loaded: LoadedModel, state: StreamState, features: torch.Tensor, n_chunks: int) -> StreamState:
    """Go on by so many chunks by the recurrent part alone."""
    temporal = state.temporal
    for _ in range(n_chunks):
        _, temporal = loaded.model._mix_and_pool(features, temporal)
    return StreamState(temporal)


def ask_s(loaded: LoadedModel, n_tokens: int) -> float:
    """Return the seconds of an answer about so many video tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((n_tokens // 16, 16, loaded.model.config.d_model)).astype(np.float16)
    chunks = tuple(VideoChunk(2.0 * i, 2.0 * i + 2, each) for i, each in enumerate(tokens))
    prompt = VideoPrompt("Describe what happens.", chunks, max_new_tokens=WORDS)
    return median_s(lambda: generate_answers(loaded.model, loaded.processor, [prompt]), rounds=3)


def plot(report: dict[str, Any], everything_ms: dict[float, float], path: Path) -> None:
    """Draw what a chunk and a question cost, over the stream's length: ours and the two others."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    chunk, question = figure.subplots(1, 2)
    seconds = [2 * int(k) for k in report["chunk_ms"]]
    again = next(value for key, value in report.items() if key.startswith("encode the newest"))
    chunk.plot(seconds, report["chunk_ms"].values(), "o-", label="the state carried on")
    chunk.plot(seconds, [again["chunk_ms"]] * len(seconds), "s--", label=f"the newest {WINDOW_FRAMES} frames anew")
    chunk.set(xscale="log", yscale="log", xlabel="stream, s", ylabel="a chunk of 2 s, ms")
    lengths = [*everything_ms, seconds[-1]]
    ours = next(value for key, value in report["question_ms"].items() if key.startswith("ours"))
    question.plot(lengths, [ours] * len(lengths), "o-", label=f"{BUDGET_TOKENS} tokens chosen")
    question.plot(list(everything_ms), list(everything_ms.values()), "s--", label="all tokens, to the context's end")
    question.set(xscale="log", yscale="log", xlabel="stream, s", ylabel="a question, ms")
    for axes in (chunk, question):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(None, device="cpu")
    model, config = loaded.model, loaded.model.config
    side, size = config.image_size, config.chunk_frames
    frames = np.random.default_rng(0).integers(0, 255, (1, size, side, side, 3), np.uint8)
    with torch.inference_mode():
        features = model._features(model._pixels(torch.as_tensor(frames)))
    states, memory_mb, at, state = {}, {}, 0, model.init_stream_state()
    began_s = time.monotonic()
    for index in sorted({10, min(1_000, options.chunks), options.chunks}):
        state = advance(loaded, state, features, index - 1 - at)
        at = index - 1
        states[index] = state
        model.encode_chunks(frames, [state])
        memory_mb[index] = psutil.Process().memory_info().rss / 1e6
        print(f"{time.monotonic() - began_s:6.0f} s  chunk {index}", flush=True)
    took: dict[int, list[float]] = {index: [] for index in states}
    for _ in range(30):  # in turns: these machines are not quiet
        for index, before in states.items():
            took[index].append(median_s(lambda before=before: model.encode_chunks(frames, [before]), rounds=1))
    chunk_ms = {index: statistics.median(series) * 1e3 for index, series in took.items()}
    state_bytes = {index: sum(t.nbytes for t in s.temporal.to_tensors().values()) for index, s in states.items()}
    window = np.random.default_rng(0).integers(0, 255, (WINDOW_FRAMES, side, side, 3), np.uint8)
    window_ms = median_s(lambda: model.encode_clip(window), rounds=3) * 1e3
    question_ms = ask_s(loaded, BUDGET_TOKENS) * 1e3
    everything = {n: ask_s(loaded, n * 16) * 1e3 for n in LENGTHS}
    first, last = min(chunk_ms), max(chunk_ms)
    report = {
        "chunk_ms": {str(k): round(v, 3) for k, v in chunk_ms.items()},
        "state_bytes": {str(k): v for k, v in state_bytes.items()},
        "last_over_first": {
            "time": round(chunk_ms[last] / chunk_ms[first], 3),
            "state": round(state_bytes[last] / state_bytes[first], 3),
            "memory": round(memory_mb[last] / memory_mb[first], 3),
        },
        "goal_last_over_first": GOAL,
        "memory_mb": {str(k): round(v) for k, v in memory_mb.items()},
        f"encode the newest {WINDOW_FRAMES} frames anew": {
            "chunk_ms": round(window_ms, 1),
            "over ours": round(window_ms / chunk_ms[last], 1),
        },
        "question_ms": {
            f"ours, {BUDGET_TOKENS} tokens at any length": round(question_ms, 1),
            **{f"all tokens of {n * size / 2:.0f} s": round(ms, 1) for n, ms in everything.items()},
        },
    }
    write_result("flat", report, ["torch"])
    plot(report, {n * size / 2: ms for n, ms in everything.items()}, RESULTS / "flat.png")


if __name__ == "__main__":
    main()
