"""The Mamba-2 scan and layer on a CPU: against transformers' own, the paper's listing, and their matrix products.

    python benchmarks/scan.py [--rounds 5]

Same numbers in, same numbers out (checked to 1e-3), in turns. The *scan* takes steps, B, C and x, with a state going in
and out: ours, the function that transformers falls back to without CUDA kernels, and the minimal one of the Mamba-2
paper (arXiv 2405.21060, listing 1), which mamba_ssm carries as its reference. The *layer* adds projections, convolution
and norm, in which there is nothing to choose: ours, and transformers' `Mamba2Mixer`.

The limit is the matrix products alone, at the block size that ours uses: per block C·Bᵀ, its product with x, B·x and
C·state; for the layer the two projections too. A training step is forward and backward.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import in_turns, spent_on, write_result
from torch import Tensor
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan

from stormline.models.mamba2 import Mamba2
from stormline.models.ssd import ssd_scan

TOKENS_PER_FRAME = 256  # STORM's
PEER_BLOCK = 256  # transformers' default, and mamba_ssm's
CASES = (  # name, width, state, frames
    ("STORM's vision width, 1 frame of a live stream", 1152, 64, 1),
    ("STORM's vision width, 4 frames", 1152, 64, 4),
    ("STORM's vision width, 32 frames", 1152, 64, 32),
    ("a 7B language model's width, 4 frames", 3584, 64, 4),
    ("the built-in model's, a chunk", 128, 32, 1),
    ("the built-in model's, 16 chunks", 128, 32, 16),
)
GOALS = {"over transformers": 5.0, "of its matrix products": 0.6, "training, over transformers": 3.0}


def listing(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, block: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Scan as listing 1 does, with one group; x (1, l, n_heads, head_dim) is already times its step, l whole blocks."""

    def sums(of: Tensor) -> Tensor:
        n = of.shape[-1]
        spread = of[..., None].expand(*of.shape, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(-1), 0)
        return spread.cumsum(-2).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(0), -torch.inf)

    n_heads = x.shape[2]
    x_, b_, c_ = (
        each.unflatten(1, (-1, block)) for each in (x, b.expand(-1, -1, n_heads, -1), c.expand(-1, -1, n_heads, -1))
    )
    a = log_decay.unflatten(1, (-1, block)).permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    y_inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c_, b_, sums(a).exp(), x_)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b_, (total[..., -1:] - total).exp(), x_)
    states = torch.cat([state[:, None], states], 1)
    states = torch.einsum("bhzc,bchpn->bzhpn", sums(F.pad(total[..., -1], (1, 0))).exp(), states)
    y_before = torch.einsum("bclhn,bchpn,bhcl->bclhp", c_, states[:, :-1], total.exp())
    return (y_inside + y_before).flatten(1, 2), states[:, -1]


def products(layer: Mamba2, n_tokens: int, *, projections: bool) -> Callable[[], None]:
    """Return what does the scan's or the layer's matrix products, and nothing else, on numbers of the same shapes."""
    q, n_heads, d_head, d_state = min(layer.block_tokens, n_tokens), layer.n_heads, layer.head_dim, layer.d_state
    n_blocks = -(-n_tokens // q)
    u, inner = torch.randn(n_tokens, layer.d_model), torch.randn(n_tokens, layer.d_inner)
    b, c = torch.randn(n_blocks, q, d_state), torch.randn(n_blocks, d_state, q)
    mixing, x = torch.randn(n_heads, q, q), torch.randn(n_heads, q, d_head)
    wide_x, state = torch.randn(q, n_heads * d_head), torch.randn(d_state, n_heads * d_head)

    def work() -> None:
        if projections:
            layer.in_proj(u)
            layer.out_proj(inner)
        for k in range(n_blocks):  # one after the other, as the state wants it
            b[k] @ c[k]
            torch.bmm(mixing, x)
            c[k] @ wide_x
            b[k] @ state

    return work


def measure_scan(layer: Mamba2, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Return the scan's ratios at a layer's sizes."""
    n_heads, d_head, d_state = layer.n_heads, layer.head_dim, layer.d_state
    x, dt = torch.randn(1, n_tokens, n_heads, d_head), F.softplus(torch.randn(1, n_tokens, n_heads) - 3)
    a, d = -torch.rand(n_heads) - 1, torch.ones(n_heads)
    b, c = torch.randn(1, n_tokens, 1, d_state), torch.randn(1, n_tokens, 1, d_state)
    state = torch.randn(1, n_heads, d_head, d_state)

    def ours(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, b, c = given or (x_0, b_0, c_0)
        return ssd_scan(x, dt, a, b, c, block_tokens=layer.block_tokens, D=d, initial_state=state)

    def theirs(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, b, c = given or (x_0, b_0, c_0)
        more = {"D": d, "initial_states": state, "return_final_states": True}
        return mamba2_chunk_scan(x, dt, a, b, c, PEER_BLOCK, **more)

    def the_listing() -> tuple[Tensor, Tensor]:
        y, last = listing(x * dt[..., None], dt * a, b, c, min(PEER_BLOCK, n_tokens), state)
        return y + d[:, None] * x, last

    x_0, b_0, c_0 = x, b, c
    with torch.inference_mode():
        for peer in (theirs, the_listing):
            torch.testing.assert_close(ours(), peer(), atol=1e-3, rtol=1e-3)
        works = {"ours": ours, "theirs": theirs, "listing": the_listing}
        took = in_turns(works | {"products": products(layer, n_tokens, projections=False)}, rounds)
        spent = spent_on(ours)

    def train(scan: Callable[..., tuple[Tensor, Tensor]]) -> None:
        y, _ = scan(*(each.clone().requires_grad_() for each in (x, b, c)))
        y.square().mean().backward()

    training = in_turns({"ours": lambda: train(ours), "theirs": lambda: train(theirs)}, max(1, rounds // 2))
    return {
        "ours_ms": round(took["ours"] * 1e3, 2),
        "over transformers": round(took["theirs"] / took["ours"], 2),
        "over the paper's listing": round(took["listing"] / took["ours"], 2),
        "of its matrix products": round(took["products"] / took["ours"], 2),
        "training, over transformers": round(training["theirs"] / training["ours"], 2),
        "spent_on": spent,
    }


def measure_layer(ours: Mamba2, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Return the whole layer's ratios."""
    config = Mamba2Config(
        hidden_size=ours.d_model,
        num_heads=ours.n_heads,
        head_dim=ours.head_dim,
        state_size=ours.d_state,
        n_groups=1,
        conv_kernel=ours.d_conv,
        expand=2,
        num_hidden_layers=1,
        layer_norm_epsilon=ours.norm.eps,
    )
    theirs = Mamba2Mixer(config, 0)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    u = torch.randn(1, n_tokens, ours.d_model)
    with torch.inference_mode():
        y, state = ours(u[:, : n_tokens // 2])
        rest, _ = ours(u[:, n_tokens // 2 :], state)
        expected = theirs(u, cache_params=DynamicCache(config=config))
        torch.testing.assert_close(torch.cat([y, rest], 1), expected, atol=1e-3, rtol=1e-3)
        works: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(u, state),
            "theirs": lambda: theirs(u, cache_params=DynamicCache(config=config)),
            "products": products(ours, n_tokens, projections=True),
        }
        took = in_turns(works, rounds)
        spent = spent_on(works["ours"])
    training = in_turns(
        {"ours": lambda: ours(u)[0].square().mean().backward(), "theirs": lambda: theirs(u).square().mean().backward()},
        max(1, rounds // 2),
    )
    return {
        "ours_ms": round(took["ours"] * 1e3, 2),
        "over transformers": round(took["theirs"] / took["ours"], 2),
        "of its matrix products": round(took["products"] / took["ours"], 2),
        "training, over transformers": round(training["theirs"] / training["ours"], 2),
        "spent_on": spent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    told: dict[str, Any] = {"threads": options.threads, "goals": GOALS, "scan": {}, "layer": {}}
    for name, width, d_state, n_frames in CASES:
        torch.manual_seed(0)
        layer = Mamba2(width, d_state=d_state, head_dim=64).eval()
        n_tokens = n_frames * TOKENS_PER_FRAME
        for part, measure in (("scan", measure_scan), ("layer", measure_layer)):
            told[part][name] = {"tokens": n_tokens, **measure(layer, n_tokens, options.rounds)}
            print(f"{part}, {name}: {told[part][name]}", flush=True)
    write_result("scan", told, ["torch", "transformers"])


if __name__ == "__main__":
    main()
