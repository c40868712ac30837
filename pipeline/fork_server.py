"""Worker processes of an embedded Ray as copies of one that has imported the libraries: a lane is back sooner.

Without it each of the six workers of a lane imports Ray twice, Arrow and pandas, and the encoder torch and
transformers: many seconds on two cores. With it one process imports the libraries as a run starts, does nothing else,
and forks. What the copies do not write to stays shared memory.

Ray itself is imported in the copy: its core reads from the environment, as it is loaded, whose worker it is. And a fork
copies neither threads nor what makes numbers random: so the server imports nothing of Ray, looks that no thread runs,
and else ends; Ray then starts its workers as ever. Linux only, and not for workers that use a GPU, because CUDA does
not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .fork_worker import ACCEPTED, ADDRESS

logger = logging.getLogger(__name__)

WORKER_FILE = Path(__file__).with_name("fork_worker.py")
BACKLOG = 64  # of workers that are started at once, while the server still imports
PACKAGE = (__package__ or "").partition(".")[0]
MODULES = (  # none that imports Ray
    "aiohttp",
    "av",
    "cloudpickle",
    "fastapi",
    "google.protobuf.json_format",
    "jsonschema",
    "kafka",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.compute",
    "pyarrow.parquet",
    "pydantic",
    "safetensors.torch",
    "starlette.middleware",
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.siglip.modeling_siglip",
    "transformers.processing_utils",
    "uvicorn",
    "yaml",
    f"{PACKAGE}.operators.annotate",
    f"{PACKAGE}.operators.decode",
    f"{PACKAGE}.operators.encode",
    f"{PACKAGE}.models.generation",
    f"{PACKAGE}.models.loading",
)
HARMLESS_THREADS = ("jemalloc_bg_thd",)  # Arrow's; it is made anew in a copy


class Order(NamedTuple):
    """A worker to be: what Ray would have started as a process of its own."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    outputs: list[int]  # descriptors of standard input, output and error


@contextmanager
def fork_server() -> Iterator[None]:
    """Have an embedded Ray that is started within the block get its workers from a fork server.

    The server imports while Ray starts; its workers wait for it. It ends with the block, or with this process; the
    workers are Ray's to end.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stormline-", ignore_cleanup_errors=True))
        address = os.path.join(folder, "fork")
        # One thread for numerical libraries, which read this once: what Ray gives to workers of up to one CPU.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # no CUDA: see above
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, address], stdin=subprocess.PIPE, env=environment, start_new_session=True
        )
        stack.callback(_end, process)
        stack.enter_context(_workers_from(address))
        yield


@contextmanager
def _workers_from(address: str) -> Iterator[None]:
    """Have a Ray that is started within the block start its workers by `WORKER_FILE`."""
    from ray._private import parameter

    plain: Any = parameter.RayParams

    class Parameters(plain):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{"setup_worker_path": str(WORKER_FILE), **kwargs})

    own: Any = parameter
    own.RayParams = Parameters
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        own.RayParams = plain
        del os.environ[ADDRESS]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def main() -> None:
    """Serve until standard input ends, which is when who started us does; or, in a copy, be the worker."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the folder that `-m` was run in, whose files are no modules of ours
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen(BACKLOG)
        import_all()
        why_not = unfit()
        if why_not:
            logger.warning("no fork server: %s", why_not)
            return
        gc.collect()
        gc.freeze()  # else the first collection in each copy would write to all that is shared
        order = serve(server)
    if order is not None:
        become(order)
        return
    with suppress(OSError):  # where who started us cannot any more
        os.unlink(sys.argv[1])
        os.rmdir(os.path.dirname(sys.argv[1]))


def import_all() -> None:
    """Import what workers need, as far as it is there."""
    for name in MODULES:
        with suppress(ImportError):
            importlib.import_module(name)


def unfit() -> str:
    """Return why this process must not be copied; nothing if it may be."""
    if "ray" in sys.modules:
        return "Ray was imported"
    others = {int(thread) for thread in os.listdir("/proc/self/task")} - {os.getpid()}
    names = sorted(Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in others)
    strange = [name for name in names if name not in HARMLESS_THREADS]
    return f"threads run after the imports: {', '.join(strange)}" if strange else ""


def serve(server: socket.socket) -> Order | None:
    """Fork a copy for each order; returns the order in a copy, and nothing in the server, at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that end are nobody's to wait for
    while True:
        ready, _, _ = select.select([server, sys.stdin.fileno()], [], [])
        if server not in ready:
            return None
        with server.accept()[0] as asking, suppress(OSError, ValueError):  # who asks may be gone
            order = _read_order(asking)
            if os.fork() == 0:
                return order
            asking.sendall(ACCEPTED)
            for descriptor in order.outputs:
                os.close(descriptor)


def _read_order(asking: socket.socket) -> Order:
    _, outputs, _, _ = socket.recv_fds(asking, 1, maxfds=3)
    with asking.makefile("rb") as told:
        return Order(**json.load(told), outputs=outputs)


def become(order: Order) -> None:
    """Make this copy the worker that was ordered, and run it to its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # as Ray has its workers
    for descriptor, given in enumerate(order.outputs):
        os.dup2(given, descriptor)
        os.close(given)
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    sys.argv = order.arguments
    runpy.run_path(order.arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
