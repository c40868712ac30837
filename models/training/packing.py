"""Several questions about one window in one row: the video is read once, and each text sees the video and itself.

    video   text 1   text 2   text 3   padding
    ─────   each text's positions start where the video's end; no text sees another

A window's video is most of its prompt, so eight questions cost hardly more than one. Each question's tokens and
positions are those of `StormProcessor.build_prompt`, so the model is trained on exactly what it is asked later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..processing import StormProcessor
from ..selection import VideoChunk
from .questions import Question

_PADDING, _VIDEO = -1, 0  # segments; texts count from 1


@dataclass(frozen=True, eq=False)
class TextRow:
    """One window, packed."""

    input_ids: np.ndarray  # (n,) int64, a placeholder for each video token
    position_ids: np.ndarray  # (n,) int64
    segments: np.ndarray  # (n,) int64: 0 the video, k text k
    targets: np.ndarray  # (n,) int64: the token to predict after each position, -100 where none
    kinds: tuple[str, ...]  # of text k at k - 1


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Rows, padded on the right."""

    input_ids: Tensor  # (B, N) int64
    position_ids: Tensor  # (B, N) int64
    attention_mask: Tensor = field(repr=False)  # (B, 1, N, N) bool, True where a position may look
    rows: Tensor  # (n_targets,) int64: where to predict: batch row,
    columns: Tensor  # (n_targets,) and position,
    targets: Tensor  # (n_targets,) and what
    texts: Tensor  # (n_targets,) int64: which text of the batch, counted through
    kinds: tuple[str, ...]  # of each text of the batch

    def to(self, device: torch.device) -> TextBatch:
        """Return it on a device."""
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class TextPacker:
    """Turns windows and questions into rows, for one processor. Remembers the texts' tokens."""

    def __init__(self, processor: StormProcessor):
        self._processor = processor
        self._question_ids = lru_cache(maxsize=50_000)(self._read_question)
        self._answer_ids = lru_cache(maxsize=50_000)(self._read_answer)
        self._video_ids = lru_cache(maxsize=256)(self._read_video)

    def pack(self, starts_s: Sequence[float], n_tokens: Sequence[int], questions: Sequence[Question]) -> TextRow:
        """Pack one window's questions.

        Args:
            starts_s: Of its chunks, from the window's begin.
            n_tokens: Video tokens of each.
            questions: With their answers.
        """
        video = self._video_ids(tuple(int(s) for s in starts_s), tuple(n_tokens))
        ids, positions, segments = [video], [np.arange(len(video))], [np.full(len(video), _VIDEO)]
        targets = [np.full(len(video), -100)]
        for k, question in enumerate(questions, start=1):
            asked, told = self._question_ids(question.prompt), self._answer_ids(question.answer)
            text = np.concatenate([asked, told[:-1]])  # the last token is predicted, not read
            wanted = np.full(len(text), -100)
            wanted[len(asked) - 1 :] = told
            ids.append(text)
            positions.append(len(video) + np.arange(len(text)))
            segments.append(np.full(len(text), k))
            targets.append(wanted)
        joined = (np.concatenate(part).astype(np.int64) for part in (ids, positions, segments, targets))
        return TextRow(*joined, kinds=tuple(q.kind for q in questions))

    def _read_video(self, starts_s: tuple[int, ...], n_tokens: tuple[int, ...]) -> np.ndarray:
        chunks = [VideoChunk(s, s, np.zeros((n, 1), np.float16)) for s, n in zip(starts_s, n_tokens, strict=True)]
        ids = self._processor.build_prompt("", chunks).input_ids.numpy()
        return ids[: 1 + np.flatnonzero(ids == self._processor.video_token_id)[-1]]

    def _read_question(self, prompt: str) -> np.ndarray:
        chunk = VideoChunk(0.0, 0.0, np.zeros((1, 1), np.float16))
        ids = self._processor.build_prompt(prompt, [chunk]).input_ids.numpy()
        return ids[1 + np.flatnonzero(ids == self._processor.video_token_id)[-1] :]

    def _read_answer(self, answer: str) -> np.ndarray:
        ids = self._processor.tokenizer.encode(self._processor.split_special(answer), add_special_tokens=False)
        return np.array([*ids, self._processor.end_of_answer_id])


def collate(rows: Sequence[TextRow], pad_token_id: int) -> TextBatch:
    """Join rows into a batch, padded to the longest."""
    n = max(len(row.input_ids) for row in rows)
    shape = (len(rows), n)
    ids, positions = np.full(shape, pad_token_id), np.zeros(shape, np.int64)
    segments, targets, texts = np.full(shape, _PADDING), np.full(shape, -100), np.full(shape, -1)
    n_texts = 0
    for i, row in enumerate(rows):
        m = len(row.input_ids)
        ids[i, :m], positions[i, :m] = row.input_ids, row.position_ids
        segments[i, :m], targets[i, :m] = row.segments, row.targets
        texts[i, :m] = n_texts + row.segments - 1
        n_texts += len(row.kinds)
    at_row, at_column = np.nonzero(targets >= 0)
    return TextBatch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        attention_mask=_mask(torch.from_numpy(segments)),
        rows=torch.from_numpy(at_row),
        columns=torch.from_numpy(at_column),
        targets=torch.from_numpy(targets[at_row, at_column].astype(np.int64)),
        texts=torch.from_numpy(texts[at_row, at_column].astype(np.int64)),
        kinds=tuple(kind for row in rows for kind in row.kinds),
    )


def _mask(segments: Tensor) -> Tensor:
    """Return who may look where: back, at the video and at the own text; padding at itself, so that no row is empty."""
    n = segments.shape[1]
    back = torch.ones(n, n, dtype=torch.bool).tril()
    looked_at = segments[:, None, :]
    same = (looked_at == segments[:, :, None]) | (looked_at == _VIDEO)
    return (same & back)[:, None]


def look_within_frames(mask: Tensor, is_video: Tensor) -> Tensor:
    """Let each run of video tokens look at all of itself, as imported models do whose frames are no sequence.

    Args:
        mask: (B, 1, n, n) bool, True where a position may look.
        is_video: (B, n) bool.

    Returns:
        As mask.
    """
    starts = is_video & ~torch.nn.functional.pad(is_video, (1, 0))[:, :-1]
    runs = torch.where(is_video, starts.cumsum(1), 0)
    return mask | ((runs[:, None, :] == runs[:, :, None]) & is_video[:, None, :])[:, None]


def look_back_at_most(mask: Tensor, position_ids: Tensor, window: int) -> Tensor:
    """Return the mask (B, 1, n, n) of layers that see so many positions (B, n) alone, the own one included."""
    return mask & (position_ids[:, None, :] > position_ids[:, :, None] - window)[:, None]
