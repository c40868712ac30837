"""The HTTP interface over a fake model: OpenAI's forms, errors, keys and limits."""

import asyncio
import json
import logging

import numpy as np
import pytest
from starlette.testclient import TestClient

from stormline.models.prompts import ChatTemplateError, VideoAnswer
from stormline.operators.errors import SettingsError
from stormline.operators.rows import Chunk
from stormline.pipeline.durations import format_moment, parse_duration_s
from stormline.pipeline.front import answering
from stormline.pipeline.front import app as app_module
from stormline.pipeline.front.access import Admission, check_host, hash_key, new_key
from stormline.pipeline.front.answering import Answerer
from stormline.pipeline.front.api_errors import ApiError
from stormline.pipeline.front.app import Backend, build_app
from stormline.pipeline.front.stream_urls import StreamRange, make_stream_url, parse_stream_url
from stormline.pipeline.settings import ServeSettings, load_settings, masked
from stormline.pipeline.stream_activity import StreamRegister
from stormline.pipeline.token_files import TokenFiles
from stormline.pipeline.token_source import TokenSource
from stormline.pipeline.token_store import TokenMemory
from stormline.pipeline.video_llm import ModelDescription

S_NS = 10**9
NOON_NS = 1_769_860_800 * S_NS  # 2026-01-31T12:00:00Z
URL = "stream://gate?last=20s"
HOST = {"base_url": "http://localhost"}


class MemoryStore:
    """The token store without Ray: sixty chunks of two seconds and four tokens for each stream."""

    def __init__(self, streams=("gate", "yard")):
        self.memory = TokenMemory(10**9)
        self.register = StreamRegister()
        for stream in streams:
            for index in range(60):
                start_ns = NOON_NS + index * 2 * S_NS
                tokens = np.full((4, 3), index, np.float16)
                self.memory.put(Chunk(stream, "s", index, start_ns, start_ns + 2 * S_NS, 0, 4, 0, "v", 0, 0, 0, tokens))

    async def held(self, stream_id):
        return self.memory.held(stream_id)

    async def pick(self, stream_id, starts_ns):
        return self.memory.pick(stream_id, starts_ns)

    async def streams(self):
        return self.memory.streams()

    async def activity(self):
        return self.register.activity()

    async def picture(self, stream_id):
        return self.register.picture(stream_id)


class EchoLlm:
    """Answers with the question, word by word; fails so many times first."""

    def __init__(self, failures=0, error=ConnectionError, after=0):
        self.prompts = []
        self._failures, self._error, self._after = failures, error, after

    async def describe(self):
        return ModelDescription("echo", "f", True, (64, 64), 4)

    async def embed(self, text):
        return np.ones(3, np.float32)

    async def answer(self, prompt):
        *_, whole = [piece async for piece in self.stream(prompt)]
        return whole

    async def stream(self, prompt):
        self.prompts.append(prompt)
        words = [f"{word} " for word in prompt.text.split()]
        for i, word in enumerate(words):
            if self._failures and i >= self._after:
                self._failures -= 1
                raise self._error("secret words")
            yield word
        video = sum(chunk.n_tokens for chunk in prompt.chunks)
        yield VideoAnswer("".join(words), 10 + video, video, len(words), "stop")


def serve_settings(**changes):
    return ServeSettings.model_validate({"token_budget": 64, **changes})


def make_client(tmp_path, llm=None, headers=None, **changes):
    limits = serve_settings(**changes)
    source = TokenSource(TokenFiles(tmp_path), MemoryStore())
    app = build_app(Backend(Answerer(source, llm or EchoLlm(), limits, retry_wait_s=0), source, tmp_path, limits))
    return TestClient(app, **HOST, headers=headers or {})


def ask(text="What happens at the gate?", *urls, **more):
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls or (URL,)]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "stormline", "messages": [{"role": "user", "content": content}], **more}


def post(client, body):
    return client.post("/v1/chat/completions", json=body)


def error_of(response):
    return response.status_code, response.json()["error"]["code"]


# Addresses and lengths of time.


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("stream://cam-1?last=600s", StreamRange("cam-1", last_s=600)),
        ("stream://Cam%201%2Fa?last=1.5h", StreamRange("Cam 1/a", last_s=5400)),
        ("stream://cam-1", StreamRange("cam-1", last_s=600)),
        ("stream://c?start=2026-01-31T12:00:00Z", StreamRange("c", start_ns=NOON_NS)),
        (
            "stream://c?start=2026-01-31T13:00:00+01:00&end=2026-01-31T12:00:01.5",
            StreamRange("c", start_ns=NOON_NS, end_ns=NOON_NS + 3 * S_NS // 2),
        ),
    ],
)
def test_stream_url_when_right_then_read(url, expected):
    assert parse_stream_url(url) == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.com/a.mp4", "expected stream://"),
        ("stream://?last=1s", "expected stream://"),
        ("stream://c?last=soon", "no length of time"),
        ("stream://c?last=", "no length of time"),
        ("stream://c?last=0", "more than 0"),
        ("stream://c?start=noon", "no time"),
        ("stream://c?start=9999-12-31T23:59:59-23:59", "a year from 1700 to 2199"),
        ("stream://c?end=2026-01-31", "expected last alone, or start"),
        ("stream://c?last=1s&start=2026-01-31", "expected last alone"),
        ("stream://c?start=2026-01-31&end=2026-01-30", "not after the start"),
        ("stream://c?lats=1s", "lats"),
        ("stream://c?last=1s&last=2s", "each once"),
    ],
)
def test_stream_url_when_wrong_then_the_message_says_what_was_expected(url, said):
    with pytest.raises(ValueError, match=said):
        parse_stream_url(url)


def test_stream_url_when_made_then_read_back():
    url = make_stream_url("cam 1/ä?&", start="2026-01-31T13:00:00+01:00", last=None)

    assert parse_stream_url(url) == StreamRange("cam 1/ä?&", start_ns=NOON_NS)


def test_duration_when_written_in_any_unit_then_seconds():
    assert [parse_duration_s(text) for text in ("90", "30s", "10m", "1.5h", "2d")] == [90, 30, 600, 5400, 172_800]
    assert format_moment(NOON_NS + 1_999_999) == "2026-01-31T12:00:00.001Z"


# Answers.


def test_chat_when_asked_then_the_answer_its_usage_and_what_it_looked_at(tmp_path):
    llm = EchoLlm()

    answer = post(make_client(tmp_path, llm), ask(max_tokens=9, temperature=0.5, seed=3, stop="x")).json()

    assert answer["object"] == "chat.completion"
    assert answer["model"] == "echo"
    assert answer["choices"][0]["message"]["content"] == "What happens at the gate? "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 50 + 5
    (use,) = answer["stormline"]["video"]
    assert (use["start"], use["end"]) == ("2026-01-31T12:01:40.000Z", "2026-01-31T12:02:00.000Z")
    assert (use["tokens_used"], use["tokens_in_range"], use["token_policy"]) == (40, 40, "recent")
    (prompt,) = llm.prompts
    assert (prompt.max_new_tokens, prompt.temperature, prompt.seed, prompt.stop) == (9, 0.5, 3, ("x",))
    assert [chunk.start_s for chunk in prompt.chunks] == list(range(0, 20, 2))


def test_chat_when_streamed_then_the_pieces_the_end_and_the_usage(tmp_path):
    response = post(make_client(tmp_path), ask(stream=True, stream_options={"include_usage": True}))

    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    *events, end, usage = map(json.loads, lines[:-1])
    assert lines[-1] == "[DONE]"
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "What happens at the gate? "
    assert end["choices"][0]["finish_reason"] == "stop"
    assert end["stormline"]["video"][0]["stream"] == "gate"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)


@pytest.mark.parametrize(
    "absent", [{"stream": None}, {"stream_options": None}, {"stream_options": {"include_usage": None}}]
)
def test_chat_when_what_may_be_null_is_null_then_as_if_it_were_not_there(tmp_path, absent):
    answer = post(make_client(tmp_path), ask(**absent)).json()
    streamed = post(make_client(tmp_path), ask(**{**absent, "stream": True})).text

    assert answer["object"] == "chat.completion"
    assert '"usage"' not in streamed
    assert streamed.endswith("data: [DONE]\n\n")


def test_chat_when_the_range_is_long_then_auto_chooses_and_the_budget_holds(tmp_path):
    llm = EchoLlm()
    client = make_client(tmp_path, llm)

    auto = post(client, ask("Why?", "stream://gate?last=2m")).json()["stormline"]["video"][0]
    policies = [
        post(client, ask("Why?", "stream://gate?last=2m", token_policy=policy, token_budget=20))
        for policy in ("recent", "uniform", "relevant", "global_local")
    ]

    assert (auto["token_policy"], auto["tokens_in_range"], auto["tokens_used"]) == ("changes", 240, 64)
    assert [p.json()["stormline"]["video"][0]["tokens_used"] for p in policies] == [20, 20, 20, 20]
    assert llm.prompts[1].chunks[0].start_s == 110


def test_chat_when_about_two_streams_then_the_budget_is_shared_and_both_are_named(tmp_path):
    llm = EchoLlm()

    yard = "stream://yard?start=2026-01-31T12:00&end=2026-01-31T12:02"
    answer = post(make_client(tmp_path, llm), ask("Which?", URL, yard))

    uses = answer.json()["stormline"]["video"]
    assert [use["stream"] for use in uses] == ["gate", "yard"]
    assert [use["tokens_used"] for use in uses] == [32, 32]
    assert llm.prompts[0].chunks[0].start_s == 100  # on the clock of the earlier range


def test_chat_when_the_same_range_is_asked_about_again_then_its_tokens_are_selected_once(tmp_path, monkeypatch):
    llm, selected = EchoLlm(), []
    select = answering.select_chunks
    monkeypatch.setattr(
        answering, "select_chunks", lambda *args, **more: selected.append(args[2]) or select(*args, **more)
    )
    client = make_client(tmp_path, llm)
    url, shorter = "stream://gate?last=2m", "stream://gate?last=100s"

    for text, where, policy in [("a", url, "auto"), ("b", url, "auto"), ("c", shorter, "auto"), ("d", url, "uniform"),
                                ("e", url, "relevant"), ("f", url, "relevant")]:  # fmt: skip
        assert post(client, ask(text, where, token_policy=policy)).status_code == 200

    assert selected == ["changes", "changes", "uniform", "relevant", "relevant"]
    a, b, c = ([(k.start_s, k.tokens.tolist()) for k in prompt.chunks] for prompt in llm.prompts[:3])
    assert a == b != c


def test_chat_when_it_goes_on_then_the_video_of_an_earlier_turn_is_seen_and_the_turns_are_history(tmp_path):
    llm = EchoLlm()
    first = ask("What?")["messages"]
    turns = [
        {"role": "developer", "content": "Be brief."},
        *first,
        {"role": "assistant", "content": "A car."},
        {"role": "user", "content": "Which colour?"},
    ]

    post(make_client(tmp_path, llm), {"messages": turns})

    (prompt,) = llm.prompts
    assert prompt.text == "Which colour?"
    assert prompt.history == (("system", "Be brief."), ("user", "What?"), ("assistant", "A car."))
    assert len(prompt.chunks) == 10


# Errors.


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": [{"role": "user", "content": "What?"}]}, 400, "missing_video"),
        ({"messages": []}, 400, "invalid_value"),
        ([], 400, "invalid_value"),
        (ask(temperature=3), 400, "invalid_value"),
        (ask(max_tokens=0), 400, "invalid_value"),
        (ask(max_tokens=10**6), 400, "invalid_value"),
        (ask(n=2), 400, "unsupported_parameter"),
        (ask(tools=[{}]), 400, "unsupported_parameter"),
        (ask(stop=["a", ""]), 400, "invalid_value"),
        (ask(seed=2**63), 400, "invalid_value"),
        (ask(token_policy="best"), 400, "invalid_value"),
        (ask(token_budget=65), 400, "invalid_value"),
        (ask("What?", "https://x/a.mp4"), 400, "invalid_stream_url"),
        (ask("What?", "stream://gate?last=8d"), 400, "range_too_long"),
        (ask("What?", "stream://gate?start=2000-01-01"), 400, "range_too_long"),
        (ask("What?", "stream://gate?start=2026-01-31&end=2026-01-31T01:00"), 400, "no_video_in_range"),
        (ask("What?", "stream://cellar?last=10s"), 404, "stream_not_found"),
        (ask("What?", "stream://cellar?start=2026-01-31&end=2026-01-31T01:00"), 404, "stream_not_found"),
        (ask("What?", *(f"stream://gate?last={i}s" for i in range(1, 10))), 400, "invalid_value"),
        (ask(""), 400, "invalid_value"),
        (ask("word " * 4000), 400, "context_length_exceeded"),
        (ask() | {"model": "gpt-9"}, 404, "model_not_found"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_chat_when_the_request_is_wrong_then_an_error_in_openais_form(tmp_path, body, status, code, streamed):
    if streamed and isinstance(body, dict):
        body = body | {"stream": True}

    assert error_of(post(make_client(tmp_path), body)) == (status, code)


def test_chat_when_the_body_is_no_json_then_said_so(tmp_path):
    client = make_client(tmp_path)
    as_json = {"content-type": "application/json"}

    assert error_of(client.post("/v1/chat/completions", content=b"{", headers=as_json)) == (400, "invalid_json")
    half = json.dumps(ask("\ud800")).encode()
    assert error_of(client.post("/v1/chat/completions", content=half, headers=as_json)) == (400, "invalid_json")
    assert error_of(client.post("/v1/chat/completions", content=b"{}")) == (415, "unsupported_media_type")
    assert error_of(client.get("/v1/cats")) == (404, "not_found")
    assert error_of(client.get("/v1/chat/completions")) == (405, "not_found")


def test_chat_when_a_replica_dies_before_a_word_then_it_is_asked_again(tmp_path):
    assert post(make_client(tmp_path, EchoLlm(failures=2)), ask()).status_code == 200

    gone = post(make_client(tmp_path, EchoLlm(failures=3)), ask())

    assert error_of(gone) == (503, "model_unavailable")
    assert int(gone.headers["retry-after"]) > 0


def test_chat_when_a_replica_dies_amid_an_answer_then_the_stream_ends_with_an_error(tmp_path):
    response = post(make_client(tmp_path, EchoLlm(failures=1, after=2)), ask(stream=True))

    lines = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    assert lines[-1]["error"]["code"] == "model_unavailable"
    assert "[DONE]" not in response.text


def test_chat_when_the_prompt_does_not_fit_the_model_then_its_words_are_passed_on(tmp_path):
    response = post(make_client(tmp_path, EchoLlm(failures=1, error=ValueError)), ask())

    assert error_of(response) == (400, "context_length_exceeded")


def test_chat_when_the_model_refuses_the_turns_then_the_request_is_said_to_be_wrong(tmp_path):
    response = post(make_client(tmp_path, EchoLlm(failures=1, error=ChatTemplateError)), ask())

    assert error_of(response) == (400, "invalid_value")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("hangs", [False, True])
def test_chat_when_a_question_cannot_be_embedded_then_the_model_is_said_to_be_away(tmp_path, hangs):
    class Broken(EchoLlm):
        async def embed(self, text):
            if hangs:
                await asyncio.Event().wait()
            raise ConnectionError

    client = make_client(tmp_path, Broken(), timeout_s=0.05)
    response = post(client, ask("What?", "stream://gate?last=2m", token_policy="relevant"))

    assert error_of(response) == (503, "model_unavailable")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0"),
        ({"content": [{"type": "video_url", "video_url": "stream://gate"}]}, "messages.0.content.0.video_url"),
        ({"content": [{"type": "text", "text": "?"}, {"type": "text"}]}, "messages.0.content.1.text"),
        ({"content": [{"text": "?"}]}, "messages.0.content.0"),
        ({"content": 5}, "messages.0.content"),
    ],
)
def test_chat_when_a_part_is_wrong_then_the_error_names_it(tmp_path, changes, param):
    response = post(make_client(tmp_path), {"messages": [{"role": "user", **changes}]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_chat_when_an_earlier_answer_has_no_text_then_it_is_taken_as_empty(tmp_path):
    llm, turns = EchoLlm(), [{"role": "assistant", "content": None}]

    post(make_client(tmp_path, llm), {"messages": [*turns, *ask("What?")["messages"]]})

    assert llm.prompts[0].history == (("assistant", ""),)


def test_chat_when_something_breaks_then_nothing_of_the_request_is_logged(tmp_path, caplog, monkeypatch):
    def broken(*args, **more):
        raise RuntimeError("cannot select for xyzzy")

    monkeypatch.setattr("stormline.pipeline.front.answering.select_chunks", broken)
    caplog.set_level(logging.DEBUG)

    response = post(make_client(tmp_path), ask("xyzzy", "stream://gate?last=2m", token_policy="relevant"))
    monkeypatch.undo()
    post(make_client(tmp_path, EchoLlm(failures=3)), ask("xyzzy"))

    assert error_of(response) == (500, "internal_error")
    assert "request_failed" in caplog.text
    assert "answer_failed" in caplog.text
    assert "xyzzy" not in caplog.text


# Access and limits.


def test_keys_when_set_then_only_a_known_one_gets_in(tmp_path):
    key, digest = new_key()
    asked = {"keys": [hash_key("other"), digest]}

    assert (
        make_client(tmp_path, headers={"Authorization": f"Bearer {key}"}, **asked).get("/v1/models").status_code == 200
    )
    for headers in ({}, {"Authorization": key}, {"Authorization": f"Bearer {digest}"}, {"Authorization": "Bearer "}):
        response = make_client(tmp_path, headers=headers, **asked).get("/v1/streams")
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"


def test_host_when_there_are_no_keys_then_only_this_machines_names_are_answered(tmp_path):
    assert error_of(make_client(tmp_path, headers={"Host": "evil.example"}).get("/v1/streams")) == (403, "unknown_host")
    for name in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        check_host(name)
    with pytest.raises(ApiError):
        check_host(None)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "gate.example"])
def test_settings_when_others_can_reach_it_then_a_key_is_demanded(host):
    with pytest.raises(SettingsError, match=r"no keys; expected serve\.keys"):
        load_settings(None, [f"serve.host='{host}'"])

    _, digest = new_key()
    settings = load_settings(None, [f"serve.host='{host}'", f"serve.keys=[{digest}]"])

    assert not settings.serve.is_local
    assert masked(settings)["serve"]["keys"] == ["***"]


def test_settings_when_a_key_itself_stands_there_then_refused_and_not_shown():
    with pytest.raises(SettingsError, match="never a key itself") as raised:
        load_settings(None, ["serve.keys=[sk-stormline-abc]"])

    assert "sk-stormline-abc" not in str(raised.value)


@pytest.mark.parametrize("declared", [True, False])
def test_body_when_too_large_then_413(tmp_path, declared):
    client = make_client(tmp_path, max_body_bytes=1024)
    data = json.dumps(ask("x" * 2000)).encode()
    content = data if declared else iter([data[:900], data[900:]])

    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})

    assert error_of(response) == (413, "body_too_large")


def test_admission_when_full_then_some_wait_and_the_rest_are_told_to_come_again():
    async def run():
        admission = Admission(max_concurrent=1, max_queued=1)
        order, gate = [], asyncio.Event()

        async def question(name):
            async with admission.slot(asyncio.get_running_loop().time() + 60):
                order.append(name)
                await gate.wait()

        first, second = asyncio.create_task(question("first")), asyncio.create_task(question("second"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as raised:
            await question("third")
        gate.set()
        await asyncio.gather(first, second)
        await question("fourth")
        return order, raised.value

    order, refused = asyncio.run(run())

    assert order == ["first", "second", "fourth"]
    assert refused.status == 429
    assert int(refused.headers()["Retry-After"]) > 0


@pytest.mark.parametrize("stream", [True, False])
def test_chat_when_no_turn_comes_in_time_then_told_to_come_again(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(app_module, "Admission", lambda max_concurrent, max_queued: Admission(0, max_queued))
    client = make_client(tmp_path, timeout_s=0.01)

    response = post(client, ask(stream=stream))

    assert error_of(response) == (429, "too_many_requests")
    assert int(response.headers["Retry-After"]) > 0


def test_answer_when_slow_then_504(tmp_path):
    class Slow(EchoLlm):
        async def stream(self, prompt):
            await asyncio.Event().wait()
            yield ""

    assert error_of(post(make_client(tmp_path, Slow(), timeout_s=0.01), ask())) == (504, "timeout")


def test_chat_when_the_asker_leaves_amid_an_answer_then_the_next_one_gets_the_place(tmp_path):
    async def run():
        left = asyncio.Event()

        class Endless(EchoLlm):
            async def stream(self, prompt):
                if prompt.text != "Forever?":
                    async for piece in super().stream(prompt):
                        yield piece
                    return
                yield "a "
                left.set()
                await asyncio.Event().wait()

        client = make_client(tmp_path, Endless(), max_concurrent=1, max_queued=0)
        waiting = await call_app(client.app, ask("Forever?", stream=True), left)
        return waiting, await call_app(client.app, ask("And now?"), asyncio.Event())

    first, second = asyncio.run(run())

    assert [message.get("status") for message in first if message["type"] == "http.response.start"] == [200]
    assert second[0]["status"] == 200


async def call_app(app, body, left):
    """Send one request whose asker goes away when `left` is set; return what was sent to it."""
    data, sent = json.dumps(body).encode(), []
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    coming = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive():
        if coming:
            return coming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


# What there is.


def test_lists_when_asked_then_models_and_streams(tmp_path, monkeypatch):
    monkeypatch.setattr("stormline.pipeline.front.streams.time.time_ns", lambda: NOON_NS + 3600 * S_NS)
    client = make_client(tmp_path)

    models, streams = client.get("/v1/models").json(), client.get("/v1/streams").json()

    assert [m["id"] for m in models["data"]] == ["echo", "stormline"]
    assert client.get("/v1/models/echo").json()["object"] == "model"
    assert error_of(client.get("/v1/models/other")) == (404, "model_not_found")
    assert streams["data"][0] == {
        "id": "gate",
        "object": "stream",
        "state": "quiet",
        "session": None,
        "first_time": "2026-01-31T12:00:00.000Z",
        "last_time": "2026-01-31T12:02:00.000Z",
        "chunks": 60,
        "lag_s": None,
        "lag_records": None,
        "picture_time": None,
    }


def test_captions_when_nothing_is_committed_or_the_time_is_wrong_then_none_or_an_error(tmp_path):
    client = make_client(tmp_path)

    assert client.get("/v1/streams/gate/captions?since=10m").json() == {"object": "list", "data": [], "has_more": False}
    assert error_of(client.get("/v1/streams/gate/captions?since=soon")) == (400, "invalid_value")
    assert error_of(client.get("/v1/streams/gate/captions?limit=0")) == (400, "invalid_value")
