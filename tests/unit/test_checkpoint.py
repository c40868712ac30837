"""Manifests and state files: what is believed, what is kept, and who may write."""

import json
import os
import subprocess
import sys

import pytest

from stormline.operators.errors import CheckpointError, CommitError, OutputLockedError
from stormline.operators.rows import Position, SnapshotKey
from stormline.pipeline.checkpoint import (
    KEPT_EPOCHS,
    MANIFEST_NAME,
    DamagedCheckpointError,
    DataFile,
    Manifest,
    StateFile,
    epoch_folder,
    list_committed,
    prune_checkpoints,
    read_manifest,
    read_state,
    write_manifest,
    write_states,
)
from stormline.pipeline.output_lock import LOCK_NAME, OutputLock


def make_manifest(lane=0, epoch=1, offsets=None, **changes):
    offsets = {0: 10} if offsets is None else offsets
    fields = {
        "lane": lane,
        "lanes": 2,
        "epoch": epoch,
        "created": "2026-01-31T12:00:00.000+00:00",
        "model": "storm-1",
        "identity": {"sampling": {"fps": "2"}, "frame_hw": [64, 64]},
        "positions": tuple(Position("vidéo", p, o) for p, o in offsets.items()),
        "states": (StateFile("encode", "vidéo", 0, "checkpoints/x", 3, "abc"),),
        "data_files": (DataFile("tokens", "tokens/date=2026-01-31/x.parquet", 2, 3966),),
        "built_on": {1: 7},
    }
    return Manifest(**{**fields, **changes})


def test_manifest_when_written_then_it_reads_back_equal(tmp_path):
    manifest = make_manifest()

    write_manifest(tmp_path, manifest)

    assert read_manifest(tmp_path, 0, 1) == manifest


def test_manifest_when_cut_anywhere_then_it_is_damaged():
    whole = make_manifest().to_json()

    for end in range(len(whole)):
        with pytest.raises(DamagedCheckpointError):
            Manifest.from_json(whole[:end])


def test_manifest_when_an_offset_is_altered_then_it_is_damaged():
    altered = make_manifest().to_json().replace(b'"next_offset": 10', b'"next_offset": 11')

    with pytest.raises(DamagedCheckpointError, match="checksum"):
        Manifest.from_json(altered)


@pytest.mark.parametrize("data", [b"[]", b"null", b"{}", b"\xff\xfe", b'"x"'])
def test_manifest_when_it_is_something_else_then_it_is_damaged(data):
    with pytest.raises(DamagedCheckpointError):
        Manifest.from_json(data)


def test_manifest_when_a_newer_stormline_wrote_it_then_the_message_says_so():
    import hashlib

    body = json.loads(make_manifest().to_json())
    del body["sha256"]
    body["version"] = 99
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    with pytest.raises(CheckpointError, match="format 99, expected 1") as caught:
        Manifest.from_json(json.dumps({**body, "sha256": digest}).encode())
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_manifest_when_copied_to_another_epoch_then_it_is_not_believed(tmp_path):
    write_manifest(tmp_path, make_manifest())
    epoch_folder(tmp_path, 0, 1).rename(epoch_folder(tmp_path, 0, 2))

    with pytest.raises(DamagedCheckpointError, match="that of lane 0, epoch 1"):
        read_manifest(tmp_path, 0, 2)


@pytest.mark.parametrize("topic", ["video", "a.b_c-1", "cams/été", "..", "x" * 249])
def test_states_when_written_then_they_read_back_from_inside_the_epochs_folder(tmp_path, topic):
    key = SnapshotKey("encode", topic, 3)

    (state,) = write_states(tmp_path, 0, 1, {key: memoryview(b"abc")})

    assert state.key == key
    assert read_state(tmp_path, state) == b"abc"
    assert (tmp_path / state.path).parent == epoch_folder(tmp_path, 0, 1)


@pytest.mark.parametrize("content", [b"ab", b"abd", None], ids=["short", "altered", "missing"])
def test_state_when_its_file_is_damaged_then_it_is_not_believed(tmp_path, content):
    (state,) = write_states(tmp_path, 0, 1, {SnapshotKey("encode", "video", 0): b"abc"})
    path = tmp_path / state.path
    path.unlink() if content is None else path.write_bytes(content)

    with pytest.raises(DamagedCheckpointError, match=r"encode\.video-0"):
        read_state(tmp_path, state)


def test_states_when_an_epoch_is_written_again_then_a_shared_older_file_keeps_its_content(tmp_path):
    key = SnapshotKey("encode", "video", 0)
    first = write_states(tmp_path, 0, 1, {key: b"old"})
    write_states(tmp_path, 0, 2, {key: b"old"}, first)

    second = write_states(tmp_path, 0, 2, {key: b"new"}, first)

    assert (read_state(tmp_path, first[0]), read_state(tmp_path, second[0])) == (b"old", b"new")


def test_prune_when_a_lane_goes_on_then_the_newest_epochs_stay(tmp_path):
    for epoch in range(1, 7):
        write_manifest(tmp_path, make_manifest(epoch=epoch, offsets={0: epoch}))

    assert prune_checkpoints(tmp_path, 0) == [3, 2, 1]
    assert list_committed(tmp_path, 0) == [6, 5, 4]


def test_prune_when_a_partition_moved_and_its_lane_has_not_committed_then_its_last_epochs_stay(tmp_path):
    for epoch in (1, 2, 3, 4):
        write_manifest(tmp_path, make_manifest(epoch=epoch, offsets={0: epoch, 1: epoch}))
    for epoch in (5, 6, 7, 8):
        write_manifest(tmp_path, make_manifest(epoch=epoch, offsets={0: epoch}))

    assert prune_checkpoints(tmp_path, 0) == [5, 1]
    assert list_committed(tmp_path, 0) == [8, 7, 6, 4, 3, 2]


def test_prune_when_the_other_lane_has_gone_far_enough_then_they_go(tmp_path):
    for epoch in (1, 2):
        write_manifest(tmp_path, make_manifest(epoch=epoch, offsets={0: epoch, 1: epoch}))
    for epoch in range(3, 3 + KEPT_EPOCHS):
        write_manifest(tmp_path, make_manifest(epoch=epoch, offsets={0: epoch}))
        write_manifest(tmp_path, make_manifest(lane=1, epoch=epoch, offsets={1: epoch}))

    assert prune_checkpoints(tmp_path, 0) == [2, 1]


def test_prune_when_an_old_manifest_is_damaged_then_it_stays_as_a_witness(tmp_path):
    for epoch in range(1, 7):
        write_manifest(tmp_path, make_manifest(epoch=epoch, offsets={0: epoch}))
    (epoch_folder(tmp_path, 0, 2) / MANIFEST_NAME).write_bytes(b"{")

    assert prune_checkpoints(tmp_path, 0) == [3, 1]


HOLD_LOCK = """
import sys
from stormline.pipeline.output_lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_when_another_process_holds_it_then_the_error_names_it_and_it_ends_with_that_process(tmp_path):
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        with pytest.raises(OutputLockedError, match=f"in use by process {holder.pid} on "), OutputLock(tmp_path):
            pass
        holder.kill()

    with OutputLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_lock_when_released_then_it_can_be_taken_again(tmp_path):
    lock = OutputLock(tmp_path / "new" / "out")
    with lock, pytest.raises(OutputLockedError), OutputLock(lock.root):
        pass

    with lock:
        pass


def test_lock_when_the_folder_cannot_be_made_then_the_error_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(CommitError, match="correct the rights"), OutputLock(tmp_path / "file" / "out"):
        pass
