"""Answers to prompts about video, many at once, where an answer never depends on which others are written with it.

Each prompt is prefilled alone, without padding, and the answers are then decoded together, each in a row of its own: a
new one begins as soon as a row is free, whatever the others are at. A prompt with video is prefilled in two parts, up
to its last video token and after it, also where nobody has asked about that video before: so a first part that was
kept (`PrefixCache`) gives the same logits as one that was just read. Three things make a prompt's logits the same, bit
for bit, whatever its companions and its place among them; all three were needed when measured on CPU in float32:

1. The decoding batch always has the same number of rows, empty ones included: a matrix product may round differently
   for another number of rows, but did not for another row of the same batch of eight.
2. Rows are padded to a multiple of 16 tokens: vectorised sums then group the same numbers together.
3. Attention of the one new token is plain products (`exact_attention`): torch's fused CPU kernel rounds differently
   for another length of padding, and with several threads also from row to row.

That is a measurement (x86, torch 2.13, 1 and 2 threads), which the tests repeat, and no promise of every BLAS. On CUDA,
and in half precision, rounding may depend on the batch, so a near tie may fall otherwise; `fixed_batch=1` then makes
answers independent again, one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .exact_attention import Prefix, PromptRest, has_exact_attention
from .prefix_cache import PrefixCache, prefix_key
from .processing import Prompt, StormProcessor
from .prompts import VideoAnswer, VideoPrompt
from .slots import Slots
from .storm import StormForConditionalGeneration

FIXED_BATCH = 8  # on CPU eight rows cost a fifth more than one
COLDEST = 1e-6  # temperature: below it the likeliest token is taken, for logits divided by it may overflow
UNFINISHED = "\ufffd"  # what a cut multi-byte character decodes to


def check_prompt(model: StormForConditionalGeneration, processor: StormProcessor, prompt: VideoPrompt) -> Prompt:
    """Return the prompt as tokens.

    Raises:
        ValueError: If it does not fit the model: too long, or video tokens of another width.
    """
    built = processor.build_prompt(prompt.text, prompt.chunks, history=prompt.history)
    n_most = _max_positions(model)
    if built.n_tokens >= n_most:
        raise ValueError(
            f"the prompt has {built.n_tokens} tokens, {built.video_tokens.shape[0]} of them video; expected fewer than "
            f"the model's {n_most}. Choose a smaller token budget or a shorter range"
        )
    if built.video_tokens.shape[0] and built.video_tokens.shape[1] != model.config.d_model:
        raise ValueError(
            f"video tokens are {built.video_tokens.shape[1]} wide; expected {model.config.d_model}. "
            "Another model encoded them: ask about a range that this one encoded"
        )
    return built


def generate_answers(
    model: StormForConditionalGeneration,
    processor: StormProcessor,
    prompts: Sequence[VideoPrompt],
    *,
    fixed_batch: int | None = None,
    listeners: Sequence[Callable[[str], None] | None] = (),
    prefixes: PrefixCache | None = None,
) -> list[VideoAnswer]:
    """Answer prompts; each answer is the same whichever other prompts are there (see the file's top).

    Args:
        model: In evaluation mode; on CPU after `use_exact_decoding`, which `load_model` does.
        processor: The model's.
        prompts: Any number, of any lengths and limits.
        fixed_batch: Rows that are decoded together; None for `FIXED_BATCH`, or 1 where a language model's cache has
            a sliding window or a recurrent state.
        listeners: For each prompt None, or what is called with the next piece of its answer as it grows, in this
            thread. The pieces together are the answer's text: what may yet become a stop text, or a cut character, is
            held back. Nothing for nobody.
        prefixes: What was read before, and is kept for the next call; None for what these prompts share.

    Returns:
        One answer per prompt, in order.

    Raises:
        ValueError: If a prompt does not fit the model, before any work; the message counts prompts from 0.
    """
    if listeners and len(listeners) != len(prompts):
        raise ValueError(f"{len(listeners)} listeners for {len(prompts)} prompts; expected one for each, or none")
    writer = AnswerWriter(model, processor, fixed_batch=fixed_batch, prefixes=prefixes)
    answers = []
    for i, prompt in enumerate(prompts):
        try:
            checked = check_prompt(model, processor, prompt)
            answers.append(writer.make(prompt, checked, listeners[i] if listeners else None))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
    # Alike with alike: a step costs what its longest row costs.
    waiting = deque(sorted(answers, key=lambda a: (a.prompt.max_new_tokens, a.built.n_tokens)))
    while waiting or writer.busy:
        while waiting and writer.has_room:
            writer.begin(waiting.popleft())
        writer.step()
    return [a.answer() for a in answers]


def stream_answer(
    model: StormForConditionalGeneration,
    processor: StormProcessor,
    prompt: VideoPrompt,
    *,
    fixed_batch: int | None = None,
) -> Iterator[str | VideoAnswer]:
    """Yield an answer's text as it grows, piece by piece, and at last the whole `VideoAnswer`.

    The pieces together are the answer's text: what may yet become a stop text, or a cut character, is held back.

    Raises:
        ValueError: If the prompt does not fit the model.
    """
    writer = AnswerWriter(model, processor, fixed_batch=fixed_batch, prefixes=PrefixCache(0))
    answer = writer.make(prompt, check_prompt(model, processor, prompt))
    writer.begin(answer)
    while True:
        if piece := answer.next_piece():
            yield piece
        if answer.done:
            break
        writer.step()
    yield answer.answer()


class AnswerWriter:
    """Writes answers, a token of each at a step; new ones begin between steps. Used from one thread.

    Args:
        model: In evaluation mode; on CPU after `use_exact_decoding`, which `load_model` does.
        processor: The model's.
        fixed_batch: As for `generate_answers`.
        prefixes: As for `generate_answers`.

    Raises:
        ValueError: If `fixed_batch` is below 1.
    """

    def __init__(
        self,
        model: StormForConditionalGeneration,
        processor: StormProcessor,
        *,
        fixed_batch: int | None = None,
        prefixes: PrefixCache | None = None,
    ):
        n_rows = rows_together(model) if fixed_batch is None else fixed_batch
        if n_rows < 1:
            raise ValueError(f"fixed_batch is {fixed_batch}; expected 1 or more")
        self._model, self._processor = model, processor
        self._prefixes = PrefixCache() if prefixes is None else prefixes
        exact = has_exact_attention(model)
        self._slots = Slots(model, n_rows, exact=exact)
        self._shares = exact and n_rows > 1  # prefixes, which then are never copied
        self._rows: list[PendingAnswer | None] = [None] * n_rows

    @property
    def busy(self) -> bool:
        """Tell whether an answer is being written."""
        return any(self._rows)

    @property
    def has_room(self) -> bool:
        """Tell whether another answer can begin."""
        return not all(self._rows)

    def make(self, prompt: VideoPrompt, built: Prompt, listener: Callable[[str], None] | None = None) -> PendingAnswer:
        """Return an answer that has yet to begin, for a prompt that `check_prompt` has built."""
        return PendingAnswer(prompt, built, self._model, self._processor, listener)

    @torch.inference_mode()
    def begin(self, answer: PendingAnswer) -> None:
        """Read an answer's prompt and write its first token, which may be its last.

        Raises:
            ValueError: If there is no room, or the language model's cache wants `fixed_batch` 1.
        """
        row = self._rows.index(None)
        read = _prefill(self._model, answer.built, self._prefixes, share=self._shares)
        answer.accept(answer.choose(read.logits))
        if not answer.done:
            self._slots.put(row, read.cache, answer.built.n_tokens, read.prefix)
            self._rows[row] = answer
        answer.tell()

    def drop(self, answer: PendingAnswer) -> None:
        """Stop writing an answer that nobody waits for."""
        row = self._rows.index(answer)
        self._rows[row] = None
        self._slots.release(row)

    @torch.inference_mode()
    def step(self) -> list[PendingAnswer]:
        """Write one token of every answer; returns those that have ended with it."""
        if not self.busy:
            return []
        logits = self._slots.step([answer.ids[-1] if answer else 0 for answer in self._rows])
        logits = _only_text(self._model, logits)
        likeliest = logits.argmax(-1).tolist()
        ended = []
        for row, answer in enumerate(self._rows):
            if answer is None:
                continue
            answer.accept(likeliest[row] if answer.prompt.temperature < COLDEST else answer.choose(logits[row]))
            answer.tell()
            if answer.done:
                self._rows[row] = None
                self._slots.release(row)
                ended.append(answer)
        return ended


def rows_together(model: StormForConditionalGeneration) -> int:
    """Return how many answers are decoded together: one by one where caches cannot be joined."""
    return FIXED_BATCH if _has_plain_cache(model) else 1


def _has_plain_cache(model: StormForConditionalGeneration) -> bool:
    """Tell whether all that the language model keeps of a prompt is keys and values of every token."""
    layers = DynamicCache(config=model.language_model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


class PendingAnswer:
    """One answer in the making; `AnswerWriter.make` makes it."""

    def __init__(
        self,
        prompt: VideoPrompt,
        built: Prompt,
        model: StormForConditionalGeneration,
        processor: StormProcessor,
        listener: Callable[[str], None] | None = None,
    ):
        self.prompt, self.built = prompt, built
        self._listener = listener
        self.ids: list[int] = []
        self.finish_reason = ""
        self._n_sent = 0  # characters that `next_piece` gave out
        self._processor = processor
        self._end_ids = _end_ids(model, processor)
        self._limit = min(prompt.max_new_tokens, _max_positions(model) - built.n_tokens)
        self._random = torch.Generator().manual_seed(prompt.seed)

    @property
    def done(self) -> bool:
        """Tell whether it has ended."""
        return bool(self.finish_reason)

    def choose(self, logits: Tensor) -> int:
        """Return the next token from logits (vocab,)."""
        if self.prompt.temperature < COLDEST:
            return int(logits.argmax())
        scaled = logits.double().cpu() / self.prompt.temperature
        threshold = torch.rand((), generator=self._random, dtype=torch.float64)
        # Each row inverts its own distribution with its own number, so that companions draw nothing from it.
        return min(int((scaled.softmax(0).cumsum(0) < threshold).sum()), len(scaled) - 1)

    def accept(self, token: int) -> None:
        """Add a token, and see whether the answer ends."""
        if token in self._end_ids:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        if self.prompt.stop and self._stop_at(self._processor.decode(self.ids)) is not None:
            self.finish_reason = "stop"
        elif len(self.ids) >= self._limit:
            self.finish_reason = "length"

    def next_piece(self) -> str:
        """Return what of the text has settled since the last call; once done, the rest of it."""
        piece = self._settled_text()[self._n_sent :]
        self._n_sent += len(piece)
        return piece

    def tell(self) -> None:
        """Give the listener, where there is one, what has settled."""
        if self._listener is not None and (piece := self.next_piece()):
            self._listener(piece)

    def _settled_text(self) -> str:
        """Return the text so far that no later token can change."""
        text = self._text()
        if self.done:
            return text
        n_held = max((_overlap(text, stop) for stop in self.prompt.stop), default=0)
        return text[: len(text) - n_held].rstrip(UNFINISHED)

    def answer(self) -> VideoAnswer:
        """Return what there is of it so far; once done, the whole."""
        return VideoAnswer(
            text=self._text(),
            prompt_tokens=self.built.n_tokens,
            video_tokens=self.built.video_tokens.shape[0],
            generated_tokens=len(self.ids),
            finish_reason=self.finish_reason,
        )

    def _text(self) -> str:
        text = self._processor.decode(self.ids)
        return text[: self._stop_at(text)]

    def _stop_at(self, text: str) -> int | None:
        places = [place for stop in self.prompt.stop if (place := text.find(stop)) >= 0]
        return min(places, default=None)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the text's end may be the start of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)


@dataclass(frozen=True)
class _ReadPrompt:
    """A prompt that was read, by itself."""

    logits: Tensor  # (vocab,) of the answer's first token
    cache: Any  # of the whole prompt, or of what follows the prefix
    prefix: Prefix | None = None


def _prefill(
    model: StormForConditionalGeneration, built: Prompt, prefixes: PrefixCache, *, share: bool = False
) -> _ReadPrompt:
    """Read a prompt; with `share` its prefix, where it has one, is not copied into its cache."""
    video_at = (built.input_ids == model.config.video_token_id).nonzero()
    n_prefix = int(video_at[-1]) + 1 if len(video_at) else 0
    if not 0 < n_prefix < built.n_tokens or not _has_plain_cache(model):
        out = _read(model, built.input_ids, built.video_tokens)
        return _ReadPrompt(_only_text(model, out.logits[:, -1])[0], out.past_key_values)
    key = prefix_key(built.input_ids[:n_prefix], built.video_tokens)
    prefix = prefixes.get(key)
    if prefix is None:
        prefix = Prefix.of(_read(model, built.input_ids[:n_prefix], built.video_tokens).past_key_values)
        prefixes.put(key, prefix)
    if share:
        rest = PromptRest(prefix)
        logits = _read_rest(model, built.input_ids[n_prefix:], n_prefix, rest.cache)
        if rest.seen:
            return _ReadPrompt(logits, rest.cache, prefix)
    cache = prefix.to_cache()
    return _ReadPrompt(_read_rest(model, built.input_ids[n_prefix:], n_prefix, cache), cache)


def _read_rest(model: StormForConditionalGeneration, input_ids: Tensor, n_before: int, cache: Any) -> Tensor:
    """Return the first token's logits (vocab,), writing the tokens that follow the prefix into its cache."""
    rest = input_ids.to(model.device)
    out = model.language_model(
        inputs_embeds=model.embed_inputs(rest[None]),  # a source's mark behind the video is a vector of its own
        position_ids=torch.arange(n_before, n_before + len(rest), device=model.device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _only_text(model, out.logits[:, -1])[0]


def _read(model: StormForConditionalGeneration, input_ids: Tensor, video_tokens: Tensor) -> Any:
    video = video_tokens.to(model.device, model.dtype) if video_tokens.shape[0] else None
    return model(input_ids=input_ids[None].to(model.device), video_tokens=video, use_cache=True, logits_to_keep=1)


def _only_text(model: StormForConditionalGeneration, logits: Tensor) -> Tensor:
    """Forbid the video placeholder, which no answer can mean."""
    logits[:, model.config.video_token_id] = -torch.inf
    return logits


def _max_positions(model: StormForConditionalGeneration) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def _end_ids(model: StormForConditionalGeneration, processor: StormProcessor) -> set[int]:
    named = model.generation_config.eos_token_id if model.generation_config else None
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return {processor.eos_token_id, processor.end_of_answer_id, *named}
