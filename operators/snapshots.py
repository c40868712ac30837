"""States of streams as bytes: one safetensors blob for the streams of one partition. Nothing is ever unpickled.

Tensors are named ``<number of the stream>/<name>``; what is not a tensor stands as JSON in the blob's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from .errors import CheckpointError
from .rows import Buffer

METADATA_KEY = "stormline"


class StreamSnapshot(NamedTuple):
    """One stream's state in one step."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def pack_snapshot(step: str, version: int, streams: Mapping[str, StreamSnapshot]) -> bytes:
    """Return one blob with the states of `streams`, by stream id."""
    names = sorted(streams)
    arrays = {
        f"{i}/{key}": np.ascontiguousarray(value)
        for i, name in enumerate(names)
        for key, value in streams[name].arrays.items()
    }
    header = {
        "step": step,
        "version": version,
        "streams": [{"stream_id": name, "header": streams[name].header} for name in names],
    }
    return save(arrays, metadata={METADATA_KEY: json.dumps(header)})


def unpack_snapshot(step: str, version: int, blob: Buffer) -> dict[str, StreamSnapshot]:
    """Read back what `pack_snapshot` wrote.

    Raises:
        CheckpointError: If the blob is of another step or version.
    """
    data = bytes(blob)
    header = json.loads(_metadata(data)[METADATA_KEY])
    if (header["step"], header["version"]) != (step, version):
        raise CheckpointError(
            f"state of {header['step']} version {header['version']}, expected {step} version {version}: "
            "it was written by another stormline; use that one, or a new output folder"
        )
    arrays = load(data)
    streams = {s["stream_id"]: StreamSnapshot(s["header"], {}) for s in header["streams"]}
    order = list(streams.values())
    for name, array in arrays.items():
        i, _, key = name.partition("/")
        order[int(i)].arrays[key] = array
    return streams


def _metadata(data: bytes) -> dict[str, str]:
    """Read the metadata of a safetensors blob: 8 bytes of header length, then the header in JSON."""
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n])["__metadata__"]
