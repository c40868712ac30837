"""The encode step: frames become chunks, chunks become tokens, and each stream's recurrent state goes on.

What is kept for a stream: the newest frame (it may stand for later grid times), the sampled frames that do not fill
a chunk yet, and the model's state. All of it goes into the snapshot, so a stream goes on elsewhere as if nothing
had happened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .in_hand import MarkFile
from .ordering import ReorderBuffer
from .rows import (
    Barrier,
    Chunk,
    DeadLetter,
    DecodedSegment,
    EncodedSegment,
    LaneNews,
    Picture,
    Row,
    SegmentMeta,
    block_of,
    rows_of,
)
from .sampling import NS_PER_S, FrameChunk, GridSpec, Sampled, SamplerState, assemble_chunks, flush, step_sampler
from .snapshots import StreamSnapshot, pack_snapshot, unpack_snapshot

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from ..models.storm import StreamState

logger = logging.getLogger(__name__)

STEP_NAME = "encode"
SNAPSHOT_VERSION = 2
LATE_NS = NS_PER_S  # by which a segment may overlap what came before it without a word: times of records are rough
REASONS = {
    "late": "frames with times that its session had passed already were not used; a notice, as `damaged` is",
}
"""Every `reason` of a dead letter that encoding writes."""

SCENE_SHARE = 0.7  # of the picture that must have changed: an object that comes or goes is no scene

OnNews = Callable[[LaneNews], None]


@dataclass(frozen=True)
class StreamEncoding:
    """Everything that the encoder remembers of one stream."""

    meta: SegmentMeta  # of its newest segment
    sampler: SamplerState
    pending: FrameChunk
    model_state: StreamState
    next_chunk_index: int = 0
    look: np.ndarray | None = None  # (rows, cols, f) float16: what each place of the newest chunk looks like


class Encoder:
    """Encode streams segment by segment with one model; pure steps on `StreamEncoding`, no I/O.

    Args:
        loaded: The model.
        grid: The sampling grid, the one that segments are decoded with.
    """

    def __init__(self, loaded: LoadedModel, grid: GridSpec):
        self.model = loaded.model
        self.grid = grid
        config = loaded.model.config
        self.chunk_frames: int = config.chunk_frames
        self.frame_hw: tuple[int, int] = (config.image_size, config.image_size)

    def init_stream(self, meta: SegmentMeta) -> StreamEncoding:
        """Return the state before a session's first segment."""
        pending = FrameChunk.empty(self.frame_hw)
        return StreamEncoding(meta, SamplerState(meta.session), pending, self.model.init_stream_state())

    def step(
        self, stream: StreamEncoding | None, decoded: DecodedSegment
    ) -> tuple[EncodedSegment, StreamEncoding | None]:
        """Take the stream's next segment.

        A new session first flushes what the old one left waiting. However a session is cut, its chunks are the same.

        Args:
            stream: State after the segment before; None at the stream's first.
            decoded: The next segment, failed or not.

        Returns:
            The chunks that it completed, and the state after it (None after a session's last segment).
        """
        meta = decoded.meta
        chunks: list[Chunk] = []
        closed: list[str] = []
        if stream is not None and stream.meta.session != meta.session:
            chunks += self.flush(stream)
            closed.append(stream.meta.session)
            stream = None
        if stream is None:
            stream = self.init_stream(meta)
        sampled = step_sampler(stream.sampler, decoded, self.grid)
        late = _late_notice(stream.sampler, decoded, sampled, self.grid)
        # Of a slow camera whose frames stand for little, a chunk may lie over as much time again.
        most_step = max(self.grid.most_step, self.chunk_frames)
        ready, pending = assemble_chunks(
            stream.pending, sampled.frames, sampled.grid_indices, self.chunk_frames, most_step
        )
        stream = replace(stream, meta=meta, sampler=sampled.state, pending=pending)
        for frames in ready:
            chunk, stream = self._encode(stream, frames)
            chunks.append(chunk)
        after: StreamEncoding | None = stream
        if meta.end:
            chunks += self.flush(stream)
            closed.append(meta.session)
            after = None
        encoded = EncodedSegment(
            meta=meta,
            chunks=tuple(chunks),
            closed_sessions=tuple(closed),
            dead_letters=(*decoded.dead_letters, *late),
            n_frames=decoded.n_frames,
            n_sampled=len(sampled.grid_indices),
        )
        return encoded, after

    def flush(self, stream: StreamEncoding) -> list[Chunk]:
        """Encode the frames that wait at a session's end: a last, short chunk, or none."""
        return [self._encode(stream, frames)[0] for frames in flush(stream.pending)[0]]

    def _encode(self, stream: StreamEncoding, frames: FrameChunk) -> tuple[Chunk, StreamEncoding]:
        import torch

        batch = torch.from_numpy(np.ascontiguousarray(frames.frames))[None]  # (1, T, H, W, 3)
        encoded = self.model.encode_chunks(batch.to(self.model.device), [stream.model_state])[0]
        look = encoded.look.numpy()
        meta = stream.meta
        chunk = Chunk(
            stream_id=meta.stream_id,
            session=meta.session,
            chunk_index=stream.next_chunk_index,
            start_ns=meta.session_start_ns + self.grid.elapsed_ns(int(frames.grid_indices[0])),
            end_ns=meta.session_start_ns + self.grid.elapsed_ns(int(frames.grid_indices[-1]) + 1),
            session_start_ns=meta.session_start_ns,
            n_frames=len(frames),
            scene_score=_scene_score(stream.look, look),
            topic=meta.topic,
            partition=meta.partition,
            offset=meta.offset,
            append_ns=meta.append_ns,
            tokens=encoded.tokens.to(torch.float16).cpu().numpy(),
        )
        after = replace(stream, model_state=encoded.state, next_chunk_index=stream.next_chunk_index + 1, look=look)
        return chunk, after


class Encode:
    """`Encoder` as a Ray Data step: one actor a lane, one call at a time, in `lane_seq` order.

    Takes `DecodedSegment` and `Barrier` rows, gives `EncodedSegment` and `Barrier` rows with the same `lane_seq`.
    It must never be restarted on its own: its state would be lost. The lane restarts as a whole.

    Args:
        load: Gives the model; called once, here, in the actor.
        grid: The sampling grid.
        threads: CPU threads for the model.
        on_news: Told of new chunks at once, before they are committed, and of pictures and lags with them or with the
            next barrier (the token store). May see a chunk again after a restart.
        snapshots: This step's states to go on from, by partition.
        marks: Folder for the mark of the record in hand (`MarkFile`); None for none.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        grid: GridSpec,
        threads: int = 1,
        on_news: OnNews | None = None,
        snapshots: Mapping[tuple[str, int], bytes] | None = None,
        marks: Path | None = None,
    ):
        import torch

        torch.set_num_threads(threads)
        self._encoder = Encoder(load(), grid)
        self._on_news = on_news
        self._marks = MarkFile(marks, STEP_NAME)
        self._pictures: dict[str, Picture] = {}  # of streams, not told yet
        self._lags: dict[tuple[str, int], int] = {}  # as last told
        self._decode_s = self._encode_s = 0.0  # that decoders, and this step, were busy
        self._order = ReorderBuffer()
        self._streams: dict[tuple[str, int], dict[str, StreamEncoding]] = {
            partition: self._restore(blob) for partition, blob in (snapshots or {}).items()
        }

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Handle the rows of one block, and those that waited for them."""
        ready = [row for arrived in rows_of(table) for row in self._order.push(arrived.lane_seq, arrived)]
        if ready:
            yield block_of([self._handle(row) for row in ready])

    def _handle(self, row: Row) -> Row:
        if row.kind == Barrier.KIND:
            barrier = Barrier.from_row(row)
            self._tell_at_barrier(barrier)
            barrier = barrier.with_busy(decode=self._decode_s, encode=self._encode_s)
            return barrier.with_snapshots(STEP_NAME, self.snapshot()).to_row(row.lane_seq)
        began_s = time.monotonic()
        try:
            return self._encode_row(row)
        finally:
            self._encode_s += time.monotonic() - began_s

    def _encode_row(self, row: Row) -> Row:
        decoded = DecodedSegment.from_row(row)
        self._decode_s += decoded.decode_s
        meta = decoded.meta
        streams = self._streams.setdefault((meta.topic, meta.partition), {})
        with self._marks.holding(meta):
            encoded, after = self._encoder.step(streams.get(meta.stream_id), decoded)
        if after is None:
            streams.pop(meta.stream_id, None)
        else:
            streams[meta.stream_id] = after
        if decoded.jpeg:
            self._pictures[meta.stream_id] = Picture(decoded.tail_ns, bytes(decoded.jpeg))
        if encoded.chunks or after is None:
            self._tell(encoded.chunks, (meta.stream_id,) if after is None else ())
        return encoded.to_row(row.lane_seq)

    def _tell(
        self,
        chunks: tuple[Chunk, ...] = (),
        ended: tuple[str, ...] = (),
        lags: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        pictures, self._pictures = self._pictures, {}
        if self._on_news is not None:
            self._on_news(LaneNews(chunks, ended, pictures, lags or {}))

    def _tell_at_barrier(self, barrier: Barrier) -> None:
        lags = {(p.topic, p.partition): p.lag for p in barrier.positions}
        if lags != self._lags or self._pictures:
            self._lags = lags
            self._tell(lags=lags)

    def snapshot(self) -> dict[tuple[str, int], bytes]:
        """Return the streams' states after the last row, by partition."""
        return {
            partition: pack_snapshot(
                STEP_NAME, SNAPSHOT_VERSION, {name: _pack_stream(stream) for name, stream in streams.items()}
            )
            for partition, streams in self._streams.items()
        }

    def _restore(self, blob: bytes) -> dict[str, StreamEncoding]:
        streams = unpack_snapshot(STEP_NAME, SNAPSHOT_VERSION, blob)
        device = self._encoder.model.device
        return {name: _unpack_stream(s, device) for name, s in streams.items()}


def _late_notice(
    before: SamplerState, decoded: DecodedSegment, sampled: Sampled, grid: GridSpec
) -> tuple[DeadLetter, ...]:
    """Say that a segment's clock has jumped back, so that not all of it could be used; nothing where it has not."""
    if decoded.failed or not before.next_grid_index:
        return ()
    passed_ns = decoded.meta.session_start_ns + grid.elapsed_ns(before.next_grid_index - 1)
    if passed_ns - decoded.first_ns <= LATE_NS:
        return ()
    detail = (
        f"its first frame lies {(passed_ns - decoded.first_ns) / NS_PER_S:.1f} s before what its session had come to: "
        f"used {len(sampled.grid_indices)} of its frames; do `start_ns` and the timestamps of its media rise?"
    )
    return (DeadLetter.of(decoded.meta, "late", detail),)


def _scene_score(before: np.ndarray | None, after: np.ndarray) -> float:
    """Return how much `SCENE_SHARE` of a picture has changed at least; nan for a stream's first chunk.

    Args:
        before: (rows, cols, f) of the chunk before, vectors of length 1.
        after: Likewise, of this one.

    Returns:
        A quantile over the places of the cosine distances there, 0 to 2.
    """
    if before is None:
        return float("nan")
    step = after.astype(np.float32) - before.astype(np.float32)
    distances = 0.5 * np.einsum("rcf,rcf->rc", step, step)  # (rows, cols); exact also where they are tiny
    return float(np.quantile(distances, 1.0 - SCENE_SHARE))


def _pack_stream(stream: StreamEncoding) -> StreamSnapshot:
    header: dict[str, Any] = {
        "meta": vars(stream.meta),
        "sampler": stream.sampler.header(),
        "pending": stream.pending.header(),
        "next_chunk_index": stream.next_chunk_index,
    }
    arrays = {**stream.sampler.to_tensors(), **stream.pending.to_tensors()}
    arrays |= {f"model/{k}": v.cpu().numpy() for k, v in stream.model_state.to_tensors().items()}
    if stream.look is not None:
        arrays["look"] = stream.look
    return StreamSnapshot(header, arrays)


def _unpack_stream(snapshot: StreamSnapshot, device: Any) -> StreamEncoding:
    import torch

    from ..models.storm import StreamState

    header, arrays = snapshot
    # Cloned into memory that torch aligns: from another address its matrix products may round differently.
    model = {
        k.removeprefix("model/"): torch.from_numpy(np.array(v)).clone()
        for k, v in arrays.items()
        if k.startswith("model/")
    }
    return StreamEncoding(
        meta=SegmentMeta(**header["meta"]),
        sampler=SamplerState.from_snapshot(header["sampler"], arrays),
        pending=FrameChunk.from_snapshot(header["pending"], arrays),
        model_state=StreamState.from_tensors(model).to(device),
        next_chunk_index=header["next_chunk_index"],
        look=arrays.get("look"),
    )
