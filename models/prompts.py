"""What is asked about video, and what comes back: plain records that need no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .selection import VideoChunk


class ChatTemplateError(ValueError):
    """A model's own chat template does not take a conversation, such as two turns of the user in a row."""


@dataclass(frozen=True, eq=False)
class VideoPrompt:
    """A question about video, and how to answer it.

    Raises:
        ValueError: On a limit below 1 or a negative temperature.
    """

    text: str
    chunks: tuple[VideoChunk, ...] = ()  # in time order
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0, or so little that it is as good as 0, takes the likeliest token
    seed: int = 0  # of this prompt's own randomness
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    history: tuple[tuple[str, str], ...] = ()  # earlier turns, (role, text)

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0 or more")
        if not all(self.stop):
            raise ValueError("stop has an empty text; expected texts of one character or more")


@dataclass(frozen=True)
class VideoAnswer:
    """An answer, and what it took."""

    text: str
    prompt_tokens: int  # video tokens included
    video_tokens: int
    generated_tokens: int  # without the one that ends it
    finish_reason: str  # stop: it ended, or met a stop text; length: it was cut off
