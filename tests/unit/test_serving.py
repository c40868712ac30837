"""What lanes reach the services through, without them."""

import asyncio
import pickle

import pytest
from ray.serve.exceptions import RayServeException

from stormline.operators.errors import PromptError, ServiceError
from stormline.pipeline import serving
from stormline.pipeline.serving import ATTEMPTS, CONNECT_WITHIN_S, LlmClient, StartingServices, StoreClient
from stormline.pipeline.settings import load_settings


class Handle:
    """A deployment's handle, of which each method notes what it is called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.name = name
        return self

    def remote(self, *args):
        self.calls.append((self.name, *args))


class SilentResponse:
    """An answer that never comes."""

    def __init__(self):
        self.waited_for, self.cancelled = asyncio.Event(), False

    def __await__(self):
        self.waited_for.set()
        return asyncio.get_running_loop().create_future().__await__()

    def cancel(self):
        self.cancelled = True


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self):
        self.now_s = 0.0

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(serving, "time", made)
    return made


@pytest.fixture
def late(monkeypatch):
    """Return a handle that is there at the third attempt: before, Serve does not run, then it lacks the deployment."""
    handle = Handle()
    answers = [RayServeException("no Serve"), KeyError("no deployment"), handle]

    def get(name, app):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(serving.serve, "get_deployment_handle", get)
    return handle


def test_store_client_when_the_store_comes_up_later_then_the_news_reach_it(late):
    client = StoreClient()

    client("news")
    client("more")

    assert late.calls == [("push", "news"), ("push", "more")]
    assert pickle.loads(pickle.dumps(client))._handle is None


def test_llm_client_when_the_llm_comes_up_later_then_asked_at_the_first_attempt(late):
    async def answer(prompt):
        return f"about {prompt}"

    late.remote = answer

    assert asyncio.run(LlmClient(timeout_s=5.0)("video")) == "about video"


def test_llm_client_when_a_question_does_not_fit_the_model_then_said_at_once(late):
    calls = []

    async def answer(prompt):
        calls.append(prompt)
        raise ValueError("the prompt has 10809 tokens")

    late.remote = answer

    with pytest.raises(PromptError, match="10809 tokens"):
        asyncio.run(LlmClient(timeout_s=5.0)("video"))
    assert calls == ["video"]


def test_llm_client_when_many_are_asked_at_once_then_only_so_many_are_under_way(late):
    under_way, most = [], []

    async def answer(prompt):
        under_way.append(prompt)
        most.append(len(under_way))
        for _ in range(5):
            await asyncio.sleep(0)
        under_way.remove(prompt)
        return prompt

    async def ask_all():
        client = LlmClient(timeout_s=5.0, at_once=2)
        return await asyncio.gather(*(client(i) for i in range(8)))

    late.remote = answer

    assert asyncio.run(ask_all()) == list(range(8))
    assert max(most) == 2


def test_llm_client_when_an_answer_takes_too_long_then_it_is_not_written_on(late, monkeypatch):
    monkeypatch.setattr(serving, "RETRY_WAIT_S", 0.0)
    responses = []
    late.remote = lambda prompt: responses.append(SilentResponse()) or responses[-1]

    with pytest.raises(ServiceError, match="gave no answer"):
        asyncio.run(LlmClient(timeout_s=0.01)("video"))

    assert [response.cancelled for response in responses] == [True] * ATTEMPTS


def test_llm_client_when_its_caller_leaves_then_the_answer_is_not_written_on(late):
    async def leave():
        response = SilentResponse()
        late.remote = lambda prompt: response
        asking = asyncio.create_task(LlmClient(timeout_s=60.0)("video"))
        await response.waited_for.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        return response.cancelled

    assert asyncio.run(leave())


def test_store_client_when_the_store_never_comes_then_says_so(monkeypatch, clock):
    def get(name, app):
        raise RayServeException("no Serve")

    monkeypatch.setattr(serving.serve, "get_deployment_handle", get)

    with pytest.raises(RayServeException, match="no Serve"):
        StoreClient()("news")
    assert clock.now_s == pytest.approx(CONNECT_WITHIN_S, abs=1.0)


def test_starting_services_when_they_cannot_start_then_raised_where_they_are_waited_for(monkeypatch):
    def deploy(settings):
        raise RuntimeError("no room")

    taken_down = []
    monkeypatch.setattr(serving, "_running_apps", set)
    monkeypatch.setattr(serving, "_deploy", deploy)
    monkeypatch.setattr(serving, "end_apps", taken_down.append)

    starting = StartingServices(load_settings(None, []))

    with pytest.raises(RuntimeError, match="no room"):
        starting.wait()
    with pytest.raises(RuntimeError, match="no room"):
        starting.ready()
    starting.take_down()
    assert taken_down == [set(serving.APPS)]
