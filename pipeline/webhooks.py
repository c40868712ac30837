"""Posts results to webhooks, signed after the Standard Webhooks specification (standardwebhooks.com).

webhook-id          the result's own id, the same in every attempt: who has seen it may pass it over
webhook-timestamp   seconds since 1970 of this attempt: one that is old was sent again by somebody else
webhook-signature   v1,base64(HMAC-SHA256(secret, "{id}.{timestamp}.{body}")), where the query names a secret
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..operators.errors import StormlineError
from .query_settings import WebhookSink, is_address, is_public, parse_url
from .secret_references import resolve_secret

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

SECRET_PREFIX = "whsec_"
AGAIN = frozenset((408, 425, 429))  # statuses below 500 that say: not now
MAX_RETRY_AFTER_S = 60.0


class DeliveryError(StormlineError):
    """A result could not be sent. It is tried again; see `delivery:` in the settings for how long.

    Attributes:
        refused: Whether the receiver is there and wants no such message, so that trying again is of little use.
        retry_after_s: How long it asked to wait.
    """

    def __init__(self, message: str, *, refused: bool = False, retry_after_s: float | None = None):
        super().__init__(message)
        self.refused = refused
        self.retry_after_s = retry_after_s


def sign(secret: str, message_id: str, timestamp_s: int, body: bytes) -> str:
    """Return the signature header's value.

    Args:
        secret: The key; after ``whsec_`` in base64, else as it is.
        message_id: The message's own.
        timestamp_s: Of the attempt, since 1970.
        body: Just as it is sent.

    Raises:
        DeliveryError: If the secret is no base64 after its prefix.
    """
    key = secret.encode()
    if secret.startswith(SECRET_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except ValueError:
            raise DeliveryError("the webhook's secret is no base64 after whsec_; correct what it refers to") from None
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"


class WebhookSender:
    """Posts messages to any URL; belongs to one event loop. Follows no redirect and uses no proxy.

    Args:
        allow_private: Whether to send to this machine and to private networks.
        timeout_s: For one attempt.
        clock_s: Seconds since 1970.
    """

    def __init__(self, *, allow_private: bool, timeout_s: float, clock_s: Callable[[], float] = time.time):
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        self._clock_s = clock_s
        self._session: aiohttp.ClientSession | None = None

    async def send(self, sink: WebhookSink, message_id: str, body: bytes) -> None:
        """Make one attempt.

        Raises:
            DeliveryError: If no 2xx came.
            SettingsError: If the secret that the sink refers to is not there, or cannot be read.
        """
        import aiohttp

        timestamp_s = int(self._clock_s())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "stormline",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp_s),
        }
        if sink.secret is not None:
            secret = await asyncio.to_thread(resolve_secret, "sinks.webhook.secret", sink.secret)
            headers["webhook-signature"] = sign(secret, message_id, timestamp_s, body)
        url = parse_url(sink.url)
        host = url.raw_host or ""
        if not self._allow_private and is_address(host) and not is_public(host):  # which nobody is asked to resolve
            raise _private(host)
        try:
            async with self._open().post(url, data=body, headers=headers, allow_redirects=False) as response:
                status, wait = response.status, response.headers.get("Retry-After", "")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            why = error.__cause__ or error  # of a name that is not resolved, aiohttp's own text says nothing
            raise DeliveryError(f"{host}: {str(why) or type(why).__name__}") from error
        if not 200 <= status < 300:
            refused = status < 500 and status not in AGAIN
            wait_s = min(float(wait), MAX_RETRY_AFTER_S) if wait.isdecimal() else None
            raise DeliveryError(f"{host} answered {status}", refused=refused, retry_after_s=wait_s)

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=None if self._allow_private else _public_resolver()),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def close(self) -> None:
        """End its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _private(host: str) -> DeliveryError:
    return DeliveryError(
        f"{host} is an address of this machine or of a private network; delivery.allow_private=true lets webhooks go "
        f"there"
    )


def _public_resolver() -> AbstractResolver:
    """Return a resolver that knows public addresses alone.

    The connection is made to just what it returns, so that a name cannot stand for another address a moment later.
    """
    from aiohttp import ThreadedResolver

    class PublicResolver(ThreadedResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            found = await super().resolve(host, port, family)
            public = [each for each in found if is_public(each["host"])]
            if not public:
                raise OSError(str(_private(host)))
            return public

    return PublicResolver()
