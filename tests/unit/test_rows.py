import numpy as np
import pytest

from stormline.operators.rows import (
    AnnotatedSegment,
    Barrier,
    Chunk,
    DeadLetter,
    DecodedSegment,
    EncodedSegment,
    Position,
    Result,
    Segment,
    SegmentMeta,
    SnapshotKey,
    block_of,
    rows_of,
)

META = SegmentMeta("cäm", "s", 3, 5, 1, "video/x-matroska", False, 2, "video", 1, 9, 7, 4)
LETTER = DeadLetter.of(META, "gap", "segments 1 to 2 never arrived", b"bytes")


def through(record, lane_seq=8):
    (row,) = rows_of(block_of([record.to_row(lane_seq)]))
    assert row.lane_seq == lane_seq
    assert row.kind == record.KIND
    return type(record).from_row(row)


def test_block_when_it_holds_several_rows_then_each_arrives_as_it_was():
    rows = [
        Segment(META, b"\x00media", (LETTER,)).to_row(4),
        Barrier((), 5).to_row(5),  # without a part
        Segment(META, b"").to_row(6),
        Barrier((), 5).with_snapshots("x", {("t", 0): b"state", ("t", 1): b""}).to_row(7),
    ]

    block = block_of(rows)

    assert block.num_rows == 1  # for Ray Data, which cuts blocks into rows
    assert rows_of(block) == rows
    assert rows_of(block_of([])) == []


def test_segment_when_sent_then_the_same_arrives():
    got = through(Segment(META, b"\x00media", (LETTER, LETTER)))

    assert got.meta == META
    assert bytes(got.data) == b"\x00media"
    assert [(d.reason, d.offset, bytes(d.data)) for d in got.dead_letters] == [("gap", 9, b"bytes")] * 2


@pytest.mark.parametrize("n_frames", [0, 1, 3])
def test_decoded_segment_when_sent_then_the_same_arrives(n_frames):
    frames = np.arange(n_frames * 4 * 5 * 3, dtype=np.uint8).reshape(n_frames, 4, 5, 3)
    indices = np.arange(max(0, n_frames - 1)) + 7

    got = through(DecodedSegment(META, indices, frames, 5, 6, n_frames, (LETTER,)))

    np.testing.assert_array_equal(got.frames, frames)
    np.testing.assert_array_equal(got.grid_indices, indices)
    assert got.failed == (n_frames == 0)
    assert bytes(got.dead_letters[0].data) == b"bytes"


def chunk(index, n_tokens):
    tokens = np.random.default_rng(index).standard_normal((n_tokens, 6)).astype(np.float16)
    return Chunk("cäm", "s", index, 1, 2, 0, 4, 0.25, "video", 1, 9, 7, tokens)


def test_annotated_segment_when_sent_then_tokens_are_the_same_bit_for_bit():
    chunks = (chunk(0, 16), chunk(1, 0), chunk(2, 4))
    result = Result("q", "caption", "cäm", "s", 1, 2, "p", "a “cat”", False, 16, "uniform", 1.5, "m", 3)

    got = through(AnnotatedSegment(EncodedSegment(META, chunks, ("s",), (LETTER,), 50, 4), (result,)))

    assert got.results == (result,)
    assert [c.chunk_index for c in got.encoded.chunks] == [0, 1, 2]
    for sent, arrived in zip(chunks, got.encoded.chunks, strict=True):
        assert arrived.tokens.dtype == np.float16
        assert arrived.tokens.shape == sent.tokens.shape
        assert arrived.tokens.tobytes() == sent.tokens.tobytes()
    assert got.encoded.closed_sessions == ("s",)
    assert bytes(got.encoded.dead_letters[0].data) == b"bytes"


def test_barrier_when_steps_add_snapshots_then_each_arrives_under_its_key():
    barrier = Barrier((Position("video", 1, 10, 3),), 5, counters={"records": 2})
    barrier = barrier.with_snapshots("source", {("video", 1): b"cursor"})

    got = through(barrier.with_snapshots("encode", {("video", 0): b"", ("video", 1): b"state"}))

    assert got.positions == (Position("video", 1, 10, 3),)
    assert got.counters == {"records": 2}
    assert {key: bytes(blob) for key, blob in got.snapshots.items()} == {
        SnapshotKey("source", "video", 1): b"cursor",
        SnapshotKey("encode", "video", 0): b"",
        SnapshotKey("encode", "video", 1): b"state",
    }


def test_barrier_when_a_step_adds_twice_then_error():
    barrier = Barrier((), 5).with_snapshots("encode", {("video", 0): b"x"})

    with pytest.raises(ValueError, match="'encode' added its snapshots"):
        barrier.with_snapshots("encode", {("video", 1): b"y"})
