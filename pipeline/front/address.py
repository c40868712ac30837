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


def open_socket(host: str, port: int, within_s: float = 0.0) -> socket.socket:
    """Return a socket that is bound there; a port that is taken is waited for.

    Raises:
        OSError: If the port stays taken for so long, or the address is not this machine's.
    """
    until_s = time.monotonic() + within_s
    while True:
        try:
            return _open_socket(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= until_s:
                raise
        time.sleep(POLL_S)


def _open_socket(host: str, port: int) -> socket.socket:
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
    try:
        open_socket(serve.host, serve.port, FREE_WITHIN_S if has_begun_again() else 0.0).close()
    except OSError as error:
        raise SettingsError(
            f"cannot listen at {serve.host}:{serve.port}: {error.strerror or error}. Choose another with "
            f"--set serve.port=8001 (or serve.host), or stop what uses it."
        ) from error
