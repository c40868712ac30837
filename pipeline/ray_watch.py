"""Ends this process when the Ray that it started is gone, or has its command begin again in it.

Nothing can be mended from within: every call to Ray, `shutdown` and what Ray does at exit among them, waits a minute
and more for servers that will not come back. What is committed is safe; Ray's other processes and the lock on the
output folder go with this program, also where another takes its place in the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from .fork_server import keep_fork_server

POLL_S = 0.2
EXIT_RAY_DIED = 1  # as for any error of ours
NEEDED = ("gcs_server", "raylet")  # Ray's names; without its dashboard or its log monitor it goes on
SHORT_LIFE_S = 60.0
MOST_SHORT_LIVES = 5  # in a row
SHORT_LIVES = "STORMLINE_SHORT_LIVES"  # environment variable: how many there were until now
SHOW_CURSOR = "\033[?25h"

Tell = Callable[[str], None]
Leave = Callable[[str, float, Tell], None]  # given why, and how long Ray had run, in seconds


def end_process(why: str, ran_s: float, tell: Tell) -> None:
    """End this process, for whoever keeps it up to start it again."""
    tell(f"{why}: ending too. What was committed is safe; started again, it goes on from there")
    _leave_terminal()
    os._exit(EXIT_RAY_DIED)


def begin_again(why: str, ran_s: float, tell: Tell) -> None:
    """Run this process's command again from its start, in the same process; end it where that was of no use.

    For a command that goes on from what it has committed: whoever started the process notices nothing but a pause. The
    fork server, if there is one, lives on, so that what takes longest of a start is done already.
    """
    short_lives = int(os.environ.get(SHORT_LIVES, "0")) + 1 if ran_s < SHORT_LIFE_S else 0
    if short_lives > MOST_SHORT_LIVES:
        end_process(f"{why}, {short_lives} times within {SHORT_LIFE_S:.0f} s", ran_s, tell)
        return
    tell(f"{why}: beginning again, from what was committed")
    os.environ[SHORT_LIVES] = str(short_lives)
    keep_fork_server()
    _leave_terminal()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:  # Python itself was replaced meanwhile
        end_process(f"{why}, and to begin again failed ({error})", ran_s, tell)


def own_ray() -> Any:
    """Return Ray's record of the servers that this process started (`ray._private.node.Node`)."""
    from ray._private import worker

    return worker._global_node


def has_begun_again() -> bool:
    """Tell whether this command has: workers of the Ray that died may be about to end, and hold a port until then."""
    return SHORT_LIVES in os.environ


def unless_stopped(stop: threading.Event, leave: Leave) -> Leave:
    """Return `leave`, but `end_process` from when a stop is asked for: what is to stop does not begin again."""
    return lambda why, ran_s, tell: (end_process if stop.is_set() else leave)(why, ran_s, tell)


def _leave_terminal() -> None:
    """Show what was printed, and the cursor, which a progress bar hides."""
    with suppress(OSError, ValueError):  # who reads it may be gone
        sys.stdout.write(SHOW_CURSOR if sys.stdout.isatty() else "")
        sys.stdout.flush()


class RayWatch:
    """Watch the servers of an embedded Ray from a thread, within the block.

    Args:
        node: Ray's record of what it started here (`own_ray`).
        tell: Told what happened.
        leave: `end_process`, or `begin_again` where this process is a command's and no other program's.
        poll_s: Between two looks.
    """

    def __init__(self, node: Any, tell: Tell, leave: Leave = end_process, poll_s: float = POLL_S):
        self._node, self._tell, self._leave, self._poll_s = node, tell, leave, poll_s
        self._began_s = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)

    def __enter__(self) -> RayWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._poll_s):
            dead = sorted({kind for kind, _ in self._node.dead_processes()} & set(NEEDED))
            if dead:
                self._leave(f"Ray died ({', '.join(dead)})", time.monotonic() - self._began_s, self._tell)
                return
