"""Answers in a thread: a question joins those under way, and nothing that befalls one befalls another."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch

from stormline.models.generation import AnswerWriter, check_prompt, generate_answers
from stormline.models.loading import build_untrained_tiny
from stormline.models.prompts import VideoPrompt
from stormline.pipeline import answer_thread
from stormline.pipeline.answer_thread import AnswerThread

LIMIT_S = 60


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model, processor = build_untrained_tiny()
    return model.eval(), processor


@pytest.fixture
def threads(tiny):
    """Make answer threads over the tiny model that are closed at the end."""
    made = []

    def make(make_writer=None, rows=2):
        made.append(AnswerThread(make_writer or (lambda: AnswerWriter(*tiny, fixed_batch=rows))))
        return made[-1]

    yield make
    for thread in made:
        thread.close()


def prompt(text, n=4, **changes):
    return VideoPrompt(text, max_new_tokens=n, **changes)


def alone(tiny, asked):
    return generate_answers(*tiny, [asked], fixed_batch=2)[0]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


async def ask(tiny, thread, asked, listener=None):
    return await thread.answer(asked, check_prompt(*tiny, asked), listener)


def test_answers_when_more_are_asked_than_there_is_room_then_each_is_its_own(tiny, threads):
    asked = [prompt(f"What is it? {'x ' * i}", n=3 + i % 4, temperature=0.7 * (i % 2), seed=i) for i in range(9)]
    thread = threads()

    async def all_at_once():
        return await asyncio.gather(*(ask(tiny, thread, each) for each in asked))

    assert run(all_at_once()) == [alone(tiny, each) for each in asked]
    assert thread.answered == 9


def test_question_when_another_is_being_answered_then_does_not_wait_for_its_end(tiny, threads):
    thread = threads()
    begun = threading.Event()

    async def long_and_short():
        long = asyncio.ensure_future(ask(tiny, thread, prompt("Long?", n=4000), lambda piece: begun.set()))
        await asyncio.to_thread(begun.wait, LIMIT_S)
        short = await ask(tiny, thread, prompt("Short?"))
        still_going = not long.done()
        long.cancel()
        return short, still_going

    short, still_going = run(long_and_short())

    assert still_going
    assert short == alone(tiny, prompt("Short?"))


def test_question_when_given_up_then_its_row_is_free_for_the_next(tiny, threads):
    thread = threads(rows=1)
    begun = threading.Event()

    async def leave():
        left = [asyncio.ensure_future(ask(tiny, thread, prompt("Long?", n=4000), lambda piece: begun.set()))]
        left += [asyncio.ensure_future(ask(tiny, thread, prompt("Waits", n=4000)))]
        await asyncio.to_thread(begun.wait, LIMIT_S)
        for each in left:
            each.cancel()
        return await ask(tiny, thread, prompt("Short?"))

    assert run(leave()).generated_tokens == 4
    assert thread.answered == 1


def test_answers_when_a_step_fails_then_those_under_way_fail_and_the_next_does_not(tiny, threads):
    class Failing(AnswerWriter):
        def step(self):
            if self.busy:
                raise RuntimeError("out of memory")
            return []

    writers = [Failing(*tiny, fixed_batch=2), AnswerWriter(*tiny, fixed_batch=2)]
    thread = threads(lambda: writers.pop(0))
    asked = prompt("What?")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(ask(tiny, thread, asked))

    assert run(ask(tiny, thread, asked)) == alone(tiny, asked)


def test_answer_when_its_own_prompt_fails_then_the_others_go_on(tiny, threads):
    thread = threads()
    good = prompt("What?", n=30)
    built = check_prompt(*tiny, good)
    broken = replace(built, input_ids=built.input_ids + 10**6)

    async def both():
        return await asyncio.gather(
            ask(tiny, thread, good), thread.answer(good, broken), ask(tiny, thread, good), return_exceptions=True
        )

    first, failed, last = run(both())

    assert first == last == alone(tiny, good)
    assert isinstance(failed, IndexError)


@pytest.mark.parametrize(("stall_s", "expected"), [(0.0, "bsbsbs"), (LIMIT_S, "bbbs")])
def test_questions_when_reading_them_takes_long_then_what_is_written_goes_on_in_between(
    tiny, threads, monkeypatch, stall_s, expected
):
    monkeypatch.setattr(answer_thread, "STALL_S", stall_s)
    done, begun, all_there = [], threading.Event(), threading.Event()

    class Told(AnswerWriter):
        def begin(self, answer):
            done.append("b")
            super().begin(answer)

        def step(self):
            if self.busy:
                done.append("s")
                begun.set()
                assert all_there.wait(LIMIT_S)
            return super().step()

    thread = threads(lambda: Told(*tiny, fixed_batch=4))

    async def one_then_three():
        first = asyncio.ensure_future(ask(tiny, thread, prompt("What?", n=30)))
        await asyncio.to_thread(begun.wait, LIMIT_S)
        more = [asyncio.ensure_future(ask(tiny, thread, prompt(f"Which {i}?", n=30))) for i in range(3)]
        await asyncio.sleep(0)  # all three have asked
        all_there.set()
        return await asyncio.gather(first, *more)

    run(one_then_three())

    assert "".join(done)[: 2 + len(expected)] == "bs" + expected
