"""Rows in strict `lane_seq` order inside an actor, whichever order its calls start in.

Ray Data hands blocks to an actor in order, but an actor with several calls under way may start them out of order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from .errors import OrderError

T = TypeVar("T")

MAX_AHEAD_ROWS = 1024  # more than any lane has in flight: a row this far ahead means that one was lost


class ReorderBuffer:
    """Hold rows back until those before them have come. For a step whose calls run one at a time."""

    def __init__(self) -> None:
        self._next_seq = 0
        self._waiting: dict[int, object] = {}

    def push(self, lane_seq: int, item: T) -> list[T]:
        """Return the items that are now in turn, in order; often just this one, or none.

        Raises:
            OrderError: If a row comes twice, or so far ahead that one must have been lost.
        """
        _check_not_lost(lane_seq, self._next_seq, lane_seq in self._waiting)
        self._waiting[lane_seq] = item
        ready = []
        while self._next_seq in self._waiting:
            ready.append(self._waiting.pop(self._next_seq))
            self._next_seq += 1
        return ready


class Turnstile:
    """Let coroutines of one event loop through one at a time, in `lane_seq` order."""

    def __init__(self) -> None:
        self._next_seq = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def turn(self, lane_seq: int) -> AsyncIterator[None]:
        """Wait until every row before `lane_seq` has had its turn; the next one's begins at the exit.

        Raises:
            OrderError: If a row comes twice, or so far ahead that one must have been lost.
        """
        _check_not_lost(lane_seq, self._next_seq, lane_seq in self._waiting)
        if lane_seq != self._next_seq:
            self._waiting[lane_seq] = asyncio.get_running_loop().create_future()
            await self._waiting[lane_seq]
        yield
        # Not reached when the body raised: the lane then fails as a whole, and nobody may go on with half a state.
        self._next_seq += 1
        following = self._waiting.pop(self._next_seq, None)
        if following is not None:
            following.set_result(None)


def _check_not_lost(lane_seq: int, next_seq: int, waiting: bool) -> None:
    if lane_seq < next_seq or waiting:
        raise OrderError(f"row {lane_seq} came twice, expected {next_seq}: the lane restarts from its checkpoint")
    if lane_seq > next_seq + MAX_AHEAD_ROWS:
        raise OrderError(f"row {next_seq} is missing, {lane_seq} came: the lane restarts from its checkpoint")
