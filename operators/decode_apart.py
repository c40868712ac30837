"""Decoding in a process apart, for streams of which a record is suspected of ending the process that decodes it.

The process runs the same `Decode` step, one block after the other, so that what comes out is the same, bit for bit.
It ends by itself when the other side is gone, and is the first that the kernel ends where memory is short.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pyarrow as pa

from .errors import StormlineError

GRACE_S = 10.0  # beyond the limit, at which the process ends itself: for one that was stopped, and cannot
END_WAIT_S = 5.0
FIRST_TO_GO = "1000"  # the kernel's highest score for whom to end first where memory is short


class ProcessDiedError(StormlineError):
    """The process apart died of a record. The record is tried again, then set aside; nothing needs to be done.

    Attributes:
        cause: A signal's name, an exit status, or how long it took.
        hung: Whether it was at work for longer than it may.
    """

    def __init__(self, cause: str, *, hung: bool):
        super().__init__(f"a decoder of its own died: {cause}")
        self.cause = cause
        self.hung = hung


class DecodeProcess:
    """One process that decodes; started at the first block, and anew after it died.

    Args:
        options: Of its `Decode`, as JSON would have them.
        limit_s: A record that takes longer ends it; 0 for none.
    """

    def __init__(self, options: Mapping[str, Any], limit_s: float = 0.0):
        self._options = {**options, "limit_s": limit_s}
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Return the process's number, or None where there is none now."""
        return self._process.pid if self._process else None

    def __call__(self, block: pa.Table) -> pa.Table:
        """Decode a block of one record there.

        Raises:
            ProcessDiedError: If the process dies, or has not answered at the limit.
        """
        if self._process is None:
            self._start()
        assert self._pipe is not None
        began_s = time.monotonic()
        try:
            send_block(self._pipe, block)
            if not self._pipe.poll(self._limit_s + GRACE_S if self._limit_s else None):
                raise TimeoutError
            return receive_block(self._pipe)
        except (OSError, EOFError):  # a pipe that breaks or ends, or the time-out
            hung = 0 < self._limit_s <= time.monotonic() - began_s
            status = self.close()
            raise ProcessDiedError(f"no end after {self._limit_s:g} s" if hung else status, hung=hung) from None

    def close(self) -> str:
        """End the process, if there is one; return what it ended of."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if process is None or pipe is None:
            return ""
        pipe.close()  # which a process that still lives takes for the end
        try:
            status = process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def _start(self) -> None:
        self._pipe, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno()), json.dumps(self._options)],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )


def send_block(pipe: Connection, block: pa.Table) -> None:
    """Send a block as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_table(block)
    pipe.send_bytes(memoryview(sink.getvalue()))


def receive_block(pipe: Connection) -> pa.Table:
    """Wait for a block.

    Raises:
        EOFError: If the other side is gone.
    """
    return pa.ipc.open_stream(pa.py_buffer(pipe.recv_bytes())).read_all()


def serve(pipe: Connection, options: Mapping[str, Any]) -> None:
    """Decode block after block, until the other side is gone."""
    from .decode import Decode

    with suppress(OSError):  # no such file, or not ours to write
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    step = Decode.from_options(options)
    with suppress(EOFError, ConnectionError):
        while True:
            send_block(pipe, step(receive_block(pipe)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), json.loads(sys.argv[2]))
