"""Encoding: how many live streams the built-in model keeps up with, and what going through it together gains.

    python benchmarks/encode.py [--rounds 10]

A chunk (4 frames, two seconds of a stream at 2 fps) of 1, 8 and 32 streams, with their states going in and out: one by
one, which is what a lane does on a CPU, since then the tokens do not depend, bit for bit, on who else is there; and as
one batch, which is what it does on a GPU. The limit is the model's matrix products alone, on the same threads.
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

from stormline.models.loading import load_model
from stormline.models.storm import StormForConditionalGeneration

STREAMS = (1, 8, 32)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="as a lane has by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(None, device="cpu").model
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
    told["cores"] = os.cpu_count()
    write_result("encode", told, ["torch", "transformers"])


if __name__ == "__main__":
    main()
