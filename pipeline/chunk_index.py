"""Which chunks a stream has in a range of time, without their tokens, and which of them to read for a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..models.selection import LOCAL_SHARE

POOLED_CHUNKS = 64  # read for the part of a long range that `global_local` pools
CANDIDATE_CHUNKS = 256  # read for `relevant` and `changes` to choose from, which must see tokens


@dataclass(frozen=True, eq=False)
class PastChunk:
    """A chunk as a question needs it."""

    start_ns: int
    end_ns: int
    tokens: np.ndarray = field(repr=False)  # (n_tokens, d_model) float16


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Chunks of one stream in order of start, as columns of one length."""

    start_ns: np.ndarray  # (n,) int64
    end_ns: np.ndarray  # (n,) int64
    n_tokens: np.ndarray  # (n,) int32

    @classmethod
    def empty(cls) -> ChunkIndex:
        """Return one without chunks."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))

    @classmethod
    def join(cls, parts: Sequence[ChunkIndex]) -> ChunkIndex:
        """Return the parts one after the other, as they are."""
        return cls(
            np.concatenate([part.start_ns for part in parts]),
            np.concatenate([part.end_ns for part in parts]),
            np.concatenate([part.n_tokens for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.start_ns)

    @property
    def total_tokens(self) -> int:
        """Return how many tokens all of them have together."""
        return int(self.n_tokens.sum())

    def where(self, chosen: np.ndarray) -> ChunkIndex:
        """Return those that a mask or positions name."""
        return ChunkIndex(self.start_ns[chosen], self.end_ns[chosen], self.n_tokens[chosen])

    def overlapping(self, start_ns: int, end_ns: int) -> ChunkIndex:
        """Return those that overlap [start_ns, end_ns)."""
        until = int(np.searchsorted(self.start_ns, end_ns))
        return self.where(np.flatnonzero(self.end_ns[:until] > start_ns))


def choose_policy(policy: str, index: ChunkIndex, budget_tokens: int) -> str:
    """Return what `auto` means for a range: all where it fits, else what changes, where all can be looked through.

    Of a longer range, a pooled whole and a recent part.
    """
    if policy != "auto":
        return policy
    if index.total_tokens <= budget_tokens:
        return "recent"
    return "changes" if len(index) <= CANDIDATE_CHUNKS else "global_local"


def choose_chunks(index: ChunkIndex, budget_tokens: int, policy: str) -> np.ndarray:
    """Choose what to read for a policy of `models.selection`, which then makes it fit the budget.

    However long the range is, no more chunks are chosen than the budget needs, and a fixed number for what is pooled
    or searched: evenly spaced ones stand for all. The newest is always among them.

    Args:
        index: Of the range.
        budget_tokens: The most video tokens to give to the model.
        policy: One of `models.selection.POLICIES`.

    Returns:
        (n,) positions in `index`, ascending.
    """
    n = len(index)
    if index.total_tokens <= budget_tokens:
        return np.arange(n)
    if policy == "recent":
        return np.arange(n - _n_newest(index, budget_tokens), n)
    if policy == "uniform":
        return _spaced(n, max(1, budget_tokens // max(1, int(index.n_tokens.min()))))
    if policy in ("relevant", "changes"):
        return _spaced(n, CANDIDATE_CHUNKS)
    n_local = _n_newest(index, int(budget_tokens * LOCAL_SHARE))
    return np.concatenate([_spaced_in_time(index.start_ns[: n - n_local], POOLED_CHUNKS), np.arange(n - n_local, n)])


def _n_newest(index: ChunkIndex, n_tokens: int) -> int:
    """Return how many of the newest chunks fit into so many tokens, at least one."""
    from_newest = np.cumsum(index.n_tokens[::-1])
    return max(1, int(np.searchsorted(from_newest, n_tokens, side="right")))


def _spaced(n: int, n_chosen: int) -> np.ndarray:
    """Return at most `n_chosen` evenly spaced positions of n, the last among them."""
    if n <= n_chosen:
        return np.arange(n)
    return (np.arange(n_chosen) + 1) * n // n_chosen - 1


def _spaced_in_time(start_ns: np.ndarray, n_chosen: int) -> np.ndarray:
    """Return positions of at most `n_chosen` chunks, the last of each of equal parts of time.

    The parts lie fast on the clock, so that a range which moves with it keeps its choice, and what was read once serves
    the next question too.
    """
    n = len(start_ns)
    if n <= n_chosen:
        return np.arange(n)
    width_ns = 1 << max(0, int(start_ns[-1] - start_ns[0]).bit_length() - n_chosen.bit_length())
    while len(parts := np.flatnonzero(np.diff(start_ns // width_ns, append=-1))) > n_chosen:
        width_ns *= 2
    return parts
