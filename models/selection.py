"""Fewer video tokens at question time: selection under a budget, over tokens that may be hours old.

    recent         the newest chunks, whole
    uniform        evenly spaced chunks, whole: STORM's test-time sampling (half the tokens as budget: keep one in two)
    global_local   everything before, pooled, then a recent part in detail: after ST-LLM (arXiv 2404.00308)
    relevant       the chunks nearest to the question, whole
    changes        the tokens that differ most from those before at the same place: what stands still is kept once

Selection is numpy on CPU, exact and repeatable: the same chunks and budget always give the same tokens. Nothing here
needs torch, so that steps that only choose and ask start without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

POLICIES = ("recent", "uniform", "global_local", "relevant", "changes")
LOCAL_SHARE = 0.5  # of the budget that `global_local` gives to the recent part
HELD_BUDGETS = 16  # of tokens to choose from, see `worth_holding`: eight minutes of the default model and budget
HELD_NEWEST = 2  # chunks held in any case


@dataclass(frozen=True, eq=False)
class VideoChunk:
    """Video tokens with the time that they stand for.

    Raises:
        ValueError: If `tokens` is not a matrix, or the chunk ends before it starts.
    """

    start_s: float  # of its first frame, on whatever clock the prompt shall show
    end_s: float
    tokens: np.ndarray = field(repr=False)  # (n_tokens, d_model) float16, in time order

    def __post_init__(self):
        if self.tokens.ndim != 2:
            raise ValueError(f"tokens have shape {self.tokens.shape}; expected (n_tokens, d_model)")
        if not self.end_s >= self.start_s:
            raise ValueError(
                f"chunk runs from {self.start_s} s to {self.end_s} s; expected an end at or after its start"
            )

    @property
    def n_tokens(self) -> int:
        """Return how many video tokens it holds."""
        return self.tokens.shape[0]


def select_chunks(
    chunks: Sequence[VideoChunk], budget_tokens: int, policy: str, *, question: np.ndarray | None = None
) -> list[VideoChunk]:
    """Choose what of a video the language model shall see.

    Everything is returned as it is where it fits the budget. A policy that keeps chunks whole falls back to pooling
    a single chunk where the budget is smaller than it, so that the answer never has nothing to look at.

    Args:
        chunks: In time order, of one d_model; may be empty.
        budget_tokens: The most video tokens to return, 1 or more.
        policy: One of `POLICIES`.
        question: (d_model,) embedding of the question (`StormForConditionalGeneration.embed_text`); for `relevant`.

    Returns:
        Chunks in time order, together at most `budget_tokens` tokens. A chunk that stands for several carries the
        time from the first one's start to the last one's end.

    Raises:
        ValueError: On an unknown policy, a budget below 1, chunks out of order or of different widths, or a missing
            question.
    """
    if policy not in POLICIES:
        raise ValueError(f"token policy is {policy!r}; expected one of {POLICIES}")
    if budget_tokens < 1:
        raise ValueError(f"budget is {budget_tokens} tokens; expected 1 or more")
    _check_chunks(chunks)
    if policy == "relevant":
        _check_question(chunks, question)
    chunks = [chunk for chunk in chunks if chunk.n_tokens]
    if sum(chunk.n_tokens for chunk in chunks) <= budget_tokens:
        return chunks
    if policy == "recent":
        return _select_best(chunks, budget_tokens, range(len(chunks) - 1, -1, -1), stop_at_first_misfit=True)
    if policy == "uniform":
        return _select_uniform(chunks, budget_tokens)
    if policy == "global_local":
        return _select_global_local(chunks, budget_tokens)
    if policy == "changes":
        return _select_changes(chunks, budget_tokens)
    assert question is not None
    return _select_best(chunks, budget_tokens, rank_by_relevance(chunks, question))


def worth_holding(places: Sequence[int], n_tokens: Sequence[int], budget_tokens: int, policy: str) -> list[int]:
    """Choose which chunks of a video that goes on to hold, so that memory does not grow with its length.

    Called with what was held before and one chunk more, it holds the same of a video however that is cut. Up to
    `HELD_BUDGETS` budgets all chunks are held, so that `select_chunks` chooses what it would choose of the whole video.
    Beyond, it holds every second, fourth, eighth… chunk, counted from the first, and the newest ones. Of `recent` it
    holds only what can still be chosen, which changes nothing.

    Args:
        places: Of the chunks held and the new one: their numbers in the video, rising by one from chunk to chunk.
        n_tokens: Of each.
        budget_tokens: As for `select_chunks`.
        policy: Likewise.

    Returns:
        Indices into `places`, rising; the last one is always among them.
    """
    newest_tokens = {"recent": budget_tokens, "global_local": int(budget_tokens * LOCAL_SHARE)}.get(policy, 0)
    n = len(places)
    newest, held_tokens = n, 0
    while newest and (held_tokens <= newest_tokens or n - newest < HELD_NEWEST):
        newest -= 1
        held_tokens += n_tokens[newest]
    if policy == "recent":
        return list(range(newest, n))
    step = places[1] - places[0] if newest > 1 else 1
    held = _every(step, places, newest)
    while newest > 1 and sum(n_tokens[i] for i in held) > budget_tokens * HELD_BUDGETS:
        step *= 2
        if step > places[newest] - places[0]:
            break
        held = _every(step, places, newest)
    return held


def _every(step: int, places: Sequence[int], newest: int) -> list[int]:
    return [i for i, place in enumerate(places) if i >= newest or (place - places[0]) % step == 0]


def rank_by_relevance(chunks: Sequence[VideoChunk], question: np.ndarray) -> list[int]:
    """Rank chunks by the cosine between the question and the nearest of each chunk's tokens.

    The nearest and not the mean: a thing asked for is seen at a few places only. Of equals the newer comes first.

    Args:
        chunks: Of d_model, each with one token or more.
        question: (d_model,) embedding.

    Returns:
        Indices into `chunks`, best first.
    """
    q = question.astype(np.float64)
    q /= max(float(np.linalg.norm(q)), 1e-12)
    scores = []
    for chunk in chunks:
        tokens = chunk.tokens.astype(np.float64)
        norms = np.maximum(np.linalg.norm(tokens, axis=1), 1e-12)
        scores.append(float((tokens @ q / norms).max()))
    return sorted(range(len(chunks)), key=lambda i: (-scores[i], -i))


def pool_tokens(tokens: np.ndarray, n_tokens: int) -> np.ndarray:
    """Average runs of neighbouring tokens, as equal in length as can be, down to `n_tokens`.

    Args:
        tokens: (n, d_model), n of 1 or more.
        n_tokens: 1 or more; where it is n or more, nothing changes.

    Returns:
        (min(n, n_tokens), d_model) in the same dtype; averaged in float32.
    """
    if n_tokens >= tokens.shape[0]:
        return tokens
    return _pool_runs(tokens, _run_starts(tokens.shape[0], n_tokens))


def _run_starts(n: int, n_runs: int) -> np.ndarray:
    """Return where each of so many runs over n begins, the first of them one longer where they cannot be equal."""
    length, longer = divmod(n, n_runs)
    run = np.arange(n_runs)
    return run * length + np.minimum(run, longer)


def _pool_runs(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Average (n, d_model) over runs that begin at `starts` and end at the next: one call, whatever their number."""
    lengths = np.diff(starts, append=len(tokens)).astype(np.float32)
    sums = np.add.reduceat(tokens, starts, axis=0, dtype=np.float32)
    return (sums / lengths[:, None]).astype(tokens.dtype)


def _select_best(
    chunks: Sequence[VideoChunk], budget_tokens: int, order: Sequence[int], *, stop_at_first_misfit: bool = False
) -> list[VideoChunk]:
    """Take whole chunks in `order` while they fit; return them in time order."""
    taken, left = [], budget_tokens
    for i in order:
        if chunks[i].n_tokens <= left:
            taken.append(i)
            left -= chunks[i].n_tokens
        elif stop_at_first_misfit:
            break
    if not taken:
        return [_pooled(chunks[order[0]], budget_tokens)]
    return [chunks[i] for i in sorted(taken)]


def _select_uniform(chunks: Sequence[VideoChunk], budget_tokens: int) -> list[VideoChunk]:
    """Take as many evenly spaced whole chunks as fit, the newest always among them."""
    n = len(chunks)
    most = budget_tokens // min(chunk.n_tokens for chunk in chunks)
    for n_taken in range(min(n - 1, most), 0, -1):
        taken = [chunks[(i + 1) * n // n_taken - 1] for i in range(n_taken)]
        if sum(chunk.n_tokens for chunk in taken) <= budget_tokens:
            return taken
    return [_pooled(chunks[-1], budget_tokens)]


def _select_global_local(chunks: Sequence[VideoChunk], budget_tokens: int) -> list[VideoChunk]:
    """Give the newest chunks their share whole, and pool everything before into the rest of the budget."""
    n_local, local_tokens = 0, 0
    for chunk in reversed(chunks):
        if local_tokens + chunk.n_tokens > budget_tokens * LOCAL_SHARE:
            break
        n_local += 1
        local_tokens += chunk.n_tokens
    split = len(chunks) - n_local
    return [*_pool_chunks(chunks[:split], budget_tokens - local_tokens), *chunks[split:]]


def _select_changes(chunks: Sequence[VideoChunk], budget_tokens: int) -> list[VideoChunk]:
    """Take the tokens with the most change, wherever they are; of equals the older. The first chunk is all new."""
    order = np.argsort(-np.concatenate(_changes(chunks)), kind="stable")
    kept = np.zeros(len(order), bool)
    kept[order[:budget_tokens]] = True
    edges = np.cumsum([chunk.n_tokens for chunk in chunks])[:-1]
    return [
        VideoChunk(chunk.start_s, chunk.end_s, chunk.tokens[mine])
        for chunk, mine in zip(chunks, np.split(kept, edges), strict=True)
        if mine.any()
    ]


def _changes(chunks: Sequence[VideoChunk]) -> list[np.ndarray]:
    """Return each chunk's (n_tokens,) squared distances from the tokens of the chunk before at the same places."""
    changes = [np.full(chunks[0].n_tokens, np.inf, np.float32)]
    for before, chunk in pairwise(chunks):
        if before.n_tokens != chunk.n_tokens:  # a short one, or other places: nothing to compare with
            changes.append(np.full(chunk.n_tokens, np.inf, np.float32))
            continue
        step = chunk.tokens.astype(np.float32) - before.tokens.astype(np.float32)
        changes.append(np.einsum("nd,nd->n", step, step))
    return changes


def _pool_chunks(chunks: Sequence[VideoChunk], budget_tokens: int) -> list[VideoChunk]:
    """Pool chunks into the budget: fewer tokens for each, and where there are more chunks than tokens, joined ones."""
    n_groups = min(len(chunks), budget_tokens)
    edges = np.linspace(0, len(chunks), n_groups + 1).astype(int)
    groups = [chunks[a:b] for a, b in pairwise(edges)]
    share, extra = divmod(budget_tokens, n_groups)
    n_before, starts = 0, []
    for i, group in enumerate(groups):
        n = sum(chunk.n_tokens for chunk in group)
        # What does not divide goes to the newest groups.
        starts.append(n_before + _run_starts(n, min(n, share + (i >= n_groups - extra))))
        n_before += n
    pooled = _pool_runs(np.concatenate([chunk.tokens for chunk in chunks]), np.concatenate(starts))
    parts = np.split(pooled, np.cumsum([len(each) for each in starts])[:-1])
    return [
        VideoChunk(group[0].start_s, max(chunk.end_s for chunk in group), part)
        for group, part in zip(groups, parts, strict=True)
    ]


def _pooled(chunk: VideoChunk, n_tokens: int) -> VideoChunk:
    return VideoChunk(chunk.start_s, chunk.end_s, pool_tokens(chunk.tokens, n_tokens))


def _check_chunks(chunks: Sequence[VideoChunk]) -> None:
    for i in range(1, len(chunks)):
        before, chunk = chunks[i - 1], chunks[i]
        if chunk.start_s < before.start_s:
            raise ValueError(
                f"chunk {i} starts at {chunk.start_s} s, after one at {before.start_s} s; expected them in time order"
            )
        if chunk.tokens.shape[1] != before.tokens.shape[1]:
            raise ValueError(
                f"chunk {i} has tokens of width {chunk.tokens.shape[1]}; expected {before.tokens.shape[1]} as before. "
                "Tokens of two models cannot be mixed: choose a range that one model encoded"
            )


def _check_question(chunks: Sequence[VideoChunk], question: np.ndarray | None) -> None:
    if question is None:
        raise ValueError("policy 'relevant' got no question; expected its embedding, see embed_text of the model")
    if chunks and question.shape != (chunks[0].tokens.shape[1],):
        raise ValueError(f"question has shape {question.shape}; expected ({chunks[0].tokens.shape[1]},) like a token")
