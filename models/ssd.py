"""The selective state-space scan of Mamba-2, with a state in and a state out.

Per head, with a scalar decay (Mamba-2, arXiv 2405.21060, section 6, "SSD"):

    h_t = exp(dt_t · A) · h_{t-1} + dt_t · x_t ⊗ B_t        h: (head_dim, d_state)
    y_t = h_t · C_t + D · x_t

`ssd_scan_ref` is that recurrence, token after token. `ssd_scan` is its block form, as matrix products: inside a
block of tokens like masked attention, between blocks by the state alone. On CPU, heads that decay moderately share one
matrix of weights inside a block (`_scan_gentle`). Shapes are those of mamba_ssm:

    x (b, l, n_heads, head_dim) · dt (b, l, n_heads) · A (n_heads,) · B, C (b, l, n_groups, d_state)
    state (b, n_heads, head_dim, d_state)

`dt` is the step after its bias and softplus. Heads are split evenly among groups, and a group shares B and C.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

STEEP = 60.0  # a head that decays by more than exp(-60) within a block; float32 ends at exp(88), and x has its share


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    block_tokens: int,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence from a state, in blocks.

    On CUDA it runs mamba_ssm's Triton kernel where that imports, elsewhere torch. The torch form walks over the
    blocks in order and does for each the same products whatever the length, so cutting a sequence at a multiple
    of `block_tokens` and carrying the state gives the same bits on CPU, where that is a multiple of 16 (so that blocks
    start at aligned addresses); any other cut agrees to rounding.

    Args:
        x: (b, l, n_heads, head_dim), l of 1 or more, not only multiples of the block.
        dt: (b, l, n_heads), steps after bias and softplus, 0 or more.
        A: (n_heads,), negative.
        B: (b, l, n_groups, d_state), what enters the state.
        C: (b, l, n_groups, d_state), what is read from it.
        block_tokens: Tokens in a block. Work inside a block grows with its square, overhead with the number of
            blocks; 64 was fastest on CPU.
        D: (n_heads,), the skip from x to y, or None for none.
        initial_state: (b, n_heads, head_dim, d_state), or None for zeros. Not modified.

    Returns:
        y (b, l, n_heads, head_dim) in the dtype of x, and the state after the last token, in float32
        (float64 where x is). Both can be differentiated, and so can every input.

    Raises:
        ValueError: If the shapes do not fit together, or `block_tokens` is below 1.
    """
    _check_shapes(x, dt, A, B, C, block_tokens, D, initial_state)
    kernel = _cuda_kernel() if x.is_cuda and x.dtype != torch.float64 else None
    if kernel is not None:
        return _scan_cuda(kernel, x, dt, A, B, C, block_tokens, D, initial_state)
    return _scan_torch(x, dt, A, B, C, block_tokens, D, initial_state)


def ssd_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan token after token: the slow truth of `ssd_scan`, whose arguments and results these are."""
    dtype = state_dtype(x.dtype)
    b, length, n_heads, head_dim = x.shape
    heads_per_group = n_heads // B.shape[2]
    x_, dt_, A_ = x.to(dtype), dt.to(dtype), A.to(dtype)
    B_ = B.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (b, l, n_heads, d_state)
    C_ = C.to(dtype).repeat_interleave(heads_per_group, dim=2)
    state = x_.new_zeros(b, n_heads, head_dim, B.shape[3]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(dt_[:, t] * A_)[..., None, None]  # (b, n_heads, 1, 1)
        entering = (dt_[:, t, :, None] * x_[:, t])[..., None] * B_[:, t, :, None, :]
        state = decay * state + entering
        outputs.append((state * C_[:, t, :, None, :]).sum(-1))  # (b, n_heads, head_dim)
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x_
    return y.to(x.dtype), state


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the scan computes and keeps its state in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_tokens: int,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(x.dtype)
    b, length, n_heads, head_dim = x.shape
    # Autocast would run the products in half precision, where a carried state drifts.
    with torch.autocast(x.device.type, enabled=False):
        x_, dt_, B_, C_ = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
        log_decay = dt_ * A.to(dtype)
        state = x_.new_zeros(b, n_heads, head_dim, B.shape[3]) if initial_state is None else initial_state.to(dtype)
        future = _future_mask(min(block_tokens, length), x.device)
        outputs = []
        # Split at once: a slice's gradient is as long as the whole, so that slices would cost its square.
        blocks = zip(*(each.split(block_tokens, 1) for each in (x_, dt_, log_decay, B_, C_)), strict=True)
        for x_q, dt_q, log_decay_q, B_q, C_q in blocks:
            y, state = _scan_block(x_q, dt_q, log_decay_q, B_q, C_q, state, future)
            if D is not None:  # here rather than once at the end: a block is still in the processor's cache
                y = y.addcmul_(D.to(dtype)[:, None], x_q)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y.to(x.dtype), state


def _future_mask(n: int, device: torch.device) -> Tensor:
    """Return (n, n) bool, True where the column comes after the row."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)


def _scan_block(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, future: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state over q tokens: each head in the cheapest way that its decay allows."""
    log_total = log_decay.transpose(1, 2).cumsum(-1)  # (b, n_heads, q), from the block's start to after each token
    if x.device.type != "cpu":  # looking at the decays would wait for the device
        return _scan_steep(x, dt, log_total, B, C, state, future)
    is_steep = (log_total.detach()[..., -1] < -STEEP).any(0)  # (n_heads,)
    n_steep = int(is_steep.sum())
    if n_steep == 0:
        return _scan_gentle(x, dt, log_total, B, C, state)
    if n_steep == len(is_steep) or B.shape[2] > 1:
        return _scan_steep(x, dt, log_total, B, C, state, future)
    gentle, steep = (~is_steep).nonzero()[:, 0], is_steep.nonzero()[:, 0]
    y_gentle, state_gentle = _scan_gentle(
        x[:, :, gentle], dt[:, :, gentle], log_total[:, gentle], B, C, state[:, gentle]
    )
    y_steep, state_steep = _scan_steep(
        x[:, :, steep], dt[:, :, steep], log_total[:, steep], B, C, state[:, steep], future
    )
    back = torch.cat([gentle, steep]).argsort()
    return torch.cat([y_gentle, y_steep], 2)[:, :, back], torch.cat([state_gentle, state_steep], 1)[:, back]


def _scan_gentle(
    x: Tensor, dt: Tensor, log_total: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state over q tokens with four products, for heads that decay by `STEEP` at most.

    The weight of token j at token i is (C_i · B_j) · exp(L_i - L_j), where L is `log_total`. It comes apart into
    exp(L_i) · (C_i · B_j) · exp(-L_j), and neither factor overflows. So the factors go to rows and columns, and what
    lies between them is the same for all heads of a group: one product for all of them, instead of a matrix and an
    exponential for each head and pair of tokens. What enters the state and what is read of it have the same factors.
    """
    b, q, n_heads, head_dim = x.shape
    n_groups, d_state = B.shape[2:]
    wide = n_heads // n_groups * head_dim
    row = log_total.exp()  # (b, n_heads, q)
    column = log_total.neg().exp().transpose(1, 2) * dt  # (b, q, n_heads)

    C_g, B_g = _by_group(C), _by_group(B)  # (b · n_groups, q, d_state)
    x_g = _by_group((x * column[..., None]).view(b, q, n_groups, wide))  # (b · n_groups, q, wide)
    before = state.reshape(b * n_groups, wide, d_state)
    scores = torch.bmm(C_g, B_g.transpose(1, 2)).tril()  # (b · n_groups, q, q); nothing from later tokens
    y = torch.baddbmm(torch.bmm(C_g, before.transpose(1, 2)), scores, x_g)
    y = y.view(b, n_groups, q, wide).transpose(1, 2).reshape(b, q, n_heads, head_dim)
    after = torch.baddbmm(before, x_g.transpose(1, 2), B_g).view(b, n_heads, head_dim, d_state)
    return y * row.transpose(1, 2)[..., None], after * row[..., -1, None, None]


def _by_group(x: Tensor) -> Tensor:
    """Return (b · n_groups, q, d) of (b, q, n_groups, d); for one group without a copy."""
    return x[:, :, 0] if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def _scan_steep(
    x: Tensor, dt: Tensor, log_total: Tensor, B: Tensor, C: Tensor, state: Tensor, future: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state over q tokens with four products, whatever the decay (Mamba-2, listing 1).

    Heads of a group share B and C: what involves those alone (step 1) is done once per group, and the others take a
    group's heads side by side as one wide matrix. For one group no operand needs a copy.
    """
    b, q, n_heads, head_dim = x.shape
    n_groups, d_state = B.shape[2:]
    wide = n_heads // n_groups * head_dim
    x_dt = x * dt[..., None]
    C_g, B_g = C.transpose(1, 2), B.transpose(1, 2)  # (b, n_groups, q, d_state)

    # 1. Inside the block: token j reaches token i with weight (C_i · B_j) · decay(j → i).
    # Future weights are masked before the exponential, which could overflow there and spoil gradients.
    decay = log_total[..., :, None] - log_total[..., None, :]
    decay = decay.masked_fill_(future[:q, :q], -torch.inf).exp_()  # (b, n_heads, q, q)
    scores = C_g @ B_g.transpose(-1, -2)  # (b, n_groups, q, q)
    weights = decay.unflatten(1, (n_groups, -1)) * scores[:, :, None]
    y_inside = weights.flatten(1, 2) @ x_dt.transpose(1, 2)  # (b, n_heads, q, head_dim)

    # 2. From before the block: what each token reads of the state, decayed up to it.
    read = C_g @ state.reshape(b, n_groups, wide, d_state).transpose(-1, -2)  # (b, n_groups, q, wide)
    read = read.transpose(1, 2).reshape(b, q, n_heads, head_dim)
    from_start = log_total.exp().transpose(1, 2)[..., None]  # (b, q, n_heads, 1)
    y = (read * from_start).add_(y_inside.transpose(1, 2))  # in this order it is contiguous

    # 3. Into the state: each token's outer product, decayed to the block's end.
    to_end = (log_total[..., -1:] - log_total).exp().transpose(1, 2)[..., None]  # (b, q, n_heads, 1)
    entering = (x_dt * to_end).reshape(b, q, n_groups, wide)
    entering = entering.permute(0, 2, 3, 1) @ B_g  # (b, n_groups, wide, d_state)

    # 4. The state itself over the block.
    over_block = log_total[..., -1].exp()[..., None, None]
    return y, torch.addcmul(entering.reshape(b, n_heads, head_dim, d_state), state, over_block)


def _scan_cuda(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_tokens: int,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # The kernel wants one dtype for x, B and C, a power of two for its chunks, and tiles of 16 or more.
    chunk_size = min(max(16, 1 << (block_tokens - 1).bit_length()), 256)
    y, final_state = kernel(
        x,
        dt.float(),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size,
        D=None if D is None else D.float(),
        initial_states=None if initial_state is None else initial_state.float().contiguous(),
        return_final_states=True,
    )
    return y.to(x.dtype), final_state.float()


@functools.cache
def _cuda_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return mamba_ssm's `mamba_chunk_scan_combined`, or None where it does not import; decided once per process."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
            mamba_chunk_scan_combined,
        )
    except ImportError as error:
        logger.warning("scan=torch device=cuda reason=%r fix='pip install stormline[cuda]'", str(error))
        return None
    logger.info("scan=mamba_ssm device=cuda")
    return mamba_chunk_scan_combined


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_tokens: int,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if block_tokens < 1:
        raise ValueError(f"block_tokens is {block_tokens}; expected 1 or more")
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (b, l, n_heads, head_dim) with l of 1 or more")
    if B.dim() != 4 or B.shape[2] < 1 or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; expected (b, l, n_groups, d_state) with n_groups dividing "
            f"the {x.shape[2]} heads"
        )
    b, length, n_heads, head_dim = x.shape
    n_groups, d_state = B.shape[2:]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("dt", dt, (b, length, n_heads)),
        ("A", A, (n_heads,)),
        ("B", B, (b, length, n_groups, d_state)),
        ("C", C, (b, length, n_groups, d_state)),
        ("D", D, (n_heads,)),
        ("initial_state", initial_state, (b, n_heads, head_dim, d_state)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} to go with x {tuple(x.shape)}")
