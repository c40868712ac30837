"""Processes that train one model together: each a share of every batch, all of them the same step.

Started by torchrun (``torchrun --nproc-per-node 8 --no-python stormline train …``), which tells each its rank; alone
otherwise. Every process holds the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

LONGEST_WAIT = timedelta(hours=12)  # for the first process to fill a cache


class Ranks:
    """This process among those that train together.

    Args:
        rank: Its number; the first, 0, alone writes.
        world: How many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join the processes that torchrun has started, where it has; by nccl on CUDA, else gloo."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=LONGEST_WAIT)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Tell whether this is the process that writes."""
        return self.rank == 0

    def share_of(self, batch: int) -> int:
        """Return how many of a batch's rows each process takes.

        Raises:
            ValueError: If they do not divide it.
        """
        if batch % self.world:
            raise ValueError(f"a batch of {batch} for {self.world} processes; expected a multiple of {self.world}")
        return batch // self.world

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes; one that a process has not counts as zero."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether a process says so; all are asked together."""
        if self.world == 1:
            return flag
        told = torch.tensor(int(flag), device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part, after the last step."""
        if self.world > 1:
            dist.destroy_process_group()
