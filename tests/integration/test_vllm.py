"""Answers by a server that takes prompt embeddings, over HTTP.

vLLM itself needs a GPU. In its place stands a server of the same interface, after vLLM's description of it, that holds
the language model alone and generates with transformers: so what is tested is that the embeddings sent are a whole
prompt, and that requests, streams and errors are read as they are written there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json

import numpy as np
import pytest
import torch
from aiohttp import web
from pydantic import ValidationError

from stormline.models.generation import check_prompt, generate_answers
from stormline.models.loading import load_model
from stormline.models.prompts import VideoPrompt
from stormline.models.selection import VideoChunk
from stormline.operators.errors import ServiceError
from stormline.pipeline.settings import VllmSettings
from stormline.pipeline.vllm_client import VllmClient

KEY = "let-me-in"


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, device="cpu")


class Server:
    """A completions API over one language model."""

    def __init__(self, loaded):
        self._language_model = loaded.model.language_model
        self._tokenizer = loaded.processor.tokenizer
        self.got = []

    async def complete(self, request):
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        body = await request.json()
        self.got.append(body)
        if body["max_tokens"] > 1000:
            return web.json_response({"error": {"message": "max_tokens is too large: 2000"}}, status=400)
        if body["max_tokens"] == 999:
            return web.Response(status=500, text="engine dead")
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        with torch.inference_mode():
            ids = self._language_model.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, len(embeds)),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                eos_token_id=body["stop_token_ids"],
                suppress_tokens=[int(i) for i, bias in body["logit_bias"].items() if bias == -100],
                pad_token_id=0,
            )[0].tolist()
        ended = ids[-1] in body["stop_token_ids"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        told = ""
        for n in range(1, len(ids) + 1):
            text = self._tokenizer.decode(ids[:n], skip_special_tokens=True)
            reason = ("stop" if ended else "length") if n == len(ids) else None
            await self._send(response, {"choices": [{"text": text[len(told) :], "finish_reason": reason}]})
            told = text
        await self._send(response, {"choices": [], "usage": {"completion_tokens": len(ids)}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response, event):
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


def prompt(loaded, n_tokens=24):
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 16, loaded.model.config.d_model)).astype(np.float16)
    chunks = tuple(VideoChunk(2.0 * i, 2.0 * i + 2, tokens[i]) for i in range(4))
    return VideoPrompt("Describe what happens.", chunks, max_new_tokens=n_tokens)


def ask(loaded, server, prompts, listener=None, key="${env:TEST_VLLM_KEY}"):
    """Answer prompts by the server, or by nobody where it is None; returns answers and errors."""

    async def whole():
        app = web.Application(client_max_size=1 << 26)
        if server is not None:
            app.router.add_post("/v1/completions", server.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        if server is None:
            await runner.cleanup()
        client = VllmClient(loaded, VllmSettings(url=f"http://127.0.0.1:{port}/v1/", model="lm", api_key=key), 60.0)
        try:
            asked = [client.answer(p, check_prompt(loaded.model, loaded.processor, p), listener) for p in prompts]
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(whole())


def test_answers_when_a_server_writes_them_then_those_of_our_own_language_model(loaded, monkeypatch):
    monkeypatch.setenv("TEST_VLLM_KEY", KEY)
    asked = [prompt(loaded), prompt(loaded, 3)]
    server, heard = Server(loaded), []

    answers = ask(loaded, server, asked, heard.append)

    ours = generate_answers(loaded.model, loaded.processor, asked)
    assert [a.text for a in answers] == [a.text for a in ours]
    assert [a.finish_reason for a in answers] == [a.finish_reason for a in ours] == ["stop", "length"]
    assert [(a.prompt_tokens, a.video_tokens) for a in answers] == [(a.prompt_tokens, a.video_tokens) for a in ours]
    assert sorted("".join(heard)) == sorted("".join(a.text for a in ours))
    assert {body["model"] for body in server.got} == {"lm"}


def test_answers_when_the_server_refuses_or_fails_then_says_what_it_said(loaded, monkeypatch):
    monkeypatch.setenv("TEST_VLLM_KEY", KEY)
    refused, failed = ask(loaded, Server(loaded), [prompt(loaded, 2000), prompt(loaded, 999)])
    (away,) = ask(loaded, None, [prompt(loaded)])

    assert isinstance(refused, ValueError)
    assert "answers 400" in str(refused)
    assert "max_tokens is too large" in str(refused)
    assert isinstance(failed, ServiceError)
    assert "answers 500: engine dead" in str(failed)
    assert isinstance(away, ServiceError)
    assert "--enable-prompt-embeds" in str(away)


def test_settings_when_the_key_is_written_out_then_refused():
    with pytest.raises(ValidationError, match=r"expected \$\{env:NAME\}"):
        VllmSettings(url="http://gpu:8000/v1", model="lm", api_key="sk-123")
    with pytest.raises(ValidationError, match="url"):
        VllmSettings(url="gpu:8000", model="lm")
