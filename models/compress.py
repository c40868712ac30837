"""Fewer video tokens inside the model: pooling, once per chunk, before tokens are stored.

Averages over frames (STORM, arXiv 2503.04130; 4 is its default) and over neighbouring places. What is chosen of the
stored tokens when a question comes is in `selection`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor


def temporal_pool(x: Tensor, pool_frames: int) -> Tensor:
    """Average each run of `pool_frames` frames; a last run with fewer frames averages what is there.

    Args:
        x: (B, T, rows, cols, d).
        pool_frames: 1 or more.

    Returns:
        (B, ceil(T / pool_frames), rows, cols, d).
    """
    n_whole = x.shape[1] // pool_frames * pool_frames
    parts = []
    if n_whole:
        parts.append(reduce(x[:, :n_whole], "b (t k) r c d -> b t r c d", "mean", k=pool_frames))
    if n_whole < x.shape[1]:
        parts.append(x[:, n_whole:].mean(1, keepdim=True))
    return torch.cat(parts, dim=1)


def spatial_pool(x: Tensor, pool: int) -> Tensor:
    """Average each `pool` × `pool` square of places; squares cut off by the edge average what is there.

    Args:
        x: (B, T, rows, cols, d).
        pool: Side of a square in places, 1 or more.

    Returns:
        (B, T, ceil(rows / pool), ceil(cols / pool), d).
    """
    if pool == 1:
        return x
    n_streams = x.shape[0]
    maps = rearrange(x, "b t r c d -> (b t) d r c")
    maps = F.avg_pool2d(maps, pool, ceil_mode=True)  # a window over the edge divides by what is inside
    return rearrange(maps, "(b t) d r c -> b t r c d", b=n_streams)
