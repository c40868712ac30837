"""The HTTP interface as a Ray Serve deployment."""

from __future__ import annotations

import threading
from pathlib import Path

from ray import serve

from ..serving import LlmReader, StoreReader
from ..settings import ServeSettings
from ..token_files import TokenFiles
from ..token_source import TokenSource
from .answering import Answerer
from .app import Backend, build_app
from .http_server import HttpServer
from .queries import QueryRules

CLOSE_S = 2.0  # for answers under way when the service stops; event connections would otherwise hold it for 20 s


# Serve waits a little longer than the server does, and then kills.
@serve.deployment(name="Front", graceful_shutdown_timeout_s=CLOSE_S + 1)
class Front:
    """`build_app` behind an HTTP server of its own; one replica, because what it lets in at once is counted in it.

    Serve keeps it up as it does the other deployments, but its requests do not come through Serve's proxy: so they cost
    a third of the CPU between client and model, one process less runs, and who reads slowly holds back who writes.

    Args:
        settings: Address, keys and limits.
        out: The output folder.
        rules: What a query over the API may not do.
    """

    async def __init__(self, settings: ServeSettings, out: Path, rules: QueryRules):
        files = TokenFiles(out)
        source = TokenSource(files, StoreReader())
        backend = Backend(Answerer(source, LlmReader(), settings), source, out, settings, rules)
        # What is on disk takes a moment for each thousand files; the first question should not wait for it.
        threading.Thread(target=files.refresh, name="read-token-files", daemon=True).start()
        self._server = await HttpServer.start(build_app(backend), settings.host, settings.port, close_s=CLOSE_S)

    async def check_health(self) -> None:
        """Tell Serve by an error that this replica answers no more."""
        self._server.check()

    async def __del__(self) -> None:
        """End the server; Serve calls this once, as it takes the replica down."""
        await self._server.stop()
