"""Ray as a part of this program: started for a run on one machine, and gone with it; or one that runs already."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ..operators.errors import SettingsError, StormlineError
from .fork_server import fork_server, import_all
from .ray_watch import Leave, RayWatch, end_process, own_ray
from .settings import Settings
from .stop_signals import keep_signal_handlers

# What Ray prints though all is well: Serve's controller ends itself amid its own calls, and parts that need a tenth
# of a CPU are more than it expects on a small machine.
RAY_CHATTER = r"Task ServeController\.\w+ failed|PYTHON worker processes have been started"
SERVE_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # another thread costs an answer time
BASE_CPUS = 2  # logical CPUs for the services and whatever Ray runs beside the lanes
# Without two processes that an embedded Ray has no use for: one starts machines, the other prints what workers log.
# And with whatever port is free for what it does need: at its usual one the agent of a Ray that was killed listens for
# seconds more, or that of another run for good, and each start waited until it had tried five times more.
LEAN = {"no_monitor": True, "include_log_monitor": False, "dashboard_agent_listen_port": 0}
UP_WITHIN_S = 10.0  # of its node; then Ray waits for it in its own way
LOOK_EVERY_S = 0.02


@contextmanager
def embedded_ray(
    settings: Settings, tell: Callable[[str], None], leave: Leave = end_process, meanwhile: Sequence[str] = ()
) -> Iterator[None]:
    """Use the running Ray, or start one for the time of the block and shut it down after it.

    Args:
        settings: Which of the two, and how large.
        tell: Told what happens.
        leave: What this process does should its own Ray die (`ray_watch`).
        meanwhile: Modules of this folder that the block imports: a Ray that is started takes a second or two, in which
            nothing else is to be done here.
    """
    if "ray" not in sys.modules:  # which reads these once
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; said outright, it does not warn of it
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAY_CHATTER)
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    with ExitStack() as stack:
        own = settings.ray.address is None
        more: dict[str, Any] = dict(LEAN) if own else {}
        if may_fork(settings):
            more["setup_worker_path"] = stack.enter_context(fork_server())
        import ray

        with keep_signal_handlers(), _lean_ray(more, meanwhile):
            _init_ray(settings, tell)
        stack.callback(ray.shutdown)
        if own:
            stack.enter_context(RayWatch(own_ray(), tell, leave))
        yield


@contextmanager
def _lean_ray(more: dict[str, Any], meanwhile: Sequence[str]) -> Iterator[None]:
    """Have a Ray that is started within the block start as we want it, and sooner.

    - With parameters that `ray.init` has none for.
    - Without the dashboard's process: `include_dashboard=False` starts it, too, without its pages, and waits for it.
    - Without importing what its agent needs, a fifth of a second, to see whether it is there: it comes with Ray Serve.
    - Noticed as soon as its node is there: Ray looks once a second.
    """
    from ray._private import node, parameter, services, utils

    plain: Any = parameter.RayParams

    class Parameters(plain):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, **more})

    def start_nothing(self: node.Node, **_: Any) -> None:
        pass

    get_node = services.get_node

    def get_node_soon(gcs_address: str, node_id: str) -> Any:
        import_all([f"{__package__}.{name}" for name in meanwhile])
        _await_node(gcs_address, node_id)
        return get_node(gcs_address, node_id)

    with (
        _replaced(parameter, "RayParams", Parameters),
        _replaced(node.Node, "start_api_server", start_nothing),
        _replaced(utils, "get_dashboard_dependency_error", lambda: None),
        _replaced(services, "get_node", get_node_soon),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _await_node(gcs_address: str, node_id: str) -> None:
    """Wait until a node is known to Ray's control store, for a while."""
    from ray import _raylet
    from ray.exceptions import RpcError

    untyped: Any = _raylet
    until_s = time.monotonic() + UP_WITHIN_S
    with suppress(RpcError):
        control_store = untyped.GcsClient(address=gcs_address)
        while time.monotonic() < until_s:
            if any(known.hex() == node_id for known in control_store.get_all_node_info(timeout=UP_WITHIN_S)):
                return
            time.sleep(LOOK_EVERY_S)


def may_fork(settings: Settings) -> bool:
    """Whether workers are copies of one process that has imported everything: on this machine, without a GPU."""
    no_gpu = not settings.ray.encode_num_gpus and not settings.llm.num_gpus
    return settings.ray.address is None and settings.ray.fork_workers and no_gpu and sys.platform == "linux"


def _init_ray(settings: Settings, tell: Callable[[str], None]) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if settings.ray.address is None:
        tell("starting Ray on this machine")
        options |= {
            "num_cpus": settings.ray.num_cpus
            or BASE_CPUS + settings.lanes.count * max(1, -(-settings.lanes.decode_workers // 4)),
            "object_store_memory": settings.ray.object_store_bytes,
            "include_dashboard": False,
            "address": "local",
            "_system_config": {
                # Ray's history of tasks would grow to hundreds of MB before it forgets the first of a lane's calls.
                "task_events_max_num_task_in_gcs": 2000,
                # Else it waits for workers that nobody has asked for, while there is much to import here as well.
                "prestart_worker_first_driver": False,
            },
        }
    else:
        options["address"] = settings.ray.address
    try:
        ray.init(**options)
    except (ConnectionError, OSError, ValueError, RuntimeError) as e:
        raise SettingsError(f"Ray does not start ({e}); check ray.address and the memory in /dev/shm.") from e
    except Exception as e:
        raise StormlineError(f"Ray did not come up ({e}) Is this machine too busy? Run again.") from e
