"""The Kafka side of publishing: every segment is either acknowledged by all replicas, or an error is raised.

The producer is idempotent, so a retry never stores a segment twice, nor two of a stream out of order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...operators.errors import PublishError
from .segmenter import CONTENT_TYPE, MediaSegment

if TYPE_CHECKING:
    from kafka.producer.future import FutureRecordMetadata

log = logging.getLogger(__name__)

RECORD_OVERHEAD_BYTES = 512  # batch and record headers, key and our own headers, with room to spare
LARGEST_RECORD_BYTES = 64 << 20  # where the broker does not tell its limit; it may still refuse less
IN_FLIGHT_BYTES = 32 << 20  # of one stream, sent and not yet acknowledged
CONNECT_TIMEOUT_MS = 10_000
LINGER_MS = 2  # a segment is worth a request of its own


@dataclass(frozen=True)
class SegmentHeader:
    """What a record says about its segment besides the stream's id, which is its key."""

    session: str
    seq: int
    start_ns: int
    end: bool

    def to_kafka(self) -> list[tuple[str, bytes]]:
        """Return the record's headers."""
        headers = [
            ("session", self.session.encode()),
            ("seq", str(self.seq).encode()),
            ("start_ns", str(self.start_ns).encode()),
            ("content-type", CONTENT_TYPE.encode()),
        ]
        return [*headers, ("end", b"1")] if self.end else headers


class SegmentProducer:
    """A connection to one topic; its streams may be sent from several threads.

    Args:
        bootstrap: ``host:port[,host:port…]``.
        topic: Its name; the broker may create it, if it is set up to.
        max_bytes: Largest record; None asks the broker for the topic's `max.message.bytes`.
        client: Passed to kafka-python's clients: ``security_protocol``, ``sasl_mechanism``…

    Raises:
        PublishError: If the broker cannot be reached or refuses the settings.
    """

    def __init__(
        self, bootstrap: str, topic: str, *, max_bytes: int | None = None, client: Mapping[str, Any] | None = None
    ):
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        self.bootstrap, self.topic = bootstrap, topic
        options: dict[str, Any] = {"bootstrap_timeout_ms": CONNECT_TIMEOUT_MS, **(client or {})}
        try:
            told_bytes = _topic_limit_bytes(bootstrap, topic, options) if max_bytes is None else None
            self._limit_bytes = max_bytes or told_bytes or LARGEST_RECORD_BYTES
            self._limit_name = f"--max-bytes {max_bytes}"
            if max_bytes is None:
                self._limit_name = f"max.message.bytes={told_bytes}" if told_bytes else "what the broker takes"
            self._producer = KafkaProducer(
                bootstrap_servers=bootstrap.split(","),
                acks="all",
                enable_idempotence=True,
                linger_ms=LINGER_MS,
                max_request_size=self._limit_bytes + RECORD_OVERHEAD_BYTES,
                max_block_ms=CONNECT_TIMEOUT_MS,
                **options,
            )
        except (KafkaError, AssertionError, TypeError, ValueError, OSError) as error:
            raise PublishError(
                f"cannot reach Kafka at {bootstrap}: {error or type(error).__name__}. Is it running, and --bootstrap "
                "right? To try things, `stormline broker` starts one"
            ) from error

    @property
    def value_limit_bytes(self) -> int:
        """Return the largest segment that fits a record."""
        return self._limit_bytes - RECORD_OVERHEAD_BYTES

    def stream(self, stream_id: str) -> StreamSender:
        """Return a sender for one stream, to be used from one thread."""
        return StreamSender(self, stream_id)

    def send(self, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> FutureRecordMetadata:
        """Queue one record."""
        return self._producer.send(self.topic, value=value, key=key, headers=headers)

    def too_large(self, stream_id: str, first_ms: int, n_bytes: int, *, is_whole: bool = True) -> PublishError:
        """Return the error for a segment over the limit: what it is, and what can be done."""
        need_bytes = 1 << (n_bytes + RECORD_OVERHEAD_BYTES).bit_length()
        return PublishError(
            f"stream {stream_id}: the segment at {first_ms / 1000:.3f} s has {'' if is_whole else 'more than '}"
            f"{n_bytes} bytes, over {self._limit_name} of topic {self.topic}. Either raise the topic's limit:\n"
            f"  kafka-configs.sh --bootstrap-server {self.bootstrap} --alter --entity-type topics "
            f"--entity-name {self.topic} --add-config max.message.bytes={need_bytes}\n"
            "or cut shorter with --segment-s (never shorter than from keyframe to keyframe), "
            "or encode smaller with --transcode --bitrate 2M"
        )

    def close(self) -> None:
        """Close the connection; streams must be flushed before, else their last records may be lost."""
        self._producer.close(timeout=CONNECT_TIMEOUT_MS / 1000)

    def __enter__(self) -> SegmentProducer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamSender:
    """Sends one stream's segments in order. A failure shows at the next call, at the latest in `flush`."""

    def __init__(self, producer: SegmentProducer, stream_id: str):
        self._producer = producer
        self.stream_id = stream_id
        self._key = stream_id.encode()
        self._in_flight: deque[tuple[FutureRecordMetadata, MediaSegment]] = deque()
        self._in_flight_bytes = 0

    @property
    def value_limit_bytes(self) -> int:
        """Return the largest segment that fits a record."""
        return self._producer.value_limit_bytes

    def too_large(self, first_ms: int, n_bytes: int, *, is_whole: bool = True) -> PublishError:
        """Return the error for a segment of this stream over the limit."""
        return self._producer.too_large(self.stream_id, first_ms, n_bytes, is_whole=is_whole)

    def send(self, segment: MediaSegment, header: SegmentHeader) -> None:
        """Send a segment; waits while too much is not yet acknowledged.

        Raises:
            PublishError: If the segment is too large, or an earlier one was not delivered.
        """
        from kafka.errors import KafkaError

        n_bytes = len(segment.data)
        if n_bytes > self._producer.value_limit_bytes:
            raise self.too_large(segment.first_ms, n_bytes)
        while self._in_flight and (self._in_flight[0][0].is_done or self._in_flight_bytes + n_bytes > IN_FLIGHT_BYTES):
            self._acknowledge_first()
        try:
            future = self._producer.send(self._key, segment.data, header.to_kafka())
        except KafkaError as error:
            raise self._undelivered(segment, error) from error
        self._in_flight.append((future, segment))
        self._in_flight_bytes += n_bytes

    def flush(self) -> None:
        """Wait until everything is acknowledged.

        Raises:
            PublishError: If something was not delivered.
        """
        while self._in_flight:
            self._acknowledge_first()

    def _acknowledge_first(self) -> None:
        from kafka.errors import KafkaError

        future, segment = self._in_flight.popleft()
        self._in_flight_bytes -= len(segment.data)
        try:
            future.get(timeout=None)  # ends by itself: delivery.timeout.ms
        except KafkaError as error:
            raise self._undelivered(segment, error) from error

    def _undelivered(self, segment: MediaSegment, error: Exception) -> PublishError:
        from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

        if isinstance(error, MessageSizeTooLargeError):
            return self.too_large(segment.first_ms, len(segment.data))
        hint = ""
        if isinstance(error, KafkaTimeoutError):
            hint = (
                f". If the topic is missing: kafka-topics.sh --bootstrap-server {self._producer.bootstrap} "
                f"--create --topic {self._producer.topic}"
            )
        return PublishError(
            f"stream {self.stream_id}: the segment at {segment.first_ms / 1000:.3f} s was not delivered to "
            f"{self._producer.topic} at {self._producer.bootstrap}: {error or type(error).__name__}{hint}"
        )


def _topic_limit_bytes(bootstrap: str, topic: str, options: Mapping[str, Any]) -> int | None:
    """Ask the broker for the topic's `max.message.bytes`; None where it does not tell or the user may not ask."""
    from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
    from kafka.errors import BrokerResponseError

    connecting = {name: value for name, value in options.items() if name in KafkaAdminClient.DEFAULT_CONFIG}
    admin = KafkaAdminClient(bootstrap_servers=bootstrap.split(","), **connecting)
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic)
        # The type stubs know kafka-python 2 alone, which had no filter.
        answer = admin.describe_configs([resource], config_filter="all")  # pyright: ignore[reportCallIssue]
        return int(answer["topic"][topic]["max.message.bytes"]["value"])
    except (BrokerResponseError, KeyError, TypeError, ValueError) as error:
        log.debug("topic=%s max.message.bytes unknown: %r", topic, error)
        return None
    finally:
        admin.close()
