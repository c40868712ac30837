"""The sizes of a STORM model, as a transformers configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .imported import ImportedConfig
from .temporal import TemporalConfig


@strict
class StormConfig(PreTrainedConfig):
    """Everything that shapes the model.

    Args:
        vision_config: Of a tower that gives one vector per patch, row by row; leading class tokens are dropped. Of an
            imported model: its whole configuration, with hardly a language model (`imported.without_language`).
        text_config: Of a decoder-only language model.
        temporal: `TemporalConfig.to_dict`; None for one block of the language model's width.
        image_size: Side of a frame in pixels; the tower's own.
        image_mean: Of R, G and B, in 0…1.
        image_std: Of R, G and B.
        vision_feature_layer: Which of the tower's hidden states to take, or None for its last, normed output.
        downsample: Pixel shuffle factor before the projector: so many squared patches become one place.
        projector_hidden_act: None for one linear layer (STORM); a function's name for two with it between (LLaVA).
        chunk_frames: Frames that are encoded together; a multiple of `temporal_pool`.
        temporal_pool: Frames that are averaged into one.
        spatial_pool: Side of the square of places that is averaged into one.
        pool_before_temporal: Average places before the temporal encoder, which keeps the state of a big model small.
        sample_fps: Frames per second that the model was trained at.
        video_token_id: The placeholder that a video token replaces.
        trained: False where answers mean nothing yet; shown to users.
        imported: `ImportedConfig.to_dict` for the vision side of an imported model, which has its own layers, pooling
            and projector; `vision_feature_layer`, `downsample` and `projector_hidden_act` then say nothing.

    Raises:
        ValueError: On sizes that do not go together.
    """

    model_type = "storm"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None  # a dict or None becomes a config
    text_config: Any = None
    temporal: dict | None = None
    image_size: int = 224
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    vision_feature_layer: int | None = None
    downsample: int = 1
    projector_hidden_act: str | None = None
    chunk_frames: int = 4
    temporal_pool: int = 4
    spatial_pool: int = 2
    pool_before_temporal: bool = False
    sample_fps: float = 2.0
    video_token_id: int = 3
    trained: bool = True
    imported: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.temporal is None:
            self.temporal = TemporalConfig(d_model=self.d_model, d_temporal=self.d_model).to_dict()
        self._check_sizes()

    @property
    def d_model(self) -> int:
        """Return the language model's width, which is the video tokens' too."""
        return self.get_text_config().hidden_size

    @property
    def temporal_config(self) -> TemporalConfig:
        """Return the temporal encoder's sizes."""
        assert self.temporal is not None
        return TemporalConfig.from_dict(self.temporal)

    @property
    def imported_config(self) -> ImportedConfig | None:
        """Return what is said of an imported vision side; None for a tower of our own."""
        return None if self.imported is None else ImportedConfig.from_dict(self.imported)

    @property
    def feature_dim(self) -> int:
        """Return the width of what the vision side gives: the tower's, or of an imported one the language model's."""
        return self.vision_config.hidden_size if self.imported is None else self.d_model

    @property
    def patch_grid(self) -> int:
        """Return how many patches a frame has along one side; of an imported model, places after its own pooling."""
        if self.imported_config is not None:
            return self.imported_config.grid
        return self.image_size // self.vision_config.patch_size

    @property
    def temporal_grid(self) -> int:
        """Return how many places along one side the temporal encoder sees."""
        grid = self.patch_grid // self.downsample
        return -(-grid // self.spatial_pool) if self.pool_before_temporal else grid

    def n_tokens(self, n_frames: int) -> int:
        """Return how many tokens a chunk of `n_frames` frames becomes."""
        grid = -(-(self.patch_grid // self.downsample) // self.spatial_pool)
        return -(-n_frames // self.temporal_pool) * grid * grid

    def _check_sizes(self) -> None:
        tower = self.vision_config if self.imported is None else self.vision_config.vision_config
        tower_size = frame_side_px(getattr(tower, "image_size", self.image_size))
        if tower_size != self.image_size:
            raise ValueError(f"image_size is {self.image_size}; expected the vision tower's {tower_size}")
        for name in ("downsample", "chunk_frames", "temporal_pool", "spatial_pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not self.sample_fps > 0:
            raise ValueError(f"sample_fps is {self.sample_fps}; expected more than 0")
        if self.chunk_frames % self.temporal_pool:
            raise ValueError(
                f"chunk_frames is {self.chunk_frames}; expected a multiple of temporal_pool, {self.temporal_pool}"
            )
        if self.imported is not None and self.downsample != 1:
            raise ValueError(f"downsample is {self.downsample}; expected 1 for an imported model, which has its own")
        if self.patch_grid < 1 or self.patch_grid % self.downsample:
            raise ValueError(
                f"downsample is {self.downsample}; expected a divisor of the patch grid's side, {self.patch_grid}"
            )
        if self.temporal_config.d_model != self.d_model:
            raise ValueError(
                f"temporal d_model is {self.temporal_config.d_model}; expected {self.d_model}, the language model's. "
                "For a narrower temporal encoder set d_temporal"
            )
        n_ids = self.get_text_config().vocab_size
        if not 0 <= self.video_token_id < n_ids:
            raise ValueError(f"video_token_id is {self.video_token_id}; expected one of the vocabulary's {n_ids} ids")


def frame_side_px(size: int | Sequence[int]) -> int:
    """Return the side of a square frame that a configuration gives as one number or as two.

    Raises:
        ValueError: If the two differ.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"the vision tower's image_size is {size}; expected a square")
    return int(sides.pop())


# So that AutoConfig, AutoTokenizer and whoever uses them understand a checkpoint's folder.
AutoConfig.register(StormConfig.model_type, StormConfig, exist_ok=True)
