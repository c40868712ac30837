"""`stormline ask` and `serve` without a service: what is wrong is said before, or as it comes."""

import io
import json
from urllib.error import URLError

import pytest
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError, StormlineError
from stormline.operators.rows import Position
from stormline.pipeline.cli import app
from stormline.pipeline.commands import ask as ask_module
from stormline.pipeline.commands import http_client
from stormline.pipeline.commands.http_client import NoServiceError
from stormline.pipeline.commands.serve import check_same_model
from stormline.pipeline.front.access import hash_key
from stormline.pipeline.front.address import base_url
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.settings import ServeSettings
from stormline.pipeline.video_llm import ModelDescription

USE = {
    "stream": "gate",
    "start": "12:00",
    "first": "12:00",
    "last": "12:10",
    "tokens_used": 64,
    "tokens_in_range": 640,
    "token_policy": "global_local",
}


def event(text="", **more):
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], **more}).encode() + b"\n\n"


@pytest.fixture
def answer_with(monkeypatch):
    """Return a function that sets what the service sends; it returns the list of what it was asked."""

    def set_answer(*lines):
        asked = []

        def post(url, body, key, timeout_s):
            asked.append((url, body, key))
            return io.BytesIO(b"".join(lines))

        monkeypatch.setattr(ask_module, "post_json", post)
        return asked

    return set_answer


def test_ask_when_answered_then_the_text_on_stdout_and_what_was_seen_on_stderr(answer_with):
    asked = answer_with(event("A r\x1b[31med "), event("van."), event(stormline={"video": [USE]}), b"data: [DONE]\n\n")

    result = CliRunner().invoke(
        app, ["ask", "front gate", "What?", "--last", "5m", "--url", "http://h:1/v1", "--key", "k"]
    )

    assert result.stdout == "A r�[31med van.\n"
    assert "64 of 640 tokens, global_local" in result.stderr
    ((url, body, key),) = asked
    assert (url, key, body["stream"]) == ("http://h:1/v1/chat/completions", "k", True)
    assert body["messages"][0]["content"][0]["video_url"]["url"] == "stream://front%20gate?last=5m"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((event("A "), b'data: {"error": {"message": "the model does not answer"}}\n\n'), "the model does not answer"),
        ((event("A "),), "broke off"),
        ((b"data: {\n\n",), "broke off"),
    ],
)
def test_ask_when_the_answer_breaks_off_then_said_so(answer_with, lines, said):
    answer_with(*lines)

    result = CliRunner().invoke(app, ["ask", "gate", "What?"])

    assert isinstance(result.exception, StormlineError)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    "options",
    [["--last", "soon"], ["--end", "2026-01-31"], ["--last", "1m", "--start", "2026-01-31"], ["--url", "h:1"]],
)
def test_ask_when_an_option_is_wrong_then_nothing_is_sent(options):
    result = CliRunner().invoke(app, ["ask", "gate", "What?", *options])

    assert isinstance(result.exception, SettingsError)
    assert "--" in str(result.exception)


@pytest.fixture
def requests(monkeypatch):
    """Return the requests that were made, none of which is answered."""
    made = []

    class Opener:
        def open(self, request, timeout):
            made.append(request)
            raise URLError("connection refused")

    monkeypatch.setattr(http_client, "build_opener", lambda *handlers: Opener())
    return made


COMMANDS = pytest.mark.parametrize("command", [["ask", "gate", "What?"], ["watch"]])


@COMMANDS
def test_key_when_a_lines_end_came_with_it_then_sent_without(command, requests):
    result = CliRunner().invoke(app, [*command, "--key", "k\r"])

    assert isinstance(result.exception, NoServiceError)
    assert requests[0].get_header("Authorization") == "Bearer k"


@COMMANDS
@pytest.mark.parametrize("key", ["a\rb", "a\x00b", "ключ"])
def test_key_when_no_header_can_have_it_then_said_so_without_showing_it(command, key, requests):
    result = CliRunner().invoke(app, [*command, "--key", key])

    assert type(result.exception) is SettingsError
    assert "--key has characters that no header can have" in str(result.exception)
    assert key not in str(result.exception)
    assert requests == []


@COMMANDS
@pytest.mark.parametrize("url", ["http://[::1", "http://h:port", "http://h:99999", "http://х:1"])
def test_url_when_it_is_no_address_then_said_so(command, url):
    result = CliRunner().invoke(app, [*command, "--url", url])

    assert type(result.exception) is SettingsError
    assert f"--url {url!r} is no address" in str(result.exception)


def test_after_when_no_header_can_have_it_then_said_so(requests):
    result = CliRunner().invoke(app, ["watch", "--after", "1\r2"])

    assert type(result.exception) is SettingsError
    assert "--after has characters" in str(result.exception)


def test_serve_when_a_new_key_is_wanted_then_it_and_its_hash_belong_together():
    result = CliRunner().invoke(app, ["serve", "--new-key"])

    key_line, hash_line = result.stdout.splitlines()
    assert f"[{hash_key(key_line.split()[-1])}]" in hash_line


def test_serve_when_the_folder_is_none_of_ours_or_has_no_tokens_then_refused(tmp_path):
    assert "expected checkpoints/" in str(CliRunner().invoke(app, ["serve", str(tmp_path)]).exception)

    (tmp_path / "checkpoints").mkdir()

    assert "has no tokens" in str(CliRunner().invoke(app, ["serve", str(tmp_path)]).exception)


def test_serve_when_another_model_encoded_the_folder_then_refused(tmp_path):
    identity = {"model": "aaaa"}
    start = recover(tmp_path, lanes=1, identity=identity).for_lane(0, (("v", 0),))
    EpochWriter(start, model="large", identity=identity).commit(positions=[Position("v", 0, 1)], snapshots={})
    model = ModelDescription("tiny", "bbbb", True, (64, 64), 4)

    with pytest.raises(SettingsError, match=r"of model 'large' \(fingerprint aaaa\).*'tiny' \(fingerprint bbbb\)"):
        check_same_model(tmp_path, model)

    check_same_model(tmp_path, ModelDescription("large", "aaaa", True, (64, 64), 4))


def test_base_url_when_the_host_is_a_number_of_version_six_then_bracketed():
    assert base_url(ServeSettings.model_validate({"host": "::1", "port": 8001})) == "http://[::1]:8001/v1"
    assert base_url(ServeSettings.model_validate({})) == "http://127.0.0.1:8000/v1"
