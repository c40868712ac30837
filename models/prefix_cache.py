"""What a language model has already read: the keys and values of a prompt's video, kept for the next question about it.

Several standing queries look at the same window, and several people ask about the same minutes. Reading the video is
most of the work of a short answer, so it is done once. A follow-up in a conversation reads it again: its prompt has the
turns before, and then the video beside the new question, where models that saw single questions in training are right
more often (the built-in one: 86 against 74 % with one turn before).
"""

from __future__ import annotations

import hashlib
import threading

import torch
from torch import Tensor

from .exact_attention import Prefix
from .last_used import LastUsed

DEFAULT_BYTES = 256 << 20


class PrefixCache:
    """The newest prefixes by their content, within a memory limit; safe for several threads.

    A prefix longer than the limit is not kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.hits = 0
        self.misses = 0
        self._kept: LastUsed[bytes, Prefix] = LastUsed(max_bytes)
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """Return how much may be kept."""
        return self._kept.max_bytes

    @property
    def n_bytes(self) -> int:
        """Return the size of what is kept."""
        return self._kept.n_bytes

    def get(self, key: bytes) -> Prefix | None:
        """Return what was kept, or None."""
        with self._lock:
            prefix = self._kept.get(key)
            if prefix is None:
                self.misses += 1
            else:
                self.hits += 1
        return prefix

    def put(self, key: bytes, prefix: Prefix) -> None:
        """Keep a prefix."""
        with self._lock:
            self._kept.put(key, prefix)


def prefix_key(input_ids: Tensor, video_tokens: Tensor) -> bytes:
    """Return what identifies a prefix: its tokens (n,) and the video tokens (n_video, d_model) in their places."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (input_ids, video_tokens):
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
