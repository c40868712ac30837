"""What `ask` and `watch` share: requests to a running service, and what to say when it refuses."""

from __future__ import annotations

import http.client
import json
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from ...operators.errors import SettingsError, StormlineError

DEFAULT_URL = "http://127.0.0.1:8000"
_LAST_OF_LATIN_1 = 255


class NoServiceError(SettingsError):
    """Nothing answers there. Start the service, or name another with --url."""


def post_json(url: str, body: dict[str, Any], key: str | None, timeout_s: float) -> IO[bytes]:
    """Send a request.

    Args:
        url: From `service_url`.
        body: To send.
        key: Bearer key, if any.
        timeout_s: Without a byte for so long, it breaks off.

    Raises:
        NoServiceError: If the service is not there.
        SettingsError: If the key or the request is wrong.
        StormlineError: If it cannot answer just now.
    """
    return _open(Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}), key, timeout_s)


def get_stream(url: str, key: str | None, headers: dict[str, str], timeout_s: float) -> IO[bytes]:
    """Open something that goes on; otherwise as `post_json`."""
    return _open(Request(url, headers=headers), key, timeout_s)


def printable(text: str) -> str:
    """Take out what could steer the terminal: names and texts come from models that saw other people's pictures."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def header_value(text: str, option: str) -> str:
    """Return a text as a header may have it: without the white space around it, such as the end of a file's line.

    Args:
        text: It may be secret, and is not shown.
        option: What it was given with.

    Raises:
        SettingsError: If no header can have it.
    """
    value = text.strip()
    if not value.isprintable() or any(ord(c) > _LAST_OF_LATIN_1 for c in value):
        raise SettingsError(
            f"{option} has characters that no header can have (a line's end, letters beyond Latin-1); copy it anew"
        )
    return value


def service_url(url: str, path: str) -> str:
    """Return the address of a path below ``/v1``.

    Args:
        url: The service's, with or without ``/v1``.
        path: ``streams``, for example.

    Raises:
        SettingsError: If it is no address.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise _no_address(url)
    return f"{url.rstrip('/').removesuffix('/v1')}/v1/{path}"


def _open(request: Request, key: str | None, timeout_s: float) -> IO[bytes]:
    parts = urlsplit(request.full_url)
    if key:
        request.add_header("Authorization", f"Bearer {header_value(key, '--key')}")
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")  # no proxy knows the way to this machine
    opener = build_opener(ProxyHandler({})) if local else build_opener()
    try:
        return opener.open(request, timeout=timeout_s)
    except HTTPError as error:
        raise _refused(error, bool(key)) from None
    except TimeoutError:  # a connection that is not taken is a URLError
        raise StormlineError(
            f"the service at {parts.scheme}://{parts.netloc} does not answer within {timeout_s:.0f} s: it is busy, or "
            f"is no service of stormline. Try again in a moment."
        ) from None
    except ValueError:  # a host's name that no request can have
        raise _no_address(f"{parts.scheme}://{parts.netloc}") from None
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise NoServiceError(
            f"no service at {parts.scheme}://{parts.netloc} ({reason}). Start one with `stormline run --serve` or "
            f"`stormline serve OUT`, or name it with --url."
        ) from None


def _no_address(url: str) -> SettingsError:
    return SettingsError(f"--url {url!r} is no address of a service; expected http://HOST:PORT")


def _refused(error: HTTPError, with_key: bool) -> StormlineError:
    try:
        message = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {error.code} {error.reason}; is this a service of stormline?"
    if error.code == 401:
        hint = "Correct" if with_key else "Give"
        return SettingsError(f"{message}. {hint} --key, or STORMLINE_KEY in the environment.")
    return StormlineError(message) if error.code == 429 or error.code >= 500 else SettingsError(message)
