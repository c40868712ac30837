"""What goes wrong with a request, in OpenAI's form, so that OpenAI's clients raise their own classes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ApiError(Exception):
    """A request that is answered with an error. Its message is for who asked, and never goes into a log.

    Args:
        status: Of HTTP.
        message: What was got, what was expected, and the next step.
        code: One word for programs.
        param: Which part of the request.
        retry_after_s: When to try again, where that helps.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        error = {"message": self.message, "type": _type_of(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how errors with these statuses look, for the description of the interface."""
    return {status: {"model": ErrorBody, "description": _type_of(status)} for status in statuses}


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
