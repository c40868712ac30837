import os
import traceback
from fractions import Fraction

import pytest
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError
from stormline.pipeline.cli import app
from stormline.pipeline.secret_references import MAX_FILE_BYTES, resolve_secrets
from stormline.pipeline.settings import load_settings, masked


def test_settings_when_nothing_is_given_then_the_defaults_hold():
    settings = load_settings(None)

    assert settings.sampling.fps == 2
    assert [q.id for q in settings.queries] == ["caption"]


def test_settings_when_file_and_override_disagree_then_the_override_wins(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("lanes: {count: 2, decode_workers: 3}\nsampling: {fps: 30000/1001}\n")

    settings = load_settings(file, ["lanes.count=4", "kafka.topics=[gate, yard]"])

    assert (settings.lanes.count, settings.lanes.decode_workers) == (4, 3)
    assert settings.sampling.fps == Fraction(30000, 1001)
    assert settings.kafka.topics == ["gate", "yard"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lanes.cuont=2", "lanes.cuont: unknown key; known here: count"),
        ("lanes.count=many", r"lanes.count: .*integer.* \(got 'many'\)"),
        ("sampling.fps=0", "got 0, expected more than 0"),
        ("queries=[{id: a}, {id: a}]", "the id 'a' stands twice"),
        ("queries=[{id: a, widow_s: 3}]", r"queries.0.widow_s: unknown key; known here: .*window_s"),
        ("lag=[{policy: skip, max_lag_s: 5, resume_lag_s: 9}]", "resume_lag_s is 9 and max_lag_s 5"),
        ("lag=[{streams: []}]", "streams names none"),
        ("lag=[{policy: drop}]", r"lag.0.policy: .*'wait' or 'skip'"),
        ("model.device=nope", r"model.device: .*auto\|cpu.* \(got 'nope'\)"),
        ("lanes", "expected section.key=value"),
        ("kafka.topics=[a", "not a YAML value"),
        ("queries=[{id: a, window_s: 4, window_s: 8}]", "the key 'window_s' stands twice"),
    ],
)
def test_settings_when_wrong_then_the_error_says_which_key_and_what_was_expected(override, said):
    with pytest.raises(SettingsError, match=said):
        load_settings(None, [override])


def test_settings_when_the_file_is_missing_or_no_mapping_then_said_so(tmp_path):
    listed = tmp_path / "list.yaml"
    listed.write_text("- a\n- b\n")

    with pytest.raises(SettingsError, match="Cannot read the settings file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="holds a list"):
        load_settings(listed)


def test_settings_when_a_section_stands_twice_in_the_file_then_refused_with_both_lines(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("lanes: {count: 2}\nkafka: {topics: [gate]}\nlanes: {decode_workers: 3}\n")

    with pytest.raises(SettingsError, match=r"s.yaml .* line 3: the key 'lanes' stands twice, first in line 1"):
        load_settings(file)


def test_secrets_when_referred_to_then_resolved_and_never_shown(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    monkeypatch.setenv("KAFKA_PASSWORD", "swordfish")
    options = {"sasl_plain_password": "${env:KAFKA_PASSWORD}", "ssl_password": f"${{file:{secret}}}", "client_id": "x"}

    assert resolve_secrets(options) == {"sasl_plain_password": "swordfish", "ssl_password": "hunter2", "client_id": "x"}
    shown = masked(load_settings(None, ["kafka.client={sasl_plain_password: swordfish, client_id: x}"]))
    assert shown["kafka"]["client"] == {"sasl_plain_password": "***", "client_id": "x"}


def test_secret_when_its_variable_is_not_set_then_named(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)

    with pytest.raises(SettingsError, match="NOT_SET is not set"):
        resolve_secrets({"sasl_plain_password": "${env:NOT_SET}"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hunter2\xff", "secret file .*/secret holds is not UTF-8"),
        (bytes(MAX_FILE_BYTES + 1), "secret has more than 65536 bytes"),
        (None, "cannot read the secret file .*/secret: No such file"),
    ],
)
def test_secret_when_its_file_cannot_be_one_then_the_file_is_named_and_nothing_of_it_shown(tmp_path, content, said):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(SettingsError, match=said) as raised:
        resolve_secrets({"ssl_password": f"${{file:{path}}}"})

    shown = "".join(traceback.format_exception(raised.value))
    assert "hunter2" not in shown
    assert "xff" not in shown


@pytest.mark.parametrize("path", ["/dev/null", "/", "/dev/null\0"])
def test_secret_when_it_would_be_read_from_what_is_no_file_then_refused_unread(path):
    with pytest.raises(SettingsError, match=r"is no regular file|embedded null byte"):
        resolve_secrets({"ssl_password": f"${{file:{path}}}"})


def test_secret_when_its_variable_is_not_utf8_then_said_without_it(monkeypatch):
    monkeypatch.setenv("KAFKA_PASSWORD", os.fsdecode(b"hunter2\xff"))

    with pytest.raises(SettingsError, match="environment variable KAFKA_PASSWORD holds is not UTF-8") as raised:
        resolve_secrets({"ssl_password": "${env:KAFKA_PASSWORD}"})

    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


def test_settings_when_a_file_is_not_utf8_then_said(tmp_path):
    path = tmp_path / "cameras.yaml"
    path.write_bytes("output: {path: /données}".encode("latin-1"))

    with pytest.raises(SettingsError, match="not UTF-8"):
        load_settings(path, [])


def test_settings_when_a_section_stands_empty_then_it_may_be_set(tmp_path):
    path = tmp_path / "cameras.yaml"
    path.write_text("lanes:\n")

    assert load_settings(path, ["lanes.count=2"]).lanes.count == 2


def test_settings_when_a_rate_divides_by_nothing_then_said():
    with pytest.raises(SettingsError, match=r"sampling.fps: .*expected a number such as 2"):
        load_settings(None, ["sampling.fps=1/0"])


def test_help_when_it_shows_lists_then_with_their_brackets():
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", "--help"]).output

    assert "kafka.topics=[gate, yard]" in shown
    assert "topics: [video]" in shown
