"""What a worker leaves behind when it dies is counted, and only against the record that it died of."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from stormline.operators.errors import CommitError
from stormline.operators.in_hand import MarkFile, RecordKey, Suspect, read_mark
from stormline.operators.rows import SegmentMeta
from stormline.pipeline.poison import FILE_NAME, SuspectList, marks_folder, step_of

META = SegmentMeta("cam", "a", 0, 0, 0, "", False, 0, "video", 3, 17, 0, 9)
NOTHING_COMMITTED = {("video", 3): 0}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def die_of(root, offset=17, step="encode", *, passed=None, deaths=0):
    """Leave what a worker leaves that dies with a record in hand."""
    marks = MarkFile(marks_folder(root, 0), step)
    if passed is not None:
        with marks.holding(replace(META, offset=passed)):
            pass
    marks.mark(marks.suspect(replace(META, offset=offset), deaths))


def counts(suspects):
    return {s.offset: s.deaths for s in suspects.of([("video", 3)])}


def test_mark_file_when_a_record_is_in_hand_then_says_which_and_afterwards_that_it_passed(tmp_path):
    marks = MarkFile(tmp_path / "in-hand", "decode")
    (path,) = (tmp_path / "in-hand").iterdir()
    assert read_mark(path) is None  # nothing yet

    with marks.holding(replace(META, stream_id="a longer name " * 20)):
        during = read_mark(path)
    with marks.holding(META, deaths=1):
        again = read_mark(path)
    after = read_mark(path)

    assert during.in_hand.key == RecordKey("video", 3, 17)
    assert during.in_hand.stream_id == "a longer name " * 20
    assert (again.in_hand.stream_id, again.in_hand.deaths) == ("cam", 1)
    assert (after.in_hand, after.passed) == (None, RecordKey("video", 3, 17))


def test_mark_file_when_the_work_raises_then_the_mark_stays(tmp_path):
    marks = MarkFile(tmp_path, "encode")

    with pytest.raises(MemoryError), marks.holding(META):
        raise MemoryError

    (path,) = tmp_path.iterdir()
    assert read_mark(path).in_hand == Suspect("video", 3, 17, "cam", "encode", 0)


def test_mark_file_when_without_a_folder_then_marks_nothing():
    with MarkFile(None, "decode").holding(META):
        pass


def test_suspects_when_a_record_is_in_hand_at_three_deaths_then_set_aside_and_so_after_every_restart(tmp_path):
    told = []
    for life in range(3):
        die_of(tmp_path)
        told.append(SuspectList(tmp_path).take_marks(0, NOTHING_COMMITTED))
        assert counts(SuspectList(tmp_path)) == {17: life + 1}
        assert list(marks_folder(tmp_path, 0).iterdir()) == []

    later = SuspectList(tmp_path)
    later.take_marks(0, {("video", 3): 500})

    assert [[s.offset for s in new] for new in told] == [[], [], [17]]
    (poison,) = SuspectList(tmp_path).of([("video", 3)])
    assert poison.is_poison
    assert later.of([("video", 4)]) == ()


def test_suspects_when_a_commit_goes_past_then_forgotten(tmp_path):
    for next_offset in (17, 17, 18):
        die_of(tmp_path)
        suspects = SuspectList(tmp_path)
        suspects.take_marks(0, {("video", 3): next_offset})

    assert counts(SuspectList(tmp_path)) == {}


def test_suspects_when_the_encoder_gets_past_a_record_then_its_count_starts_anew(tmp_path):
    suspects = SuspectList(tmp_path)
    for _ in range(2):
        die_of(tmp_path)
        suspects.take_marks(0, NOTHING_COMMITTED)
    assert counts(suspects) == {17: 2}

    die_of(tmp_path, 19, passed=18)  # killed for nothing, a little later
    suspects.take_marks(0, NOTHING_COMMITTED)
    assert counts(suspects) == {19: 1}

    die_of(tmp_path, 17, passed=16)
    suspects.take_marks(0, NOTHING_COMMITTED)
    assert counts(suspects) == {17: 1, 19: 1}


def test_suspects_when_the_record_that_kills_showed_others_silence_then_it_is_set_aside_all_the_same(tmp_path):
    ends = [replace(META, stream_id=name, end=True, by_silence=True) for name in ("quiet-1", "quiet-2")]
    suspects = SuspectList(tmp_path)
    told = []

    for _ in range(3):
        marks = MarkFile(marks_folder(tmp_path, 0), "encode")
        for end in ends:
            with marks.holding(end):
                pass
        with pytest.raises(MemoryError), marks.holding(META):
            raise MemoryError
        told.append(suspects.take_marks(0, NOTHING_COMMITTED, "encode"))

    assert [[s.stream_id for s in new] for new in told] == [[], [], ["cam"]]


def test_mark_file_when_a_session_ends_by_silence_then_no_record_is_marked_for_it(tmp_path):
    marks = MarkFile(tmp_path, "encode")
    (path,) = tmp_path.iterdir()

    with marks.holding(replace(META, end=True, by_silence=True)):
        during = read_mark(path)

    assert (during, read_mark(path)) == (None, None)


@pytest.mark.parametrize(
    ("blamed", "expected"), [("encode", {18: 1}), ("decode", {17: 1}), ("lane", {}), (None, {17: 1, 18: 1})]
)
def test_suspects_when_a_step_is_blamed_then_what_others_had_in_hand_is_not_counted(tmp_path, blamed, expected):
    die_of(tmp_path, 17, "decode")
    die_of(tmp_path, 18, "encode")
    suspects = SuspectList(tmp_path)

    suspects.take_marks(0, NOTHING_COMMITTED, blamed)

    assert counts(suspects) == expected


def test_suspects_when_a_decoder_saw_others_die_then_its_own_death_adds_to_theirs(tmp_path):
    die_of(tmp_path, 17, "decode", deaths=2)
    suspects = SuspectList(tmp_path)

    (poison,) = suspects.take_marks(0, NOTHING_COMMITTED, "decode")

    assert poison.deaths == 3


def test_suspects_when_a_decoder_set_a_record_aside_then_it_stays_so(tmp_path):
    marks = MarkFile(marks_folder(tmp_path, 0), "decode")
    proven = Suspect("video", 3, 17, "cam", "decode", 3, "SIGSEGV")
    marks.set_aside(proven)
    with marks.holding(META):
        pass

    SuspectList(tmp_path).take_marks(0, {("video", 3): 90})

    assert SuspectList(tmp_path).of([("video", 3)]) == (proven,)
    assert "decode it died 3 times, at last by SIGSEGV" in proven.detail


def test_suspects_when_the_supervisor_dies_before_the_marks_are_removed_then_not_counted_twice(tmp_path, monkeypatch):
    die_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SuspectList, "forget", lambda self, lane: None)
        SuspectList(tmp_path).take_marks(0, NOTHING_COMMITTED)

    SuspectList(tmp_path).take_marks(0, NOTHING_COMMITTED)

    assert counts(SuspectList(tmp_path)) == {17: 1}
    assert list(marks_folder(tmp_path, 0).iterdir()) == []


def test_suspects_when_the_disk_refuses_then_counted_when_it_is_tried_again(tmp_path, monkeypatch):
    die_of(tmp_path)
    suspects = SuspectList(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.truncate("/nowhere", 0))
        for _ in range(4):
            with pytest.raises(CommitError, match=r"suspects|nowhere"):
                suspects.take_marks(0, NOTHING_COMMITTED)

    suspects.take_marks(0, NOTHING_COMMITTED)

    assert counts(suspects) == counts(SuspectList(tmp_path)) == {17: 1}


def test_suspects_when_lanes_die_one_after_the_other_then_each_is_counted(tmp_path):
    suspects = SuspectList(tmp_path)
    for lane in (0, 1):
        marks = MarkFile(marks_folder(tmp_path, lane), "encode")
        marks.mark(marks.suspect(replace(META, partition=lane), 0))
        suspects.take_marks(lane, {})

    assert [s.partition for s in suspects.of([("video", 0), ("video", 1)])] == [0, 1]


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 99}', b"[]", b'{"version": 1, "suspects": [{"a": 1}]}'])
def test_suspects_when_the_file_is_damaged_then_made_anew(tmp_path, content):
    path = Path(tmp_path / "checkpoints" / FILE_NAME)
    path.parent.mkdir()
    path.write_bytes(content)
    die_of(tmp_path)

    SuspectList(tmp_path).take_marks(0, NOTHING_COMMITTED)

    assert [s["offset"] for s in json.loads(path.read_bytes())["suspects"]] == [17]


@pytest.mark.parametrize("content", [b"", b"{", b"{}\n", b"\x00" * 300, b'{"step": "encode", "in_hand": {"a": 1}}'])
def test_suspects_when_a_mark_is_damaged_then_it_counts_for_nothing(tmp_path, content):
    folder = marks_folder(tmp_path, 0)
    folder.mkdir(parents=True)
    (folder / "encode-x.json").write_bytes(content)
    (folder / "decode-x.jsonl").write_bytes(content)

    assert SuspectList(tmp_path).take_marks(0, NOTHING_COMMITTED) == []

    assert list(folder.iterdir()) == []
    assert not (tmp_path / "checkpoints" / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the worker MapWorker(MapBatches(Encode)) died between two rows: the lane restarts", "encode"),
        ("The actor died.\n\tclass_name: MapWorker(MapBatches(Decode))\n\tactor_id: 1", "decode"),
        ("The actor died.\n\tclass_name: Lane\n\tactor_id: 1", "lane"),
        ("MapBatches(Decode) waited for MapBatches(Encode)", None),
        ("no barrier for 120 s", None),
    ],
)
def test_step_of_when_an_error_names_one_step_then_that_is_blamed(text, expected):
    assert step_of(RuntimeError(text)) == expected
