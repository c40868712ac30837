"""Questions of an archive are asked in batches: nobody waits for an answer, and eight cost little more than one."""

from __future__ import annotations

import asyncio

from ...models.prompts import VideoAnswer, VideoPrompt
from ...operators.annotate import Ask, TimedAsk


class AskTogether(TimedAsk):
    """Hold questions back until there are enough to be answered together, or the first has waited long enough.

    Each is asked by itself, and has the answer that it would have had alone. The time that questions are held back does
    not count as asking. For one event loop.

    Args:
        ask: Asks one question.
        n_together: So many go at once.
        wait_s: The longest that one is held back.
    """

    def __init__(self, ask: Ask, n_together: int, wait_s: float):
        super().__init__(ask)
        self._n_together, self._wait_s = n_together, wait_s
        self._n_held = 0
        self._go: asyncio.Event | None = None  # of those that are held now

    async def __call__(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the answer."""
        if self._go is None:
            self._go = asyncio.Event()
            asyncio.get_running_loop().call_later(self._wait_s, self._let_go, self._go)
        go = self._go
        self._n_held += 1
        if self._n_held >= self._n_together:
            self._let_go(go)
        await go.wait()
        return await super().__call__(prompt)

    def _let_go(self, go: asyncio.Event) -> None:
        go.set()
        if go is self._go:
            self._go, self._n_held = None, 0
