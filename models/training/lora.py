"""LoRA (arXiv 2106.09685) for the language model, by peft: small matrices beside its own, which stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..storm import StormForConditionalGeneration

PART = "language_model"


@dataclass(frozen=True)
class Lora:
    """How the language model is adapted.

    Attributes:
        rank: Of the small matrices.
        alpha: Their product counts alpha / rank.
        dropout: Of their input, in training.
        modules: Names of the linear layers that get them, by their ends (``q_proj``); none for all but the last.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))  # YAML has lists
        if self.rank < 1:
            raise ValueError(f"lora: rank is {self.rank}; expected 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"lora: alpha is {self.alpha}; expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is {self.dropout}; expected 0 or more, and less than 1")


class Adapters:
    """The small matrices in a model's language model, from now until they are merged.

    Args:
        model: Gets them in place.
        lora: Which.
        seed: Of their start; until trained they change nothing.

    Raises:
        ImportError: Without peft.
        ValueError: If no layer has one of the names.
    """

    def __init__(self, model: StormForConditionalGeneration, lora: Lora, seed: int):
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError as error:
            raise ImportError("LoRA needs peft: pip install 'stormline[train]'") from error
        torch.manual_seed(seed)
        wanted: Any = list(lora.modules) or "all-linear"
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=wanted,  # type: ignore[arg-type]
        )
        self._tuner: Any = LoraModel(model.language_model, config, "default")
        self._model = model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the small matrices by their names in the model."""
        return {name: p for name, p in self._model.parameters_of(PART).items() if ".lora_" in name}

    def merge(self) -> None:
        """Add them to the matrices they stand beside: the model is then an ordinary one again."""
        self._model.language_model = self._tuner.merge_and_unload()
