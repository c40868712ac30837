"""An encoder that comes back with other parameters in the midst of a connection, or of the file recorded of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from list_producer import ListProducer, ListSender
from small_media import RATE, make_meta, make_video

from stormline.operators.decode import decode_file
from stormline.operators.sampling import GridSpec
from stormline.pipeline.archive.file_ranges import cut_file
from stormline.pipeline.publish.inputs import InputError, SourceSpec
from stormline.pipeline.publish.options import PublishOptions
from stormline.pipeline.publish.publisher import StreamPublisher

N_FRAMES = 120  # of each encoder
PART_MS = N_FRAMES * 1000 // int(RATE)
FLV_HEADER_BYTES, TAG_HEADER_BYTES, TAG_END_BYTES = 13, 11, 4
VIDEO = 9  # type of a tag
CONFIGURATION, END = 0, 2  # types of an AVC packet, in the second byte of a video tag


@pytest.fixture(scope="module")
def steady() -> bytes:
    return make_video("flv", n_frames=N_FRAMES, options=(("bf", "0"),))


@pytest.fixture(scope="module")
def restarted() -> bytes:
    return make_video("flv", n_frames=N_FRAMES, options=(("bf", "0"), ("profile", "baseline")))


def record(path: Path, *videos: bytes) -> str:
    """Write FLV as an RTMP server records it: one connection, in which each keyframe comes with its configuration."""
    file = io.BytesIO(videos[0][:FLV_HEADER_BYTES])
    file.seek(FLV_HEADER_BYTES)
    for i, video in enumerate(videos):
        configuration = b""
        for kind, ms, body in flv_tags(video):
            if kind != VIDEO or body[1] == END:
                continue
            if body[1] == CONFIGURATION:
                configuration = body
                continue
            if body[0] >> 4 == 1:  # a keyframe
                file.write(flv_tag(i * PART_MS + ms, configuration))
            file.write(flv_tag(i * PART_MS + ms, body))
    path.write_bytes(file.getvalue())
    return str(path)


def flv_tags(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield each tag's type, time in ms and body."""
    at = FLV_HEADER_BYTES
    while at < len(data):
        n_bytes = int.from_bytes(data[at + 1 : at + 4], "big")
        ms = int.from_bytes(data[at + 4 : at + 7], "big")
        yield data[at], ms, data[at + TAG_HEADER_BYTES : at + TAG_HEADER_BYTES + n_bytes]
        at += TAG_HEADER_BYTES + n_bytes + TAG_END_BYTES


def flv_tag(ms: int, body: bytes) -> bytes:
    header = bytes([VIDEO]) + len(body).to_bytes(3, "big") + ms.to_bytes(3, "big") + bytes(4)
    return header + body + (TAG_HEADER_BYTES + len(body)).to_bytes(4, "big")


def frames_of(media: str | bytes) -> list[np.ndarray]:
    with av.open(media if isinstance(media, str) else io.BytesIO(media)) as container:
        return [frame.to_ndarray(format="gray").astype(int) for frame in container.decode(video=0)]


def publish(path: str, **options) -> tuple[StreamPublisher, ListSender]:
    sender = ListSender()
    return StreamPublisher(SourceSpec(path, "file", "x"), ListProducer(sender), PublishOptions(**options)), sender


def test_publish_when_an_encoder_comes_back_with_other_parameters_then_transcodes_from_there(
    tmp_path, steady, restarted
):
    path = record(tmp_path / "restarted.flv", steady, restarted)
    publisher, sender = publish(path)

    report = publisher.run()

    got = [frame for segment, _ in sender.sent for frame in frames_of(segment.data)]
    expected = frames_of(path)
    assert len(got) == len(expected) == 2 * N_FRAMES
    assert max(np.abs(a - b).mean() for a, b in zip(got, expected, strict=True)) < 4
    assert ["changes its codec parameters" in notice for notice in report.notices] == [True]
    assert report.n_skipped_packets == 0


def test_publish_when_a_server_repeats_the_parameters_then_copies(tmp_path, steady):
    publisher, sender = publish(record(tmp_path / "steady.flv", steady))

    report = publisher.run()

    assert (report.transcoded, report.n_frames) == (False, N_FRAMES)
    assert sum(len(frames_of(segment.data)) for segment, _ in sender.sent) == N_FRAMES


def test_copy_when_an_encoder_comes_back_with_other_parameters_then_ends_the_session_there_and_says_why(
    tmp_path, steady, restarted
):
    publisher, sender = publish(record(tmp_path / "restarted.flv", steady, restarted), method="copy")

    with pytest.raises(InputError, match=r"changes its codec parameters after 4\.800 s.*--transcode"):
        publisher.run()

    assert [header.end for _, header in sender.sent] == [False] * (len(sender.sent) - 1) + [True]
    assert sum(len(frames_of(segment.data)) for segment, _ in sender.sent) == N_FRAMES


def test_archive_when_the_parameters_change_in_a_file_then_its_ranges_together_give_every_frame(
    tmp_path, steady, restarted
):
    path = record(tmp_path / "restarted.flv", steady, restarted)

    ranges = list(cut_file(path, 1.0))

    decoded = [
        decode_file(
            path,
            make_meta(),
            grid=GridSpec(Fraction(2)),
            frame_hw=(48, 64),
            pts_range=(r.start_pts, r.stop_pts),
            keep_from_pts=r.keep_from_pts,
            origin_pts=r.origin_pts,
        )
        for r in ranges
    ]
    assert sum(d.n_frames for d in decoded) == 2 * N_FRAMES
    assert [d.dead_letters for d in decoded] == [()] * len(ranges)
    assert len(ranges) > 3
    assert ranges[-1].start_pts < PART_MS
