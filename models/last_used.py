"""What was used last, as much of it as fits into some bytes of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LastUsed(Generic[K, V]):
    """Values by key, as many as fit into `max_bytes`; those used last stay, and one larger than that is not kept.

    Not for several threads at a time.

    Args:
        max_bytes: Of all together.
        n_bytes_of: Tells a value's size; nothing: its `nbytes`.
    """

    def __init__(self, max_bytes: int, n_bytes_of: Callable[[V], int] = attrgetter("nbytes")):
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._n_bytes_of = n_bytes_of
        self._kept: OrderedDict[K, V] = OrderedDict()  # the least used first

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        """Return a value that is still there."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value, and forget those not used for longest; a key that is there keeps what it has."""
        n_bytes = self._n_bytes_of(value)
        if key in self._kept or n_bytes > self.max_bytes:
            return
        self._kept[key] = value
        self.n_bytes += n_bytes
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= self._n_bytes_of(self._kept.popitem(last=False)[1])
