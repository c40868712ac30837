"""The Mamba-2 mixer, with its whole state in and out.

Parameters have the names and shapes of mamba_ssm's `Mamba2`, so that its weights load. Unlike there, `forward` takes
and returns the state of both the convolution and the scan, at any length: a sequence may be cut anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ssd import ssd_scan, state_dtype

# Range of the step sizes at the start, and their floor: mamba_ssm's defaults.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
A_MIN, A_MAX = 1.0, 16.0  # range of -A at the start: mamba_ssm's default


@dataclass(frozen=True)
class Mamba2State:
    """All that a mixer remembers of a sequence; its size does not depend on the sequence's length.

    Kept in float32 whatever the model's dtype (float64 in a float64 model): a state in half precision drifts.
    """

    conv: Tensor  # (b, d_conv - 1, conv_dim): the convolution's last inputs, oldest first, zeros before the start
    ssm: Tensor  # (b, n_heads, head_dim, d_state)

    def __repr__(self) -> str:
        return f"Mamba2State(conv={tuple(self.conv.shape)}, ssm={tuple(self.ssm.shape)}, dtype={self.ssm.dtype})"

    @property
    def n_bytes(self) -> int:
        """Return its size in memory."""
        return self.conv.nbytes + self.ssm.nbytes

    def to(self, device: torch.device | str) -> Mamba2State:
        """Return it on another device."""
        return Mamba2State(self.conv.to(device), self.ssm.to(device))

    def detach(self) -> Mamba2State:
        """Return it cut off from the graph, for back-propagation through a limited time."""
        return Mamba2State(self.conv.detach(), self.ssm.detach())


class GatedRMSNorm(nn.Module):
    """RMS norm of x · silu(z), over each group of channels by itself (mamba_ssm's, with `norm_before_gate=False`)."""

    def __init__(self, d: int, *, n_groups: int = 1, eps: float = 1e-5):
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the normed product, (…, d), in the weight's dtype; computed in float32 or better."""
        dtype = state_dtype(x.dtype)
        gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (self.n_groups, -1))
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (gated * scale).flatten(-2).to(self.weight.dtype) * self.weight


class Mamba2(nn.Module):
    """A sequence mixer of linear cost: projection, short convolution, selective scan, gated norm, projection.

    Args:
        d_model: Width of what comes in and goes out.
        d_state: Numbers kept per channel.
        d_conv: Taps of the causal convolution, 2 or more.
        expand: Inner width over d_model.
        head_dim: Channels in a head; divides the inner width.
        n_groups: Groups of heads that share B and C.
        bias: Whether the two projections have a bias.
        conv_bias: Whether the convolution has one.
        block_tokens: Tokens in a block of the scan (`ssd_scan`).
        norm_eps: Of the gated norm.

    Raises:
        ValueError: If the sizes do not divide each other.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        bias: bool = False,
        conv_bias: bool = True,
        block_tokens: int = 64,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        d_inner = expand * d_model
        if d_inner % head_dim:
            raise ValueError(f"head_dim is {head_dim}; expected a divisor of expand * d_model = {d_inner}")
        if n_groups < 1 or (d_inner // head_dim) % n_groups:
            raise ValueError(f"n_groups is {n_groups}; expected a divisor of the {d_inner // head_dim} heads")
        if d_conv < 2:
            raise ValueError(f"d_conv is {d_conv}; expected 2 or more")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, d_inner, d_state, d_conv
        self.head_dim, self.n_heads, self.n_groups = head_dim, d_inner // head_dim, n_groups
        self.conv_dim = d_inner + 2 * n_groups * d_state
        self.block_tokens = block_tokens

        self.in_proj = nn.Linear(d_model, d_inner + self.conv_dim + self.n_heads, bias=bias)  # [z | x B C | dt]
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(d_inner, n_groups=n_groups, eps=norm_eps)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        self.reset_scan_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as mamba_ssm does; those that transformers marks as loaded are left alone."""
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        self.out_proj.reset_parameters()
        nn.init.ones_(self.norm.weight)
        self.reset_scan_parameters()

    def reset_scan_parameters(self) -> None:
        """Draw dt_bias, A_log and D anew: log-uniform steps, A uniform in (-16, -1), D one."""
        log_dt = torch.empty_like(self.dt_bias, dtype=torch.float32)
        dt = log_dt.uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
        _fill(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        _fill(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(A_MIN, A_MAX).log())
        nn.init.ones_(self.D)

    def init_state(self, b: int, device: torch.device | str | None = None) -> Mamba2State:
        """Return the state before any token, for b sequences: zeros, float32."""
        return Mamba2State(
            conv=torch.zeros(b, self.d_conv - 1, self.conv_dim, device=device),
            ssm=torch.zeros(b, self.n_heads, self.head_dim, self.d_state, device=device),
        )

    def forward(
        self, u: Tensor, state: Mamba2State | None = None, *, chunk_tokens: int | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Mix a sequence, or the next piece of one.

        Cutting it anywhere and carrying the state gives what one pass gives: to rounding in general, since a
        matrix product may round differently at another length. Bit for bit on CPU where both go in pieces of the
        same lengths, which is what `chunk_tokens` is for: with it, one call equals calls of that many tokens each,
        on tensors of their own and with the same number of threads.

        Args:
            u: (b, l, d_model), l of 1 or more.
            state: After the tokens before; None at the start. Not modified.
            chunk_tokens: Process u in pieces of this many tokens (the last may be shorter), or None for all at once.

        Returns:
            (b, l, d_model), and the state after the last token.

        Raises:
            ValueError: If u or the state has another shape.
        """
        if u.dim() != 3 or u.shape[1] < 1 or u.shape[2] != self.d_model:
            raise ValueError(f"u has shape {tuple(u.shape)}; expected (b, l, {self.d_model}) with l of 1 or more")
        if state is None:
            state = self.init_state(u.shape[0], u.device)
        expected_conv = (u.shape[0], self.d_conv - 1, self.conv_dim)
        if tuple(state.conv.shape) != expected_conv:
            raise ValueError(f"the state's conv has shape {tuple(state.conv.shape)}; expected {expected_conv}")
        if chunk_tokens is None:
            return self._mix(u, state)
        outputs = []
        for piece in u.split(chunk_tokens, dim=1):
            # A copy starts at an aligned address like any new tensor. A view in the middle may not, and MKL was seen to
            # round small products differently there.
            y, state = self._mix(piece.clone(memory_format=torch.contiguous_format), state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def _mix(self, u: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        n_BC = self.n_groups * self.d_state
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.n_heads], dim=-1)
        xBC, conv_state = self._convolve(xBC, state.conv)
        x, B, C = xBC.split([self.d_inner, n_BC, n_BC], dim=-1)
        dtype = state_dtype(dt.dtype)
        y, ssm_state = ssd_scan(
            x.unflatten(-1, (self.n_heads, self.head_dim)),
            F.softplus(dt.to(dtype) + self.dt_bias.to(dtype)),
            -torch.exp(self.A_log.to(dtype)),  # in float32, since in half precision it may overflow
            B.unflatten(-1, (self.n_groups, self.d_state)),
            C.unflatten(-1, (self.n_groups, self.d_state)),
            block_tokens=self.block_tokens,
            D=self.D,
            initial_state=state.ssm,
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), Mamba2State(conv_state, ssm_state)

    def _convolve(self, xBC: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve (b, l, conv_dim) over time behind the last inputs; return silu of it, and the new last inputs.

        As d_conv shifted products, in the layout that comes in and goes out: a convolution call wants channels before
        time, and was no faster on CPU.
        """
        length = xBC.shape[1]
        inputs = torch.cat([conv_state.to(xBC.dtype), xBC], dim=1)  # (b, d_conv - 1 + l, conv_dim)
        taps = self.conv1d.weight[:, 0].to(xBC.dtype)  # (conv_dim, d_conv)
        out = inputs[:, :length] * taps[:, 0]
        for k in range(1, self.d_conv):
            out = torch.addcmul(out, inputs[:, k : k + length], taps[:, k])
        if self.conv1d.bias is not None:
            out = out + self.conv1d.bias.to(xBC.dtype)
        # Cloned, so that a state that is kept does not keep its whole chunk in memory.
        last = inputs[:, length:].to(state_dtype(xBC.dtype), copy=True)
        return F.silu(out), last


@torch.no_grad()
def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    # transformers marks what `from_pretrained` has loaded, and guards nn.init by that mark; here too.
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
