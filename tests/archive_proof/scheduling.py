"""SVT-AV1, where root runs it, makes the thread that calls it a real-time one: that starves every other process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_scheduling() -> Iterator[None]:
    """Give this thread its scheduling back after something that changes it; also usable as a decorator."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)
