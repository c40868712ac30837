"""Reads a request of OpenAI's chat completions, with video parts, against the service's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from ..settings import ServeSettings
from .api_errors import ApiError
from .stream_urls import StreamRange, parse_stream_url

_MAX_MESSAGES = 256
_MAX_STOPS = 4  # as OpenAI allows
_INT64 = 2**63


def _kind(value: Any) -> str:
    """Tell a text from a list, so that an error names what is wrong within the list."""
    return _LIST if isinstance(value, list) else _TEXT


_TEXT, _LIST = "a text", "a list"  # in pydantic's account of where an error is; left out of ours


class Part(BaseModel):
    """Something of a request; what it has beyond is passed over."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Part):
    """Text within a message."""

    type: Literal["text"]
    text: str


class VideoUrl(Part):
    """``stream://cam-1?last=600s`` or ``stream://cam-1?start=TIME&end=TIME``."""

    url: str


class VideoPart(Part):
    """A range of a stream within a message."""

    type: Literal["video_url"]
    video_url: VideoUrl


class ChatMessage(Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str | None, Tag(_TEXT)]
        | Annotated[list[Annotated[TextPart | VideoPart, Field(discriminator="type")]], Tag(_LIST)],
        Discriminator(_kind),
    ]


class StreamOptions(Part):
    """About an answer in pieces."""

    include_usage: bool | None = None


class ChatBody(Part):
    """The body; what would not change the answer (user, metadata…) may stand there and is passed over."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Annotated[Annotated[str | None, Tag(_TEXT)] | Annotated[list[str], Tag(_LIST)], Discriminator(_kind)] = None
    token_budget: int | None = Field(None, ge=1)
    token_policy: Literal["auto", "recent", "uniform", "global_local", "relevant", "changes"] | None = None


# What would change the answer and is not supported: refused unless it says what holds anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}


@dataclass(frozen=True)
class ChatRequest:
    """A question about video, checked."""

    model: str | None
    ranges: tuple[StreamRange, ...]  # of all messages, in order, each once
    question: str = field(repr=False)
    history: tuple[tuple[str, str], ...] = field(repr=False)
    stream: bool
    include_usage: bool
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = field(repr=False)
    token_budget: int
    token_policy: str


def read_chat_request(body: Any, limits: ServeSettings) -> ChatRequest:
    """Check a request's JSON.

    Video parts may stand in any of the user's messages, so that a conversation can go on by sending it again with one
    more question. Greedy where no temperature is given, because a caption of what happened is no place for chance.

    Args:
        body: As parsed.
        limits: The service's.

    Raises:
        ApiError: 400, with `param` naming the place.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the body is a JSON {type(body).__name__}; expected an object with `messages`")
    for name, neutral in _REFUSED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise bad_request(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
    try:
        asked = ChatBody.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = _where(first["loc"])
        raise bad_request(f"{where}: {first['msg']}", where) from None
    turns = [("system" if m.role == "developer" else m.role, _text_of(m)) for m in asked.messages]
    n_chars = sum(len(text) for _, text in turns)
    if n_chars > limits.max_prompt_chars:
        message = f"the messages have {n_chars} characters; expected {limits.max_prompt_chars} or fewer"
        raise bad_request(message, "messages", "context_length_exceeded")
    if turns[-1][0] != "user" or not turns[-1][1]:
        raise bad_request("the last message is the question: expected one of role user with text", "messages")
    max_tokens = asked.max_completion_tokens or asked.max_tokens or limits.max_tokens
    if max_tokens > limits.max_tokens:
        raise bad_request(f"max_tokens is {max_tokens}; expected {limits.max_tokens} or fewer", "max_tokens")
    return ChatRequest(
        model=asked.model,
        ranges=_ranges_of(asked.messages, limits),
        question=turns[-1][1],
        history=tuple(turns[:-1]),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        max_tokens=max_tokens,
        temperature=asked.temperature or 0.0,
        seed=asked.seed or 0,
        stop=_stops_of(asked.stop),
        token_budget=_budget_of(asked.token_budget, limits),
        token_policy=asked.token_policy or limits.token_policy,
    )


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error for a request that cannot be understood or is beyond a limit."""
    return ApiError(400, message, code=code, param=param)


def _where(places: Sequence[str | int]) -> str:
    """Return an error's place in the request, without the names that pydantic gives to what a value may be."""
    kept = [
        str(place)
        for i, place in enumerate(places)
        if place not in (_TEXT, _LIST) and not (i > 1 and places[i - 2] == _LIST and isinstance(place, str))
    ]
    return ".".join(kept)


def _text_of(message: ChatMessage) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _ranges_of(messages: Sequence[ChatMessage], limits: ServeSettings) -> tuple[StreamRange, ...]:
    ranges: dict[StreamRange, None] = {}
    for i, message in enumerate(messages):
        for part in message.content if isinstance(message.content, list) else []:
            if isinstance(part, VideoPart):
                ranges[_range_of(part, message.role, f"messages.{i}.content", limits)] = None
    if not ranges:
        raise bad_request(
            "there is no video to look at; expected a content part such as "
            '{"type": "video_url", "video_url": {"url": "stream://cam-1?last=600s"}}; GET /v1/streams lists them',
            "messages",
            "missing_video",
        )
    if len(ranges) > limits.max_parts:
        raise bad_request(f"{len(ranges)} video parts; expected {limits.max_parts} or fewer", "messages")
    return tuple(ranges)


def _range_of(part: VideoPart, role: str, where: str, limits: ServeSettings) -> StreamRange:
    if role != "user":
        raise bad_request(f"a video part in a message of role {role}; expected it in one of role user", where)
    try:
        asked = parse_stream_url(part.video_url.url)
    except ValueError as error:
        raise bad_request(str(error), where, "invalid_stream_url") from None
    length_s = asked.last_s
    if asked.start_ns is not None and asked.end_ns is not None:
        length_s = (asked.end_ns - asked.start_ns) / 1e9
    if length_s is not None and length_s > limits.max_range_s:
        raise range_too_long(length_s, limits, where)
    return asked


def range_too_long(length_s: float, limits: ServeSettings, where: str) -> ApiError:
    """Return the error for a range beyond the limit."""
    message = f"the range is {length_s:.0f} s long; expected {limits.max_range_s:.0f} s or less: ask about parts of it"
    return bad_request(message, where, "range_too_long")


def _stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or not all(stops):
        raise bad_request(f"stop: expected at most {_MAX_STOPS} texts, none of them empty", "stop")
    return stops


def _budget_of(budget: int | None, limits: ServeSettings) -> int:
    if budget is not None and budget > limits.token_budget:
        raise bad_request(f"token_budget is {budget}; expected {limits.token_budget} or fewer", "token_budget")
    return budget or limits.token_budget
