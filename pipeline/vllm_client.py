"""Have a vLLM server write the answers: prompts go to it as embeddings, video tokens in their places.

The server holds the checkpoint's language model and nothing of the vision side (`vllm serve LLM
--enable-prompt-embeds`); what it is sent is what our own language model would be given. After vLLM's own description of
its completions API: `prompt_embeds` is a tensor (n_tokens, d_model) as `torch.save` writes it, in base64.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ..models.prompts import VideoAnswer, VideoPrompt
from ..operators.errors import ServiceError
from .secret_references import resolve_secret

if TYPE_CHECKING:
    import aiohttp

    from ..models.loading import LoadedModel
    from ..models.processing import Prompt
    from .settings import VllmSettings

logger = logging.getLogger(__name__)

ERROR_CHARACTERS = 500  # of the server's own words, in ours
_REFUSED = (400, 413, 422)  # what is wrong is the prompt; with all others it is the server, or how it is asked
_FINISHED = ("stop", "length")


class _RefusedError(ValueError):
    """The server does not take this prompt, and never will."""


class VllmClient:
    """Answers prompts by a vLLM server; takes the place of `AnswerThread`.

    Args:
        loaded: The model, whose embeddings are used and whose language model the server has.
        vllm: Where the server is.
        timeout_s: Of one answer.
    """

    def __init__(self, loaded: LoadedModel, vllm: VllmSettings, timeout_s: float):
        self._loaded = loaded
        self._url = f"{vllm.url.rstrip('/')}/completions"
        self._model = vllm.model
        self._key = resolve_secret("llm.vllm.api_key", vllm.api_key) if vllm.api_key else None
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self.answered = 0
        self.generated_tokens = 0

    async def answer(
        self, prompt: VideoPrompt, built: Prompt, listener: Callable[[str], None] | None = None
    ) -> VideoAnswer:
        """Return the answer.

        Args:
            prompt: The question.
            built: What `check_prompt` made of it.
            listener: Called with each piece of the answer as it comes.

        Raises:
            ValueError: If the server refuses the prompt.
            ServiceError: If it cannot be reached, or fails, or leaves the answer unfinished.
        """
        import aiohttp

        request = self._request(prompt, built)
        pieces, finish_reason, n_generated = [], None, 0
        try:
            async for event in self._events(request):
                for choice in event.get("choices", ()):
                    if text := choice.get("text"):
                        pieces.append(text)
                        if listener is not None:
                            listener(text)
                    finish_reason = choice.get("finish_reason") or finish_reason
                n_generated = (event.get("usage") or {}).get("completion_tokens", n_generated)
        except _RefusedError:
            raise
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServiceError(
                f"the vLLM server at {self._url} does not answer as it should: {type(error).__name__} {error}. "
                "See that it runs, with --enable-prompt-embeds; llm.vllm.url is its address with /v1"
            ) from error
        if finish_reason not in _FINISHED:
            raise self._broke_off(f"finish_reason is {finish_reason!r}, expected one of {', '.join(_FINISHED)}")
        self.answered += 1
        self.generated_tokens += n_generated
        n_video = built.video_tokens.shape[0]
        return VideoAnswer("".join(pieces), built.n_tokens, n_video, n_generated, finish_reason)

    def _request(self, prompt: VideoPrompt, built: Prompt) -> dict[str, Any]:
        import torch

        model = self._loaded.model
        with torch.inference_mode():
            video = built.video_tokens.to(model.device, model.dtype) if len(built.video_tokens) else None
            embeds = model.embed_inputs(built.input_ids[None].to(model.device), video)[0]
        stored = io.BytesIO()
        torch.save(embeds.cpu().clone(), stored)
        return {
            "model": self._model,
            "prompt": "",
            "prompt_embeds": base64.b64encode(stored.getvalue()).decode(),
            "max_tokens": prompt.max_new_tokens,
            "temperature": prompt.temperature,
            "seed": prompt.seed,
            "stop": list(prompt.stop),
            "stop_token_ids": sorted({self._loaded.processor.eos_token_id, self._loaded.processor.end_of_answer_id}),
            "logit_bias": {str(model.config.video_token_id): -100},  # which no answer can mean
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _events(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with self._session.post(self._url, json=request, headers=headers) as response:
            if response.status != 200:
                said = (await response.text())[:ERROR_CHARACTERS]
                message = f"the vLLM server at {self._url} answers {response.status}: {said}"
                raise _RefusedError(message) if response.status in _REFUSED else ServiceError(message)
            done = False
            async for line in response.content:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    done = True
                elif data:
                    event = json.loads(data)
                    if not isinstance(event, dict) or "error" in event:
                        raise self._broke_off(data[:ERROR_CHARACTERS])
                    yield event
        if not done:
            raise self._broke_off("what it wrote ends without [DONE]")

    def _broke_off(self, why: str) -> ServiceError:
        return ServiceError(f"the vLLM server at {self._url} broke off: {why}. See its log")

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
