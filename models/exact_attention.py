"""Attention of answers that are written together, on a CPU: rounded alike for every row, whatever the other rows hold.

A row's keys come in two parts: those of the prompt's beginning, up to its last video token, which rows about the same
video share (`Prefix`), and its own behind them. What is shared lies in memory once, is never copied, and for the next
row still lies in the processor's cache. Each row's products with it are its own, so nothing tells a row who else looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .storm import StormForConditionalGeneration

EXACT_ATTENTION = "stormline_exact"
ALIGN_TOKENS = 16  # float32 numbers in the widest vector, AVX-512


def use_exact_decoding(model: StormForConditionalGeneration) -> None:
    """Make the language model's attention round alike for every row of a decoding batch; for CPU.

    Prompts still go through torch's fused kernel, but for what follows a prefix. Language models with attention of
    their own making are left as they are; for them use ``fixed_batch=1``.
    """
    if model.language_model.config._attn_implementation == "sdpa":
        model.language_model.set_attn_implementation(EXACT_ATTENTION)


def has_exact_attention(model: StormForConditionalGeneration) -> bool:
    """Tell whether `use_exact_decoding` took effect."""
    return model.language_model.config._attn_implementation == EXACT_ATTENTION


@dataclass(frozen=True, eq=False)
class Prefix:
    """The keys and values of a prompt's beginning, which several answers may look at; nobody changes them."""

    # Of each layer: keys (n_kv_heads, d, n_tokens), in which one query's product is twice as fast as the other way
    # round, and values (n_kv_heads, n_tokens, d); both contiguous.
    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, cache: DynamicCache) -> Prefix:
        """Return what a cache of one prompt holds now."""
        pairs = map(tensors_of, cache.layers)
        return cls(tuple((k[0].transpose(1, 2).contiguous(), v[0].contiguous()) for k, v in pairs))

    @property
    def n_tokens(self) -> int:
        """Return its length."""
        return self.layers[0][1].shape[1]

    @property
    def nbytes(self) -> int:
        """Return its size in memory."""
        return sum(x.nbytes for layer in self.layers for x in layer)

    def to_cache(self) -> DynamicCache:
        """Return a cache that starts with it; written on, that makes new tensors."""
        return _cache_of([_holding(DynamicLayer(), k.transpose(1, 2)[None], v[None]) for k, v in self.layers])


class PromptRest:
    """A cache for what follows a prefix in one prompt: its layers hold only that, and its attention sees both."""

    def __init__(self, prefix: Prefix):
        self._layers = [_RestLayer(layer) for layer in prefix.layers]
        self.cache = _cache_of(self._layers)

    @property
    def seen(self) -> bool:
        """Tell whether every layer's attention looked at the prefix: some models put other keys in their place."""
        return all(layer.seen for layer in self._layers)


class _RestLayer(DynamicLayer):
    def __init__(self, prefix: tuple[Tensor, Tensor]):
        super().__init__()
        self.prefix = prefix
        self.seen = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        keys = keys.view_as(keys)  # a tensor of its own, for what is said of it must go when this step does
        _say_before(keys, self)
        return keys, values


class StepBefore:
    """What the rows of one step look at before their own keys, in all layers; at least one of them has a prefix."""

    def __init__(self, prefixes: Sequence[Prefix | None]):
        self.rows = [(row, prefix) for row, prefix in enumerate(prefixes) if prefix is not None]
        longest = max(prefix.n_tokens for _, prefix in self.rows)
        self.width = -(-longest // ALIGN_TOKENS) * ALIGN_TOKENS
        self._scratch: _Scratch | None = None

    def attend_to(self, keys: Tensor, layer: int) -> Tensor:
        """Return the keys, a fresh view of a layer's rows, such that attention to them sees what is before them too."""
        _say_before(keys, (self, layer))
        return keys

    def scratch(self, own: Tensor) -> _Scratch:
        """Return room for the scores of all layers, one after the other; `own` are those of the rows' own keys."""
        if self._scratch is None or self._scratch.own_scores.shape != own.shape:  # a model's layers may differ
            self._scratch = _Scratch(self, own)
        return self._scratch


class _Scratch:
    """Scores and weights of one layer, (b, n_kv_heads, g, prefixes' width + own width), and the rows' views of them."""

    def __init__(self, before: StepBefore, own: Tensor):
        shape = (*own.shape[:3], before.width + own.shape[3])
        self.scores = own.new_full(shape, -torch.inf)  # behind a shorter prefix it stays so
        self.weights = torch.empty_like(self.scores)
        self.own_scores = self.scores[..., before.width :]
        self.own_weights = self.weights[..., before.width :]
        places = [(row, prefix.n_tokens) for row, prefix in before.rows]
        self.row_scores = [self.scores[row, :, :, :n] for row, n in places]
        self.row_weights = [self.weights[row, :, :, :n] for row, n in places]


def tensors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return a cache layer's keys and values."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _say_before(keys: Tensor, before: tuple[StepBefore, int] | _RestLayer) -> None:
    keys.before = before  # type: ignore[attr-defined]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as sdpa does, but for one new token, or behind a prefix, with plain products.

    Args:
        module: The attention layer.
        query: (B, n_heads, n, d).
        key: (B, n_kv_heads, n_keys, d); for one new token perhaps of fewer rows, the rest of which then see nothing.
        value: As key.
        attention_mask: (B, 1, n, n_keys) bool, True where to look; or None.
        scaling: None for 1 / sqrt(d).
        **kwargs: Only for what goes through sdpa.

    Returns:
        (B, n, n_heads, d), and no weights.
    """
    before: tuple[StepBefore, int] | _RestLayer | None = getattr(key, "before", None)
    if isinstance(before, _RestLayer):
        before.seen = True
        return _attend_rest(_scaled(query, scaling), key, value, before.prefix), None
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = _scaled(query, scaling)
    n_rows, n_heads = query.shape[:2]
    b, n_kv_heads, width, d = key.shape
    query = query.reshape(n_rows, n_kv_heads, n_heads // n_kv_heads, d)
    scores = query[:b] @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask[:b, :, :, :width], -torch.inf)
    out = _softmax(scores, value) @ value if before is None else _attend_behind(query, scores, value, *before)
    out = out.reshape(b, 1, n_heads, -1)
    return F.pad(out, (0, 0, 0, 0, 0, 0, 0, n_rows - b)), None


def _attend_rest(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """Return (1, n, n_heads, d): what follows a prefix in one prompt looks at it, and causally at itself."""
    _, n_heads, n, d = query.shape
    n_kv_heads = key.shape[1]
    query = query.reshape(n_kv_heads, n_heads // n_kv_heads * n, d)
    keys, values = prefix
    n_prefix = values.shape[1]
    own = (query @ key[0].transpose(1, 2)).view(n_kv_heads, -1, n, n)
    own = own.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu_(1), -torch.inf).view(n_kv_heads, -1, n)
    weights = _softmax(torch.cat([query @ keys, own], -1), value)
    out = weights[..., :n_prefix] @ values + weights[..., n_prefix:] @ value[0]
    return out.view(1, n_heads, n, -1).transpose(1, 2)


def _attend_behind(query: Tensor, own: Tensor, value: Tensor, before: StepBefore, layer: int) -> Tensor:
    """Return (b, n_kv_heads, g, d) for one new token of each row.

    Args:
        query: (n_rows, n_kv_heads, g, d), scaled; also of rows that see nothing.
        own: Scores of each row's own keys, (b, n_kv_heads, g, width).
        value: (b, n_kv_heads, width, d).
        before: What the rows look at besides.
        layer: In this layer.
    """
    scratch = before.scratch(own)
    scratch.own_scores.copy_(own)
    queries = query.unbind()
    for (row, prefix), scores in zip(before.rows, scratch.row_scores, strict=True):
        scores.copy_(torch.bmm(queries[row], prefix.layers[layer][0]))
    torch.softmax(scratch.scores, -1, out=scratch.weights)
    out = scratch.own_weights @ value
    outs = out.unbind()
    for (row, prefix), weights in zip(before.rows, scratch.row_weights, strict=True):
        outs[row].add_(torch.bmm(weights, prefix.layers[layer][1]))
    return out


def _scaled(query: Tensor, scaling: float | None) -> Tensor:
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling)


def _softmax(scores: Tensor, like: Tensor) -> Tensor:
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(like.dtype)


def _holding(layer: DynamicLayer, keys: Tensor, values: Tensor) -> DynamicLayer:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _cache_of(layers: Sequence[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [*layers]
    return cache


AttentionInterface.register(EXACT_ATTENTION, _attend)
AttentionMaskInterface.register(EXACT_ATTENTION, sdpa_mask)
