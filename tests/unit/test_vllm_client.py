import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import torch

from stormline.models.prompts import VideoPrompt
from stormline.operators.errors import ServiceError
from stormline.pipeline.settings import VllmSettings
from stormline.pipeline.vllm_client import VllmClient

PIECE = b'data: {"choices": [{"text": "a van", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Session:
    """A server's one answer, without a server."""

    def __init__(self, status, body):
        self._status, self._body = status, body

    @asynccontextmanager
    async def post(self, url, **request):
        yield SimpleNamespace(status=self._status, text=self._text, content=self._lines())

    async def _text(self):
        return self._body.decode()

    async def _lines(self):
        for line in self._body.splitlines(keepends=True):
            yield line


class Client(VllmClient):
    def __init__(self, status, body):
        super().__init__(SimpleNamespace(), VllmSettings(url="http://gpu:8000/v1", model="lm"), 60.0)
        self._session = Session(status, body)

    def _request(self, prompt, built):
        return {}


def answer(status, body):
    built = SimpleNamespace(n_tokens=3, video_tokens=torch.zeros(2, 4))
    return asyncio.run(Client(status, body).answer(VideoPrompt("What?"), built))


def test_answer_when_the_server_writes_it_to_its_end_then_whole():
    written = answer(200, PIECE + LAST + b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n' + DONE)

    assert (written.text, written.generated_tokens, written.finish_reason) == ("a van", 2, "stop")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_answer_when_the_prompt_is_what_is_wrong_then_never_asked_again(status):
    with pytest.raises(ValueError, match=f"answers {status}: too long"):
        answer(status, b"too long")


@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 500, 503])
def test_answer_when_the_server_or_its_settings_are_what_is_wrong_then_it_may_be_asked_again(status):
    with pytest.raises(ServiceError, match=f"answers {status}: not now"):
        answer(status, b"not now")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>gateway</html>\n", "does not answer as it should"),
        (b"\xff\n", "does not answer as it should"),
        (b"[1]\n", "broke off"),
        (b"", r"ends without \[DONE\]"),
        (PIECE, r"ends without \[DONE\]"),
        (PIECE + LAST, r"ends without \[DONE\]"),
        (PIECE + DONE, "finish_reason is None"),
        (PIECE + LAST.replace(b"stop", b"abort") + DONE, "finish_reason is 'abort'"),
        (PIECE + b'data: {"error": {"message": "engine dead"}}\n\n' + DONE, "broke off: .*engine dead"),
    ],
)
def test_answer_when_it_breaks_off_or_is_none_then_no_part_of_it_goes_for_the_whole(body, said):
    with pytest.raises(ServiceError, match=said):
        answer(200, body)
