"""Secrets by reference: ``${env:NAME}`` or ``${file:/path}``, resolved where they are used and never written down."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from ..operators.errors import SettingsError

MAX_FILE_BYTES = 64 << 10  # keys and certificates are smaller
_REFERENCE = re.compile(r"^\$\{(env|file):([^}]+)\}$")


def is_reference(value: str) -> bool:
    """Tell whether a value refers to a secret."""
    return _REFERENCE.match(value) is not None


def resolve_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Replace ``${env:NAME}`` and ``${file:/path}`` values by what they refer to.

    Raises:
        SettingsError: If the variable is not set or the file cannot be read; or what they hold is no text.
    """
    return {key: resolve_secret(key, value) for key, value in options.items()}


def resolve_secret(key: str, value: Any) -> Any:
    """Return what one value refers to, or itself where it refers to nothing. Reads a file, which may take its time.

    Raises:
        SettingsError: As `resolve_secrets`.
    """
    match = _REFERENCE.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    kind, name = match.groups()
    if kind == "env":
        if name not in os.environ:
            raise SettingsError(f"{key}: the environment variable {name} is not set; set it or correct the reference.")
        what, secret = f"environment variable {name}", os.fsencode(os.environ[name])
    else:
        what, secret = f"secret file {name}", _read_file(key, Path(name)).strip()
    try:
        return secret.decode()
    except UnicodeDecodeError:  # which holds the secret
        raise SettingsError(f"{key}: what the {what} holds is not UTF-8; write the secret as text.") from None


def _read_file(key: str, path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device may have no end, and a pipe nobody who writes
            raise SettingsError(
                f"{key}: {path} is no regular file, which a secret is read from; correct the reference."
            )
        with path.open("rb") as file:
            secret = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise SettingsError(f"{key}: cannot read the secret file {path}: {e.strerror}.") from e
    except ValueError as e:  # of a name that no file can have
        raise SettingsError(f"{key}: cannot read the secret file {str(path)!r}: {e}.") from e
    if len(secret) > MAX_FILE_BYTES:
        raise SettingsError(f"{key}: the secret file {path} has more than {MAX_FILE_BYTES} bytes; is it another file?")
    return secret
