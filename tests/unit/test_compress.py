"""Pooling and token selection."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from stormline.models.compress import spatial_pool, temporal_pool
from stormline.models.selection import POLICIES, VideoChunk, pool_tokens, select_chunks

D = 8


def make_chunks(n_tokens_each: list[int], seed: int = 0) -> list[VideoChunk]:
    rng = np.random.default_rng(seed)
    return [
        VideoChunk(2.0 * i, 2.0 * i + 2, rng.standard_normal((n, D)).astype(np.float16))
        for i, n in enumerate(n_tokens_each)
    ]


def total(chunks: list[VideoChunk]) -> int:
    return sum(chunk.n_tokens for chunk in chunks)


def starts(chunks: list[VideoChunk]) -> list[float]:
    return [chunk.start_s for chunk in chunks]


@pytest.mark.parametrize("n_frames", [1, 3, 4, 5, 8])
def test_temporal_pool_when_frames_do_not_divide_then_last_part_averages_what_is_there(n_frames):
    x = torch.randn(2, n_frames, 3, 3, D)

    y = temporal_pool(x, 4)

    expected = torch.stack([part.mean(1) for part in x.split(4, dim=1)], dim=1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (5, 4), (3, 7), (1, 1)])
def test_spatial_pool_when_grid_is_odd_then_edge_averages_what_is_there(rows, cols):
    x = torch.randn(2, 3, rows, cols, D)

    y = spatial_pool(x, 2)

    assert y.shape == (2, 3, -(-rows // 2), -(-cols // 2), D)
    for r in range(y.shape[2]):
        for c in range(y.shape[3]):
            square = x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            torch.testing.assert_close(y[:, :, r, c], square.mean((2, 3)))


@pytest.mark.parametrize("policy", POLICIES)
def test_select_when_everything_fits_then_returns_it_unchanged(policy):
    chunks = make_chunks([4, 4, 4])

    assert select_chunks(chunks, 12, policy, question=np.ones(D)) == chunks


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [1, 2, 5, 16, 17, 40, 99, 159])
@pytest.mark.parametrize("sizes", [[16] * 10, [1, 16, 3, 7, 16, 16, 2, 40, 5, 1], [159, 1], [1, 159]])
def test_select_when_over_budget_then_never_exceeds_it_and_keeps_time_order(policy, budget, sizes):
    chunks = make_chunks(sizes)

    chosen = select_chunks(chunks, budget, policy, question=np.ones(D))
    again = select_chunks(make_chunks(sizes), budget, policy, question=np.ones(D))

    assert 1 <= total(chosen) <= budget
    assert starts(chosen) == sorted(set(starts(chosen)))
    assert all(chunk.tokens.dtype == np.float16 and chunk.n_tokens for chunk in chosen)
    for a, b in zip(chosen, again, strict=True):
        assert (a.start_s, a.end_s) == (b.start_s, b.end_s)
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_select_recent_when_over_budget_then_newest_whole_chunks_without_holes():
    chunks = make_chunks([4, 4, 9, 4, 4])

    chosen = select_chunks(chunks, 12, "recent")

    assert chosen == chunks[3:]  # the chunk of 9 does not fit, and nothing older may jump the queue


def test_select_uniform_when_half_fits_then_keeps_one_in_two():
    chunks = make_chunks([4] * 10)

    chosen = select_chunks(chunks, 20, "uniform")

    assert chosen == chunks[1::2]


def test_select_changes_when_most_stands_still_then_what_moved_is_kept():
    still = np.ones((16, D), np.float16)
    chunks = [VideoChunk(2.0 * i, 2.0 * i + 2, still.copy()) for i in range(50)]
    chunks[30].tokens[5] += 3  # something at one place, gone again in the next chunk
    chunks[41].tokens[7:9] += 1

    chosen = select_chunks(chunks, 16 + 6, "changes")

    assert starts(chosen) == [0.0, 60.0, 62.0, 82.0, 84.0]
    assert [chunk.n_tokens for chunk in chosen] == [16, 1, 1, 2, 2]
    np.testing.assert_array_equal(chosen[1].tokens, chunks[30].tokens[5:6])


def test_select_global_local_when_over_budget_then_covers_all_time_and_recent_in_detail():
    chunks = make_chunks([16] * 100)

    chosen = select_chunks(chunks, 64, "global_local")

    assert chosen[-2:] == chunks[-2:]  # half of 64 tokens: two whole chunks
    assert total(chosen) == 64
    assert chosen[0].start_s == 0.0
    assert all(a.end_s == b.start_s for a, b in pairwise(chosen))  # no gap in time
    mean_before = np.concatenate([c.tokens for c in chunks[:-2]]).astype(np.float32).mean(0)
    pooled = np.concatenate([c.tokens for c in chosen[:-2]]).astype(np.float32).mean(0)
    np.testing.assert_allclose(pooled, mean_before, atol=0.05)


def test_select_relevant_when_one_token_matches_then_its_chunk_is_kept():
    chunks = make_chunks([16] * 10)
    question = chunks[3].tokens[5].astype(np.float32)

    chosen = select_chunks(chunks, 32, "relevant", question=question)

    assert 6.0 in starts(chosen)
    assert len(chosen) == 2


def test_pool_tokens_when_reduced_then_averages_neighbouring_runs():
    tokens = np.arange(10, dtype=np.float16).reshape(5, 2)

    pooled = pool_tokens(tokens, 2)

    np.testing.assert_array_equal(pooled, [[2, 3], [7, 8]])


def test_select_when_asked_wrongly_then_says_what_was_expected():
    chunks = make_chunks([4, 4])
    wider = VideoChunk(9, 10, np.zeros((2, D + 1), np.float16))

    with pytest.raises(ValueError, match=r"'newest'; expected one of"):
        select_chunks(chunks, 4, "newest")
    with pytest.raises(ValueError, match="budget is 0"):
        select_chunks(chunks, 0, "recent")
    with pytest.raises(ValueError, match="expected them in time order"):
        select_chunks(chunks[::-1], 4, "recent")
    with pytest.raises(ValueError, match="width 9; expected 8"):
        select_chunks([*chunks, wider], 4, "recent")
    with pytest.raises(ValueError, match="got no question"):
        select_chunks(chunks, 4, "relevant")
    with pytest.raises(ValueError, match=r"question has shape \(3,\)"):
        select_chunks(chunks, 4, "relevant", question=np.ones(3))


def test_video_chunk_when_shaped_wrongly_then_raises():
    with pytest.raises(ValueError, match="expected \\(n_tokens, d_model\\)"):
        VideoChunk(0, 1, np.zeros(4, np.float16))
    with pytest.raises(ValueError, match="at or after its start"):
        VideoChunk(2, 1, np.zeros((1, 4), np.float16))
