"""The vision side of a model that somebody else trained: transformers' own code, called through one interface.

A frame goes through the source's vision tower, its pixel shuffle or pooling and its projector, in whichever order the
source has them, by `get_video_features` where it has that and else by `get_image_features`. What comes out are places
of the language model's width, row by row; the temporal encoder follows. So a family needs no code of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig

FRAME_CALLS = ("video", "images", "image_list")


@dataclass(frozen=True)
class ImportedConfig:
    """What `StormConfig` says of an imported model beyond its own configuration. JSON-able.

    Raises:
        ValueError: On values that no import gives.
    """

    name: str  # for people and for `/v1/models`
    frame_call: str  # "video": get_video_features(B, T, 3, H, W); "images": get_image_features(B·T, 3, H, W);
    # "image_list": get_image_features(B, T, 3, H, W)
    grid: int  # places along one side of a frame, after the source's own pooling
    newline_token_id: int | None = None  # stands for the vector that the source puts after a video
    bidirectional_video: bool = False  # tokens of one frame also look ahead, at each other (Gemma 3)

    def __post_init__(self):
        if self.frame_call not in FRAME_CALLS:
            raise ValueError(f"imported: frame_call is {self.frame_call!r}; expected one of {', '.join(FRAME_CALLS)}")
        if self.grid < 1:
            raise ValueError(f"imported: grid is {self.grid}; expected 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImportedConfig:
        """Build it from `to_dict`'s result.

        Raises:
            ValueError: On an unknown key.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"imported has unknown keys {unknown}; expected only {sorted(known)}")
        return cls(**values)


class FrameEncoder(nn.Module):
    """A source model without its language model: frames in, projected places out."""

    def __init__(self, source_config: PreTrainedConfig, imported: ImportedConfig):
        """Build it with fresh weights.

        Args:
            source_config: From `without_language`.
            imported: How the source is called.
        """
        super().__init__()
        self.model: Any = AutoModel.from_config(source_config)
        drop_language(self.model)
        self.frame_call, self.grid = imported.frame_call, imported.grid
        self.has_newline = imported.newline_token_id is not None

    @property
    def tower(self) -> nn.Module:
        """Return the vision tower, without pooling and projector."""
        return self.model.get_encoder(modality="image")

    @property
    def newline(self) -> Tensor:
        """Return the vector (d_model,) that ends a video; only where there is one."""
        return self.model.image_newline

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode frames (B, T, 3, H, W), normalised, into places (B, T, grid, grid, d_model).

        Raises:
            ValueError: If the source gives another number of places than `grid` says.
        """
        n_clips, n_frames = pixel_values.shape[:2]
        tokens = call_source(self.model, self.frame_call, pixel_values)
        n_places = n_frames * self.grid**2
        if tokens.shape[1] != n_places + self.has_newline:
            raise ValueError(
                f"the imported vision side gave {tokens.shape[1]} tokens for {n_frames} frames; expected {n_places}"
                f"{' and one that ends the video' if self.has_newline else ''}. Import the model again"
            )
        places = tokens[:, :n_places]  # what ends a video is put there by the prompt, once
        return rearrange(places, "b (t r c) d -> b t r c d", b=n_clips, r=self.grid, c=self.grid)


def call_source(model: Any, frame_call: str, pixel_values: Tensor) -> Tensor:
    """Return what a source makes of clips (B, T, 3, H, W): (B, n_tokens, d_model)."""
    # A copy starts at an aligned address: a chunk by itself then rounds as the same chunk of a longer clip.
    pixel_values = pixel_values.clone(memory_format=torch.contiguous_format)
    if frame_call == "video":
        out = model.get_video_features(pixel_values, return_dict=True)
    elif frame_call == "images":
        out = model.get_image_features(pixel_values.flatten(0, 1), return_dict=True)
    else:
        out = model.get_image_features(pixel_values, return_dict=True)
    tokens = out.pooler_output
    if not isinstance(tokens, Tensor):
        tokens = torch.cat([each.reshape(-1, each.shape[-1]) for each in tokens])
    return tokens.reshape(pixel_values.shape[0], -1, tokens.shape[-1])


def without_language(source_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the source's configuration with as little of a language model as can be built; its width is kept."""
    trimmed = deepcopy(source_config)
    text: Any = trimmed.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))  # one of each, as rotary settings are by kind
    text.num_hidden_layers = len(kinds)
    if kinds:
        text.layer_types = kinds
    text.intermediate_size = text.vocab_size = 1
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    return trimmed


def drop_language(model: Any) -> nn.Module:
    """Take the language model out of a source's base model, and return it."""
    decoder = model.get_decoder()
    for name, child in list(model.named_children()):
        if child is decoder:
            delattr(model, name)
            return decoder
    raise ValueError(f"{type(model).__name__} holds no language model of its own; expected an image-text model")
