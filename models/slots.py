"""The memory of several answers that are written together, each in a row of its own, coming and going at any time.

A row's keys and values start at column 0; what lies behind its length is masked. So neither the arrival of a longer
prompt nor another row's end moves anything that an answer looks at. Where a row has a prefix, that stays where it is,
and the row holds what comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .exact_attention import ALIGN_TOKENS, Prefix, StepBefore, tensors_of
from .storm import StormForConditionalGeneration

ROOM_TOKENS = 64  # in whole such steps the rows grow
KEPT_BYTES = 64 << 20  # of rows that are all free: to ask for fresh memory takes as long as a token


class Slots:
    """Rows that decode one token each at a time.

    Args:
        model: In evaluation mode.
        n_rows: Always decoded together, empty ones included. With one row any kind of cache will do.
        exact: Whether the model has exact attention, which takes prefixes, and may leave out free rows.
    """

    def __init__(self, model: StormForConditionalGeneration, n_rows: int, *, exact: bool = False):
        self.n_rows = n_rows
        self._model = model
        self._exact = exact
        self._places = _Places(torch.zeros(n_rows, dtype=torch.long, device=model.device))
        self._cache: Any = None
        self._used = [False] * n_rows
        self._prefixes: list[Prefix | None] = [None] * n_rows

    def put(self, row: int, cache: Any, n_tokens: int, prefix: Prefix | None = None) -> None:
        """Begin a row with the cache of a prompt that was read by itself.

        Args:
            row: A free one.
            cache: Of the prompt's `n_tokens`, or where it has a prefix of those behind it.
            n_tokens: All of the prompt's.
            prefix: What the prompt begins with; only with several rows and exact attention.

        Raises:
            ValueError: If there are several rows and the cache is not plain keys and values.
        """
        if self.n_rows == 1:
            self._cache = cache
        else:
            layers = cache.layers
            if prefix is None and not all(type(layer) is DynamicLayer for layer in layers):
                raise ValueError(
                    "this language model keeps other caches than plain attention's (sliding window, recurrent); "
                    "expected fixed_batch=1 for it, which answers one prompt after the other"
                )
            if self._cache is None:
                self._cache = DynamicCache()
                self._cache.layers = [_SlotLayer(i, self.n_rows, self._places, like) for i, like in enumerate(layers)]
            for mine, theirs in zip(self._cache.layers, layers, strict=True):
                mine.put(row, theirs)
        n_before = 0 if prefix is None else prefix.n_tokens
        self._places.begin_row(row, n_before, n_tokens - n_before)
        self._used[row], self._prefixes[row] = True, prefix

    def release(self, row: int) -> None:
        """Give a row back; with the last one the memory goes, unless there is little of it."""
        self._used[row], self._prefixes[row] = False, None
        self._places.begin_row(row, 0, 0)
        if not any(self._used) and self._n_bytes() > KEPT_BYTES:
            self._cache = None

    def _n_bytes(self) -> float:
        if self.n_rows == 1 or self._cache is None:  # a prompt's own cache is never used again
            return math.inf
        return sum(layer.n_bytes for layer in self._cache.layers)

    def step(self, last: Sequence[int]) -> Tensor:
        """Take each row's newest token (any number for a free row) and return the logits (n_rows, vocab) after it."""
        places, device = self._places, self._model.device
        last_used = max(row for row, used in enumerate(self._used) if used)
        places.begin_step(last_used + 1 if self._exact else self.n_rows, self._prefixes)
        more: dict[str, Any] = {}
        if self.n_rows > 1:
            visible = torch.arange(places.width, device=device) <= places.lengths[:, None]
            # To exact attention as it takes it, so that nothing has to be made of it.
            more["attention_mask"] = visible[:, None, None] if self._exact else visible.long()
        out = self._model.language_model(
            input_ids=torch.tensor(last, device=device)[:, None],
            position_ids=(places.n_before + places.lengths)[:, None],
            past_key_values=self._cache,
            use_cache=True,
            **more,
        )
        places.end_step(self._used)
        return out.logits[:, -1]


class _Places:
    """Where each row writes, the same for all layers."""

    def __init__(self, lengths: Tensor):
        self.lengths = lengths  # (n_rows,) tokens in each row, behind its prefix
        self.n_before = torch.zeros_like(lengths)  # (n_rows,) tokens of its prefix
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.width = 0  # columns that this step looks at
        self.n_seen = 0  # rows that it looks at
        self.before: StepBefore | None = None  # what this step looks at besides

    def begin_row(self, row: int, n_before: int, n_own: int) -> None:
        self.n_before[row], self.lengths[row] = n_before, n_own

    def begin_step(self, n_seen: int, prefixes: Sequence[Prefix | None]) -> None:
        self.n_seen = n_seen
        self.before = StepBefore(prefixes) if any(prefixes) else None
        longest = int(self.lengths.max()) + 1
        self.width = -(-longest // ALIGN_TOKENS) * ALIGN_TOKENS

    def end_step(self, used: Sequence[bool]) -> None:
        self.lengths += torch.tensor(used, device=self.lengths.device)


class _SlotLayer(DynamicLayer):
    """One layer's keys and values (n_rows, heads, columns, d), of which a step sees the first `width` columns."""

    def __init__(self, index: int, n_rows: int, places: _Places, like: DynamicLayer):
        super().__init__()
        keys, values = tensors_of(like)
        self.lazy_initialization(keys, values)
        self._index, self._places = index, places
        self._key_room = keys.new_zeros(n_rows, keys.shape[1], 0, keys.shape[3])
        self._value_room = values.new_zeros(n_rows, values.shape[1], 0, values.shape[3])

    def put(self, row: int, prompt: DynamicLayer) -> None:
        keys, values = tensors_of(prompt)
        n = keys.shape[2]
        self._make_room(n)
        self._key_room[row, :, :n] = keys[0]
        self._value_room[row, :, :n] = values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        places = self._places
        self._make_room(places.width)
        self._key_room[places.rows, :, places.lengths] = key_states[:, :, 0]
        self._value_room[places.rows, :, places.lengths] = value_states[:, :, 0]
        seen, width = places.n_seen, places.width
        keys, values = self._key_room[:seen, :, :width], self._value_room[:seen, :, :width]
        return keys if places.before is None else places.before.attend_to(keys, self._index), values

    @property
    def n_bytes(self) -> int:
        return self._key_room.nbytes + self._value_room.nbytes

    def get_seq_length(self) -> int:
        return self._places.width - 1  # with the token of this step all columns may be looked at; the mask says which

    def _make_room(self, n: int) -> None:
        if n > self._key_room.shape[2]:
            more = -(-n // ROOM_TOKENS) * ROOM_TOKENS - self._key_room.shape[2]
            self._key_room = F.pad(self._key_room, (0, 0, 0, more))
            self._value_room = F.pad(self._value_room, (0, 0, 0, more))
