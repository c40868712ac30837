"""Encoding: how many live streams the built-in model keeps up with, and what going through it together gains.

    python benchmarks/encode.py [--rounds 10]

A chunk (4 frames, two seconds of a stream at 2 fps) of 1, 8 and 32 streams, with their states going in and out: one by
one, which is what a lane does, since then the tokens do not depend, bit for bit on a CPU, on who else is there; and as
one batch, which a GPU would gain from. The limit is the model's matrix products alone, on the same threads.

And a caption of a window's tokens, one at a time, for windows of 4, 8 and 16 s of the generated world.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import in_turns, spent_on, write_result
from torch import nn

from stormline.models.generation import generate_answers
from stormline.models.loading import LoadedModel, load_model
from stormline.models.prompts import VideoPrompt
from stormline.models.storm import StormForConditionalGeneration
from stormline.models.training.clips import make_clip, seed_of
from stormline.models.training.evaluate import stream_clip
from stormline.models.training.questions import CAPTION_PROMPT

STREAMS = (1, 8, 32)
CAPTIONED_FRAMES = (8, 16, 32)


def products(model: StormForConditionalGeneration) -> Callable[[], None]:
    """Return what does the matrix products of one chunk's vision tower and temporal encoder, and nothing else."""
    config = model.config
    n_patches = config.chunk_frames * config.patch_grid**2
    n_places = config.chunk_frames * config.temporal_grid**2
    parts = (
        (model.vision_tower, n_patches),
        (model.multi_modal_projector, n_places),
        (model.temporal_encoder, n_places),
    )
    layers = [
        (layer, torch.randn(n, layer.in_features))
        for part, n in parts
        for layer in part.modules()
        if isinstance(layer, nn.Linear)
    ]

    def work() -> None:
        for layer, x in layers:
            layer(x)

    return work


def captions(loaded: LoadedModel, rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds and tokens of a caption, by frames of its window."""
    told = {}
    for n_frames in CAPTIONED_FRAMES:
        clips = [make_clip(seed_of(i, 100, held_out=True), n_frames, backwards=False) for i in range(rounds)]
        chunks = [stream_clip(loaded, clip.render()) for clip in clips]
        prompts = [VideoPrompt(CAPTION_PROMPT, tuple(each), max_new_tokens=96) for each in chunks]
        answers = [generate_answers(loaded.model, loaded.processor, [prompt])[0] for prompt in prompts]
        took = in_turns(
            {str(i): lambda p=p: generate_answers(loaded.model, loaded.processor, [p]) for i, p in enumerate(prompts)},
            3,
        )
        told[str(n_frames)] = {
            "caption_ms": round(float(np.median(list(took.values()))) * 1e3, 1),
            "longest_ms": round(max(took.values()) * 1e3, 1),
            "video_tokens": answers[0].video_tokens,
            "written_tokens": round(float(np.mean([answer.generated_tokens for answer in answers])), 1),
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="as a lane has by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(None, device="cpu")
    model = loaded.model
    side, t = model.config.image_size, model.config.chunk_frames
    chunk_s = t / model.config.sample_fps
    rng = np.random.default_rng(0)
    told: dict[str, Any] = {"threads": options.threads, "chunk_s": chunk_s, "streams": {}}
    with torch.inference_mode():
        for n in STREAMS:
            frames = rng.integers(0, 255, (n, t, side, side, 3), np.uint8)
            states = [model.init_stream_state() for _ in range(n)]
            took = in_turns(
                {
                    "one by one": lambda f=frames, s=states: model.encode_chunks(f, s, one_by_one=True),
                    "as a batch": lambda f=frames, s=states: model.encode_chunks(f, s, one_by_one=False),
                    "products": products(model),
                },
                options.rounds,
            )
            told["streams"][str(n)] = each = {
                "chunk_ms": round(took["one by one"] / n * 1e3, 2),
                "a batch over one by one": round(took["one by one"] / took["as a batch"], 2),
                "of its matrix products": round(took["products"] * n / took["one by one"], 2),
                "live_streams_a_core": round(n * chunk_s / took["one by one"], 0),
            }
            if n == 1:
                each["spent_on"] = spent_on(lambda f=frames, s=states: model.encode_chunks(f, s), times=20)
            print(f"{n} streams: {each}", flush=True)
    told["captions"] = captions(loaded, options.rounds)
    print(told["captions"], flush=True)
    told["cores"] = os.cpu_count()
    write_result("encode", told, ["torch", "transformers"])


if __name__ == "__main__":
    main()
