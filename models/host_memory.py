"""How this process's C library handles memory that is freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep large blocks that are freed for the next use, in place of giving them back to the system.

    A training step on a CPU takes and frees tensors of tens of megabytes over and over. By default each comes fresh
    from the system, which clears it page by page: a sixth of the step's time. The process then holds on to the most
    that it ever used, and to more and more where sizes vary, because a large block fits into no gap of small ones: call
    `give_back_freed_memory` now and then.

    Returns:
        Whether the C library knows how; only glibc does.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST) and mallopt(_M_MMAP_MAX, 0))


def give_back_freed_memory() -> bool:
    """Give all whole pages that are free back to the system, also those between blocks in use.

    Returns:
        Whether there were any; False also where the C library does not know how.
    """
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
