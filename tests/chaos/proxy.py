"""The wire between lanes and broker, which can be cut: a TCP proxy in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

READ_BYTES = 1 << 16


class CuttableProxy:
    """Pass connections on to a server until `cut`; a context manager.

    Args:
        port: Where to listen, on 127.0.0.1.
        server_port: Where the server is, on 127.0.0.1.
    """

    def __init__(self, port: int, server_port: int):
        self._port, self._server_port = port, server_port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._refusing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def cut(self) -> int:
        """Reset every connection and refuse new ones until `mend`; return how many there were."""
        return self._call(self._cut())

    def mend(self) -> None:
        """Take connections again."""
        self._refusing = False

    def __enter__(self) -> CuttableProxy:
        self._thread.start()
        self._call(asyncio.start_server(self._serve, "127.0.0.1", self._port))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _cut(self) -> int:
        self._refusing = True
        n = len(self._open) // 2
        for writer in list(self._open):
            writer.transport.abort()
        return n

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._open -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                writer.write(data)
                await writer.drain()
        writer.close()
