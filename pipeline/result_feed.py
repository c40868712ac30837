"""Hands new results to any number of listeners of one process: one look at the disk for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from .result_tail import Cursor, ResultEvent, ResultTail, newest_cursor

logger = logging.getLogger(__name__)

POLL_S = 0.5
KEPT_EVENTS = 1000  # for those who listen at another pace
_EVENTS_AT_ONCE = 256


class ResultFeed:
    """Lets many listen to the committed results of a folder; belongs to one event loop.

    While anybody listens, one task looks for new results twice a second and keeps the newest ones. Each listener goes
    through those at its own pace; one that comes late, or falls behind them, reads what it has not had from the
    disk. So no listener costs memory, however slow it is, and none misses a result or gets one twice.

    Args:
        root: The output folder; it may have nothing in it yet.
        poll_s: Between two looks.
        keep_events: How many of the newest results stay in memory.
    """

    def __init__(self, root: Path, *, poll_s: float = POLL_S, keep_events: int = KEPT_EVENTS):
        self._root = root
        self._poll_s = poll_s
        self._kept: deque[ResultEvent] = deque(maxlen=keep_events)
        self._n_seen = 0  # results ever kept; the newest of `_kept` is number `_n_seen - 1`
        self._news = asyncio.Event()
        self._listeners = 0
        self._poller: asyncio.Task[None] | None = None
        self._polling = asyncio.Event()  # from here on nothing is missed

    @property
    def listeners(self) -> int:
        """Return how many listen."""
        return self._listeners

    async def listen(
        self, after: Cursor | None = None, *, idle_s: float = 15.0
    ) -> AsyncGenerator[ResultEvent | Cursor]:
        """Yield results from a place on, and go on with new ones for ever.

        Args:
            after: Go on after that; None: with what is committed from when the first is asked for.
            idle_s: When nothing came for so long, the place so far is yielded instead: to say that all is well.

        Yields:
            Results, each with the place to go on from after it; and places.
        """
        self._listeners += 1
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="result-feed")
        try:
            await self._polling.wait()
            seen = after if after is not None else await asyncio.to_thread(newest_cursor, self._root)
            while True:
                number = self._n_seen
                tail = ResultTail(self._root, seen)
                async for event in _from_disk(tail):
                    yield event
                seen = tail.cursor
                while number >= self._n_seen - len(self._kept):  # else it fell behind: from the disk again
                    if number == self._n_seen:
                        if not await self._wait(idle_s):
                            yield seen
                        continue
                    event = self._kept[number - self._n_seen]
                    number += 1
                    if not seen.has(event):
                        seen = seen.joined(event.cursor)
                        yield replace(event, cursor=seen)
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._stop()

    async def _wait(self, idle_s: float) -> bool:
        try:
            await asyncio.wait_for(self._news.wait(), idle_s)
        except TimeoutError:
            return False
        return True

    async def _poll(self) -> None:
        tail: ResultTail | None = None
        while True:
            try:
                if tail is None:
                    tail = ResultTail(self._root, await asyncio.to_thread(newest_cursor, self._root))
                    self._polling.set()
                async for event in _from_disk(tail):
                    self._kept.append(event)
                    self._n_seen += 1
                    self._tell()
            except Exception as error:  # noqa: BLE001 (the edge of a task: it must not end while anybody listens)
                logger.warning("results_not_read error=%r; trying again", error)
                # What was read and not kept is read by each listener from the disk: nothing that is kept follows.
                self._kept.clear()
                self._n_seen += 1
                self._tell()
            await asyncio.sleep(self._poll_s)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _stop(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
        self._poller = None
        self._polling = asyncio.Event()
        self._kept.clear()


async def _from_disk(tail: ResultTail) -> AsyncGenerator[ResultEvent]:
    events = tail.poll()
    while batch := await asyncio.to_thread(lambda: list(islice(events, _EVENTS_AT_ONCE))):
        for event in batch:
            yield event
