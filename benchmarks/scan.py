"""The Mamba-2 layer on a CPU: against transformers' own, and against the matrix products that it cannot do without.

    python benchmarks/scan.py [--rounds 5]

Same weights, same input, same outputs (checked to 1e-3), in turns: our mixer, and transformers' `Mamba2Mixer`, whose
fallback runs where there are no CUDA kernels. The limit is the layer's matrix products alone, at the block size that it
uses: the two projections, and per block C·Bᵀ, its product with x, B·x and C·state. A chunk of a stream is timed with a
state going in and out; a training step is forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from stormline.models.mamba2 import Mamba2

RESULT = Path(__file__).parent / "results" / "scan.json"
TOKENS_PER_FRAME = 256  # STORM's
CASES = (  # name, width, state, frames
    ("STORM's vision width, 4 frames", 1152, 64, 4),
    ("STORM's vision width, 16 frames", 1152, 64, 16),
    ("STORM's vision width, 1 frame of a live stream", 1152, 64, 1),
    ("a 7B language model's width, 4 frames", 3584, 64, 4),
    ("the small model's, 64 places over 16 frames", 128, 32, 4),
)
GOALS = {"against transformers": 5.0, "of its matrix products": 0.6, "training, against transformers": 3.0}


def pair(width: int, d_state: int) -> tuple[Mamba2, Mamba2Mixer, Mamba2Config]:
    """Return our layer and transformers' with the same weights."""
    torch.manual_seed(0)
    ours = Mamba2(width, d_state=d_state, head_dim=64)
    config = Mamba2Config(
        hidden_size=width,
        num_heads=ours.n_heads,
        head_dim=64,
        state_size=d_state,
        n_groups=1,
        conv_kernel=ours.d_conv,
        expand=2,
        num_hidden_layers=1,
        layer_norm_epsilon=ours.norm.eps,
    )
    theirs = Mamba2Mixer(config, 0)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval(), config


def matrix_products(layer: Mamba2, n_tokens: int) -> Callable[[], None]:
    """Return what does the layer's matrix products, and nothing else, on numbers of the same shapes."""
    q, n_heads, d_head, d_state = layer.block_tokens, layer.n_heads, layer.head_dim, layer.d_state
    n_blocks = -(-n_tokens // q)
    u = torch.randn(n_tokens, layer.d_model)
    inner = torch.randn(n_tokens, layer.out_proj.in_features)
    b, c = torch.randn(n_blocks, q, d_state), torch.randn(n_blocks, d_state, q)
    mixing, x = torch.randn(n_blocks * n_heads, q, q), torch.randn(n_blocks * n_heads, q, d_head)
    bx, state = torch.randn(n_blocks, d_state, q), torch.randn(n_blocks, d_state, n_heads * d_head)
    wide_x = torch.randn(n_blocks, q, n_heads * d_head)

    def work() -> None:
        layer.in_proj(u)
        layer.out_proj(inner)
        torch.bmm(b, c)
        torch.bmm(mixing, x)
        torch.bmm(bx, wide_x)
        torch.bmm(b, state)

    return work


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each work's median seconds, taken in turns: these machines are not quiet."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began_s = time.perf_counter()
            work()
            if turn:  # warmed up
                took[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(series) for name, series in took.items()}


def measure(width: int, d_state: int, n_frames: int, rounds: int) -> dict[str, float]:
    """Return the ratios of one case."""
    ours, theirs, config = pair(width, d_state)
    n_tokens = n_frames * TOKENS_PER_FRAME
    u = torch.randn(1, n_tokens, width)
    with torch.inference_mode():
        y, state = ours(u[:, : n_tokens // 2])
        expected = theirs(u, cache_params=DynamicCache(config=config))
        rest, _ = ours(u[:, n_tokens // 2 :], state)
        torch.testing.assert_close(torch.cat([y, rest], 1), expected, atol=1e-3, rtol=1e-3)
        products = matrix_products(ours, n_tokens)
        seconds = in_turns(
            {
                "ours": lambda: ours(u, state),
                "theirs": lambda: theirs(u, cache_params=DynamicCache(config=config)),
                "products": products,
            },
            rounds,
        )
    training = in_turns(
        {"ours": lambda: ours(u)[0].square().mean().backward(), "theirs": lambda: theirs(u).square().mean().backward()},
        max(1, rounds // 2),
    )
    return {
        "tokens": n_tokens,
        "ours_ms": round(seconds["ours"] * 1e3, 2),
        "against transformers": round(seconds["theirs"] / seconds["ours"], 2),
        "of its matrix products": round(seconds["products"] / seconds["ours"], 2),
        "training, against transformers": round(training["theirs"] / training["ours"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": options.threads,
        "goals": GOALS,
        "cases": {},
    }
    for name, width, d_state, n_frames in CASES:
        report["cases"][name] = told = measure(width, d_state, n_frames, options.rounds)
        print(f"{name}: {told}", flush=True)
    report["load_average"] = os.getloadavg()[0]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
