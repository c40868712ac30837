"""The front's HTTP server, over real sockets."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import dataclass, field

import pytest
from free_port import free_port

from stormline.pipeline.front import app as front_app
from stormline.pipeline.front import http_server
from stormline.pipeline.front.address import open_socket
from stormline.pipeline.front.app import Guard
from stormline.pipeline.front.http_server import HttpServer
from stormline.pipeline.settings import ServeSettings

HOST = "127.0.0.1"
OVER_ALL_BUFFERS = 64 << 20  # more than the kernel takes for a reader that does not read


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def get(port):
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


def test_server_when_started_stopped_and_started_again_then_answers_and_the_port_is_free_between():
    port = free_port()

    async def run():
        answers = []
        for _ in range(2):
            server = await HttpServer.start(hello, HOST, port, close_s=1)
            server.check()
            answers.append(await get(port))
            await server.stop()
            with pytest.raises(ConnectionRefusedError):
                await get(port)
            with pytest.raises(RuntimeError, match="has ended"):
                server.check()
        return answers

    for answer in asyncio.run(run()):
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"hello")
        assert b"server:" not in answer


def test_server_when_the_port_is_taken_for_a_moment_then_it_waits():
    port = free_port()

    async def run():
        before = open_socket(HOST, port)
        before.listen()
        starting = asyncio.create_task(HttpServer.start(hello, HOST, port, close_s=1))
        await asyncio.sleep(3 * http_server.POLL_S)
        assert not starting.done()
        before.close()
        server = await asyncio.wait_for(starting, 10)
        answer = await get(port)
        await server.stop()
        return answer

    assert asyncio.run(run()).endswith(b"hello")


def test_server_when_the_port_stays_taken_then_an_error(monkeypatch):
    monkeypatch.setattr(http_server, "FREE_WITHIN_S", 0.0)
    port = free_port()
    with open_socket(HOST, port) as taken:
        taken.listen()
        with pytest.raises(OSError, match="in use") as refused:
            asyncio.run(HttpServer.start(hello, HOST, port, close_s=1))
    assert refused.value.errno == errno.EADDRINUSE


@dataclass
class Flood:
    """An application that sends more than any buffer holds, and notes how far it came."""

    sent: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None

    async def __call__(self, scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while self.sent < OVER_ALL_BUFFERS:
                await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
                self.sent += 1 << 16
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ended.set()


def test_client_when_it_reads_nothing_then_sending_waits_for_it_and_is_given_up(monkeypatch):
    monkeypatch.setattr(front_app, "SEND_TIMEOUT_S", 0.3)
    port = free_port()

    async def run():
        flood = Flood()
        server = await HttpServer.start(Guard(flood, ServeSettings(enabled=True)), HOST, port, close_s=1)
        with socket.create_connection((HOST, port)) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(flood.ended.wait(), 20)
        await server.stop()
        return flood

    flood = asyncio.run(run())
    assert isinstance(flood.error, TimeoutError)
    assert 0 < flood.sent < OVER_ALL_BUFFERS


@pytest.mark.parametrize("part", [b"", b"{"])
def test_client_when_it_leaves_before_its_body_is_whole_then_nothing_is_logged(caplog, part):
    port, left = free_port(), asyncio.Event()

    async def read(scope, receive, send):
        from fastapi import Request

        try:
            await Request(scope, receive).body()
        finally:
            left.set()

    async def run():
        server = await HttpServer.start(Guard(read, ServeSettings(enabled=True)), HOST, port, close_s=1)
        with socket.create_connection((HOST, port)) as leaving:
            leaving.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n" + part)
            await asyncio.sleep(0.1)
        await asyncio.wait_for(left.wait(), 10)
        await server.stop()

    asyncio.run(run())
    assert not caplog.records
