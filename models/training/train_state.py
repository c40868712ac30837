"""Where a training stands, on disk: weights and the optimisers' memory as safetensors, the rest as JSON.

Written whole or not at all: the tensors under a new name first, then `state.json`, which names them. A kill at any
moment leaves the state before or the state after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE_FILE = "state.json"
STATE_VERSION = 1


@dataclass(frozen=True)
class Optimizers:
    """The optimisers of a stage, with the names of what they train."""

    parts: tuple[torch.optim.Optimizer, ...]
    names: Mapping[int, str]  # by id of the parameter

    def step(self, learning_rate: float) -> None:
        """Change the weights by their gradients."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            optimizer.step()

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what they remember as named tensors."""
        tensors = {}
        for optimizer in self.parts:
            for parameter, memory in optimizer.state.items():
                for key, value in memory.items():
                    tensors[f"optimizer/{self.names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach().cpu()
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `to_tensors` gave."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = f"optimizer/{self.names[id(parameter)]}/"
                    memory = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                    # `step` stays on CPU, where the optimisers keep it.
                    optimizer.state[parameter] = {
                        k: v.clone() if k == "step" else v.to(parameter.device, copy=True) for k, v in memory.items()
                    }


def build_optimizers(
    parameters: Mapping[str, nn.Parameter], optimizer: str, learning_rate: float, weight_decay: float
) -> Optimizers:
    """Build the optimisers of a stage.

    Muon (Jordan and others, 2024) is for the matrices inside the blocks; embeddings, norms, heads and convolutions
    stay with AdamW. Its steps are scaled to AdamW's size, so that one learning rate serves both.
    """
    names = {id(p): name for name, p in parameters.items()}
    matrices = [p for n, p in parameters.items() if optimizer == "muon" and p.ndim == 2 and _is_inside(n)]
    taken = {id(p) for p in matrices}
    decayed = [p for p in parameters.values() if id(p) not in taken and p.ndim >= 2]
    plain = [p for p in parameters.values() if id(p) not in taken and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    parts: list[torch.optim.Optimizer] = []
    if groups:
        parts.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98)))
    if matrices:
        group = {"params": matrices, "lr_scale": 1.0}
        parts.append(
            torch.optim.Muon([group], lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return Optimizers(tuple(parts), names)


def _is_inside(name: str) -> bool:
    return ".layers." in name or ".blocks." in name


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a state, replacing the one before.

    Args:
        folder: For the files.
        tensors: On CPU, each with memory of its own.
        values: JSON-able; must have ``stage`` and ``step``, which name the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tensors-{values['stage']:02d}-{values['step']:07d}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.tmp")
    _sync_and_rename(folder / f"{name}.tmp", folder / name)
    text = json.dumps({"version": STATE_VERSION, "tensors": name, **values}, indent=1)
    temporary = folder / f"{STATE_FILE}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    _sync_and_rename(temporary, folder / STATE_FILE)
    for path in folder.glob("tensors-*"):
        if path.name != name:
            path.unlink()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what `save_state` wrote last, or None where there is nothing.

    Raises:
        ValueError: If another version wrote it.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("version") != STATE_VERSION:
        raise ValueError(
            f"{path} has version {values.get('version')}; expected {STATE_VERSION}. Start anew in another folder"
        )
    return load_file(folder / values["tensors"]), values


def _sync_and_rename(temporary: Path, final: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
