"""What is remembered of each stream: whether it goes on, how far behind it is, how it looks."""

from dataclasses import replace

import numpy as np

from stormline.operators.rows import Chunk, LaneNews, Picture
from stormline.pipeline.stream_activity import MAX_STREAMS, StreamActivity, StreamRegister


class Clock:
    now_ns = 100

    def __call__(self):
        return self.now_ns


def chunk(stream="cam", partition=0):
    return Chunk(stream, "s", 0, 0, 10, 0, 4, 0.0, "video", partition, 0, 0, np.zeros((1, 1), np.float16))


def test_activity_when_chunks_come_then_heard_of_and_no_longer_ended():
    clock = Clock()
    register = StreamRegister(clock)

    register.take(LaneNews((chunk(),), ended=("cam",)))
    ended = register.activity()["cam"]
    clock.now_ns = 200
    register.take(LaneNews((chunk(),)))

    assert ended == StreamActivity(heard_ns=100, ended=True, lag_records=None, picture_ns=None, session="s")
    assert register.activity()["cam"] == replace(ended, heard_ns=200, ended=False)


def test_activity_when_another_session_begins_then_that_one_is_named():
    register = StreamRegister()

    register.take(LaneNews((chunk(),), ended=("cam",)))
    register.take(LaneNews((replace(chunk(), session="next"),)))

    assert register.activity()["cam"].session == "next"


def test_activity_when_lags_are_told_then_each_stream_has_its_partitions():
    register = StreamRegister()

    register.take(LaneNews((chunk("a", 0), chunk("b", 1), chunk("c", 2))))
    register.take(LaneNews(lags={("video", 0): 7, ("video", 1): -1}))
    register.take(LaneNews(lags={("video", 0): 8}))

    assert {name: seen.lag_records for name, seen in register.activity().items()} == {"a": 8, "b": None, "c": None}


def test_picture_when_a_newer_one_comes_then_it_alone_is_kept():
    register = StreamRegister()
    assert register.picture("cam") is None

    register.take(LaneNews(pictures={"cam": Picture(1, b"old")}))
    register.take(LaneNews(pictures={"cam": Picture(2, b"new"), "other": Picture(1, b"x")}))

    assert register.picture("cam") == Picture(2, b"new")
    assert register.activity()["cam"].picture_ns == 2


def test_register_when_there_are_too_many_streams_then_the_longest_silent_leave():
    register = StreamRegister()
    register.take(LaneNews((chunk("first"), chunk("second")), pictures={"second": Picture(1, b"x")}))
    register.take(LaneNews(tuple(chunk(f"s{i}") for i in range(MAX_STREAMS - 2))))
    register.take(LaneNews((chunk("first"),)))

    register.take(LaneNews((chunk("one more"),)))

    assert len(register.activity()) == MAX_STREAMS
    assert "first" in register.activity()
    assert "second" not in register.activity()
    assert register.picture("second") is None
