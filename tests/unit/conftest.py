"""What a unit test may not do: start Ray, open a connection, sleep. Such a test belongs in tests/integration.

The refusals are pytest's own failures, which are no `Exception`: code under test that catches all errors at its edge
lets them through.
"""

import asyncio
import socket
import sys
import time

import pytest
import ray

# Waiting for a child process that ends by itself polls with sleeps inside the standard library.
MAY_SLEEP = ("subprocess",)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("A unit test started Ray. Call the step itself, or move the test to tests/integration.")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch):
    """Refuse connecting, listening and looking up names; a socketpair, which every event loop needs, is allowed."""

    def refuse(*args, **kwargs):
        pytest.fail("A unit test used a socket. Pass the client in, or move the test to tests/integration.")

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    real_sleep, real_async_sleep = time.sleep, asyncio.sleep

    def refuse_sleep(seconds):
        if sys._getframe(1).f_globals.get("__name__") not in MAY_SLEEP:
            pytest.fail(f"A unit test slept {seconds} s. Pass the clock in, or wait for an event.")
        real_sleep(seconds)

    def refuse_async_sleep(delay, result=None):
        if delay > 0:
            pytest.fail(f"A unit test slept {delay} s. Pass the clock in, or wait for an asyncio.Event.")
        return real_async_sleep(0, result)

    monkeypatch.setattr(time, "sleep", refuse_sleep)
    monkeypatch.setattr(asyncio, "sleep", refuse_async_sleep)
