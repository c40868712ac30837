"""One lane's commits: what is written, when nothing is, and when they must be refused."""

import logging
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stormline.operators.errors import CheckpointError, CommitError
from stormline.operators.rows import Position, Result, SnapshotKey
from stormline.pipeline.checkpoint import epoch_folder, list_committed, read_manifest, write_owner
from stormline.pipeline.durable_files import temporary_path
from stormline.pipeline.parquet_sink import EpochWriter, data_file_path
from stormline.pipeline.recovery import recover, recover_lane

VIDEO_0 = ("video", 0)
ENCODE = SnapshotKey("encode", "video", 0)
HOUR_NS = 3_600 * 10**9
JANUARY_31_NS = 1_769_817_600 * 10**9
DAY = "2026-01-31"


def make_result(start_ns=JANUARY_31_NS, answer="a car"):
    return Result("q", "caption", "gate", "s", start_ns, start_ns, "What?", answer, False, 16, "recent", 1.0, "m", 0)


def make_writer(root, cls=EpochWriter):
    return cls(recover(root, lanes=1, identity={}).for_lane(0, [VIDEO_0]), model="m", identity={})


def at(next_offset):
    return [Position("video", 0, next_offset)]


def files_below(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_commit_when_rows_cross_midnight_then_one_file_for_each_date(tmp_path):
    writer = make_writer(tmp_path)

    report = writer.commit(
        results=[make_result(), make_result(JANUARY_31_NS + 24 * HOUR_NS)], positions=at(5), snapshots={ENCODE: b"abc"}
    )

    assert files_below(tmp_path) == {
        ".files.lock",
        ".files.gate",
        "results/date=2026-01-31/lane-000-epoch-00000001.parquet",
        "results/date=2026-02-01/lane-000-epoch-00000001.parquet",
        "checkpoints/lane-000/owner",
        "checkpoints/lane-000/.owner.lock",
        "checkpoints/lane-000/epoch-00000001/encode.video-0.safetensors",
        "checkpoints/lane-000/epoch-00000001/manifest.json",
    }
    assert (report.epoch, report.rows, report.state_bytes) == (1, {"results": 2}, 3)
    manifest = read_manifest(tmp_path, 0, 1)
    assert manifest.positions == tuple(at(5))
    assert [(f.path, f.n_rows) for f in manifest.data_files] == [(f.path, 1) for f in report.files]
    assert all((tmp_path / f.path).stat().st_size == f.n_bytes for f in report.files)


def test_commit_when_nothing_is_new_then_nothing_is_written(tmp_path):
    writer = make_writer(tmp_path)
    first = writer.commit(positions=at(5), snapshots={ENCODE: b"abc"})
    before = files_below(tmp_path)

    second = writer.commit(positions=at(5), snapshots={ENCODE: b"abc"})

    assert (first.skipped, second.skipped, second.epoch) == (False, True, 1)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"positions": at(6), "snapshots": {ENCODE: b"abc"}},
        {"positions": at(5), "snapshots": {ENCODE: b"abd"}},
        {"positions": at(5), "snapshots": {}},
        {"positions": at(5), "snapshots": {ENCODE: b"abc"}, "results": [make_result()]},
    ],
    ids=["position", "state", "state gone", "row"],
)
def test_commit_when_anything_is_new_then_it_is_an_epoch(tmp_path, change):
    writer = make_writer(tmp_path)
    writer.commit(positions=at(5), snapshots={ENCODE: b"abc"})

    report = writer.commit(**change)

    assert (report.skipped, report.epoch) == (False, 2)
    assert list_committed(tmp_path, 0) == [2, 1]


def test_commit_when_a_state_is_unchanged_then_its_file_is_shared_and_a_change_leaves_the_old_one(tmp_path):
    writer = make_writer(tmp_path)
    annotate = SnapshotKey("annotate", "video", 0)
    for next_offset, encode in ((1, b"a"), (2, b"b"), (3, b"c")):
        writer.commit(positions=at(next_offset), snapshots={ENCODE: encode, annotate: b"same"})

    folders = [epoch_folder(tmp_path, 0, epoch) for epoch in (1, 2, 3)]
    assert [(f / "encode.video-0.safetensors").read_bytes() for f in folders] == [b"a", b"b", b"c"]
    assert len({(f / "annotate.video-0.safetensors").stat().st_ino for f in folders}) == 1


def test_commit_when_a_topic_has_the_longest_legal_name_then_its_state_is_written(tmp_path):
    topic = "t" * 249
    writer = make_writer(tmp_path)

    key = SnapshotKey("encode", topic, 11)
    writer.commit(positions=[Position(topic, 11, 5)], snapshots={key: b"abc"})

    start = recover(tmp_path, lanes=1, identity={}).for_lane(0, [(topic, 11)])
    assert start.load_snapshots() == {key: b"abc"}


def test_commit_when_the_disk_is_full_then_the_error_names_the_file_and_the_writer_stops(tmp_path):
    writer = make_writer(tmp_path)
    final = data_file_path(tmp_path, "results", DAY, 0, 1)
    final.parent.mkdir(parents=True)
    final.with_name(f".{final.name}.tmp").symlink_to("/dev/full")

    with pytest.raises(CommitError, match=r"No space left on device.*Free space"):
        writer.commit(results=[make_result()], positions=at(5), snapshots={})

    with pytest.raises(CommitError, match="restart the lane from its checkpoint"):
        writer.commit(positions=at(6), snapshots={})
    assert list_committed(tmp_path, 0) == []


def test_commit_when_a_folder_cannot_be_made_then_the_error_names_it(tmp_path):
    writer = make_writer(tmp_path)
    (tmp_path / "results").write_text("in the way")

    with pytest.raises(CommitError, match=f"{tmp_path}/results"):
        writer.commit(results=[make_result()], positions=at(5), snapshots={})


def test_commit_when_a_position_falls_back_then_it_is_refused(tmp_path):
    make_writer(tmp_path).commit(positions=at(5), snapshots={})
    restarted = make_writer(tmp_path)

    with pytest.raises(CheckpointError, match=r"video\[0\]@4 is before 5"):
        restarted.commit(positions=at(4), snapshots={})


def test_commit_when_a_snapshot_has_no_position_then_it_raises(tmp_path):
    with pytest.raises(ValueError, match="no position"):
        make_writer(tmp_path).commit(positions=at(5), snapshots={SnapshotKey("encode", "video", 1): b""})


def test_commit_when_the_lane_was_restarted_elsewhere_then_the_old_process_writes_no_row(tmp_path):
    old = make_writer(tmp_path)
    old.commit(results=[make_result()], positions=at(1), snapshots={})

    start = recover_lane(tmp_path, 0, lanes=1, partitions=[VIDEO_0], identity={})

    with pytest.raises(CommitError, match=r"belongs to .* now"):
        old.commit(results=[make_result(24 * HOUR_NS, "twice")], positions=at(2), snapshots={})
    new = EpochWriter(start, model="m", identity={})
    new.commit(results=[make_result(answer="once")], positions=at(2), snapshots={})
    rows = pq.read_table(tmp_path / "results")["answer"].to_pylist()
    assert sorted(rows) == ["a car", "once"]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_commit_when_another_process_wants_the_lane_between_two_steps_then_it_waits_until_the_epoch_counts(
    tmp_path, number
):
    waited = []

    class Contested(EpochWriter):
        def step_done(self, step):
            if step == number:
                with pytest.raises(CommitError, match="held by another process") as refused:
                    write_owner(self.root, self.lane, "another", wait_s=0.0)
                waited.append(refused.value)

    report = make_writer(tmp_path, Contested).commit(results=[make_result()], positions=at(1), snapshots={})

    assert len(waited) == 1
    start = recover_lane(tmp_path, 0, lanes=1, partitions=[VIDEO_0], identity={})
    assert (start.next_epoch, start.positions) == (report.epoch + 1, tuple(at(1)))


def test_commit_when_another_process_has_the_lane_then_the_old_one_does_not_touch_a_draft_of_the_same_epoch(tmp_path):
    old = make_writer(tmp_path)
    write_owner(tmp_path, 0, "another")
    draft = temporary_path(data_file_path(tmp_path, "results", DAY, 0, old.next_epoch))
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"of the other")

    with pytest.raises(CommitError, match="belongs to another now"):
        old.commit(results=[make_result()], positions=at(1), snapshots={})

    assert draft.read_bytes() == b"of the other"


def test_commit_when_power_may_fail_then_every_file_is_synced_before_its_name_counts(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    events, real_fsync, real_replace = [], os.fsync, Path.replace

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/")))
        real_fsync(descriptor)

    def replace(path, target):
        events.append(("rename", str(target).removeprefix(f"{tmp_path}/")))
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    writer.commit(results=[make_result()], positions=at(1), snapshots={ENCODE: b"abc"})

    rows, epoch = f"results/date={DAY}", "checkpoints/lane-000/epoch-00000001"
    order = [
        ("sync", f"{rows}/.lane-000-epoch-00000001.parquet.tmp"),
        ("rename", f"{rows}/lane-000-epoch-00000001.parquet"),
        ("sync", rows),
        ("sync", f"{epoch}/encode.video-0.safetensors"),
        ("sync", f"{epoch}/.manifest.json.tmp"),
        ("rename", f"{epoch}/manifest.json"),
        ("sync", epoch),
    ]
    assert [e for e in events if e in order] == order
    assert {("sync", "results"), ("sync", "checkpoints/lane-000"), ("sync", str(tmp_path))} <= set(events)


def test_commit_when_done_then_one_line_is_logged(tmp_path, caplog):
    writer = make_writer(tmp_path)

    with caplog.at_level(logging.INFO, "stormline.pipeline.parquet_sink"):
        writer.commit(results=[make_result()], positions=at(1), snapshots={})

    (line,) = [r.getMessage() for r in caplog.records if r.name.endswith("parquet_sink")]
    assert line.startswith("committed lane=0 epoch=1 rows={'results': 1}")
