"""What a standing query says: which streams it watches, in which windows, what it asks, and when that is an alert.

Defined here because a lane's snapshot keeps the definition that each open window began with: a change counts from
the next window on, also after a crash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .rows import ResultKind

DEFAULT_WINDOW_S = 10.0
CAPTION_PROMPT = "Describe what happens."
MAX_PATTERNS = 64


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AlertCondition(_Section):
    """When an answer means that what the alert is about is there. Exactly one of the three."""

    answer: str | None = Field(
        None, max_length=200, description="The answer begins with these words; case and punctuation do not count."
    )
    contains: str | None = Field(
        None, min_length=1, max_length=200, description="The answer has this in it; case does not count."
    )
    matches: str | None = Field(
        None, min_length=1, max_length=500, description="A regular expression (RE2) finds something; (?i) for any case."
    )

    @field_validator("answer", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        return value if not isinstance(value, bool) else "yes" if value else "no"  # what YAML makes of a bare yes

    @field_validator("answer")
    @classmethod
    def _has_words(cls, value: str | None) -> str | None:
        if value is not None and not _words(value):
            raise ValueError("expected at least one word, such as yes")
        return value

    @field_validator("matches")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                _matches(value, "")
            except pa.ArrowInvalid as error:
                raise ValueError(f"no regular expression of RE2: {error}") from None
        return value

    @model_validator(mode="after")
    def _is_one(self) -> AlertCondition:
        given = [name for name in ("answer", "contains", "matches") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'nothing'}, expected one of answer, contains and matches")
        return self

    def holds(self, answer: str) -> bool:
        """Tell whether an answer of the model fulfils it. Takes time linear in the answer, whatever the pattern."""
        if self.answer is not None:
            wanted = _words(self.answer)
            return _words(answer)[: len(wanted)] == wanted
        if self.contains is not None:
            return self.contains.casefold() in answer.casefold()
        assert self.matches is not None
        return _matches(self.matches, answer)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _matches(pattern: str, text: str) -> bool:
    # Arrow's expressions are RE2's: no pattern that somebody sends takes for ever, as Python's own may.
    found = pc.call_function("match_substring_regex", [pa.array([text])], pc.MatchSubstringOptions(pattern))
    return found[0].as_py()


class StandingQuery(_Section):
    """A question that is asked about every window of the streams that it names."""

    id: str = Field(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Its name, in the results' query_id.",
    )
    kind: ResultKind = Field(
        "caption", description="caption: a row for each window. alert: a row where its condition begins to hold."
    )
    streams: tuple[str, ...] = Field(
        ("*",), min_length=1, max_length=MAX_PATTERNS, description="Globs over stream ids; one that fits is enough."
    )
    prompt: str = Field(
        CAPTION_PROMPT, min_length=1, max_length=4000, description="What is asked; an alert must have its own."
    )
    window_s: float | None = Field(
        None, gt=0, le=86_400, description="Length of a window, counted from the session's start; 10 unless scenes."
    )
    scenes: bool = Field(False, description="Windows are the stream's scenes instead, as far as `scenes:` allows.")
    token_budget: int = Field(256, ge=1, le=1_000_000, description="Video tokens given to the LLM a window.")
    token_policy: Literal["recent", "uniform", "global_local", "changes"] = Field(
        "uniform", description="How they are chosen."
    )
    max_new_tokens: int = Field(48, ge=1, le=4096, description="Longest answer.")
    condition: AlertCondition | None = Field(
        None, description="Of an alert: which answers mean that it holds; the answer yes, where nothing is said."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("streams"), str):
            data["streams"] = [data["streams"]]
        if data.get("window_s") is None and not data.get("scenes"):
            data["window_s"] = DEFAULT_WINDOW_S
        if data.get("kind") == "alert" and data.get("condition") is None:
            data["condition"] = {"answer": "yes"}
        return data

    @field_validator("streams")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not all(0 < len(pattern) <= 256 for pattern in patterns):
            raise ValueError("expected patterns of 1 to 256 characters, such as gate-*")
        return patterns

    @model_validator(mode="after")
    def _fits_its_kind(self) -> StandingQuery:
        if self.kind == "alert" and "prompt" not in self.model_fields_set:
            raise ValueError("an alert needs a prompt: the question that is asked, such as 'Does anybody enter?'")
        if self.scenes and self.window_s is not None:
            raise ValueError("windows are either of window_s or scenes; leave one of them out")
        if self.kind == "caption" and self.condition is not None:
            raise ValueError("a caption has no condition; leave it out, or make it kind: alert")
        return self

    @property
    def window_ns(self) -> int:
        """Return the length of its windows, where they are not scenes."""
        assert self.window_s is not None
        return round(self.window_s * 1e9)

    def watches(self, stream_id: str) -> bool:
        """Tell whether a stream is one of those that it names."""
        return any(fnmatchcase(stream_id, pattern) for pattern in self.streams)

    def asks_as(self, other: StandingQuery) -> bool:
        """Tell whether both mean the same by an alert, so that one that holds in the one still holds in the other."""
        return (self.prompt, self.condition) == (other.prompt, other.condition)


def by_id(queries: Sequence[StandingQuery]) -> dict[str, StandingQuery]:
    """Return queries by their id, in order."""
    return {query.id: query for query in queries}
