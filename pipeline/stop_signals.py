"""Ctrl-C and SIGTERM as a request: the first asks for a clean stop, a second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ended


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Put back the handlers of the stop signals after the block: `ray.init` sets one of its own, which just exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def on_stop_signal(request_stop: Callable[[], None], tell: Callable[[str], None]) -> Iterator[None]:
    """Call `request_stop` at the first SIGINT or SIGTERM within the block.

    The second one ends the process at once, which loses nothing that was committed.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(EXIT_INTERRUPTED)
        asked = True
        tell("stopping cleanly; once more to stop at once")
        request_stop()

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
