"""Who may ask, and how much at once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from .api_errors import ApiError

KEY_PREFIX = "sk-stormline-"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
RETRY_AFTER_S = 2


def new_key() -> tuple[str, str]:
    """Return a key of 256 random bits, and its hash for `serve.keys`."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key in hex. Keys are long and random, so that they need no salt and no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_key(authorization: str | None, hashes: Sequence[str]) -> None:
    """Let a request in whose bearer key is known, or any where no keys are set.

    Args:
        authorization: The header's value.
        hashes: From `serve.keys`.

    Raises:
        ApiError: 401.
    """
    if not hashes:
        return
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise ApiError(401, "no key; expected the header `Authorization: Bearer KEY`", code="missing_api_key")
    digest = hash_key(key.strip())
    # Every hash is compared, so that the time says nothing of which one it was.
    if not any([hmac.compare_digest(digest, known) for known in hashes]):
        raise ApiError(401, "this key is not known here; ask who runs the service for one", code="invalid_api_key")


def check_host(host: str | None) -> None:
    """Let a request in that names this machine; for a service that has no keys.

    A web page elsewhere can make a browser ask 127.0.0.1 under a name of its own (DNS rebinding), and read the answer.

    Raises:
        ApiError: 403.
    """
    name = (host or "").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name not in LOCAL_NAMES:
        raise ApiError(
            403, "without keys the service answers to localhost alone; set serve.keys for others", code="unknown_host"
        )


class Admission:
    """At most so many questions at once, a few more waiting, and the rest told to come again.

    Args:
        max_concurrent: Answered at once.
        max_queued: Waiting.
    """

    def __init__(self, max_concurrent: int, max_queued: int):
        self._free = asyncio.Semaphore(max_concurrent)
        self._max_queued = max_queued
        self._waiting = 0

    @asynccontextmanager
    async def slot(self, deadline_s: float) -> AsyncIterator[None]:
        """Wait for a turn, and have it within the block.

        Args:
            deadline_s: Of the wait, by the loop's clock.

        Raises:
            ApiError: 429, where too many wait already, or no turn came in time.
        """
        if self._free.locked() and self._waiting >= self._max_queued:
            raise _busy(f"{self._waiting} questions wait already")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._free.acquire()
        except TimeoutError:
            raise _busy("too many questions are being answered, and this one's turn did not come in time") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()


def _busy(why: str) -> ApiError:
    return ApiError(429, f"{why}; try again in a moment", code="too_many_requests", retry_after_s=RETRY_AFTER_S)
