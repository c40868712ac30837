"""Where the service listens."""

from __future__ import annotations

import errno
import socket
import time

from ...operators.errors import SettingsError
from ..ray_watch import has_begun_again
from ..settings import ServeSettings

POLL_S = 0.1
FREE_WITHIN_S = 30.0  # what held it for this command before


def base_url(serve: ServeSettings) -> str:
    """Return where clients find the service."""
    host = f"[{serve.host}]" if ":" in serve.host else serve.host
    return f"http://{host}:{serve.port}/v1"


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound there.

    Raises:
        OSError: If the port is taken, or the address is not this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


def check_port(serve: ServeSettings) -> None:
    """See that the service can listen there; what this command itself has left there, as its Ray died, is waited for.

    Raises:
        SettingsError: If the port is taken, or the address is not this machine's.
    """
    until_s = time.monotonic() + (FREE_WITHIN_S if has_begun_again() else 0.0)
    while (error := _refusal(serve)) and error.errno == errno.EADDRINUSE and time.monotonic() < until_s:
        time.sleep(POLL_S)
    if error:
        raise SettingsError(
            f"cannot listen at {serve.host}:{serve.port}: {error.strerror or error}. Choose another with "
            f"--set serve.port=8001 (or serve.host), or stop what uses it."
        ) from error


def _refusal(serve: ServeSettings) -> OSError | None:
    """Return why the service cannot listen there; nothing if it can."""
    try:
        open_socket(serve.host, serve.port).close()
    except OSError as error:
        return error
    return None
