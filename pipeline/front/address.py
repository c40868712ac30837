"""Where the service listens."""

from __future__ import annotations

import socket

from ...operators.errors import SettingsError
from ..settings import ServeSettings


def base_url(serve: ServeSettings) -> str:
    """Return where clients find the service."""
    host = f"[{serve.host}]" if ":" in serve.host else serve.host
    return f"http://{host}:{serve.port}/v1"


def check_port(serve: ServeSettings) -> None:
    """See that the service can listen there.

    Raises:
        SettingsError: If the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(
            f"cannot listen at {serve.host}:{serve.port}: {error.strerror or error}. Choose another with "
            f"--set serve.port=8001 (or serve.host), or stop what uses it."
        ) from error
