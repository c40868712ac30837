"""The limits that conftest.py puts on unit tests do hold."""

import asyncio
import socket
import subprocess
import sys
import time

import pytest
import ray


def test_ray_when_started_then_refused():
    with pytest.raises(pytest.fail.Exception, match="started Ray"):
        ray.init()


def test_ray_when_started_by_a_call_then_refused():
    with pytest.raises(pytest.fail.Exception, match="started Ray"):
        ray.put(1)


@pytest.mark.parametrize("use", ["connect", "bind"])
def test_socket_when_used_then_refused(use):
    with socket.socket() as s, pytest.raises(pytest.fail.Exception, match="used a socket"):
        getattr(s, use)(("127.0.0.1", 0))


def test_sleep_when_called_then_refused():
    with pytest.raises(pytest.fail.Exception, match=r"slept 0\.01 s"):
        time.sleep(0.01)


def test_async_sleep_when_longer_than_a_yield_then_refused():
    async def yields_then_sleeps():
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)

    with pytest.raises(pytest.fail.Exception, match=r"slept 0\.01 s"):
        asyncio.run(yields_then_sleeps())


def test_sleep_when_called_by_code_that_catches_every_error_then_refused_all_the_same():
    async def product():
        try:
            await asyncio.sleep(60)
        except Exception:  # noqa: BLE001 (as at the edge of a thread or process)
            return

    with pytest.raises(pytest.fail.Exception, match="slept 60 s"):
        asyncio.run(product())


def test_child_process_when_waited_for_then_allowed():
    assert subprocess.run([sys.executable, "-c", "print(1)"], timeout=30, check=True).returncode == 0
