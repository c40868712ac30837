from dataclasses import replace

import numpy as np

from stormline.operators.rows import Chunk
from stormline.pipeline.token_store import TokenMemory

TOKEN_BYTES = 4 * 8 * 2


def chunk(index, stream="cam", value=0.0):
    tokens = np.full((4, 8), value, np.float16)
    return Chunk(stream, "s", index, index * 10, index * 10 + 10, 0, 4, 0.0, "video", 0, index, 0, tokens)


def test_read_when_asked_for_a_range_then_the_overlapping_chunks_in_order():
    memory = TokenMemory(max_bytes=10**6)
    for index in (0, 2, 1, 3):
        memory.put(chunk(index))

    assert [c.chunk_index for c in memory.read("cam", 15, 30)] == [1, 2]
    assert memory.read("nobody", 0, 100) == []


def test_put_when_over_the_limit_then_the_oldest_of_any_stream_leaves():
    memory = TokenMemory(max_bytes=3 * TOKEN_BYTES)
    for index in range(3):
        memory.put(chunk(index, stream="a"))
        memory.put(chunk(index, stream="b"))

    assert memory.n_bytes == 3 * TOKEN_BYTES
    assert memory.streams() == {"a": (20, 30, 1), "b": (10, 30, 2)}


def test_put_when_a_restarted_lane_pushes_again_then_nothing_is_there_twice():
    memory = TokenMemory(max_bytes=10**6)
    memory.put(chunk(0))

    memory.put(replace(chunk(0, value=1.0)))

    (kept,) = memory.read("cam", 0, 10)
    assert kept.tokens[0, 0] == 1.0
    assert memory.n_bytes == TOKEN_BYTES
