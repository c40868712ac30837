"""The LLM deployment: answers prompts of text and video tokens, many callers' in one batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve

from ..models.prompts import VideoAnswer, VideoPrompt
from .settings import LlmSettings, ModelSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelDescription:
    """What a lane and its checkpoints must know of the model, without holding it."""

    name: str
    fingerprint: str
    trained: bool
    frame_hw: tuple[int, int]
    chunk_frames: int


@serve.deployment(name="VideoLLM", max_ongoing_requests=256)
class VideoLLM:
    """Hold the model; batch what is asked at about the same time.

    Greedy by default, and the same prompt gives the same text whichever prompts share its batch
    (see `models.generation.generate_answers` for how far that holds).
    """

    def __init__(self, model: ModelSettings, llm: LlmSettings):
        import torch

        from ..models.loading import load_model

        torch.set_num_threads(llm.num_threads)
        self._loaded = load_model(model.path, device=model.device, dtype=model.dtype)
        self._answered = 0
        self._batches = 0
        self._generated_tokens = 0
        self._answer_batch.set_max_batch_size(llm.max_batch_size)  # type: ignore[attr-defined]
        self._answer_batch.set_batch_wait_timeout_s(llm.batch_wait_ms / 1e3)  # type: ignore[attr-defined]

    async def answer(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the answer to one prompt."""
        return await self._answer_batch(prompt)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def _answer_batch(self, prompts: Sequence[VideoPrompt]) -> list[VideoAnswer]:
        import asyncio

        from ..models.generation import generate_answers

        # In a thread, so that the replica goes on taking requests into the next batch.
        answers = await asyncio.to_thread(generate_answers, self._loaded.model, self._loaded.processor, list(prompts))
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
        }
