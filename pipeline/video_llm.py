"""The LLM deployment: answers prompts of text and video tokens, those of many callers at once."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from ..models.prompts import VideoAnswer, VideoPrompt
from .answer_thread import AnswerThread
from .settings import LlmSettings, ModelSettings
from .vllm_client import VllmClient

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from ..models.processing import Prompt

logger = logging.getLogger(__name__)


SWITCH_S = 5e-4  # between Python's threads: at the usual 5 ms a finished piece waits longer than the next one takes


@dataclass(frozen=True)
class ModelDescription:
    """What a lane and its checkpoints must know of the model, without holding it."""

    name: str
    fingerprint: str
    trained: bool
    frame_hw: tuple[int, int]
    chunk_frames: int


def describe(loaded: LoadedModel) -> ModelDescription:
    """Return what a model is."""
    config = loaded.model.config
    frame_hw = (config.image_size, config.image_size)
    return ModelDescription(loaded.name, loaded.fingerprint, loaded.trained, frame_hw, config.chunk_frames)


@serve.deployment(name="VideoLLM", max_ongoing_requests=256)
class VideoLLM:
    """Hold the model; answer what is asked at the same time together.

    Greedy by default, and the same prompt gives the same text whichever others are answered with it
    (see `models.generation.generate_answers` for how far that holds).
    """

    def __init__(self, model: ModelSettings, llm: LlmSettings):
        import torch

        from ..models.generation import AnswerWriter, rows_together
        from ..models.loading import load_model
        from ..models.prefix_cache import PrefixCache

        torch.set_num_threads(llm.num_threads)
        sys.setswitchinterval(SWITCH_S)
        self._loaded = loaded = load_model(model.path, device=model.device, dtype=model.dtype)
        self._prefixes = prefixes = PrefixCache(llm.prefix_cache_bytes)
        rows = llm.max_batch_size if rows_together(loaded.model) > 1 else 1
        self._writing: AnswerThread | VllmClient
        if llm.vllm is not None:
            self._writing = VllmClient(loaded, llm.vllm, llm.timeout_s)
        else:
            self._writing = AnswerThread(
                lambda: AnswerWriter(loaded.model, loaded.processor, fixed_batch=rows, prefixes=prefixes)
            )

    async def answer(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the answer to one prompt.

        Raises:
            ValueError: If the prompt does not fit the model.
        """
        return await self._writing.answer(prompt, self._build(prompt))

    async def stream(self, prompt: VideoPrompt) -> AsyncIterator[str | VideoAnswer]:
        """Yield the answer's text piece by piece as it grows, and at last the whole answer.

        It is the same text as `answer` gives.

        Raises:
            ValueError: If the prompt does not fit the model; before the first piece.
        """
        built = self._build(prompt)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def listener(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        answering = asyncio.ensure_future(self._writing.answer(prompt, built, listener))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await answering
        finally:
            answering.cancel()  # where the one who asked has left

    async def embed(self, text: str) -> np.ndarray:
        """Return a question's embedding (d_model,) float32, for the token policy `relevant`."""
        import torch

        ids = self._loaded.processor.tokenizer.encode(text, add_special_tokens=False)
        return self._loaded.model.embed_text(torch.tensor(ids, dtype=torch.long))

    def _build(self, prompt: VideoPrompt) -> Prompt:
        """Return the prompt as tokens, or refuse what does not fit."""
        from ..models.generation import check_prompt

        return check_prompt(self._loaded.model, self._loaded.processor, prompt)

    async def describe(self) -> ModelDescription:
        """Return what the model is."""
        return describe(self._loaded)

    async def stats(self) -> dict[str, Any]:
        """Return what was answered since the replica started."""
        return {
            "answered": self._writing.answered,
            "generated_tokens": self._writing.generated_tokens,
            "prefixes_read": self._prefixes.misses,
            "prefixes_found": self._prefixes.hits,
        }
