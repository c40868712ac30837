"""The LLM deployment: answers prompts of text and video tokens, many callers' in one batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from ..models.prompts import VideoAnswer, VideoPrompt
from .settings import LlmSettings, ModelSettings

if TYPE_CHECKING:
    from ..models.processing import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelDescription:
    """What a lane and its checkpoints must know of the model, without holding it."""

    name: str
    fingerprint: str
    trained: bool
    frame_hw: tuple[int, int]
    chunk_frames: int


@dataclass(frozen=True)
class _Asked:
    """One prompt of a batch, and who hears its answer grow; called in the batch's thread."""

    prompt: VideoPrompt
    built: Prompt
    listener: Callable[[str], None] | None = None


@serve.deployment(name="VideoLLM", max_ongoing_requests=256)
class VideoLLM:
    """Hold the model; batch what is asked at about the same time.

    Greedy by default, and the same prompt gives the same text whichever prompts share its batch
    (see `models.generation.generate_answers` for how far that holds).
    """

    def __init__(self, model: ModelSettings, llm: LlmSettings):
        import torch

        from ..models.loading import load_model
        from ..models.prefix_cache import PrefixCache

        torch.set_num_threads(llm.num_threads)
        self._loaded = load_model(model.path, device=model.device, dtype=model.dtype)
        self._prefixes = PrefixCache(llm.prefix_cache_bytes)
        self._answered = 0
        self._batches = 0
        self._generated_tokens = 0
        self._answer_batch.set_max_batch_size(llm.max_batch_size)  # type: ignore[attr-defined]
        self._answer_batch.set_batch_wait_timeout_s(llm.batch_wait_ms / 1e3)  # type: ignore[attr-defined]

    async def answer(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the answer to one prompt.

        Raises:
            ValueError: If the prompt does not fit the model.
        """
        return await self._answer_batch(_Asked(prompt, self._build(prompt)))

    async def stream(self, prompt: VideoPrompt) -> AsyncIterator[str | VideoAnswer]:
        """Yield the answer's text piece by piece as it grows, and at last the whole answer.

        It shares its batch with whatever else is asked, streamed or not, and is the same text as `answer` gives.

        Raises:
            ValueError: If the prompt does not fit the model; before the first piece.
        """
        built = self._build(prompt)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def listener(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        answering = asyncio.ensure_future(self._answer_batch(_Asked(prompt, built, listener)))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        while (piece := await pieces.get()) is not None:
            yield piece
        yield await answering

    async def embed(self, text: str) -> np.ndarray:
        """Return a question's embedding (d_model,) float32, for the token policy `relevant`."""
        import torch

        ids = self._loaded.processor.tokenizer.encode(text, add_special_tokens=False)
        return self._loaded.model.embed_text(torch.tensor(ids, dtype=torch.long))

    def _build(self, prompt: VideoPrompt) -> Prompt:
        """Refuse what does not fit before it joins a batch, which would fail with it."""
        from ..models.generation import check_prompt

        return check_prompt(self._loaded.model, self._loaded.processor, prompt)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def _answer_batch(self, asked: Sequence[_Asked]) -> list[VideoAnswer]:
        from ..models.generation import generate_answers

        # In a thread, so that the replica goes on taking requests into the next batch.
        answers = await asyncio.to_thread(
            generate_answers,
            self._loaded.model,
            self._loaded.processor,
            [a.prompt for a in asked],
            built=[a.built for a in asked],
            listeners=[a.listener for a in asked],
            prefixes=self._prefixes,
        )
        self._answered += len(answers)
        self._batches += 1
        self._generated_tokens += sum(a.generated_tokens for a in answers)
        return answers

    async def describe(self) -> ModelDescription:
        """Return what the model is."""
        loaded, config = self._loaded, self._loaded.model.config
        frame_hw = (config.image_size, config.image_size)
        return ModelDescription(loaded.name, loaded.fingerprint, loaded.trained, frame_hw, config.chunk_frames)

    async def stats(self) -> dict[str, Any]:
        """Return what was answered since the replica started."""
        return {
            "answered": self._answered,
            "batches": self._batches,
            "generated_tokens": self._generated_tokens,
            "prefixes_read": self._prefixes.misses,
            "prefixes_found": self._prefixes.hits,
        }
