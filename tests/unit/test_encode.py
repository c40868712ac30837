"""The encode step on real video, cut in many ways: the tokens must be those of one offline pass, bit for bit."""

import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from stormline.models.loading import load_model
from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.operators.decode import Decode
from stormline.operators.encode import Encode, Encoder
from stormline.operators.rows import Barrier, EncodedSegment, Position, Segment, SegmentMeta, block_of, rows_of
from stormline.operators.sampling import FrameChunk, GridSpec

FPS = 10
N_FRAMES = 105  # 10.5 s: 21 grid times at 2 fps, so five chunks of four frames and one left over
START_NS = 1_700_000_000_000_000_000
CUTS = {
    "whole": [N_FRAMES],
    "one frame at a time": [1] * N_FRAMES,
    "thirds of a second": [3] * 35,
    "two seconds, as chunks are": [20] * 5 + [5],
    "across chunks": [7, 25, 1, 1, 30, 13, 28],
    "just before and after grid times": [5, 1, 4, 1, 5, 4, 6, 19, 60],
}


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return load_model(None, device="cpu")


@pytest.fixture(scope="module")
def packets():
    """Encode the shapes world so that every frame is a keyframe; return the stream's template and its packets."""
    return encode_shapes(seed=3)


def encode_shapes(seed):
    out = io.BytesIO()
    with av.open(out, "w", "matroska") as container:
        stream = container.add_stream("mjpeg", rate=FPS)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuvj420p"
        for image in ShapesWorld(ShapesSpec(seed=seed, size_px=128)).frames(FPS, 0.0, N_FRAMES / FPS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    source = av.open(io.BytesIO(out.getvalue()))
    return source.streams.video[0], [p for p in source.demux(video=0) if p.dts is not None]


def remux(template, packets):
    out = io.BytesIO()
    with av.open(out, "w", "matroska") as container:
        stream = container.add_stream_from_template(template)
        for packet in packets:
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.time_base, copy.is_keyframe = packet.pts, packet.dts, packet.time_base, True
            copy.stream = stream
            container.mux(copy)
    return out.getvalue()


def segments(video, sizes, *, stream="cam", session="s1", partition=0):
    template, packets = video
    assert sum(sizes) == len(packets)
    first = 0
    for seq, size in enumerate(sizes):
        part = packets[first : first + size]
        first += size
        start_ns = START_NS + int(part[0].pts * part[0].time_base * 1000) * 1_000_000
        meta = SegmentMeta(
            stream, session, seq, start_ns, START_NS, "", first == len(packets), 0, "video", partition, seq, 0, 1
        )
        yield Segment(meta, remux(template, part))


def decoder(loaded):
    size = loaded.model.config.image_size
    return Decode(fps=2, frame_hw=(size, size))


def encode_rows(loaded, all_segments, *, snapshots=None, barrier_after=()):
    """Run segments through the decode and the encode step, with barriers; return the rows that come out."""
    decode = decoder(loaded)
    step = Encode(lambda: loaded, GridSpec(Fraction(2)), snapshots=snapshots)
    items = []
    for i, segment in enumerate(all_segments):
        items.append(segment)
        if i in barrier_after:
            items.append(Barrier((Position("video", 0, i + 1),), made_ns=0))
    out = []
    for lane_seq, item in enumerate(items):
        for table in step(decode(block_of([item.to_row(lane_seq)]))):
            out += rows_of(table)
    return out


def chunks_of(rows, stream="cam"):
    encoded = [EncodedSegment.from_row(row) for row in rows if row.kind == EncodedSegment.KIND]
    return [c for e in encoded for c in e.chunks if c.stream_id == stream]


def comparable(chunks):
    return [(c.session, c.chunk_index, c.start_ns, c.end_ns, c.n_frames, c.tokens.tobytes()) for c in chunks]


@pytest.fixture(scope="module")
def offline(loaded, packets):
    """Encode the whole video in one pass of the model."""
    (whole,) = segments(packets, CUTS["whole"])
    decoded = decoder(loaded).decode(whole)
    np.testing.assert_array_equal(decoded.grid_indices, np.arange(21))
    return loaded.model.encode_clip(torch.from_numpy(decoded.frames[:-1].copy())).numpy()


@pytest.mark.parametrize("cut", CUTS, ids=CUTS.keys())
def test_tokens_however_the_stream_is_cut_then_bit_identical_to_one_pass(loaded, packets, offline, cut):
    chunks = chunks_of(encode_rows(loaded, segments(packets, CUTS[cut])))

    assert [c.n_frames for c in chunks] == [4, 4, 4, 4, 4, 1]
    assert [(c.start_ns - START_NS) // 10**6 for c in chunks] == [0, 2000, 4000, 6000, 8000, 10000]
    tokens = np.concatenate([c.tokens for c in chunks])
    assert tokens.tobytes() == offline.tobytes()


def test_streams_when_interleaved_then_each_is_as_alone(loaded, packets):
    other = encode_shapes(seed=4)
    cut = CUTS["across chunks"]
    alone = [comparable(chunks_of(encode_rows(loaded, segments(v, cut)))) for v in (packets, other)]
    a, b = segments(packets, cut, stream="a"), segments(other, cut, stream="b")

    together = encode_rows(loaded, [s for pair in zip(a, b, strict=True) for s in pair])

    assert comparable(chunks_of(together, "a")) == alone[0]
    assert comparable(chunks_of(together, "b")) == alone[1]
    assert alone[0] != alone[1]


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_crash_when_resumed_from_a_snapshot_then_as_no_crash(loaded, packets, cut):
    everything = list(segments(packets, CUTS["across chunks"]))
    expected = comparable(chunks_of(encode_rows(loaded, everything)))

    before = encode_rows(loaded, everything[: cut + 1], barrier_after=[cut])
    snapshots = {
        (key.topic, key.partition): bytes(blob) for key, blob in Barrier.from_row(before[-1]).snapshots.items()
    }
    after = encode_rows(loaded, everything[cut + 1 :], snapshots=snapshots)

    assert comparable(chunks_of(before) + chunks_of(after)) == expected


@pytest.mark.parametrize("snapshot_after", [None, 1, 2, 3])
def test_segment_when_its_clock_has_jumped_back_then_a_notice_tells_what_was_not_used(loaded, packets, snapshot_after):
    everything = list(segments(packets, [20] * 5 + [5]))
    for i, back_s in ((2, 3), (3, 10), (4, 0.7)):  # at 1 s, before the session's start, and no worth telling
        start_ns = everything[i].meta.start_ns - round(back_s * 10**9)
        everything[i] = replace(everything[i], meta=replace(everything[i].meta, start_ns=start_ns))

    if snapshot_after is None:
        rows = encode_rows(loaded, everything)
    else:
        rows = encode_rows(loaded, everything[: snapshot_after + 1], barrier_after=[snapshot_after])
        blobs = Barrier.from_row(rows.pop()).snapshots
        snapshots = {(key.topic, key.partition): bytes(blob) for key, blob in blobs.items()}
        rows += encode_rows(loaded, everything[snapshot_after + 1 :], snapshots=snapshots)

    told = [EncodedSegment.from_row(row).dead_letters for row in rows]
    assert [[letter.reason for letter in letters] for letters in told] == [[], [], ["late"], ["late"], [], []]
    assert "lies 2.5 s before what its session had come to: used 0 of its frames" in told[2][0].detail
    assert told[2][0].offset == 2


def test_session_when_a_new_one_begins_then_the_old_is_flushed_and_the_new_is_as_alone(loaded, packets):
    first = list(segments(packets, CUTS["across chunks"]))
    second = list(segments(packets, CUTS["whole"], session="s2"))
    alone = comparable(chunks_of(encode_rows(loaded, second)))

    rows = encode_rows(loaded, [*first[:2], *second])

    chunks = chunks_of(rows)
    assert [(c.session, c.n_frames) for c in chunks if c.session == "s1"] == [("s1", 4), ("s1", 3)]
    assert comparable([c for c in chunks if c.session == "s2"]) == alone
    assert EncodedSegment.from_row(rows[-1]).closed_sessions == ("s1", "s2")


def test_scene_score_when_the_picture_changes_then_higher_than_when_it_stays(loaded):
    encoder = Encoder(loaded, GridSpec(Fraction(2)))
    size = loaded.model.config.image_size
    rng = np.random.default_rng(0)
    still, other = (np.repeat(rng.integers(0, 256, (1, size, size, 3), np.uint8), 4, axis=0) for _ in range(2))
    meta = SegmentMeta("cam", "s", 0, START_NS, START_NS, "", False, 0, "video", 0, 0, 0, 1)
    stream, scores = encoder.init_stream(meta), []
    for i, frames in enumerate((still, still, other)):
        chunk, stream = encoder._encode(stream, FrameChunk(frames, np.arange(4) + 4 * i))
        scores.append(chunk.scene_score)

    assert np.isnan(scores[0])
    assert scores[1] < 1e-6 < scores[2]


def test_news_when_segments_and_barriers_pass_then_chunks_pictures_lags_and_ends_are_told(loaded, packets):
    size = loaded.model.config.image_size
    decode = Decode(fps=2, frame_hw=(size, size), picture_interval_s=1e-9)
    told = []
    step = Encode(lambda: loaded, GridSpec(Fraction(2)), on_news=told.append)
    parts = list(segments(packets, [10, 20, 75]))  # one second, two seconds, the rest
    barriers = [Barrier((Position("video", 0, n, lag=lag),), made_ns=0) for n, lag in ((1, 4), (2, 4), (3, 0))]

    for lane_seq, item in enumerate(item for pair in zip(parts, barriers, strict=True) for item in pair):
        list(step(decode(block_of([item.to_row(lane_seq)]))))

    seen = [(len(n.chunks), n.ended, [p.time_ns - START_NS for p in n.pictures.values()], dict(n.lags)) for n in told]
    assert seen == [
        (0, (), [900_000_000], {("video", 0): 4}),
        (1, (), [2_900_000_000], {}),
        (5, ("cam",), [10_400_000_000], {}),
        (0, (), [], {("video", 0): 0}),
    ]
