import json

import pytest

from stormline.operators.errors import CheckpointError
from stormline.operators.rows import DeadLetter
from stormline.pipeline.sessions import MAX_SEQ, MOST_ENDED, Record, SessionTracker
from stormline.pipeline.tables import dead_letters_table

T0_NS = 1_700_000_000_000_000_000


def record(offset, *, key=b"cam", partition=0, timestamp_ms=T0_NS // 1_000_000, **headers):
    raw = [(name.replace("_type", "-type"), str(value).encode()) for name, value in headers.items()]
    return Record("video", partition, offset, timestamp_ms, key, b"media", raw)


def published(offset, seq, session="s1", **more):
    return record(offset, session=session, seq=seq, start_ns=T0_NS + seq * 10**9, **more)


def test_headers_when_all_are_there_then_they_place_the_segment():
    tracker = SessionTracker()

    first = tracker.take(published(0, 0))
    last = tracker.take(published(1, 1, end="1", content_type="video/x-matroska"))

    assert (first.meta.session, first.meta.seq, first.meta.session_start_ns) == ("s1", 0, T0_NS)
    assert (last.meta.seq, last.meta.start_ns, last.meta.session_start_ns) == (1, T0_NS + 10**9, T0_NS)
    assert (first.meta.end, last.meta.end, last.meta.content_type) == (False, True, "video/x-matroska")


def test_seq_when_repeated_then_dropped_and_counted():
    tracker = SessionTracker()

    taken = [tracker.take(published(i, seq)) for i, seq in enumerate([0, 1, 1, 0, 2])]

    assert [s.meta.seq for s in taken if s] == [0, 1, 2]
    assert tracker.counters["duplicates"] == 2


def test_seq_when_it_jumps_then_a_gap_is_recorded_with_its_place():
    tracker = SessionTracker()
    tracker.take(published(0, 0))

    after = tracker.take(published(1, 4))

    assert after.meta.gap_segments == 3
    assert [d.reason for d in after.dead_letters] == ["gap"]
    assert "segments 1 to 3 never arrived before video[0]@1" in after.dead_letters[0].detail


def test_session_when_new_then_a_new_grid_begins_and_late_records_of_the_old_are_dropped():
    tracker = SessionTracker()
    tracker.take(published(0, 0))

    new = tracker.take(record(1, session="s2", seq=0, start_ns=T0_NS + 77))
    late = tracker.take(published(2, 1))
    following = tracker.take(record(3, session="s2", seq=1, start_ns=T0_NS + 10**9))

    assert (new.meta.session, new.meta.session_start_ns, new.meta.gap_segments) == ("s2", T0_NS + 77, 0)
    assert late is None
    assert (following.meta.session, following.meta.seq) == ("s2", 1)


def test_record_when_it_has_no_headers_then_counted_and_timed_by_kafka():
    tracker = SessionTracker()

    metas = [tracker.take(record(i, timestamp_ms=1000 + 500 * i)).meta for i in range(3)]

    assert [m.seq for m in metas] == [0, 1, 2]
    assert [m.start_ns for m in metas] == [10**9, 1_500_000_000, 2 * 10**9]
    assert {m.session_start_ns for m in metas} == {10**9}


def test_record_when_a_headerless_session_has_ended_then_the_next_begins_another():
    tracker = SessionTracker()

    first, ended, new = (tracker.take(record(i, **({"end": 1} if i == 1 else {}))).meta for i in range(3))

    assert first.session == ended.session != new.session
    assert new.seq == 0


def test_record_when_it_has_no_key_then_the_stream_is_named_after_its_partition():
    assert SessionTracker().take(record(0, key=None, partition=3)).meta.stream_id == "video-3"


def test_header_when_it_is_no_number_then_noted_and_the_record_is_used():
    segment = SessionTracker().take(record(0, seq="abc", start_ns="-5", timestamp_ms=7))

    assert (segment.meta.seq, segment.meta.start_ns) == (0, 7_000_000)
    assert [d.reason for d in segment.dead_letters] == ["bad_header", "bad_header"]


def test_snapshot_when_restored_then_goes_on_as_without_interruption():
    records = [published(0, 0), published(1, 1, key=b"other", partition=1), published(2, 1), published(3, 1)]
    records += [published(4, 5), record(5, session="s2", seq=0, start_ns=T0_NS)]
    whole = SessionTracker()
    expected = [whole.take(r) for r in records]

    for cut in range(len(records) + 1):
        before = SessionTracker()
        got = [before.take(r) for r in records[:cut]]
        after = SessionTracker.restore(before.snapshot())
        got += [after.take(r) for r in records[cut:]]
        assert got == expected


def test_snapshot_when_of_another_version_then_refused():
    with pytest.raises(CheckpointError, match=r"video\[0\] has version 99"):
        SessionTracker.restore({("video", 0): b'{"version": 99, "streams": {}}'})


def test_record_when_skipped_then_the_next_comes_after_a_gap_that_is_not_told_as_missing():
    tracker = SessionTracker()
    tracker.take(published(0, 0))
    for seq in (1, 2, 4):  # 3 never came
        skipped = tracker.skip(published(seq, seq))
        assert (skipped.meta.seq, skipped.data) == (seq, b"")
    again = tracker.skip(published(5, 2))

    tracker = SessionTracker.restore(tracker.snapshot())
    after = tracker.take(published(6, 6))
    following = tracker.take(published(7, 7))

    assert [d.detail for d in skipped.dead_letters] == [f"segments 3 to 3 never arrived before {skipped.meta.where}"]
    assert again is None
    assert after.meta.gap_segments == 5
    assert [d.detail for d in after.dead_letters] == [f"segments 5 to 5 never arrived before {after.meta.where}"]
    assert (following.meta.gap_segments, following.dead_letters) == (0, ())


def test_record_when_it_comes_after_its_successor_then_a_gap_was_told_and_it_is_dropped():
    """What a producer without idempotence may do when it tries again: 0, 2, 1, 3."""
    tracker = SessionTracker()

    taken = [tracker.take(published(i, seq)) for i, seq in enumerate([0, 2, 1, 1, 3])]

    assert [(s.meta.seq, s.meta.gap_segments) for s in taken if s] == [(0, 0), (2, 1), (3, 0)]
    assert [d.reason for s in taken if s for d in s.dead_letters] == ["gap"]
    assert tracker.counters["duplicates"] == 2


@pytest.mark.parametrize("scale", [10**3, 10**6], ids=["microseconds", "nanoseconds"])
def test_timestamp_when_it_cannot_be_one_in_milliseconds_then_noted_and_gone_on_without(scale):
    segment = SessionTracker().take(record(0, timestamp_ms=T0_NS // 10**6 * scale))

    assert (segment.meta.start_ns, segment.meta.append_ns) == (0, 0)
    assert [d.reason for d in segment.dead_letters] == ["bad_header"]
    assert "expected milliseconds" in segment.dead_letters[0].detail


def test_start_when_it_is_beyond_what_can_be_written_then_the_records_timestamp_counts():
    segment = SessionTracker().take(record(0, start_ns=2**63 - 1, seq=2**64))

    assert (segment.meta.start_ns, segment.meta.seq) == (T0_NS, 0)
    assert [d.reason for d in segment.dead_letters] == ["bad_header", "bad_header"]


def test_seq_when_it_is_the_largest_allowed_then_what_is_counted_on_from_it_can_still_be_written():
    tracker = SessionTracker()

    metas = [tracker.take(record(i, session="s1", **seq)).meta for i, seq in enumerate([{"seq": MAX_SEQ}, {}, {}])]

    table = dead_letters_table([DeadLetter.of(meta, "not_media", "") for meta in metas])
    assert table["seq"].to_pylist() == [MAX_SEQ, MAX_SEQ + 1, MAX_SEQ + 2]


@pytest.mark.parametrize("name", ["door", None])
def test_session_when_several_of_one_name_end_one_after_the_other_then_each_is_taken_whole(name):
    tracker, seen = SessionTracker(), []
    named = {} if name is None else {"session": name}

    for offset in range(8):
        tracker = SessionTracker.restore(tracker.snapshot())
        segment = tracker.take(record(offset, **named, **({"end": "1"} if offset % 2 else {})))
        seen.append((segment.meta.session, segment.meta.seq))

    sessions = [session for session, _ in seen]
    first = name or ""
    assert [seq for _, seq in seen] == [0, 1] * 4
    assert sessions == [s for place in ("", "@video-0-2", "@video-0-4", "@video-0-6") for s in [f"{first}{place}"] * 2]
    assert tracker.counters["duplicates"] == 0


def heard(offset, seq, second, key=b"cam", session="s1", **more):
    return published(offset, seq, session, key=key, timestamp_ms=T0_NS // 10**6 + second * 1000, **more)


def take_all(tracker, records):
    """Return what each record gives, the ends of silent sessions before its own segment."""
    segments = []
    for each in records:
        segments += [*tracker.end_silent(each), tracker.take(each)]
    return [segment for segment in segments if segment is not None]


def test_session_when_silent_for_long_then_it_ends_and_what_comes_later_is_another_after_no_gap():
    tracker = SessionTracker(idle_s=60)
    others = [heard(2 + i, i, 3 * i, key=b"other") for i in range(30)]

    segments = take_all(tracker, [heard(0, 0, 0), heard(1, 1, 1), *others, heard(40, 2, 90), heard(41, 2, 91)])

    mine = [s.meta for s in segments if s.meta.stream_id == "cam"]
    assert [(m.session, m.seq, m.end, m.n_bytes) for m in mine] == [
        ("s1", 0, False, 5),
        ("s1", 1, False, 5),
        ("s1", 2, True, 0),
        ("s1@video-0-40", 2, False, 5),
    ]
    assert mine[-1].gap_segments == 0
    assert mine[2].offset == 2 + 21  # of the record whose time showed it: 63 s
    assert [m.by_silence for m in mine] == [False, False, True, False]
    assert tracker.counters["duplicates"] == 1


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 24, 25, 26, 27, 30, 60])
def test_silence_when_the_lane_restarts_anywhere_then_the_same_sessions_end_at_the_same_records(cut):
    records = [heard(i, i, 0, key=b"cam-%d" % i) for i in range(5)] + [
        heard(5 + i, i, 3 * i, key=b"other" if i < 40 else b"cam-%d" % (i % 5)) for i in range(60)
    ]
    whole = take_all(SessionTracker(idle_s=60), records)

    tracker = SessionTracker(idle_s=60)
    segments = take_all(tracker, records[:cut])
    segments += take_all(SessionTracker.restore(tracker.snapshot(), idle_s=60), records[cut:])

    assert [s.meta for s in segments] == [s.meta for s in whole]
    assert sum(s.meta.end for s in whole) == 5
    assert len({(s.meta.stream_id, s.meta.session) for s in whole}) == 11


def test_silence_when_one_timestamp_is_a_day_ahead_then_no_session_ends():
    tracker = SessionTracker(idle_s=3600)
    wrong = [heard(1 + 2 * i, i, 86_400 + i, key=b"wrong") for i in range(200)]
    right = [heard(2 + 2 * i, i, i) for i in range(200)]

    segments = take_all(tracker, [each for pair in zip(wrong, right, strict=True) for each in pair])

    assert not any(s.meta.end for s in segments)
    assert len(segments) == 400


def test_silence_when_records_have_no_timestamps_then_no_session_ends():
    tracker = SessionTracker(idle_s=0.001)

    segments = take_all(tracker, [record(i, key=b"cam-%d" % (i % 3), timestamp_ms=-1) for i in range(30)])

    assert not any(s.meta.end for s in segments)


def test_snapshot_when_of_the_version_before_then_its_streams_go_on_and_silence_counts_from_now():
    cursor = {"session": "s1", "session_start_ns": T0_NS, "next_seq": 4, "previous_session": None, "skipped": 0}
    old = json.dumps({"version": 2, "streams": {"cam": cursor | {"ended": False, "said": None}}}).encode()
    tracker = SessionTracker.restore({("video", 0): old}, idle_s=60)

    segments = take_all(tracker, [heard(0, 0, 0, key=b"other"), heard(1, 4, 50)])

    assert [(s.meta.stream_id, s.meta.session, s.meta.seq) for s in segments] == [("other", "s1", 0), ("cam", "s1", 4)]


def test_snapshot_when_of_the_version_before_then_late_records_of_the_session_before_are_still_dropped():
    cursor = {"session": "s2", "session_start_ns": T0_NS, "next_seq": 1, "said": None, "heard_ns": T0_NS}
    before = {"previous_session": "s1", "previous_next_seq": 4}
    old = json.dumps({"version": 3, "clock_ns": T0_NS, "streams": {"cam": cursor | before}}).encode()
    tracker = SessionTracker.restore({("video", 0): old})

    segments = take_all(tracker, [published(9, 3), published(10, 4), published(11, 1, "s2")])

    assert [(s.meta.session, s.meta.seq) for s in segments] == [("s2", 1)]
    assert (tracker.counters["duplicates"], tracker.counters["strays"]) == (1, 1)


def test_streams_when_a_great_many_have_ended_then_the_state_stays_small_and_no_session_comes_twice():
    tracker = SessionTracker()
    names = [b"upload-%d" % i for i in range(MOST_ENDED + 500)]

    first = take_all(tracker, [record(i, key=name, end=1) for i, name in enumerate(names)])
    tracker = SessionTracker.restore(tracker.snapshot())
    again = take_all(tracker, [record(10_000 + i, key=name) for i, name in enumerate(names)])

    size = len(tracker.snapshot()["video", 0])
    take_all(tracker, [record(20_000 + i, key=name, end=1) for i, name in enumerate(names)])
    assert len(tracker.snapshot()["video", 0]) < size
    assert len(json.loads(tracker.snapshot()["video", 0])["streams"]) == MOST_ENDED
    assert len({(s.meta.stream_id, s.meta.session) for s in (*first, *again)}) == 2 * len(names)


@pytest.mark.parametrize("numbered", [True, False], ids=["with seq", "without seq"])
def test_session_when_two_publishers_send_as_one_stream_then_what_is_left_out_is_told_once(numbered):
    tracker = SessionTracker()
    records = [
        record(2 * i + k, session=session, **({"seq": i} if numbered else {}))
        for i in range(50)
        for k, session in enumerate("AB")
    ]

    segments = take_all(tracker, records)

    assert [s.meta.session for s in segments] == ["A", *"B" * 50]
    (letter,) = tracker.take_letters()
    assert (letter.reason, letter.stream_id, letter.session, letter.offset) == ("two_sessions", "cam", "A", 2)
    assert letter.n_bytes == 49 * len(b"media")
    assert "do two publishers send as stream 'cam'?" in letter.detail
    assert (tracker.counters["strays"], tracker.counters["duplicates"], tracker.take_letters()) == (49, 0, [])


def in_lives(records, idle_s=3600.0):
    """Return a tracker that was restored before each record, and what it took."""
    tracker, segments = SessionTracker(idle_s), []
    for each in records:
        counters, tracker = tracker.counters, SessionTracker.restore(tracker.snapshot(), idle_s)
        tracker.counters = counters
        segments += take_all(tracker, [each])
    return tracker, segments


def test_session_when_the_newer_of_two_publishers_starts_again_then_the_older_stays_left_out():
    order = [("A", 0), ("A", 1), ("B", 0), ("A", 2), ("B2", 0), ("A", 3), ("B2", 1), ("A", 4), ("B2", 2)]

    tracker, segments = in_lives([published(i, seq, session) for i, (session, seq) in enumerate(order)])

    assert [(s.meta.session, s.meta.seq, s.meta.gap_segments) for s in segments] == [
        *[("A", 0, 0), ("A", 1, 0)],
        ("B", 0, 0),
        *[("B2", 0, 0), ("B2", 1, 0), ("B2", 2, 0)],
    ]
    assert (tracker.counters["strays"], tracker.counters["duplicates"]) == (3, 0)


def test_session_when_a_record_of_two_sessions_before_is_repeated_then_the_newest_goes_on():
    order = [("A", 0), ("A", 1), ("B", 0), ("C", 0), ("A", 1), ("C", 1), ("C", 2)]

    tracker, segments = in_lives([published(i, seq, session) for i, (session, seq) in enumerate(order)])

    taken = [(s.meta.session, s.meta.seq) for s in segments]
    assert taken == [("A", 0), ("A", 1), ("B", 0), ("C", 0), ("C", 1), ("C", 2)]
    assert (tracker.counters["strays"], tracker.counters["duplicates"], tracker.take_letters()) == (0, 1, [])


def test_session_when_it_came_back_from_silence_and_another_followed_then_its_late_record_begins_none():
    others = [heard(1 + i, i, 3 * i, key=b"other") for i in range(25)]
    last = [heard(40, 1, 75), heard(41, 0, 76, session="s2"), heard(42, 2, 77), heard(43, 1, 78, session="s2")]

    tracker, segments = in_lives([heard(0, 0, 0), *others, *last], idle_s=60)

    taken = [(s.meta.session, s.meta.seq) for s in segments if s.meta.stream_id == "cam"]
    assert taken == [("s1", 0), ("s1", 1), ("s1@video-0-40", 1), ("s2", 0), ("s2", 1)]
    assert (tracker.counters["strays"], tracker.counters["duplicates"]) == (1, 0)


def test_session_when_a_great_many_follow_each_other_then_the_newest_few_are_remembered():
    tracker, _ = in_lives([published(i, 0, f"s{i}") for i in range(20)])

    tracker.take(published(20, 1, "s11"))
    size = len(tracker.snapshot()["video", 0])
    for i in range(21, 40):
        tracker.take(published(i, 0, f"s{i}"))

    assert tracker.counters["strays"] == 1
    assert len(tracker.snapshot()["video", 0]) == size


def test_session_when_records_of_two_earlier_ones_come_late_then_each_has_its_row():
    tracker = SessionTracker()
    order = [("A", 0), ("B", 0), ("C", 0), ("A", 1), ("B", 1), ("A", 2)]

    take_all(tracker, [published(i, seq, session) for i, (session, seq) in enumerate(order)])

    letters = tracker.take_letters()
    assert [(letter.session, letter.offset, letter.n_bytes) for letter in letters] == [("A", 3, 10), ("B", 4, 5)]
