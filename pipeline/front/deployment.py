"""The HTTP interface as a Ray Serve deployment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ray import serve

from ..serving import LlmReader, StoreReader
from ..settings import ServeSettings
from ..token_files import TokenFiles
from ..token_source import TokenSource
from .answering import Answerer
from .app import Backend, build_app
from .queries import QueryRules

# More than the service's own limits let in: those answer 429 themselves, where Serve would say 503 and no more.
MAX_REQUESTS = 4096
CLOSE_S = 2.0  # for answers under way when the service stops; event connections would otherwise hold it for 20 s


@serve.deployment(name="Front", max_ongoing_requests=MAX_REQUESTS, graceful_shutdown_timeout_s=CLOSE_S)
@serve.ingress()
class Front:
    """`build_app` behind Serve's proxy; one replica, because what it lets in at once is counted in it.

    Args:
        limits: Keys and limits.
        out: The output folder.
        rules: What a query over the API may not do.
    """

    def __init__(self, limits: ServeSettings, out: Path, rules: QueryRules):
        files = TokenFiles(out)
        source = TokenSource(files, StoreReader())
        self._backend = Backend(Answerer(source, LlmReader(), limits), source, out, limits, rules)
        # What is on disk takes a moment for each thousand files; the first question should not wait for it.
        threading.Thread(target=files.refresh, name="read-token-files", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Serve calls this once, after the constructor."""
        return build_app(self._backend)
