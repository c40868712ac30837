"""What the first stages read off: linear heads that say what is at each place. They are not part of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clips import CHANGE_NAMES, FPS, MOTIONS, RECENT_S, SPEED_NAMES, UNKNOWN, PlaceLabels
from .shapes_spec import COLOURS, SHAPES, SIZES

_CLASSES = {
    "colour": 1 + len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "speed": len(SPEED_NAMES),
    "change": 1 + len(CHANGE_NAMES),
    "background": 2,
}
STILL_TARGETS = ("colour", "shape", "size")
MOVING_TARGETS = (*STILL_TARGETS, "motion", "speed", "change", "background")
_MOSTLY_NOTHING = ("colour", "change", "background")  # their class 0
_SHADE_SCALES = (5.0, 50.0)  # of a place's mean colour and its change, whose differences are small and smaller
_AGE_SCALE = 2.0  # of how long ago an object changed, in seconds
_NOTHING_SHARE = 0.3  # of the loss of targets that know "nothing": places without an object are nine in ten


class PlaceHeads(nn.Module):
    """A norm and a linear layer for each target, one for where in the place the object is, and those asked for.

    Args:
        width: Of what is read.
        targets: What to tell.
        shade: Whether to tell a place's mean colour, too, and by how much it changed of late.
        ages: Whether to tell how long ago the object there changed.
    """

    def __init__(self, width: int, targets: Sequence[str], *, shade: bool = False, ages: bool = False):
        super().__init__()
        self.targets = tuple(targets)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, _CLASSES[name]) for name in self.targets})
        self.offset = nn.Linear(width, 2)
        self.shade = nn.Linear(width, 6) if shade else None
        self.age = nn.Linear(width, 1) if ages else None

    def loss(self, x: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and of each target (right, asked) counts of the places that have an object.

        Args:
            x: (..., width).
            labels: From `stack_labels`, each of x's leading shape; with the shade from `shades_of`, where it is told.
        """
        x = self.norm(x.float())
        losses: list[Tensor] = []
        counts: dict[str, Tensor] = {}
        for name in self.targets:
            logits, wanted = self.heads[name](x), labels[name]
            something = wanted > 0 if name in _MOSTLY_NOTHING else wanted != UNKNOWN
            losses.append(_mean_loss(logits, wanted, something))
            if name in _MOSTLY_NOTHING:
                losses.append(_NOTHING_SHARE * _mean_loss(logits, wanted, wanted == 0))
            right = (logits.detach().argmax(-1) == wanted) & something
            counts[name] = torch.stack([right.sum(), something.sum()])
        there = ~torch.isnan(labels["offset"][..., 0])
        if there.any():
            losses.append(F.smooth_l1_loss(self.offset(x)[there], labels["offset"][there], beta=0.1))
        if self.shade is not None:
            told, wanted = self.shade(x).split(3, -1), labels["shade"].split(3, -1)
            for scale, a, b in zip(_SHADE_SCALES, told, wanted, strict=True):
                losses.append(scale * F.smooth_l1_loss(a, b, beta=0.02))
        aged = ~torch.isnan(labels["age"])
        if self.age is not None and aged.any():
            told = self.age(x)[..., 0][aged]
            losses.append(_AGE_SCALE * F.smooth_l1_loss(told, labels["age"][aged], beta=0.25))
            near = (told.detach() - labels["age"][aged]).abs() < 0.5 / FPS
            counts["age"] = torch.stack([near.sum(), aged.sum()])
        return torch.stack(losses).sum(), counts


def _mean_loss(logits: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean cross entropy over the chosen places, 0 where there is none."""
    if not chosen.any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits[chosen], wanted[chosen])


def stack_labels(labels: Sequence[PlaceLabels], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return clips' labels as tensors (B, T, grid, grid), `offset` with two more."""
    names = (*MOVING_TARGETS, "offset", "age")
    return {name: torch.from_numpy(np.stack([getattr(one, name) for one in labels])).to(device) for name in names}


def shades_of(frames: np.ndarray, grid: int) -> Tensor:
    """Return the mean colour of each place, in [-1, 1], and what it was less in the frame `RECENT_S` before.

    Args:
        frames: (T, size, size, 3) uint8 RGB.
        grid: Places in a row.

    Returns:
        (T, grid, grid, 6) float32.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    shades = F.adaptive_avg_pool2d(pixels, grid).permute(0, 2, 3, 1) / 127.5 - 1.0
    before = (torch.arange(len(shades)) - round(RECENT_S * FPS)).clamp(min=0)
    return torch.cat([shades, shades - shades[before]], -1)
