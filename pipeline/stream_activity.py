"""What was last heard of each stream: whether it goes on, how far behind its lane is, and how it looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..operators.rows import LaneNews, Picture

MAX_STREAMS = 2000  # beyond, those that were not heard of for longest leave: a picture each is 30 MB at most


@dataclass(frozen=True)
class StreamActivity:
    """The latest of one stream."""

    heard_ns: int  # when its newest chunk arrived, by the clock on the wall
    ended: bool  # its publisher said so, and nothing came since
    lag_records: int | None  # that wait in its partition, its own and others'; None where unknown
    picture_ns: int | None  # time of its newest picture's frame; None for no picture
    session: str | None = None  # that its newest chunk is of; None where no chunk came yet


class StreamRegister:
    """The latest of all streams, from what the lanes tell.

    Args:
        clock_ns: The clock on the wall.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns):
        self._clock_ns = clock_ns
        self._heard_ns: dict[str, int] = {}  # by stream, the longest silent first
        self._ended: set[str] = set()
        self._partitions: dict[str, tuple[str, int]] = {}
        self._sessions: dict[str, str] = {}
        self._pictures: dict[str, Picture] = {}
        self._lags: dict[tuple[str, int], int] = {}

    def take(self, news: LaneNews) -> None:
        """Take in what a lane tells."""
        self._lags |= news.lags
        self._pictures |= news.pictures
        for chunk in news.chunks:
            self._hear(chunk.stream_id)
            self._ended.discard(chunk.stream_id)
            self._partitions[chunk.stream_id] = chunk.topic, chunk.partition
            self._sessions[chunk.stream_id] = chunk.session
        for stream_id in news.ended:
            self._hear(stream_id)
            self._ended.add(stream_id)
        for stream_id in news.pictures:
            self._hear(stream_id)
        while len(self._heard_ns) > MAX_STREAMS:
            self._forget(next(iter(self._heard_ns)))

    def _hear(self, stream_id: str) -> None:
        self._heard_ns.pop(stream_id, None)
        self._heard_ns[stream_id] = self._clock_ns()

    def _forget(self, stream_id: str) -> None:
        self._ended.discard(stream_id)
        for known in (self._heard_ns, self._partitions, self._sessions, self._pictures):
            known.pop(stream_id, None)

    def activity(self) -> Mapping[str, StreamActivity]:
        """Return the latest of each stream."""
        return {stream_id: self._of(stream_id) for stream_id in self._heard_ns}

    def _of(self, stream_id: str) -> StreamActivity:
        picture = self._pictures.get(stream_id)
        lag = self._lags.get(self._partitions.get(stream_id, ("", -1)), -1)
        return StreamActivity(
            heard_ns=self._heard_ns[stream_id],
            ended=stream_id in self._ended,
            lag_records=lag if lag >= 0 else None,
            picture_ns=picture.time_ns if picture else None,
            session=self._sessions.get(stream_id),
        )

    def picture(self, stream_id: str) -> Picture | None:
        """Return a stream's newest picture."""
        return self._pictures.get(stream_id)
