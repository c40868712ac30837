"""What goes into the model: frames as normalised pixels, and prompts with a time and a placeholder per video token.

A prompt for two chunks of three tokens each, as the small tokenizer's chat template writes it (V is ``<|video|>``):

    <|bos|><|user|>[00:12]VVV[00:14]VVV
    What happens?<|end|><|assistant|>

The model then puts one video token in the place of each V. An imported model's prompt is written by its own chat
template, with its own placeholder and with its marks around the tokens of one frame, or of frames averaged into one:

    [00:12]<img>VVV</img>[00:14]<img>VVV</img>
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from .prompts import ChatTemplateError
from .selection import VideoChunk

CONFIG_FILE = "processor_config.json"
KEPT_TEXTS = 256  # prompts whose tokens are kept


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt ready for the model."""

    input_ids: Tensor  # (n,) int64, with one placeholder for each video token
    video_tokens: Tensor = field(repr=False)  # (n_video_tokens, d_model) float16, in the placeholders' order

    @property
    def n_tokens(self) -> int:
        """Return its length, video tokens included."""
        return self.input_ids.shape[0]


def normalise_frames(
    frames: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn frames into what a vision tower takes: scaled to 0…1, then (x - mean) / std for each channel.

    Args:
        frames: (..., H, W, 3) uint8 RGB.
        mean: Of R, G and B.
        std: Of R, G and B.
        dtype: Of the result; computed in float32.

    Returns:
        (..., 3, H, W), contiguous, on the frames' device.

    Raises:
        ValueError: If the frames are not uint8 or have not three channels.
    """
    if frames.dtype != torch.uint8 or frames.dim() < 3 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames are {frames.dtype} of shape {tuple(frames.shape)}; expected torch.uint8 of shape (..., H, W, 3)"
        )
    scale = torch.tensor([1 / (255 * s) for s in std], device=frames.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=frames.device)
    pixels = frames.to(torch.float32) * scale + shift
    return pixels.movedim(-1, -3).to(dtype).contiguous()


def format_time(seconds: float) -> str:
    """Return the time as a prompt shows it: ``[mm:ss]``, from one hour on ``[h:mm:ss]``, rounded down.

    >>> format_time(12.9), format_time(3723)
    ('[00:12]', '[1:02:03]')
    """
    sign, whole = ("-", int(-seconds)) if seconds < 0 else ("", int(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"[{sign}{hours}:{minutes:02d}:{rest:02d}]" if hours else f"[{sign}{minutes:02d}:{rest:02d}]"


class StormProcessor:
    """Prepares frames and prompts for one model, and reads its answers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_size: int,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        video_token: str = "<|video|>",
        frame_prefix: str = "",
        frame_suffix: str = "",
        video_suffix: str = "",
        frame_tokens: int = 0,
        content_parts: bool = False,
    ):
        """Check that the tokenizer can write prompts.

        Args:
            tokenizer: With a chat template, and with `video_token` as one of its tokens.
            image_size: Side of a frame in pixels.
            image_mean: Of R, G and B, in 0…1.
            image_std: Of R, G and B.
            video_token: The placeholder.
            frame_prefix: What an imported model wants before the tokens of one frame.
            frame_suffix: And after them.
            video_suffix: And after the last token of a video.
            frame_tokens: Tokens of one (pooled) frame; a chunk with more is written as several frames. 0: any number.
            content_parts: Whether the chat template wants a message's content as a list of parts.

        Raises:
            ValueError: If the tokenizer has no chat template or does not know the placeholder.
        """
        ids = list(tokenizer.encode(video_token, add_special_tokens=False))
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer splits the video placeholder {video_token!r} into {len(ids)} tokens; expected one. "
                "Name a token that it has, or add this one as a special token"
            )
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; expected one. Use the instruction-tuned model's, or set it"
            )
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.video_token, self.video_token_id = video_token, ids[0]
        self.frame_prefix, self.frame_suffix, self.video_suffix = frame_prefix, frame_suffix, video_suffix
        self.frame_tokens, self.content_parts = frame_tokens, content_parts
        self._eos_token_id = next(iter(tokenizer.encode(str(tokenizer.eos_token), add_special_tokens=False)))
        self._end_of_answer_id = self._find_end_of_answer()
        # Windows of one length have the same times, and the same is asked of each, so texts come again and again. A
        # template that writes the date has new ones each day.
        dated = "strftime_now" in str(tokenizer.chat_template)
        self._encode_turns = self._encode if dated else lru_cache(KEPT_TEXTS)(self._encode)
        self._special_texts = {video_token} | {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }

    @property
    def eos_token_id(self) -> int:
        """Return the tokenizer's own end token, which may end an answer."""
        return self._eos_token_id

    @property
    def end_of_answer_id(self) -> int:
        """Return the token that the chat template puts behind an answer, such as Gemma's ``<end_of_turn>``."""
        return self._end_of_answer_id

    def prepare_frames(self, frames: np.ndarray | Tensor) -> Tensor:
        """Return pixel_values (..., 3, H, W) float32 of frames (..., H, W, 3) uint8 RGB at the model's size.

        Raises:
            ValueError: If the frames have another size or type.
        """
        frames = torch.as_tensor(frames)
        if frames.shape[-3:-1] != (self.image_size, self.image_size):
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}; expected (..., {self.image_size}, {self.image_size}, 3). "
                "Decode or resize them to the model's size"
            )
        return normalise_frames(frames, self.image_mean, self.image_std)

    def build_prompt(
        self, text: str, chunks: Sequence[VideoChunk] = (), *, history: Sequence[tuple[str, str]] = ()
    ) -> Prompt:
        """Write a prompt: for each chunk its time and its tokens' placeholders, then the text.

        Special tokens that somebody types into a text are split, so that they mean nothing.

        Args:
            text: The question or instruction.
            chunks: In time order; those without tokens are left out.
            history: Turns before this one, (role, text) with role system, user or assistant.

        Raises:
            ValueError: On an unknown role, or where the chat template drops the placeholders.
        """
        chunks = [chunk for chunk in chunks if chunk.n_tokens]
        frames = [self._split_frames(chunk.n_tokens) for chunk in chunks]  # tokens of each frame, by chunk
        one = self.frame_prefix + self.video_token + self.frame_suffix
        video = "".join(
            format_time(chunk.start_s) + one * len(sizes) for chunk, sizes in zip(chunks, frames, strict=True)
        )
        content = f"{video}{self.video_suffix}\n{self.split_special(text)}" if video else self.split_special(text)
        turns = [*((role, self.split_special(turn)) for role, turn in history), ("user", content)]
        ids = np.asarray(self._encode_turns(tuple(turns)), dtype=np.int64)
        is_video, n_places = ids == self.video_token_id, sum(len(sizes) for sizes in frames)
        if is_video.sum() != n_places:
            raise ValueError(
                f"the chat template's text has {is_video.sum()} video placeholders; expected {n_places}, one per "
                "frame or chunk. The template changes or drops the user's text"
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_video] = [n for sizes in frames for n in sizes]
        return Prompt(torch.from_numpy(np.repeat(ids, repeats)), _concatenate(chunks))

    def split_special(self, text: str) -> str:
        """Return a text with its special tokens split by a space, so that they mean nothing."""
        for special in self._special_texts:
            text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and `processor_config.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        values = {
            "processor_class": type(self).__name__,
            "image_size": self.image_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "video_token": self.video_token,
        }
        marks = ("frame_prefix", "frame_suffix", "video_suffix", "frame_tokens", "content_parts")
        values |= {name: getattr(self, name) for name in marks if getattr(self, name)}
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> StormProcessor:
        """Read what `save_pretrained` wrote: from a folder, or from the hub by an id like ``owner/name``.

        Raises:
            FileNotFoundError: If there is no `processor_config.json`.
        """
        path = cached_file(str(folder), CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise FileNotFoundError(f"{folder}/{CONFIG_FILE} is missing; expected a folder that save_pretrained wrote")
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        values.pop("processor_class", None)
        is_local = Path(folder).is_dir()
        return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=is_local), **values)

    def _encode(self, turns: tuple[tuple[str, str], ...]) -> list[int]:
        """Return the tokens of a conversation, (role, text) by (role, text), that waits for an answer.

        Raises:
            ChatTemplateError: Where the model's own chat template refuses it.
        """
        from jinja2 import TemplateError

        messages = [self._message(role, text) for role, text in turns]
        try:
            rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:  # such as two turns of the user in a row
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from None
        bos = self.tokenizer.bos_token  # a template that leaves it out counts on the tokenizer, as in transformers
        adds_bos = bos is not None and not rendered.startswith(str(bos))
        return list(self.tokenizer.encode(rendered, add_special_tokens=adds_bos))

    def _find_end_of_answer(self) -> int:
        mark = "stormline"  # stands for an answer
        turns = [self._message("user", "?"), self._message("assistant", mark)]
        behind = str(self.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ids = self.tokenizer.encode(behind, add_special_tokens=False)
        return next((i for i in ids if i in special), self._eos_token_id)

    def _split_frames(self, n_tokens: int) -> list[int]:
        """Return how many of a chunk's tokens go into each of its frames."""
        size = self.frame_tokens or n_tokens
        return [min(size, n_tokens - start) for start in range(0, n_tokens, size)]

    def _message(self, role: str, text: str) -> dict[str, Any]:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"role is {role!r}; expected system, user or assistant")
        return {"role": role, "content": [{"type": "text", "text": text}] if self.content_parts else text}


def _concatenate(chunks: Sequence[VideoChunk]) -> Tensor:
    if not chunks:
        return torch.zeros(0, 0, dtype=torch.float16)
    # A copy: chunks may be read-only views into somebody's buffers, which torch cannot mark.
    return torch.from_numpy(np.concatenate([chunk.tokens for chunk in chunks]).astype(np.float16))
