"""Ray Data, which is built for work that ends, made to run for ever, row by row.

Each setting stands with its reason. Some reach into Ray's internals, which is why Ray is pinned to a minor version;
the tests hold that each is still there, and the behaviour that they are for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.core.generated import gcs_pb2
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor, streaming_executor_state
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.bundle_queue.reordering import ReorderingBundleQueue
from ray.data._internal.execution.interfaces.execution_options import ExecutionResources
from ray.data._internal.execution.operators import actor_pool_map_operator, map_operator
from ray.data._internal.execution.operators.actor_pool_map_operator import _ActorPool
from ray.data._internal.stats import _StatsManager
from ray.data.datasource import Datasource
from ray.exceptions import RayError

ROWS_IN_FLIGHT = 8  # between two steps: what keeps both busy over a turn of the executor
EXECUTOR_TURN_S = 0.02  # shorter costs more CPU than it saves time
FILES_TURN_S = 0.05  # where nobody waits for a row: costs a third of the CPU
CLUSTER_LOOK_S = 10.0  # how old what is known of the cluster may be
SOURCE_CPUS = 0.1  # logical ones

generated: Any = gcs_pb2
DEAD = generated.ActorTableData.ActorState.DEAD


class BlocksInFlight(BackpressurePolicy):
    """Lets no more blocks wait between two steps than keep the second one busy.

    Ray's own policies go by bytes alone: a backlog of small records is then read by the thousand, long before the lane
    comes to it, and what is in flight is lost from sight as lag.
    """

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Return 0 where enough of a step's output waits for the next one, else None: any."""
        return 0 if self._topology[op].output_queue.num_blocks >= ROWS_IN_FLIGHT else None


class WholeCluster(ClusterAutoscaler):
    """Reckons with all that the cluster has, and asks for no more of it.

    Ray Data's own shares what is left over between executions, those that were killed included for three minutes: after
    a few kills a lane's share was too small for its steps, and it stood still until the dead ones' shares expired. A
    lane's steps say themselves what they want, and Ray's scheduler sees that it is there.
    """

    def __init__(self) -> None:
        self._looked_s = -math.inf
        self._resources = ExecutionResources.zero()

    def try_trigger_scaling(self) -> None:
        """Do nothing: where Ray adds machines, it does so for actors that wait for one."""

    def on_executor_shutdown(self) -> None:
        """Do nothing."""

    def get_total_resources(self) -> ExecutionResources:
        """Return what the cluster had a moment ago."""
        if time.monotonic() - self._looked_s > CLUSTER_LOOK_S:
            self._resources = ExecutionResources.from_resource_dict({**ray.cluster_resources()})
            self._looked_s = time.monotonic()
        return self._resources


class NoTracker:
    """Stands for Ray Data's actor that is told where actors are; picklable."""

    @property
    def update_actor_location(self) -> NoTracker:
        """Return what is called as a method of the actor."""
        return self

    def remote(self, *told: Any) -> None:
        """Do nothing."""


update_running_actor_state = _ActorPool._update_running_actor_state  # Ray's own


def lane_context(context: DataContext, turn_s: float = EXECUTOR_TURN_S) -> None:
    """Set up Ray Data for an execution that never ends and hands every row on at once.

    Args:
        context: Of this process.
        turn_s: How often the executor looks at its tasks.
    """
    context.target_max_block_size = 1  # a row leaves at once; at the default nothing leaves until 128 MB
    context.execution_options.preserve_order = True
    context._max_num_blocks_in_streaming_gen_buffer = ROWS_IN_FLIGHT
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, BlocksInFlight])
    context.execution_no_progress_timeout_s = -1  # a feed may be silent for a night
    context.actor_task_retry_on_errors = False  # a retried call would meet a state that has moved on
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    _keep_no_statistics()
    _keep_no_finished_tasks()
    _notice_dead_actors()
    _do_without_helpers()
    # Each turn of the executor waits until all its tasks have something, and a source has not: for this long, always.
    # At Ray's 0.1 s a row takes half a second through five steps.
    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = turn_s


def _keep_no_statistics() -> None:
    """Have Ray Data forget the rows that have passed: its statistics of a job grow with every block, 10 kB and more.

    They lie in the executor's process and in an actor that it tells; a lane counts for itself (`LaneStatus`).
    """
    operators: Any = map_operator
    manager: Any = _StatsManager
    operators.to_stats = lambda metadata: []
    manager.update_execution_metrics = staticmethod(lambda *args, **kwargs: None)
    manager.update_iteration_metrics = staticmethod(lambda *args, **kwargs: None)


def _keep_no_finished_tasks() -> None:
    """Have the queues that put blocks in order forget the tasks they are done with: near 1 kB for each otherwise."""

    def move_to_next_key(queue: Any) -> None:
        assert not queue._inner[queue._current_key]
        del queue._inner[queue._current_key]
        queue._finalized_keys.remove(queue._current_key)
        queue._current_key += 1

    queues: Any = ReorderingBundleQueue
    queues._move_to_next_key = move_to_next_key


def _notice_dead_actors() -> None:
    """Have an actor that dies between two calls end the execution; Ray Data would wait for it for ever."""

    def update(pool: Any, actor: Any) -> None:
        state = actor._get_local_state()
        if state == DEAD:
            raise RayError(f"the worker {pool.map_worker_cls_name} died between two rows: the lane restarts")
        update_running_actor_state(pool, actor)

    pools: Any = _ActorPool
    pools._update_running_actor_state = update


def _do_without_helpers() -> None:
    """Have Ray Data start none of its own actors, each a process: a lane has no use for what they know.

    One shares out the cluster (`WholeCluster`); one knows where actors are that were started again, which a lane's
    never are; one keeps statistics.
    """
    executors: Any = streaming_executor
    pools: Any = actor_pool_map_operator
    manager: Any = _StatsManager
    executors.create_cluster_autoscaler = lambda *args, **kwargs: WholeCluster()
    pools.get_or_create_actor_location_tracker = NoTracker
    pools.get_actor_locations = lambda logical_ids: {}
    manager.register_dataset_to_stats_actor = staticmethod(lambda *args, **kwargs: None)


def build_dataset(source: Datasource, steps: Mapping[str, Callable[[Dataset], Dataset]]) -> Dataset:
    """Chain the steps behind the source.

    Args:
        source: The lane's source.
        steps: By name, in order: each takes the dataset so far and adds its own `map_batches`.
    """
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=1,  # else a SplitBlocks step is added, which waits for the end
        num_cpus=SOURCE_CPUS,
        ray_remote_args={"max_retries": 0},  # a source that starts over would repeat rows
    )
    for add in steps.values():
        dataset = add(dataset)
    return dataset


def actor_step(
    step: type, kwargs: Mapping[str, Any], *, size: int = 1, calls: int = 1, num_cpus: float, num_gpus: float = 0
) -> Callable[[Dataset], Dataset]:
    """Return a `build_dataset` step that runs a callable class in actors that are never restarted."""

    def add(dataset: Dataset) -> Dataset:
        return dataset.map_batches(
            step,
            batch_size=None,  # a block is a row: nothing is gathered or split
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=size,
                max_concurrent_calls_per_actor=calls,
                max_tasks_in_flight_per_actor=max(ROWS_IN_FLIGHT, calls),
            ),
            fn_constructor_kwargs=dict(kwargs),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,  # a restarted actor would go on with an empty state, silently
            max_task_retries=0,
        )

    return add
