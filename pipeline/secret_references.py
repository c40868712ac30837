"""Secrets by reference: ``${env:NAME}`` or ``${file:/path}``, resolved where they are used and never written down."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..operators.errors import SettingsError

_REFERENCE = re.compile(r"^\$\{(env|file):([^}]+)\}$")


def is_reference(value: str) -> bool:
    """Tell whether a value refers to a secret."""
    return _REFERENCE.match(value) is not None


def resolve_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Replace ``${env:NAME}`` and ``${file:/path}`` values by what they refer to.

    Raises:
        SettingsError: If the variable is not set or the file cannot be read.
    """
    return {key: resolve_secret(key, value) for key, value in options.items()}


def resolve_secret(key: str, value: Any) -> Any:
    """Return what one value refers to, or itself where it refers to nothing.

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
        return os.environ[name]
    try:
        return Path(name).read_text().strip()
    except OSError as e:
        raise SettingsError(f"{key}: cannot read the secret file {name}: {e.strerror}.") from e
