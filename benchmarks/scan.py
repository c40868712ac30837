"""The Mamba-2 scan and layer on a CPU: against transformers' own, the paper's listing, and their matrix products.

    python benchmarks/scan.py [--rounds 5]

Same numbers in, same numbers out (checked to 1e-3), in turns. The *scan* takes steps, B, C and x, with a state going in
and out: ours, the function that transformers falls back to without CUDA kernels, and the minimal one of the Mamba-2
paper (arXiv 2405.21060, listing 1), which mamba_ssm carries as its reference. The *layer* adds projections, convolution
and norm, in which there is nothing to choose: ours, and transformers' `Mamba2Mixer`.

STORM scans all places of all frames as one sequence. The built-in model scans each of its 16 places over time: many
sequences of the four frames of a chunk. There transformers, which fills up to its block of 256 tokens, is also measured
with the block that suits it best.

The limit is the matrix products alone, at the block size that ours uses: per block C·Bᵀ, its product with x, B·x and
C·state; for the layer the two projections too. A training step is forward and backward.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
PEER_BLOCKS = (16, 64)  # that it is measured with beside it


class Case(NamedTuple):
    """A scan's sizes."""

    name: str
    width: int
    d_state: int
    n_sequences: int
    n_tokens: int  # of each


CASES = (
    Case("STORM's vision width, 1 frame of a live stream", 1152, 64, 1, TOKENS_PER_FRAME),
    Case("STORM's vision width, 4 frames", 1152, 64, 1, 4 * TOKENS_PER_FRAME),
    Case("STORM's vision width, 32 frames", 1152, 64, 1, 32 * TOKENS_PER_FRAME),
    Case("a 7B language model's width, 4 frames", 3584, 64, 1, 4 * TOKENS_PER_FRAME),
    Case("the built-in model, a chunk of a stream", 128, 32, 16, 4),
    Case("the built-in model, a chunk of each of 8 streams", 128, 32, 128, 4),
    Case("the built-in model's width, 256 tokens as one sequence", 128, 32, 1, 256),
    Case("the built-in model's width, 4,096 tokens as one sequence", 128, 32, 1, 4096),
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


def products(layer: Mamba2, case: Case, *, projections: bool) -> Callable[[], None]:
    """Return what does the scan's or the layer's matrix products, and nothing else, on numbers of the same shapes."""
    n, q = case.n_sequences, min(layer.block_tokens, case.n_tokens)
    n_heads, d_head, d_state = layer.n_heads, layer.head_dim, layer.d_state
    n_blocks = -(-case.n_tokens // q)
    u, inner = (torch.randn(n, case.n_tokens, width) for width in (layer.d_model, layer.d_inner))
    b, c = torch.randn(n_blocks, n, q, d_state), torch.randn(n_blocks, n, d_state, q)
    mixing, x = torch.randn(n * n_heads, q, q), torch.randn(n * n_heads, q, d_head)
    wide_x, state = torch.randn(n, q, n_heads * d_head), torch.randn(n, d_state, n_heads * d_head)

    def work() -> None:
        if projections:
            layer.in_proj(u)
            layer.out_proj(inner)
        for k in range(n_blocks):  # one after the other, as the state wants it
            torch.bmm(b[k], c[k])
            torch.bmm(mixing, x)
            torch.bmm(c[k], wide_x)
            torch.bmm(b[k], state)

    return work


def measure_scan(layer: Mamba2, case: Case, rounds: int) -> dict[str, Any]:
    """Return the scan's ratios at a layer's sizes."""
    n, n_tokens, n_heads, d_head, d_state = *case[3:], layer.n_heads, layer.head_dim, layer.d_state
    x, dt = torch.randn(n, n_tokens, n_heads, d_head), F.softplus(torch.randn(n, n_tokens, n_heads) - 3)
    a, d = -torch.rand(n_heads) - 1, torch.ones(n_heads)
    b, c = torch.randn(n, n_tokens, 1, d_state), torch.randn(n, n_tokens, 1, d_state)
    state = torch.randn(n, n_heads, d_head, d_state)

    def ours(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, b, c = given or (x_0, b_0, c_0)
        return ssd_scan(x, dt, a, b, c, block_tokens=layer.block_tokens, D=d, initial_state=state)

    def theirs(*given: Tensor, block: int = PEER_BLOCK) -> tuple[Tensor, Tensor]:
        x, b, c = given or (x_0, b_0, c_0)
        more = {"D": d, "initial_states": state, "return_final_states": True}
        return mamba2_chunk_scan(x, dt, a, b, c, block, **more)

    def the_listing() -> tuple[Tensor, Tensor]:
        y, last = listing(x * dt[..., None], dt * a, b, c, min(PEER_BLOCK, n_tokens), state)
        return y + d[:, None] * x, last

    x_0, b_0, c_0 = x, b, c
    blocks = {PEER_BLOCK, min(PEER_BLOCK, n_tokens), *(block for block in PEER_BLOCKS if block < n_tokens)}
    peers = {f"block {block}": partial(theirs, block=block) for block in sorted(blocks)}
    default = f"block {PEER_BLOCK}"
    with torch.inference_mode():
        for peer in (theirs, the_listing):
            torch.testing.assert_close(ours(), peer(), atol=1e-3, rtol=1e-3)
        works = {"ours": ours, "listing": the_listing, "products": products(layer, case, projections=False)}
        took = in_turns(works | peers, rounds)
        spent = spent_on(ours)

    def train(scan: Callable[..., tuple[Tensor, Tensor]]) -> None:
        y, _ = scan(*(each.clone().requires_grad_() for each in (x, b, c)))
        y.square().mean().backward()

    best = min(peers, key=lambda name: took[name])
    trained = {"ours": ours} | {name: peers[name] for name in {default, best}}
    training = in_turns({name: partial(train, scan) for name, scan in trained.items()}, max(1, rounds // 2))
    return {
        "ours_ms": round(took["ours"] * 1e3, 2),
        "over transformers": round(took[default] / took["ours"], 2),
        "over transformers at its best block": round(took[best] / took["ours"], 2),
        "over the paper's listing": round(took["listing"] / took["ours"], 2),
        "of its matrix products": round(took["products"] / took["ours"], 2),
        "training, over transformers": round(training[default] / training["ours"], 2),
        "training, over transformers at its best block": round(training[best] / training["ours"], 2),
        "spent_on": spent,
    }


def measure_layer(ours: Mamba2, case: Case, rounds: int) -> dict[str, Any]:
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
    u = torch.randn(case.n_sequences, case.n_tokens, ours.d_model)
    with torch.inference_mode():
        y, state = ours(u[:, : case.n_tokens // 2])
        rest, _ = ours(u[:, case.n_tokens // 2 :], state)
        expected = theirs(u, cache_params=DynamicCache(config=config))
        torch.testing.assert_close(torch.cat([y, rest], 1), expected, atol=1e-3, rtol=1e-3)
        works: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(u, state),
            "theirs": lambda: theirs(u, cache_params=DynamicCache(config=config)),
            "products": products(ours, case, projections=True),
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
    for case in CASES:
        torch.manual_seed(0)
        layer = Mamba2(case.width, d_state=case.d_state, head_dim=64).eval()
        for part, measure in (("scan", measure_scan), ("layer", measure_layer)):
            sizes = {"sequences": case.n_sequences, "tokens": case.n_tokens}
            told[part][case.name] = {**sizes, **measure(layer, case, options.rounds)}
            print(f"{part}, {case.name}: {told[part][case.name]}", flush=True)
    write_result("scan", told, ["torch", "transformers"])


if __name__ == "__main__":
    main()
