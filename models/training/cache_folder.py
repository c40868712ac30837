"""A folder of what a frozen part of the model made of clips: files of so many clips, for one state of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..storm import StormForConditionalGeneration

SHARD_CLIPS = 32  # in a file: what an interruption loses, at most


def shard_path(folder: Path, first: int) -> Path:
    """Return the file of the clips from `first` on."""
    return folder / f"clips-{first:06d}.safetensors"


def weights_hash(model: StormForConditionalGeneration, parts: Iterable[str]) -> str:
    """Return hex digits that change with the weights of a model's parts."""
    digest = hashlib.sha256()
    for name in parts:
        for key, tensor in sorted(model.parameters_of(name).items()):
            digest.update(key.removeprefix(f"{name}.").encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def keep_only(folder: Path, wanted: dict[str, object]) -> None:
    """Delete a folder's clips if they are not those that are wanted, and say which are."""
    about = folder / "about.json"
    if about.is_file() and _read(about) == wanted:
        return
    for path in folder.glob("clips-*.safetensors"):
        path.unlink()
    text = json.dumps(wanted, indent=2) + "\n"
    written_whole(about, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read(about: Path) -> object:
    """Return what a file says, or nothing where it is cut off."""
    try:
        return json.loads(about.read_text(encoding="utf-8"))
    except ValueError:
        return None


def written_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then give it its own: it is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    write(temporary)
    os.replace(temporary, path)
