"""The temporal encoder: what lets a frame's tokens know the frames before.

Blocks of pre-norm Mamba-2, each a residual whose last projection starts at zero (`TemporalBlock`):

    x ← x + out(Mamba2(Norm(x)))

The forward scan carries its state from chunk to chunk. The backward scan, which can be switched off, sees the current
chunk only, so a stream needs no more look-ahead than its chunk. Each block has a scan order:

    sweep      one sequence over frames, rows and columns (STORM, arXiv 2503.04130, section 3.2)
    location   each place by itself over time, the places as a batch

A stream's state is `TemporalState`: frozen, float32, of a size that does not depend on the stream's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .mamba2 import Mamba2, Mamba2State

SCAN_ORDERS = ("sweep", "location")
STATE_VERSION = 1  # in the key names of a snapshot; another layout of the state needs another number


@dataclass(frozen=True)
class TemporalConfig:
    """Sizes of a temporal encoder. JSON-able through `to_dict` and `from_dict`.

    Raises:
        ValueError: On sizes that do not go together.
    """

    d_model: int  # width of the tokens that come in and go out
    d_temporal: int  # width of the blocks; where it differs from d_model, a linear layer leads in and one out
    n_layers: int = 1
    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    bidirectional: bool = True  # adds the backward scan over the current chunk
    scan_orders: tuple[str, ...] = ("location",)  # one per block
    block_tokens: int = 64  # tokens in a block of the scan
    norm_eps: float = 1e-5

    def __post_init__(self):
        object.__setattr__(self, "scan_orders", tuple(self.scan_orders))  # JSON has lists
        if len(self.scan_orders) != self.n_layers:
            raise ValueError(
                f"scan_orders has {len(self.scan_orders)} entries {self.scan_orders}; expected one per layer, "
                f"n_layers = {self.n_layers}"
            )
        unknown = [order for order in self.scan_orders if order not in SCAN_ORDERS]
        if unknown:
            raise ValueError(f"scan_orders holds {unknown}; expected each to be one of {SCAN_ORDERS}")
        for name in ("d_model", "d_temporal", "n_layers", "d_state", "expand", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {**asdict(self), "scan_orders": list(self.scan_orders)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TemporalConfig:
        """Build it from `to_dict`'s result.

        Raises:
            ValueError: On an unknown key.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"temporal config has unknown keys {unknown}; expected only {sorted(known)}")
        return cls(**values)


@dataclass(frozen=True)
class TemporalState:
    """What the temporal encoder remembers of one or more streams of the same frame size.

    Never modified in place: each step returns a new one, so an old one stays a valid snapshot.
    """

    n_streams: int
    rows: int
    cols: int
    blocks: tuple[Mamba2State, ...]  # per block; batch n_streams (sweep) or n_streams * rows * cols (location)

    def __repr__(self) -> str:
        return f"TemporalState(n_streams={self.n_streams}, grid={self.rows}x{self.cols}, n_bytes={self.n_bytes})"

    @property
    def n_bytes(self) -> int:
        """Return its size in memory."""
        return sum(block.n_bytes for block in self.blocks)

    def to(self, device: torch.device | str) -> TemporalState:
        """Return it on another device."""
        return self._with_blocks(self.n_streams, [block.to(device) for block in self.blocks])

    def detach(self) -> TemporalState:
        """Return it cut off from the graph, for back-propagation through a limited time."""
        return self._with_blocks(self.n_streams, [block.detach() for block in self.blocks])

    @classmethod
    def stack(cls, states: Sequence[TemporalState]) -> TemporalState:
        """Join states along the stream axis, in order.

        Raises:
            ValueError: On no states, or states of different frame sizes or encoders.
        """
        if not states:
            raise ValueError("got no states to stack; expected one or more")
        first = states[0]
        for i, state in enumerate(states):
            if (state.rows, state.cols, len(state.blocks)) != (first.rows, first.cols, len(first.blocks)):
                raise ValueError(f"state {i} is {state}; expected the grid and blocks of the first, {first}")
        if len(states) == 1:
            return first
        blocks = [
            Mamba2State(torch.cat([b.conv for b in same]), torch.cat([b.ssm for b in same]))
            for same in zip(*(state.blocks for state in states), strict=True)
        ]
        return first._with_blocks(sum(state.n_streams for state in states), blocks)

    def unstack(self) -> list[TemporalState]:
        """Return one state per stream, each with memory of its own."""
        if self.n_streams == 1:
            return [self]
        # Clones: a view would keep the whole batch in memory for as long as one of its streams lives.
        per_block = [
            [
                Mamba2State(conv.clone(), ssm.clone())
                for conv, ssm in zip(block.conv.chunk(self.n_streams), block.ssm.chunk(self.n_streams), strict=True)
            ]
            for block in self.blocks
        ]
        return [self._with_blocks(1, blocks) for blocks in zip(*per_block, strict=True)]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return it as named tensors on CPU, contiguous, for safetensors. The names carry the layout's version."""
        prefix = f"temporal.v{STATE_VERSION}"
        tensors = {f"{prefix}.grid": torch.tensor([self.n_streams, self.rows, self.cols])}
        for i, block in enumerate(self.blocks):
            tensors[f"{prefix}.block{i}.conv"] = block.conv.detach().cpu().contiguous()
            tensors[f"{prefix}.block{i}.ssm"] = block.ssm.detach().cpu().contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TemporalState:
        """Build it from `to_tensors`'s result; on CPU. Keys that do not start with ``temporal.`` are ignored.

        Raises:
            ValueError: If the tensors are of another version, or some are missing.
        """
        prefix = f"temporal.v{STATE_VERSION}"
        names = sorted(name for name in tensors if name.startswith("temporal."))
        n_blocks = sum(name.endswith(".conv") for name in names)
        kinds = [f"block{i}.{kind}" for i in range(n_blocks) for kind in ("conv", "ssm")]
        expected = sorted(f"{prefix}.{kind}" for kind in ("grid", *kinds))
        if names != expected:
            raise ValueError(
                f"snapshot of a temporal state holds {names}; expected {expected}. "
                "It was written by another version or is damaged: start the stream with a new state"
            )
        n_streams, rows, cols = (int(n) for n in tensors[f"{prefix}.grid"])
        blocks = (
            Mamba2State(tensors[f"{prefix}.block{i}.conv"], tensors[f"{prefix}.block{i}.ssm"]) for i in range(n_blocks)
        )
        return cls(n_streams, rows, cols, tuple(blocks))

    def _with_blocks(self, n_streams: int, blocks: Sequence[Mamba2State]) -> TemporalState:
        return TemporalState(n_streams, self.rows, self.cols, tuple(blocks))


class TemporalBlock(nn.Module):
    """One residual block: norm, (linear in,) a Mamba-2 each way, (linear out)."""

    def __init__(self, config: TemporalConfig, scan_order: str):
        super().__init__()
        self.scan_order = scan_order
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        narrow = config.d_temporal != config.d_model
        self.proj_in = nn.Linear(config.d_model, config.d_temporal, bias=False) if narrow else None
        self.forward_mixer = _mixer(config)
        self.backward_mixer = _mixer(config) if config.bidirectional else None
        self.proj_out = nn.Linear(config.d_temporal, config.d_model, bias=False) if narrow else None
        self.zero_last_projection()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, the last projection at zero."""
        nn.init.ones_(self.norm.weight)
        for module in (self.proj_in, self.proj_out, self.forward_mixer, self.backward_mixer):
            if module is not None:
                module.reset_parameters()
        self.zero_last_projection()

    def zero_last_projection(self) -> None:
        """Make the block add nothing: `proj_out` where there is one, else the mixers' own."""
        if self.proj_out is not None:
            nn.init.zeros_(self.proj_out.weight)
            return
        for mixer in (self.forward_mixer, self.backward_mixer):
            if mixer is not None:
                nn.init.zeros_(mixer.out_proj.weight)

    def state_batch(self, n_streams: int, rows: int, cols: int) -> int:
        """Return how many sequences the streams make in this block's order."""
        return n_streams if self.scan_order == "sweep" else n_streams * rows * cols

    def forward(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """Advance over one chunk: x (B, T, rows, cols, d_model) → the same shape, and the new state."""
        n_streams, _, rows, cols, _ = x.shape
        h = self.norm(x)
        if self.proj_in is not None:
            h = self.proj_in(h)
        if self.scan_order == "sweep":
            h = rearrange(h, "b t r c d -> b (t r c) d")
        else:
            h = rearrange(h, "b t r c d -> (b r c) t d")
        y, state = self.forward_mixer(h, state)
        if self.backward_mixer is not None:
            y = y + self.backward_mixer(h.flip(1))[0].flip(1)
        if self.scan_order == "sweep":
            y = rearrange(y, "b (t r c) d -> b t r c d", r=rows, c=cols)
        else:
            y = rearrange(y, "(b r c) t d -> b t r c d", b=n_streams, r=rows)
        if self.proj_out is not None:
            y = self.proj_out(y)
        return x + y, state


def _mixer(config: TemporalConfig) -> Mamba2:
    return Mamba2(
        config.d_temporal,
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.expand,
        head_dim=config.head_dim,
        n_groups=config.n_groups,
        block_tokens=config.block_tokens,
        norm_eps=config.norm_eps,
    )


class TemporalEncoder(nn.Module):
    """Lets tokens know the frames before them, chunk by chunk and without end.

    Fresh from its constructor it changes nothing, exactly: an image model can be wrapped before any training.
    """

    def __init__(self, config: TemporalConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(TemporalBlock(config, order) for order in config.scan_orders)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, the last projections at zero."""
        for block in self._blocks():
            block.reset_parameters()

    def init_state(
        self, n_streams: int, rows: int, cols: int, device: torch.device | str | None = None
    ) -> TemporalState:
        """Return the state before any frame: zeros, float32."""
        blocks = [
            block.forward_mixer.init_state(block.state_batch(n_streams, rows, cols), device) for block in self._blocks()
        ]
        return TemporalState(n_streams, rows, cols, tuple(blocks))

    def forward(
        self, x: Tensor, state: TemporalState | None = None, *, chunk_frames: int | None = None
    ) -> tuple[Tensor, TemporalState]:
        """Advance the streams over a chunk of frames, or over a clip on a grid of chunks.

        Without `chunk_frames` the call is one chunk, which is also the fast way to train on a long clip. With it, one
        call does what calls of that many frames each would do with the state carried, bit for bit on CPU. Without the
        backward scan the two agree to rounding; with it they differ, as it sees its chunk only.

        Args:
            x: (B, T, rows, cols, d_model), B streams of T frames, both 1 or more.
            state: After the frames before, on x's device; None at the start of the streams. Not modified.
            chunk_frames: Frames in a chunk (the last chunk may be shorter), or None.

        Returns:
            The same shape and dtype, and the state after the last frame.

        Raises:
            ValueError: If x has another width, or the state is for other streams, grid or encoder.
        """
        if x.dim() != 5 or x.shape[1] < 1 or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (B, T, rows, cols, {self.config.d_model}) with T of 1 or more"
            )
        n_streams, _, rows, cols, _ = x.shape
        if state is None:
            state = self.init_state(n_streams, rows, cols, x.device)
        self._check_state(state, n_streams, rows, cols)
        if chunk_frames is None:
            return self._advance(x, state)
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames is {chunk_frames}; expected 1 or more, or None for one chunk")
        outputs = []
        for chunk in x.split(chunk_frames, dim=1):
            # A copy is aligned in memory like any new tensor, so that its products round as in a call of its own.
            y, state = self._advance(chunk.clone(memory_format=torch.contiguous_format), state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def _advance(self, x: Tensor, state: TemporalState) -> tuple[Tensor, TemporalState]:
        new_blocks = []
        for block, block_state in zip(self._blocks(), state.blocks, strict=True):
            x, block_state = block(x, block_state)
            new_blocks.append(block_state)
        return x, TemporalState(state.n_streams, state.rows, state.cols, tuple(new_blocks))

    def _check_state(self, state: TemporalState, n_streams: int, rows: int, cols: int) -> None:
        got = (state.n_streams, state.rows, state.cols, len(state.blocks))
        expected = (n_streams, rows, cols, self.config.n_layers)
        if got != expected:
            raise ValueError(
                f"the state is for (streams, rows, cols, blocks) = {got}; expected {expected} as in x. "
                "Start the stream with init_state, or restore a snapshot of this model"
            )

    def _blocks(self) -> list[TemporalBlock]:
        return cast(list[TemporalBlock], list(self.blocks))
