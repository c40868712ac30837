"""What an embedded Ray runs to start a worker process: has the fork server make one, which takes no time.

Ray runs this file by its path with the worker's command line, in place of its own `setup_worker.py`, which imports all
of Ray to start Python again, where that is imported a second time. Where there is no fork server, or the worker wants
an environment of its own, Ray's file runs instead. Only what Python has at hand is imported here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping

ADDRESS = "STORMLINE_FORK_SERVER"  # environment variable: the server's socket
JOB, ANY_JOB = "RAY_JOB_ID", "ffffffff"  # environment variable, and its value in a worker that Ray starts in advance
RAYLET = "RAY_RAYLET_PID"  # environment variable; a job has the same number in every Ray, and this tells them apart
ASKER_BYTES = 18  # of what an order begins with
READY_WITHIN_S = 40.0  # Ray gives a worker a minute; the server takes some seconds for its imports as a run starts
ACCEPTED = b"+"
OWN_ENVIRONMENT = "--serialized-runtime-env-context="
OF_SETUP = ("--language=", OWN_ENVIRONMENT)  # what Ray's `setup_worker.py` takes for itself


def asker(environment: Mapping[str, str]) -> bytes:
    """Return which job of which Ray a worker is for: 8 characters, then 10."""
    return f"{environment.get(JOB, ANY_JOB):8.8}{environment.get(RAYLET, ''):>10.10}".encode()


def ask(address: str, arguments: list[str]) -> bool:
    """Have the fork server start a worker with this process's environment, folder and outputs; tell whether it did.

    Args:
        address: The server's socket.
        arguments: The worker's file and its options.
    """
    order = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(READY_WITHIN_S)
            server.connect(address)
            socket.send_fds(server, [asker(os.environ)], [0, 1, 2])
            server.sendall(json.dumps(order).encode())
            server.shutdown(socket.SHUT_WR)
            return server.recv(1) == ACCEPTED
    except OSError:
        return False


def main() -> None:
    """Start the worker that Ray wants, one way or the other."""
    arguments = sys.argv[1:]
    plain = "--language=PYTHON" in arguments and not any(a.startswith(OWN_ENVIRONMENT) for a in arguments)
    mine = [argument for argument in arguments if not argument.startswith(OF_SETUP)]
    if plain and ADDRESS in os.environ and ask(os.environ[ADDRESS], mine):
        return
    theirs = os.path.join(os.path.dirname(mine[0]), "setup_worker.py")  # beside the worker's file
    os.execv(sys.executable, [sys.executable, theirs, *arguments])


if __name__ == "__main__":
    main()
