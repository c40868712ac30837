"""What a model will need, from its configuration alone: nothing is loaded, and weights have shapes only."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig

from .imported import without_language
from .importing import FrameSettings, ImportOptions, ProbedFrames, check_family, make_config, probe_frames
from .storm import StormForConditionalGeneration
from .storm_config import StormConfig

WEIGHT_BYTES = 2  # bfloat16
RESERVE_BYTES = 4 << 30  # activations, kernels' workspace and the allocator's slack
CACHED_PROMPTS, CACHED_TOKENS = 8, 8192  # prompts that are answered together, and their lengths
SHARE_OF_PEAK = 0.4  # of a device's peak that a vision tower reaches: a usual share, not measured here
_PROBED_LAYERS = 2  # of the tower; what a frame becomes does not depend on its depth


@dataclass(frozen=True)
class Device:
    """An accelerator."""

    name: str
    memory_bytes: int
    peak_flops: float  # bfloat16, dense, a second


DEVICES = (
    Device("24 GB (L4)", 24 << 30, 121e12),
    Device("80 GB (H100)", 80 << 30, 989e12),
)


@dataclass(frozen=True)
class SizePlan:
    """What one model needs. Times are counted from multiplications, not measured."""

    name: str
    parameters: dict[str, int]  # by part
    weight_bytes: int  # in bfloat16
    places_per_frame: int
    tokens_per_chunk: int
    chunk_s: float
    state_bytes_per_stream: int
    tokens_per_hour: int  # of one stream
    stored_bytes_per_hour: int  # of one stream, before Parquet compresses
    cache_bytes_per_token: int  # of the language model
    flops_per_frame: float  # vision tower, projector and temporal encoder
    streams_by_memory: dict[str, int]  # by device, the language model beside them
    streams_by_compute: dict[str, int]  # by device, at `SHARE_OF_PEAK` of its peak for the vision side alone

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


def plan_import(
    source_config: PreTrainedConfig, name: str, options: ImportOptions | None = None, *, fps: float = 2.0
) -> SizePlan:
    """Return what a model would need once imported.

    Args:
        source_config: Of the model.
        name: For people.
        options: As for the import.
        fps: Sampled frames a second.

    Raises:
        ValueError: If it cannot be imported; the message says why.
    """
    check_family(source_config)
    frames = FrameSettings((0.5,) * 3, (0.5,) * 3, fps)
    config = make_config(source_config, _probe_shallow(source_config), frames, options or ImportOptions(), name)
    return plan_model(config, name, fps=fps)


def plan_model(config: StormConfig, name: str, *, fps: float = 2.0) -> SizePlan:
    """Return what a STORM model needs.

    Args:
        config: The model's.
        name: For people.
        fps: Sampled frames a second.
    """
    with torch.device("meta"):
        model = StormForConditionalGeneration(config)
    parts = ("vision_tower", "multi_modal_projector", "temporal_encoder", "language_model")
    parameters = {part: sum(p.numel() for p in model.parameters_of(part).values()) for part in parts}
    state_bytes = model.init_stream_state().n_bytes
    weight_bytes = WEIGHT_BYTES * sum(parameters.values())
    tokens_per_chunk, chunk_s = config.n_tokens(config.chunk_frames), config.chunk_frames / fps
    tokens_per_hour = round(3600 / chunk_s * tokens_per_chunk)
    text: Any = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache_bytes = 2 * WEIGHT_BYTES * text.num_hidden_layers * text.num_key_value_heads * head_dim
    flops = _flops_per_frame(config, parameters)
    used = weight_bytes + RESERVE_BYTES + CACHED_PROMPTS * CACHED_TOKENS * cache_bytes
    return SizePlan(
        name=name,
        parameters=parameters,
        weight_bytes=weight_bytes,
        places_per_frame=config.patch_grid**2,
        tokens_per_chunk=tokens_per_chunk,
        chunk_s=chunk_s,
        state_bytes_per_stream=state_bytes,
        tokens_per_hour=tokens_per_hour,
        stored_bytes_per_hour=tokens_per_hour * config.d_model * 2,
        cache_bytes_per_token=cache_bytes,
        flops_per_frame=flops,
        # Twice the state: a step has the one before and the one after.
        streams_by_memory={d.name: max(0, d.memory_bytes - used) // (2 * state_bytes) for d in DEVICES},
        streams_by_compute={d.name: int(SHARE_OF_PEAK * d.peak_flops / (flops * fps)) for d in DEVICES},
    )


def _flops_per_frame(config: StormConfig, parameters: dict[str, int]) -> float:
    """Count a multiplication and an addition for each weight and patch, and the tower's attention."""
    tower: Any = config.vision_config if config.imported is None else config.vision_config.vision_config
    patch = tower.patch_size if isinstance(tower.patch_size, int) else tower.patch_size[0]
    n_patches = (config.image_size // patch) ** 2
    attention = 4 * n_patches**2 * tower.hidden_size * tower.num_hidden_layers
    n_places = config.temporal_grid**2
    # A projector that pools works on fewer places: this is its upper bound.
    rest = parameters["multi_modal_projector"] + parameters["temporal_encoder"]
    return 2.0 * parameters["vision_tower"] * n_patches + attention + 2.0 * rest * n_places


def _probe_shallow(source_config: PreTrainedConfig) -> ProbedFrames:
    """Find what a frame becomes, with fresh weights of a tower cut to few layers."""
    shallow: Any = deepcopy(source_config)
    tower = shallow.vision_config
    layer = getattr(shallow, "vision_feature_layer", -1)
    deepest = max((n for n in ([layer] if isinstance(layer, int) else layer)), default=-1)
    tower.num_hidden_layers = min(tower.num_hidden_layers, max(_PROBED_LAYERS, deepest))
    trimmed = without_language(shallow)
    return probe_frames(AutoModel.from_config(trimmed).eval(), trimmed)
