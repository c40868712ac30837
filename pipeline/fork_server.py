"""Worker processes of an embedded Ray as copies of one that has imported everything: a lane is back sooner.

Without it each of the six workers of a lane imports Ray twice, Arrow and pandas, and the encoder torch and
transformers: many seconds on two cores. With it one process imports them as a run starts, does nothing else, and forks.
What the copies do not write to stays shared memory.

Ray's core reads from the environment, as it is loaded, for which job it works. So there are two stages: the server
imports all but Ray, while Ray starts; and a first copy of it, made when the first worker of the job is wanted, imports
Ray too and makes all the job's workers. Those that Ray starts in advance, for any job, are copies of the first stage.

Copies end with the process that they are copies of, and that with who started it: of a run that was killed no worker
stays to hold a port or a core while the next one starts. A command that begins again in its own process, because its
Ray died, takes its server along (`keep_fork_server`), which ends its copies and is then ready at once. The stage of a
job is no use to the next Ray: its core has read, as it was loaded, which raylet it belongs to.

A fork copies neither threads nor what makes numbers random. So each stage looks that no thread runs and that the core
has made no random number; else it ends, and Ray starts its workers as ever. Linux only, and not for workers that use a
GPU, because CUDA does not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..infra.parent import end_with
from .fork_worker import ACCEPTED, ADDRESS, ANY_JOB, ASKER_BYTES, READY_WITHIN_S

logger = logging.getLogger(__name__)

WORKER_FILE = Path(__file__).with_name("fork_worker.py")
BACKLOG = 64  # of workers that are started at once, while the server still imports
PACKAGE = (__package__ or "").partition(".")[0]
MODULES = (  # none that imports Ray
    "aiohttp",
    "av",
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
RAY_MODULES = (
    "ray._private.workers",
    "ray.data._internal.execution.operators.actor_pool_map_operator",
    "ray.data._internal.execution.streaming_executor",
    "ray.serve._private.controller",
    "ray.serve._private.replica",
    f"{PACKAGE}.pipeline.front.deployment",
    f"{PACKAGE}.pipeline.lane",
    f"{PACKAGE}.pipeline.offset_reporter",
    f"{PACKAGE}.pipeline.token_store",
    f"{PACKAGE}.pipeline.video_llm",
)
KEPT = "STORMLINE_KEPT_SERVER"  # environment variable: of the program that was in this process before
END_COPIES = "x" * ASKER_BYTES  # in an asker's place: an order to end all workers
GONE_WITHIN_S = 20.0  # a busy machine takes its time to take them down
_running: dict[tuple[str, ...], Server] = {}  # by their modules; of this process
_started: dict[int, subprocess.Popen[bytes]] = {}  # by their number; held, else others would wait for them
HARMLESS_THREADS = ("jemalloc_bg_thd",)  # Arrow's; it is made anew in a copy


class Order(NamedTuple):
    """A worker to be: what Ray would have started as a process of its own."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    outputs: list[int]  # descriptors of standard input, output and error


class Server(NamedTuple):
    """A fork server as who started it knows it."""

    pid: int
    lifeline: int  # descriptor: the server ends as it is closed
    address: str
    modules: list[str]
    code: int  # see `_code`

    def end(self) -> None:
        """End it, and with it its copies."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        if process := _started.pop(self.pid, None):
            process.returncode = -signal.SIGKILL  # it need not look
        os.close(self.lifeline)
        shutil.rmtree(os.path.dirname(self.address), ignore_errors=True)

    def end_copies(self) -> bool:
        """End its workers; tell whether that was done, and it lives."""
        with socket.socket(socket.AF_UNIX) as asking, suppress(OSError):
            asking.settimeout(READY_WITHIN_S)
            asking.connect(self.address)
            asking.sendall(END_COPIES.encode())
            return asking.recv(1) == ACCEPTED
        return False


@contextmanager
def fork_server(modules: Sequence[str] = MODULES) -> Iterator[str]:
    """Run a fork server for an embedded Ray that is started within the block.

    The server imports while Ray starts; its workers wait for it. It ends with the block, or with this process, and with
    it those of its workers that Ray has not ended by then. Within the block of another of the same modules that one
    serves.

    Args:
        modules: What it imports, as far as it is there.

    Yields:
        The file by which Ray is to start its workers, its parameter `setup_worker_path`.
    """
    if tuple(modules) in _running:
        yield str(WORKER_FILE)
        return
    with ExitStack() as stack:
        server = _kept(list(modules)) or _start(list(modules))
        stack.callback(server.end)
        os.environ[ADDRESS] = server.address
        stack.callback(os.environ.pop, ADDRESS)
        _running[tuple(modules)] = server
        stack.callback(_running.pop, tuple(modules))
        yield str(WORKER_FILE)


@contextmanager
def fork_server_ahead() -> Iterator[ExitStack]:
    """Run a fork server from before it is known whether it is wanted: its imports are what a start waits for most.

    Yields:
        What to close where it is not wanted; the end of the block closes it, too.
    """
    with ExitStack() as ahead:
        if sys.platform == "linux" and "ray" not in sys.modules:  # else this is part of a program that has a Ray
            ahead.enter_context(fork_server())
        yield ahead


def keep_fork_server() -> None:
    """Leave the server that runs, if there is one, to the program that `os.execv` puts into this process next."""
    for server in list(_running.values())[-1:]:
        os.set_inheritable(server.lifeline, True)
        os.environ[KEPT] = json.dumps({"owner": os.getpid(), "server": server})


def _kept(modules: list[str]) -> Server | None:
    """Return the server that the program before in this process has left, if it is one of ours and fit."""
    kept = json.loads(os.environ.pop(KEPT, "{}"))
    if kept.get("owner") != os.getpid():
        return None  # whoever began it is another process, and sees to it
    server = Server(*kept["server"])
    os.set_inheritable(server.lifeline, False)
    with suppress(ChildProcessError):  # whom that program has left behind
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if server.end_copies() and server.modules == modules and server.code == _code():
        return server
    server.end()
    return None


def _code() -> int:
    """Return what changes as this package is edited, or any is installed: what was imported before is then another."""
    root = Path(__file__).parents[1]
    own = (path for folder in ("infra", "models", "operators", "pipeline") for path in (root / folder).rglob("*.py"))
    return max(path.stat().st_mtime_ns for path in (Path(sysconfig.get_path("purelib")), *own))


def _start(modules: list[str]) -> Server:
    # One thread for numerical libraries, which read this once: what Ray gives to workers of up to one CPU. And they
    # shall not ask CUDA whether it is there, which would begin it.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    address = os.path.join(tempfile.mkdtemp(prefix="stormline-"), "fork")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(BACKLOG)
        stdin, lifeline = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, address, str(server.fileno()), *modules],
            stdin=stdin,
            pass_fds=[server.fileno()],
            env=environment,
            start_new_session=True,  # Ctrl-C is for who started us
        )
        os.close(stdin)
    _started[process.pid] = process
    return Server(process.pid, lifeline, address, modules, _code())


def main() -> None:
    """Serve until standard input ends, which is when who started us does; or, in a copy, be the worker."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the folder that `-m` was run in, whose files are no modules of ours
    address, descriptor, *modules = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as server:
        import_all(modules)
        why_not = "Ray was imported" if "ray" in sys.modules else unfit()
        if why_not:
            logger.warning("no fork server: %s", why_not)
            return
        order = serve(server)
    if order is not None:
        become(order)
        return
    with suppress(OSError):  # where who started us cannot any more
        os.unlink(address)
        os.rmdir(os.path.dirname(address))
    os._exit(0)  # at once: to take down all that was imported lasts a second, in which the next start may wait for us


def import_all(modules: Sequence[str]) -> None:
    """Import what workers need, as far as it is there."""
    gc.disable()  # what is imported stays: to look for garbage among it takes a fifth of the time
    for name in modules:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()  # else the first collection in each copy would write to all that is shared


def import_ray() -> None:
    """Import Ray and what is built on it, with no number of its core's making: a copy's would be those of others."""
    import ray.actor
    from ray._raylet import ActorClassID

    class Numbers:
        from_random = staticmethod(lambda: ActorClassID(os.urandom(ActorClassID.size())))

    module: Any = ray.actor
    module.ActorClassID = Numbers  # of a class as it is defined
    import_all(RAY_MODULES)
    module.ActorClassID = ActorClassID


def unfit() -> str:
    """Return why this process must not be copied; nothing if it may be."""
    others = {int(thread) for thread in os.listdir("/proc/self/task")} - {os.getpid()}
    names = sorted(Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in others)
    strange = [name for name in names if name not in HARMLESS_THREADS]
    if strange:
        return f"threads run after the imports: {', '.join(strange)}"
    if "ray" in sys.modules and _number_of_a_copy() == _number_of_a_copy():
        return "Ray's core made a random number while it was imported"
    return ""


def _number_of_a_copy() -> bytes:
    from ray._raylet import UniqueID

    get, put = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.write(put, UniqueID.from_random().binary())
        os._exit(0)
    os.close(put)
    with open(get, "rb") as told:
        number = told.read()
    with suppress(ChildProcessError):  # it is gone, and nobody's to wait for
        os.waitpid(copy, 0)
    return number


def serve(server: socket.socket) -> Order | None:
    """Make a copy for each order; returns the order in a copy, and nothing in the server, at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that end are nobody's to wait for
    stages: dict[str, socket.socket] = {}  # of jobs, each of one Ray
    while True:
        ready, _, _ = select.select([server, sys.stdin.fileno()], [], [])
        if server not in ready:
            return None
        with server.accept()[0] as asking:
            outputs: list[int] = []
            with suppress(OSError, ValueError):  # who asks may be gone
                told, outputs, _, _ = socket.recv_fds(asking, ASKER_BYTES, maxfds=3)
                job = told.decode()
                if job == END_COPIES:
                    end_copies()
                    while stages:
                        stages.popitem()[1].close()
                    asking.sendall(ACCEPTED)
                elif job.startswith(ANY_JOB):
                    order = read_order(asking, outputs)
                    if is_copy():
                        return order
                    asking.sendall(ACCEPTED)
                else:
                    if job not in stages:
                        stages[job], orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                        if is_copy():
                            close([*outputs, *(stage.detach() for stage in stages.values())])
                            asking.close()  # else who asks would wait for us, should this stage fail
                            return serve_job(orders)
                        orders.close()
                    socket.send_fds(stages[job], [b"+"], [asking.fileno(), *outputs])
            close(outputs)


def serve_job(orders: socket.socket) -> Order:
    """Import Ray as the first order has it, and make a copy for each order; returns it in a copy.

    It ends with the server. Orders that cannot be met go unanswered: Ray then starts the worker.
    """
    why_not = None
    with orders:
        while True:
            told, descriptors, _, _ = socket.recv_fds(orders, 1, maxfds=4)
            if not told:
                os._exit(0)
            asked, *outputs = descriptors
            with socket.socket(fileno=asked) as asking, suppress(OSError, ValueError):  # who asks may be gone
                order = read_order(asking, outputs)
                if why_not is None:
                    os.environ.update(order.environment)
                    import_ray()
                    why_not = unfit()
                    if why_not:
                        logger.warning("no fork server: %s", why_not)
                if not why_not:
                    if is_copy():
                        return order
                    asking.sendall(ACCEPTED)
            close(outputs)


def read_order(asking: socket.socket, outputs: list[int]) -> Order:
    """Return what is asked for."""
    with asking.makefile("rb") as told:
        return Order(**json.load(told), outputs=outputs)


def is_copy() -> bool:
    """Make a copy of this process, which ends with it; returns in both, and tells which it is."""
    original = os.getpid()
    if os.fork() != 0:
        return False
    end_with(original)
    return True


def end_copies() -> None:
    """End the copies of this process, and theirs, and wait until they are gone, with the ports that they held."""
    ending = []
    for pid in list(_below(os.getpid())):
        with suppress(ProcessLookupError):
            ending.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(ending[-1], signal.SIGKILL)
    until_s = time.monotonic() + GONE_WITHIN_S
    for descriptor in ending:
        select.select([descriptor], [], [], max(0.0, until_s - time.monotonic()))
    close(ending)


def _below(pid: int) -> Iterator[int]:
    """Give the processes that a process has begun, and those that these have."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it is gone
            for child in map(int, children.read_text().split()):
                yield child
                yield from _below(child)


def close(descriptors: Sequence[int]) -> None:
    """Close what a copy has now."""
    for descriptor in descriptors:
        os.close(descriptor)


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
