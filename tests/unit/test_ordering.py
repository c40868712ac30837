import asyncio
import itertools

import pytest

from stormline.operators.errors import OrderError
from stormline.operators.ordering import MAX_AHEAD_ROWS, ReorderBuffer, Turnstile


@pytest.mark.parametrize("arrival", list(itertools.permutations(range(4))))
def test_reorder_buffer_whichever_order_rows_come_in_then_they_leave_in_order(arrival):
    buffer = ReorderBuffer()

    left = [item for seq in arrival for item in buffer.push(seq, f"row {seq}")]

    assert left == [f"row {i}" for i in range(4)]


def test_reorder_buffer_when_a_row_comes_twice_then_error():
    buffer = ReorderBuffer()
    buffer.push(0, "a")
    buffer.push(2, "c")

    for seq in (0, 2):
        with pytest.raises(OrderError, match="twice"):
            buffer.push(seq, "again")


def test_reorder_buffer_when_a_row_is_lost_then_error_and_not_for_ever_waiting():
    with pytest.raises(OrderError, match="row 0 is missing"):
        ReorderBuffer().push(MAX_AHEAD_ROWS + 1, "far")


@pytest.mark.parametrize("arrival", [(2, 0, 1), (0, 1, 2), (2, 1, 0)])
def test_turnstile_whichever_order_calls_start_in_then_turns_are_in_order(arrival):
    turns = []

    async def call(turnstile, seq):
        async with turnstile.turn(seq):
            turns.append(seq)

    async def main():
        turnstile = Turnstile()
        await asyncio.gather(*(call(turnstile, seq) for seq in arrival))

    asyncio.run(main())

    assert turns == [0, 1, 2]


def test_turnstile_when_a_turn_fails_then_nobody_after_it_gets_one():
    turns = []

    async def fail(turnstile):
        async with turnstile.turn(0):
            raise ValueError("half a state")

    async def follow(turnstile):
        async with turnstile.turn(1):
            turns.append(1)

    async def main():
        turnstile = Turnstile()
        follower = asyncio.create_task(follow(turnstile))
        with pytest.raises(ValueError, match="half a state"):
            await fail(turnstile)
        await asyncio.sleep(0)
        assert not follower.done()
        follower.cancel()

    asyncio.run(main())

    assert turns == []
