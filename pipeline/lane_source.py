"""What the sources of a lane have in common: one read task, and the time at which a barrier is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ..operators.rows import BLOCK_SCHEMA

Plan = TypeVar("Plan")


class LaneSource(Datasource):
    """One read task, whatever the parallelism asked for: the lane's order is the order in which it yields.

    Args:
        read: Called once, in a worker, with the plan; yields blocks. Both are picklable.
        plan: What to read, and from where.
    """

    def __init__(self, read: Callable[[Plan], Iterator[pa.Table]], plan: Plan):
        super().__init__()
        self._read, self._plan = read, plan

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: it may never end."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the one read task."""
        read, plan = self._read, self._plan
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: read(plan), metadata, schema=BLOCK_SCHEMA)]


class BarrierTimer:
    """Says when a barrier is due."""

    def __init__(self, interval_s: float):
        self._interval_s = interval_s
        self.restart()

    def restart(self) -> None:
        """Count from now on: a barrier has just been made."""
        self._due_s = time.monotonic() + self._interval_s

    @property
    def due(self) -> bool:
        """Tell whether the interval is over."""
        return time.monotonic() >= self._due_s
