"""An HTTP server within the process that the application runs in."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

from .address import open_socket

POLL_S = 0.05
FREE_WITHIN_S = 10.0  # what listened there before: this deployment's own process, which has died
KEEP_ALIVE_S = 90  # a connection that asks nothing; clients keep theirs for a minute or so
BACKLOG = 2048


class HttpServer:
    """An application that listens at an address, within the event loop that `start` is called in."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket):
        self._server = server
        self._task = asyncio.create_task(server.serve([listening]))

    @classmethod
    async def start(cls, app: ASGIApp, host: str, port: int, *, close_s: float) -> HttpServer:
        """Return the server, when it answers.

        Args:
            app: What answers.
            host: This machine's name or address.
            port: Port.
            close_s: At its end, for answers under way.

        Raises:
            OSError: If it cannot listen there.
        """
        listening = await asyncio.to_thread(open_socket, host, port, FREE_WITHIN_S)
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,  # what is asked about, and when, is nobody else's business
            log_config=None,
            log_level="critical",  # errors are logged by the application, without anybody's text
            server_header=False,
            proxy_headers=False,  # where a request comes from decides nothing
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, int(close_s)),
            backlog=BACKLOG,
        )
        server = cls(uvicorn.Server(config), listening)
        while not server._server.started:
            server.check()
            await asyncio.sleep(POLL_S)
        return server

    def check(self) -> None:
        """See that it answers.

        Raises:
            RuntimeError: If it does not any more.
        """
        if self._task.done():
            raise RuntimeError("the HTTP server has ended") from self._task.exception()

    async def stop(self) -> None:
        """End it: no more connections, and a moment for answers under way."""
        self._server.should_exit = True
        await self._task
