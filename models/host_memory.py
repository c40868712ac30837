"""How this process's C library handles memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep large blocks that are freed for the next use, in place of giving them back to the system.

    A training step on a CPU takes and frees tensors of tens of megabytes over and over. By default each comes fresh
    from the system, which clears it page by page: a sixth of the step's time. The process then holds on to the most
    that it ever used.

    Returns:
        Whether the C library knows how; only glibc does.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST) and mallopt(_M_MMAP_MAX, 0))
