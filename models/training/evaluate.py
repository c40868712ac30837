"""How good a trained model is: accuracy by kind of question and by length, on clips that were never trained on.

Clips are streamed chunk by chunk with the state carried, and answers are generated as a lane or the API would. Beside
the accuracy stand three controls:

    chance      the best that always says the same, or tosses a coin between the options
    no video    the same questions without any frames
    shuffled    the same frames in a random order, which must not help where the order matters

Every question that needs the order is asked twice, of a clip and of the same clip played backwards, where the other
answer is right. So the set of frames alone gives half, whatever it gives away.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation import generate_answers
from ..loading import LoadedModel
from ..prompts import VideoPrompt
from ..selection import VideoChunk, select_chunks
from .clips import FPS, Clip, make_clip, seed_of
from .questions import KINDS, NEEDLE_KINDS, ORDER_NEEDED, Question, ask, caption_recall, exact

LENGTHS = (8, 16, 32, 128, 512, 2048)
BUDGET_TOKENS = 512
FRAMES_PER_LENGTH = 24_000  # drawn and encoded at most, so that the longest take no longer than the shortest
SHUFFLED_UP_TO = 128  # frames; beyond, a shuffled video costs much and tells nothing new
_ONE_PASS_CLIPS = 8  # of each length, whose tokens are compared with those of one pass
_BATCH = 64  # prompts answered together
_LONG_KINDS = (*NEEDLE_KINDS, "alert", "first change", "exists", "count", "when")
_CAPTION_TOKENS = 96
_ENOUGH_TO_TELL = 5  # answers, before their being all alike says something about their kind


@dataclass(frozen=True, eq=False)
class AskedClip:
    """A clip, and what it is asked."""

    clip: Clip
    questions: tuple[Question, ...]


@dataclass
class Tally:
    """How the questions of one kind went, at one length."""

    asked: int = 0
    right: int = 0
    shuffled_asked: int = 0
    shuffled_right: int = 0
    no_video_asked: int = 0
    no_video_right: int = 0
    recall: float = 0.0  # of captions: summed share of right clauses
    answers: Counter[str] = field(default_factory=Counter)
    n_options: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return shares; None where nothing was asked."""
        chance = max(self.answers.values(), default=0) / max(1, self.asked)
        if self.n_options:
            chance = max(chance, 1.0 / self.n_options)
        told = {
            "asked": self.asked,
            "accuracy": self.right / self.asked if self.asked else None,
            "chance": chance,
            "no_video": self.no_video_right / self.no_video_asked if self.no_video_asked else None,
            "shuffled": self.shuffled_right / self.shuffled_asked if self.shuffled_asked else None,
        }
        return told | ({"clauses": self.recall / self.asked} if self.recall else {})


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `by_length[frames][kind]` holds `Tally.to_dict`'s shares."""

    model: str
    fingerprint: str
    seed: int
    budget_tokens: int
    token_policy: str
    by_length: dict[int, dict[str, dict[str, Any]]]
    one_pass: dict[str, int]  # clips whose streamed tokens were compared with those of one pass, and equal ones
    encoded_frames_per_s: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)

    def mean(self, n_frames: int, kinds: Iterable[str], share: str = "accuracy") -> float | None:
        """Return the mean share over kinds at a length, each question counting alike; None where nothing was asked."""
        found = [r for k in kinds if (r := self.by_length[n_frames].get(k)) and r[share] is not None]
        asked = sum(r["asked"] for r in found)
        return sum(r[share] * r["asked"] for r in found) / asked if asked else None


def evaluate(
    loaded: LoadedModel,
    *,
    lengths: Iterable[int] = LENGTHS,
    n_per_kind: int = 100,
    budget_tokens: int = BUDGET_TOKENS,
    policy: str = "changes",
    seed: int = 0,
    frames_per_length: int = FRAMES_PER_LENGTH,
    controls: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a model.

    Args:
        loaded: The model.
        lengths: Frames of a clip, at 2 fps.
        n_per_kind: Questions of each kind and length, as far as `frames_per_length` allows.
        budget_tokens: The most video tokens given to an answer.
        policy: How they are chosen, see `select_chunks`.
        seed: Of the held-out clips: 0 to 7; from 8 on they are those again.
        frames_per_length: The most frames drawn for a length.
        controls: Ask without video and of shuffled frames, too; without these it takes a third of the time.
        on_progress: Told in words where it stands.
    """
    say = on_progress or (lambda _: None)
    began_s = time.monotonic()
    by_length: dict[int, dict[str, dict[str, Any]]] = {}
    one_pass = {"compared": 0, "equal": 0}
    encoded = {"frames": 0, "seconds": 0.0}
    for position, n_frames in enumerate(lengths):
        items = draw_items(
            n_frames, n_per_kind, seed * 16 + position, frames_per_length, loaded.model.config.image_size
        )
        n_questions = sum(len(item.questions) for item in items)
        say(f"{n_frames} frames: {n_questions} questions about {len(items)} clips")
        by_length[n_frames] = {
            kind: tally.to_dict()
            for kind, tally in _run_length(
                loaded, items, n_frames, (budget_tokens, policy), one_pass, encoded, say, controls
            ).items()
        }
    rate = encoded["frames"] / max(encoded["seconds"], 1e-9)
    return Evaluation(
        loaded.name,
        loaded.fingerprint,
        seed,
        budget_tokens,
        policy,
        by_length,
        one_pass,
        round(rate, 1),
        round(time.monotonic() - began_s, 1),
    )


def draw_items(n_frames: int, n_per_kind: int, stream: int, frames_at_most: int, size_px: int = 64) -> list[AskedClip]:
    """Draw held-out clips and balanced questions about them.

    A kind's answers are balanced where they can be: yes and no within each kind of event, and counts. Questions that
    need the order come in pairs, with the clip played backwards.
    """
    kinds = [k for k in KINDS if n_frames <= 32 or k in _LONG_KINDS]
    weights = {kind: 1.0 for kind in kinds}
    taken: Counter[str] = Counter()
    balance: Counter[tuple[str, str, str]] = Counter()
    items: list[AskedClip] = []
    for index in range(max(4, frames_at_most // n_frames)):
        world = "needles" if index % 3 == 0 or n_frames > 128 else "shapes"
        clip = make_clip(
            seed_of(index, 128 + stream % 128, held_out=True), n_frames, world, size_px=size_px, backwards=False
        )
        rng = np.random.default_rng([clip.seed, 29])
        chosen: list[Question] = []
        for question in ask(clip.window(0, n_frames), rng, 40, weights):
            kind = question.kind
            key = (kind, question.topic, question.answer)
            if taken[kind] < n_per_kind and balance[key] < _quota(question, n_per_kind):
                taken[kind] += 2 if kind in ORDER_NEEDED else 1
                balance[key] += 1
                chosen.append(question)
        if chosen:
            items.append(AskedClip(clip, tuple(chosen)))
        twins = [q for q in chosen if q.kind in ORDER_NEEDED and q.reversed_answer is not None]
        if twins:
            turned = tuple(replace(q, answer=q.reversed_answer or "", reversed_answer=q.answer) for q in twins)
            items.append(AskedClip(replace(clip, backwards=True), turned))
        if all(taken[kind] >= n_per_kind for kind in kinds):
            break
    return _without_one_answer(items)


def _without_one_answer(items: Sequence[AskedClip]) -> list[AskedClip]:
    """Leave out kinds whose answer is always the same, such as counts of what a short clip cannot hold."""
    answers: dict[str, list[str]] = defaultdict(list)
    for item in items:
        for question in item.questions:
            answers[question.kind].append(question.answer)
    dull = {kind for kind, told in answers.items() if len(told) >= _ENOUGH_TO_TELL and len(set(told)) == 1}
    kept = (replace(item, questions=tuple(q for q in item.questions if q.kind not in dull)) for item in items)
    return [item for item in kept if item.questions]


def _quota(question: Question, n_per_kind: int) -> int:
    """Return how many questions of a kind may have the same topic and answer."""
    if question.kind == "alert":
        return -(-n_per_kind // 16)  # eight kinds of event, yes and no
    if question.options == ("yes", "no"):
        return -(-n_per_kind // 2)
    if question.kind in ("needle count", "count"):
        return -(-n_per_kind // 4)
    if question.answer == "nothing is there":
        return n_per_kind // 10
    return n_per_kind


def _run_length(
    loaded: LoadedModel,
    items: Sequence[AskedClip],
    n_frames: int,
    budget: tuple[int, str],
    one_pass: dict[str, int],
    encoded: dict[str, float],
    say: Callable[[str], None],
    controls: bool,
) -> dict[str, Tally]:
    tallies: dict[str, Tally] = defaultdict(Tally)
    asked: list[tuple[Question, str]] = []
    prompts: list[VideoPrompt] = []
    for i, item in enumerate(items):
        frames = item.clip.render()
        began_s = time.monotonic()
        chunks = stream_clip(loaded, frames)
        encoded["seconds"] += time.monotonic() - began_s
        encoded["frames"] += n_frames
        if i < _ONE_PASS_CLIPS:
            tokens = torch.from_numpy(np.concatenate([c.tokens for c in chunks]))
            one_pass["compared"] += 1
            one_pass["equal"] += int(torch.equal(tokens, loaded.model.encode_clip(frames)))
        told = {"video": tuple(select_chunks(chunks, *budget))}
        if controls:
            told["no video"] = ()
        if controls and n_frames <= SHUFFLED_UP_TO:
            order = np.random.default_rng([item.clip.seed, 31]).permutation(n_frames)
            shuffled = stream_clip(loaded, frames[order])
            told["shuffled"] = tuple(select_chunks(shuffled, *budget))
        for question in item.questions:
            for what, given in told.items():
                asked.append((question, what))
                prompts.append(prompt_of(question, given))
        if len(prompts) >= _BATCH or i == len(items) - 1:
            _answer(loaded, asked, prompts, tallies)
            asked, prompts = [], []
        if i % 50 == 49:
            say(f"{n_frames} frames: {i + 1} of {len(items)} clips")
    return {kind: tallies[kind] for kind in KINDS if kind in tallies}


def stream_clip(loaded: LoadedModel, frames: np.ndarray | Tensor) -> list[VideoChunk]:
    """Encode a clip as a lane does: chunk by chunk, with the state carried. Times are seconds from its start."""
    state, size = loaded.model.init_stream_state(), loaded.model.config.chunk_frames
    chunks = []
    for first in range(0, len(frames), size):
        (encoded,) = loaded.model.encode_chunks(frames[None, first : first + size], [state])
        state = encoded.state
        stop = min(first + size, len(frames))
        chunks.append(VideoChunk(first / FPS, stop / FPS, encoded.tokens.numpy()))
    return chunks


def prompt_of(question: Question, chunks: tuple[VideoChunk, ...]) -> VideoPrompt:
    """Return what the model is asked."""
    most = _CAPTION_TOKENS if question.kind in ("caption", "actions", "objects") else 12
    return VideoPrompt(text=question.prompt, chunks=chunks, max_new_tokens=most)


def _answer(
    loaded: LoadedModel,
    asked: Sequence[tuple[Question, str]],
    prompts: Sequence[VideoPrompt],
    tallies: dict[str, Tally],
) -> None:
    answers = generate_answers(loaded.model, loaded.processor, prompts)
    for (question, what), answer in zip(asked, answers, strict=True):
        tally, right = tallies[question.kind], exact(answer.text, question.answer)
        if what == "video":
            tally.asked += 1
            tally.right += right
            tally.n_options = len(question.options)
            # "grow" of "grow or shrink" is one answer, but names of objects are not alike from clip to clip.
            tally.answers[question.answer] += 1
            if question.kind == "caption":
                tally.recall += caption_recall(answer.text, question.answer)
        elif what == "shuffled":
            tally.shuffled_asked += 1
            tally.shuffled_right += right
        else:
            tally.no_video_asked += 1
            tally.no_video_right += right


def markdown_table(evaluation: Evaluation) -> str:
    """Return the results as a table: a row for each kind, and for each length ``accuracy`` (shuffled)."""
    lengths = sorted(evaluation.by_length)
    lines = [
        "| question | chance | no video | " + " | ".join(f"{n} frames" for n in lengths) + " |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    for kind in KINDS:
        found = {n: evaluation.by_length[n][kind] for n in lengths if kind in evaluation.by_length[n]}
        if not found:
            continue
        first = next(iter(found.values()))
        cells = [_cell(found.get(n)) for n in lengths]
        blind = "–" if first["no_video"] is None else f"{first['no_video']:.0%}"
        lines.append(f"| {kind} | {first['chance']:.0%} | {blind} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("In brackets: the same frames shuffled. A caption counts only when every word is right.")
    return "\n".join(lines)


def _cell(share: dict[str, Any] | None) -> str:
    if not share or share["accuracy"] is None:
        return "–"
    text = f"{share['accuracy']:.0%}"
    if share["shuffled"] is not None:
        text += f" ({share['shuffled']:.0%})"
    return text + f" of {share['asked']}"
