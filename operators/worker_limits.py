"""What a record may cost the process that decodes it: time, and memory. Hostile bytes can ask for any of both."""

from __future__ import annotations

import faulthandler
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STDERR = 2  # the descriptor itself: Python's own object may be replaced by one without
STATM = Path("/proc/self/statm")
DATA_FIELD = 5  # of it: pages of private memory that can be written


@contextmanager
def ended_after(limit_s: float) -> Iterator[None]:
    """End this process where the block takes longer, with its stack on standard error; 0 for no limit.

    The thread that does so needs nothing of Python's, so that it also ends what hangs inside FFmpeg.
    """
    if not limit_s:
        yield
        return
    faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def limit_memory(growth_bytes: int) -> None:
    """Have this process get no more memory than it has now and so many bytes; 0 for no limit.

    FFmpeg then fails with an error, of which the record gets a dead letter. Seen without it: an MP4 of 3 kB whose
    fragment claims ninety million frames took 2.4 GB. Does nothing where there is no Linux.
    """
    if growth_bytes and STATM.exists():
        now_bytes = int(STATM.read_text().split()[DATA_FIELD]) * os.sysconf("SC_PAGESIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now_bytes + growth_bytes, hard))
