"""Ends this process when the Ray that it started is gone, so that whoever keeps it up can start both again.

Nothing can be mended from within: every call to Ray, `shutdown` and what Ray does at exit among them, waits a minute
and more for servers that will not come back. What is committed is safe; Ray's other processes and the lock on the
output folder go with this one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

POLL_S = 0.2
EXIT_RAY_DIED = 1  # as for any error of ours
NEEDED = ("gcs_server", "raylet")  # Ray's names; without its dashboard or its log monitor it goes on


def own_ray() -> Any:
    """Return Ray's record of the servers that this process started (`ray._private.node.Node`)."""
    from ray._private import worker

    return worker._global_node


class RayWatch:
    """Watch the servers of an embedded Ray from a thread, within the block.

    Args:
        node: Ray's record of what it started here (`own_ray`).
        tell: Told why this process ends.
        leave: Ends it, with a status.
        poll_s: Between two looks.
    """

    def __init__(
        self,
        node: Any,
        tell: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
        poll_s: float = POLL_S,
    ):
        self._node, self._tell, self._leave, self._poll_s = node, tell, leave, poll_s
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
                self._tell(
                    f"Ray died ({', '.join(dead)}): ending too. What was committed is safe; started again, it goes on "
                    "from there"
                )
                self._leave(EXIT_RAY_DIED)
                return
