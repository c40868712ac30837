"""Has a process end with the one that started it, whichever way that ends. Linux only; elsewhere nothing happens.

Run as a file with a process id and a command, it becomes that command, which then ends with that process. So it is
done in a fresh interpreter and not in a `preexec_fn`, which may deadlock in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with(parent: int) -> None:
    """Have the kernel kill this process as its parent ends: precisely, the *thread* of it that started this one.

    Args:
        parent: Process id that the parent had; where it is gone already, this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
