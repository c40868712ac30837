"""Answers written in a thread of their own, so that the replica goes on taking questions meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..models.prompts import VideoAnswer, VideoPrompt

if TYPE_CHECKING:
    from ..models.generation import AnswerWriter, PendingAnswer
    from ..models.processing import Prompt

logger = logging.getLogger(__name__)

STALL_S = 0.02  # of reading between two tokens of the others; a video that is still known takes 2 ms, a new one 50


@dataclass(eq=False)
class _Question:
    prompt: VideoPrompt
    built: Prompt
    listener: Callable[[str], None] | None
    future: Future[VideoAnswer] = field(default_factory=Future)
    given_up: bool = False
    answer: PendingAnswer | None = None  # once it is being written


class AnswerThread:
    """Takes questions from an event loop and writes as many answers at once as there is room for.

    A question joins those that are being answered between two of their tokens; it waits for nobody to end unless all
    rows are taken, and then in the order of asking.

    Args:
        make_writer: Makes an empty writer; called again after one failed, whose answers fail with it.
    """

    def __init__(self, make_writer: Callable[[], AnswerWriter]):
        self._make_writer = make_writer
        self._writer = make_writer()
        self._waiting: deque[_Question] = deque()
        self._begun: list[_Question] = []
        self._changed = threading.Condition()
        self._closed = False
        self.answered = 0
        self.steps = 0
        self.generated_tokens = 0
        self._thread = threading.Thread(target=self._run, name="write-answers", daemon=True)
        self._thread.start()

    async def answer(
        self, prompt: VideoPrompt, built: Prompt, listener: Callable[[str], None] | None = None
    ) -> VideoAnswer:
        """Return the answer; where the caller stops waiting, it is not written any further.

        Args:
            prompt: The question.
            built: What `check_prompt` made of it.
            listener: Called with each piece of the answer, in the thread.
        """
        question = _Question(prompt, built, listener)
        with self._changed:
            self._waiting.append(question)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(question.future)
        except asyncio.CancelledError:
            question.given_up = True
            raise

    def close(self) -> None:
        """End the thread after the token at hand; for tests, a replica ends with its process."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._begun or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
            self._drop_given_up()
            self._begin()
            self._step()

    def _drop_given_up(self) -> None:
        for question in [q for q in self._begun if q.given_up]:
            assert question.answer is not None
            self._writer.drop(question.answer)
            self._begun.remove(question)

    def _begin(self) -> None:
        """Begin questions that wait, as far as there is room, without letting what is being written stand still."""
        until_s = time.monotonic() + STALL_S
        while self._waiting and self._writer.has_room:
            question = self._waiting.popleft()
            if not question.future.set_running_or_notify_cancel():
                continue
            try:
                question.answer = self._writer.make(question.prompt, question.built, question.listener)
                self._writer.begin(question.answer)
            except Exception as error:  # noqa: BLE001 (it is the asker's; the others go on)
                question.future.set_exception(error)
                continue
            if question.answer.done:
                self._end(question)
            else:
                self._begun.append(question)
                if time.monotonic() >= until_s:
                    return  # the others wait for the next token

    def _step(self) -> None:
        try:
            ended = self._writer.step()
        except Exception as error:
            logger.exception("answers_failed n=%d", len(self._begun))
            for question in self._begun:
                question.future.set_exception(error)
            self._begun.clear()
            self._writer = self._make_writer()
            return
        self.steps += 1
        if ended:
            for question in [q for q in self._begun if q.answer in ended]:
                self._begun.remove(question)
                self._end(question)

    def _end(self, question: _Question) -> None:
        assert question.answer is not None
        answer = question.answer.answer()
        self.answered += 1
        self.generated_tokens += answer.generated_tokens
        question.future.set_result(answer)
