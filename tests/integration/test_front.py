"""The service as clients see it: the official openai package against the real Serve application and a small model."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import ray
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError, StormlineError
from stormline.operators.rows import Chunk, LaneNews, Position, Result
from stormline.pipeline.cli import app
from stormline.pipeline.commands import ask as ask_command
from stormline.pipeline.front.address import check_port
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.ray_watch import SHORT_LIVES
from stormline.pipeline.recovery import recover
from stormline.pipeline.serving import LLM_APP, STORE_APP, StoreClient, describe_model
from stormline.pipeline.settings import ServeSettings

S_NS = 10**9
NOON_NS = 1_769_860_800 * S_NS  # 2026-01-31T12:00:00Z
N_COMMITTED, N_CHUNKS = 20, 30  # of two seconds and sixteen tokens; the newest are in memory alone
IDENTITY = {"model": "m"}


def make_chunk(index):
    tokens = np.random.default_rng(index).normal(size=(16, 192)).astype(np.float16)
    start_ns = NOON_NS + index * 2 * S_NS
    return Chunk("front gate", "s", index, start_ns, start_ns + 2 * S_NS, NOON_NS, 4, 0.5, "v", 0, index, 0, tokens)


def make_caption(index):
    start_ns = NOON_NS + index * 10 * S_NS
    return Result("caption", "caption", "front gate", "s", start_ns, start_ns + 10 * S_NS, "What?", f"caption {index}",
                  False, 16, "recent", 1.0, "m", start_ns)  # fmt: skip


@pytest.fixture(scope="module")
def stream(services):
    """Commit the older part of a stream to the folder and push the newer part to the store; return its name."""
    from ray import serve

    writer = EpochWriter(
        recover(services.out, lanes=1, identity=IDENTITY).for_lane(0, (("v", 0),)), model="m", identity=IDENTITY
    )
    chunks = [make_chunk(index) for index in range(N_CHUNKS)]
    captions = [make_caption(index) for index in range(4)]
    writer.commit(chunks=chunks[:12], results=captions[:2], positions=[Position("v", 0, 12)], snapshots={})
    writer.commit(chunks=chunks[12:20], results=captions[2:], positions=[Position("v", 0, 20)], snapshots={})
    StoreClient()(LaneNews(tuple(chunks[15:])))
    store = serve.get_deployment_handle("TokenStore", STORE_APP)
    deadline_s = time.monotonic() + 60
    while "front gate" not in store.streams.remote().result(timeout_s=30):
        assert time.monotonic() < deadline_s, "the chunks did not arrive in the store"
        time.sleep(0.1)
    return "front gate"


@pytest.fixture(scope="module")
def client(services):
    with openai.OpenAI(base_url=f"{services.url}/v1", api_key=services.key, max_retries=0, timeout=120) as made:
        yield made


def ask(client, url, text="Describe what happens.", **more):
    part = {"type": "video_url", "video_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
    return client.chat.completions.create(**({"model": "stormline", "messages": messages, "max_tokens": 12} | more))


def test_models_when_listed_then_the_one_that_runs(client, stream):
    name = describe_model().name

    assert [model.id for model in client.models.list()] == [name, "stormline"]
    assert client.models.retrieve(name).object == "model"


def test_answer_when_plain_or_streamed_then_the_same_text_usage_and_range(client, stream):
    url = "stream://front%20gate?last=60s"

    plain = ask(client, url)
    events = list(ask(client, url, stream=True, stream_options={"include_usage": True}))

    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == plain.choices[0].message.content != ""
    assert events[-1].usage == plain.usage
    assert 0 < plain.usage.completion_tokens <= 12
    assert plain.choices[0].finish_reason == events[-2].choices[0].finish_reason
    (use,) = plain.model_extra["stormline"]["video"]
    assert (use["start"], use["end"]) == ("2026-01-31T12:00:00.000Z", "2026-01-31T12:01:00.000Z")
    assert (use["tokens_in_range"], use["tokens_used"], use["token_policy"]) == (480, 64, "changes")
    assert len([event for event in events if event.choices and event.choices[0].delta.content]) > 1


def test_answer_when_many_ask_at_once_then_each_gets_what_it_gets_alone(client, stream):
    urls = [f"stream://front%20gate?last={4 * n}s" for n in range(1, 7)]
    alone = [ask(client, url).choices[0].message.content for url in urls]

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda url: ask(client, url).choices[0].message.content, urls))

    assert together == alone
    assert len(set(alone)) > 1


def test_answer_when_about_the_past_or_sampled_or_by_relevance_then_given(client, stream):
    past = ask(client, "stream://front%20gate?start=2026-01-31T12:00:10Z&end=2026-01-31T12:00:14Z")
    drawn = [ask(client, "stream://front%20gate", temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    relevant = ask(client, "stream://front%20gate", extra_body={"token_policy": "relevant"})

    (use,) = past.model_extra["stormline"]["video"]
    assert (use["first"], use["tokens_used"]) == ("2026-01-31T12:00:10.000Z", 32)
    texts = [answer.choices[0].message.content for answer in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert relevant.model_extra["stormline"]["video"][0]["tokens_used"] == 64


def test_stop_when_given_then_the_answer_ends_before_it(client, stream):
    free = ask(client, "stream://front%20gate").choices[0].message.content
    stop = free[len(free) // 2 :][:3]

    stopped = ask(client, "stream://front%20gate", stop=stop).choices[0]

    assert stopped.message.content == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"


def test_error_when_a_request_is_wrong_then_the_clients_own_class(client, services, stream):
    with pytest.raises(openai.BadRequestError, match="no video to look at") as raised:
        client.chat.completions.create(model="stormline", messages=[{"role": "user", "content": "What?"}])
    assert raised.value.code == "missing_video"
    with pytest.raises(openai.NotFoundError, match=r"no stream 'cellar' here; known are .+"):
        ask(client, "stream://cellar", stream=True)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        ask(client, "stream://front%20gate", model="gpt-9")
    with pytest.raises(openai.BadRequestError, match="expected 256 or fewer"):
        ask(client, "stream://front%20gate", max_tokens=10_000)
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        ask(client, "stream://front%20gate", text="x" * (1 << 20))
    assert large.value.status_code == 413


def test_answer_when_the_token_store_was_killed_then_parquet_answers(client, stream):
    from ray import serve

    url = "stream://front%20gate?start=2026-01-31T12:00:00Z&end=2026-01-31T12:00:40Z"
    before = ask(client, url).choices[0].message.content
    replicas = [a for a in ray.util.list_named_actors(all_namespaces=True) if "TokenStore" in a["name"]]
    for replica in replicas:
        ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]), no_restart=True)

    after = ask(client, url).choices[0].message.content

    assert len(replicas) == 1
    assert after == before
    assert serve.get_deployment_handle("TokenStore", STORE_APP).streams.remote().result(timeout_s=60) == {}


def test_ask_command_when_used_then_prints_the_answer_and_what_it_looked_at(client, services, stream):
    url = "stream://front%20gate?start=2026-01-31T12:00:00Z&end=2026-01-31T12:00:40Z"
    expected = ask(client, url).choices[0].message.content
    period = ["--start", "2026-01-31T12:00:00Z", "--end", "2026-01-31T12:00:40Z"]
    where = ["--url", services.url, "--max-tokens", "12"]

    asked = CliRunner().invoke(app, ["ask", stream, "Describe what happens.", *period, *where, "--key", services.key])
    no_key = CliRunner().invoke(app, ["ask", stream, "Describe what happens.", *where])

    assert asked.exit_code == 0, asked.exception
    assert asked.stdout == f"{expected}\n"
    assert "64 of 320 tokens, changes" in asked.stderr
    assert "STORMLINE_KEY" in str(no_key.exception)


def test_streams_and_captions_when_listed_then_times_and_committed_rows(client, stream):
    streams = client.get("/streams", cast_to=object)
    captions = client.get("/streams/front%20gate/captions?since=2026-01-31T12:00:10&limit=2", cast_to=object)

    (mine,) = [entry for entry in streams["data"] if entry["id"] == stream]
    assert (mine["first_time"], mine["chunks"]) == ("2026-01-31T12:00:00.000Z", N_COMMITTED)
    assert [row["answer"] for row in captions["data"]] == ["caption 2", "caption 3"]
    assert captions["has_more"] is True


@pytest.mark.parametrize("stream_answer", [True, False])
def test_answer_when_who_asked_leaves_then_it_is_not_written_to_its_end(client, services, stream, stream_answer):
    from ray import serve

    llm = serve.get_deployment_handle("VideoLLM", LLM_APP)
    url = "stream://front%20gate?last=60s"
    drawn = [{"temperature": 2.0, "seed": seed, "max_tokens": 256} for seed in range(40)]
    n_words, asked = max(
        ((ask(client, url, **each).usage.completion_tokens, each) for each in drawn), key=itemgetter(0)
    )
    assert n_words > 20

    def is_stopped():
        before = llm.stats.remote().result(timeout_s=30)
        with socket.create_connection((urlsplit(services.url).hostname, urlsplit(services.url).port)) as connection:
            connection.sendall(raw_request(url, services.key, stream=stream_answer, **asked))
            while llm.stats.remote().result(timeout_s=30)["prefixes_found"] == before["prefixes_found"]:
                pass  # not begun yet
        n_after = ask(client, url).usage.completion_tokens
        time.sleep(0.5)  # in which the other would have been written to its end
        after = llm.stats.remote().result(timeout_s=30)
        words = after["generated_tokens"] - before["generated_tokens"]
        return (after["answered"] - before["answered"], words) == (1, n_after)

    # Written in a tenth of a second: on a busy machine one may leave too late, but what nothing stops never is stopped.
    assert any(is_stopped() for _ in range(5))


def raw_request(url, key, **more):
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "Describe what happens."}]
    body = json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("began_again", [True, False])
def test_port_when_taken_then_a_command_that_began_again_waits_for_it_to_be_free(monkeypatch, began_again):
    if began_again:
        monkeypatch.setenv(SHORT_LIVES, "1")
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(1) as pool:
        serve = ServeSettings(enabled=True, port=taken.getsockname()[1])

        checked = pool.submit(check_port, serve)

        if not began_again:
            with pytest.raises(SettingsError, match="cannot listen at"):
                checked.result(10)
        assert checked.done() != began_again
        taken.close()
        assert not began_again or checked.result(10) is None


def test_ask_command_when_the_service_is_there_and_silent_then_not_told_to_start_one(monkeypatch):
    monkeypatch.setattr(ask_command, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        result = CliRunner().invoke(app, ["ask", "gate", "What?", "--url", url])

    assert isinstance(result.exception, StormlineError)
    assert not isinstance(result.exception, SettingsError)
    assert f"the service at {url} does not answer" in str(result.exception)
