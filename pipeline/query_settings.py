"""A standing query as settings and the API have it: what the lanes need to know, and where its results go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from pydantic import BaseModel, ConfigDict, Field, field_validator
from yarl import URL

from ..operators.queries import StandingQuery
from .secret_references import is_reference

LOCAL_NAMES = ("localhost", "localhost.localdomain")
_NAT64 = IPv6Network("64:ff9b::/96")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class KafkaSink(_Section):
    """Results as JSON to a topic, keyed by stream."""

    topic: str = Field(
        min_length=1, max_length=249, pattern=r"^[A-Za-z0-9._-]+$", description="Of the brokers in `kafka:`."
    )


class WebhookSink(_Section):
    """Results as JSON to a URL, one POST each, signed if there is a secret."""

    url: str = Field(min_length=1, max_length=2048, description="http:// or https://")
    secret: str | None = Field(
        None, max_length=512, description="${env:NAME} or ${file:/path}: the key of the HMAC-SHA256 signature."
    )

    @field_validator("url")
    @classmethod
    def _is_one(cls, url: str) -> str:
        parsed = parse_url(url)
        if parsed.user or parsed.password:
            raise ValueError("expected no name and password in the URL; a secret signs what is sent")
        return url

    @field_validator("secret")
    @classmethod
    def _is_by_reference(cls, secret: str | None) -> str | None:
        if secret is not None and not is_reference(secret):
            raise ValueError("expected ${env:NAME} or ${file:/path}, never a secret itself")
        return secret


class Sinks(_Section):
    """Where results go beside Parquet."""

    events: bool = Field(True, description="To the event stream, which the page and `stormline watch` show.")
    kafka: KafkaSink | None = None
    webhook: WebhookSink | None = None


class Query(StandingQuery):
    """A standing query with where its results go."""

    sinks: Sinks = Field(default_factory=lambda: Sinks.model_validate({}))

    def for_lanes(self) -> StandingQuery:
        """Return what the lanes need to know."""
        return StandingQuery.model_validate(self.model_dump(exclude={"sinks"}))


def parse_url(url: str) -> URL:
    """Return a URL that can be posted to, as aiohttp reads it: its `raw_host` is what a connection is made to.

    Other characters may stand for those of an address: ``１２７。0.0.1`` is 127.0.0.1.

    Raises:
        ValueError: If it cannot be posted to.
    """
    try:
        parsed = URL(url)
        usable = parsed.scheme in ("http", "https") and bool(parsed.raw_host) and parsed.explicit_port != 0
    except ValueError:
        usable = False
    if not usable or re.search(r"[\x00-\x20\x7f]", url):
        raise ValueError(f"got {url!r}, expected a URL such as https://example.org/hook")
    return parsed


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the open internet; what is no address is not."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):  # which may stand for one of the older kind
        ip = ip.ipv4_mapped or ip.sixtofour or (IPv4Address(ip.packed[-4:]) if ip in _NAT64 else ip)
    return ip.is_global and not ip.is_multicast


def check_sinks(query: Query, *, allow_private: bool, input_topics: Sequence[str]) -> None:
    """See that a query's results may go where it says, as far as that shows without asking anybody.

    What a host's name stands for is looked at again whenever something is sent.

    Raises:
        ValueError: If they may not.
    """
    sinks = query.sinks
    read = [] if sinks.kafka is None else [name for name in input_topics if names_topic(name, sinks.kafka.topic)]
    if sinks.kafka is not None and read:
        raise ValueError(
            f"sinks.kafka.topic: {sinks.kafka.topic!r} is a topic that video is read from (kafka.topics has "
            f"{read[0]!r}); choose another for results"
        )
    if sinks.webhook is not None and not allow_private:
        host = (parse_url(sinks.webhook.url).raw_host or "").rstrip(".")
        if host in LOCAL_NAMES or (is_address(host) and not is_public(host)):
            raise ValueError(
                f"sinks.webhook.url: {host} is an address of this machine or of a private network; "
                "delivery.allow_private=true in the settings lets webhooks go there"
            )


def names_topic(name: str, topic: str) -> bool:
    """Tell whether an entry of `kafka.topics`, a name or a pattern, means a topic.

    Kafka's own topics begin with two underscores and carry no video: no pattern means them.
    """
    is_pattern = any(c in name for c in "*?[") and not topic.startswith("__")
    return topic == name or (is_pattern and fnmatchcase(topic, name))


def is_address(host: str) -> bool:
    """Tell whether a host is an IP address rather than a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
