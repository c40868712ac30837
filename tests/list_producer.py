"""A producer without Kafka: what would be sent is kept in a list."""

from __future__ import annotations

from stormline.pipeline.publish.producer import SegmentHeader, StreamSender
from stormline.pipeline.publish.segmenter import MediaSegment


class ListSender(StreamSender):
    """Keeps what it is given; lets a test act after each segment."""

    def __init__(self, after=lambda n: None):
        self.stream_id = "street"
        self.sent: list[tuple[MediaSegment, SegmentHeader]] = []
        self.after = after

    def send(self, segment: MediaSegment, header: SegmentHeader) -> None:
        self.sent.append((segment, header))
        self.after(len(self.sent))

    def flush(self) -> None:
        pass


class ListProducer:
    """Hands out one sender."""

    def __init__(self, sender: ListSender):
        self.sender = sender

    def stream(self, stream_id: str) -> ListSender:
        self.sender.stream_id = stream_id
        return self.sender
