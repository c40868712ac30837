"""What the lane sets inside Ray Data is still there in this version of Ray."""

import inspect
from types import SimpleNamespace

import pytest
import ray
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.data import DataContext
from ray.data._internal.execution import streaming_executor, streaming_executor_state
from ray.data._internal.execution.backpressure_policy import get_backpressure_policies
from ray.data._internal.execution.bundle_queue.reordering import ReorderingBundleQueue
from ray.data._internal.execution.operators import actor_pool_map_operator, map_operator
from ray.data._internal.execution.operators.actor_pool_map_operator import _ActorPool
from ray.data._internal.stats import _StatsManager
from ray.exceptions import RayError

from stormline.pipeline.endless_dataset import EXECUTOR_TURN_S, ROWS_IN_FLIGHT, BlocksInFlight, lane_context


class Bundle:
    """Stands for a block on its way."""

    num_rows, size_bytes, schema, metadata = lambda self: 1, lambda self: 1, None, ()
    block_refs = ()

    def __len__(self):
        return 1


def test_ray_data_when_read_then_uses_what_the_lane_sets():
    turn = inspect.getsource(streaming_executor_state.process_completed_tasks)
    assert "timeout=WAIT_FOR_TASK_COMPLETION_TIMEOUT_S" in turn
    assert "_output_blocks_stats.extend(to_stats(" in inspect.getsource(map_operator)
    assert {"update_execution_metrics", "update_iteration_metrics"} <= set(vars(_StatsManager))
    executor, pool = inspect.getsource(streaming_executor), inspect.getsource(actor_pool_map_operator)
    assert "_cluster_autoscaler = create_cluster_autoscaler(" in executor
    assert "_StatsManager.register_dataset_to_stats_actor(" in executor
    assert "actor_location_tracker=get_or_create_actor_location_tracker()" in pool
    assert "] = get_actor_locations(" in pool
    assert "self._actor_node_id_map_snapshot.get(logical_id) or state.actor_location" in pool
    assert "self._update_running_actor_state(actor)" in inspect.getsource(_ActorPool.refresh_actor_state)
    assert hasattr(_ActorPool, "map_worker_cls_name")
    assert hasattr(DataContext(), "_max_num_blocks_in_streaming_gen_buffer")
    assert ".max_task_output_bytes_to_read(op)" in inspect.getsource(streaming_executor_state.process_completed_tasks)


@pytest.mark.parametrize(("n_waiting", "limit"), [(0, None), (ROWS_IN_FLIGHT - 1, None), (ROWS_IN_FLIGHT, 0)])
def test_policy_when_enough_waits_for_the_next_step_then_no_more_is_read(n_waiting, limit):
    assert isinstance(streaming_executor_state.OpBufferQueue.num_blocks, property)
    state = SimpleNamespace(output_queue=SimpleNamespace(num_blocks=n_waiting))
    policy = BlocksInFlight(DataContext(), {"op": state}, None)

    assert policy.max_task_output_bytes_to_read("op") == limit


class DeadActor:
    """Stands for an actor whose process has died."""

    def _get_local_state(self):
        return ActorTableData.ActorState.DEAD


@pytest.fixture
def as_before(monkeypatch):
    """Put back at the end what `lane_context` replaces inside Ray."""
    for owner, name in (
        (streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"),
        (map_operator, "to_stats"),
        (ReorderingBundleQueue, "_move_to_next_key"),
        (_ActorPool, "_update_running_actor_state"),
        (_StatsManager, "update_execution_metrics"),
        (_StatsManager, "update_iteration_metrics"),
        (_StatsManager, "register_dataset_to_stats_actor"),
        (streaming_executor, "create_cluster_autoscaler"),
        (actor_pool_map_operator, "get_or_create_actor_location_tracker"),
        (actor_pool_map_operator, "get_actor_locations"),
    ):
        monkeypatch.setattr(owner, name, inspect.getattr_static(owner, name))


def test_actor_when_it_died_between_two_rows_then_the_error_names_its_step(as_before):
    lane_context(DataContext())
    pool = object.__new__(_ActorPool)
    pool._map_worker_cls_name = "MapWorker(MapBatches(Encode))"

    with pytest.raises(RayError, match=r"the worker MapWorker\(MapBatches\(Encode\)\) died between two rows"):
        pool._update_running_actor_state(DeadActor())


def test_resources_when_other_executions_were_killed_then_a_lane_still_reckons_with_the_whole_cluster(
    as_before, monkeypatch
):
    assert "self._cluster_autoscaler.get_total_resources()" in inspect.getsource(streaming_executor)
    asked = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: asked.append(1) or {"CPU": 4.0, "memory": 100.0})
    lane_context(DataContext())
    autoscaler = streaming_executor.create_cluster_autoscaler({}, None, DataContext(), execution_id="a")

    found = [autoscaler.get_total_resources() for _ in range(3)]

    assert [(each.cpu, each.memory) for each in found] == [(4.0, 100.0)] * 3
    assert asked == [1]


def test_lane_context_when_set_then_rows_leave_at_once_and_leave_nothing(as_before):
    context = DataContext()

    lane_context(context)

    assert context.target_max_block_size == 1
    assert context._max_num_blocks_in_streaming_gen_buffer == ROWS_IN_FLIGHT
    assert BlocksInFlight in [type(policy) for policy in get_backpressure_policies(context, {}, None)]
    assert streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S == EXECUTOR_TURN_S
    assert map_operator.to_stats([object()]) == []
    assert _StatsManager.update_execution_metrics("dataset", [], [], {}) is None

    queue, bundles = ReorderingBundleQueue(), [Bundle() for _ in range(6)]
    for first in range(0, 6, 3):
        for key in (first + 1, first, first + 2):  # tasks end in any order
            queue.add(bundles[key], key=key)
            queue.finalize(key)
        assert [queue.get_next() for _ in range(3)] == bundles[first : first + 3]
        assert not queue.has_next()
    assert queue._current_key == 6
    assert len(queue._inner) <= 1  # the one that is looked for
    assert not queue._finalized_keys
