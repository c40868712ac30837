"""STORM made streamable (arXiv 2503.04130): a video language model whose video side carries a state on.

    frames ─▶ vision tower ─▶ pixel shuffle + projector ─▶ temporal encoder ─▶ average pooling ─▶ language model
              (SigLIP-like)    (to the LLM's width)        (Mamba-2, stateful)  (time, places)     (any decoder)

Of an imported model the first two are its own, with its own pooling (`imported.FrameEncoder`).

`StormConfig` and `StormForConditionalGeneration` are ordinary transformers classes. The streaming side is
`init_stream_state`, `encode_chunks` and `encode_clip`; `generation` answers questions over the tokens.

Tokens leave the encoder as float16, for storage, and the language model is always given float16-rounded values: what is
answered from tokens just made and from tokens read back is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_outputs import CausalLMOutputWithPast

from .compress import spatial_pool, temporal_pool
from .imported import FrameEncoder
from .processing import normalise_frames
from .storm_config import StormConfig
from .temporal import TemporalBlock, TemporalEncoder, TemporalState

LOOK_GRID = 8  # rows and columns that tell scenes apart: more would only make a stream's state larger


@dataclass(frozen=True, eq=False)
class StreamState:
    """What the model remembers of one stream; of fixed size, never modified."""

    temporal: TemporalState

    @property
    def n_bytes(self) -> int:
        """Return its size in memory."""
        return self.temporal.n_bytes

    def to(self, device: torch.device | str) -> StreamState:
        """Return it on another device."""
        return StreamState(self.temporal.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """Return it as named tensors on CPU, for safetensors."""
        return self.temporal.to_tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StreamState:
        """Build it from `to_tensors`'s result; on CPU.

        Raises:
            ValueError: If tensors are missing or of another version.
        """
        return cls(TemporalState.from_tensors(tensors))


@dataclass(frozen=True, eq=False)
class EncodedChunk:
    """What one stream's chunk of frames became."""

    tokens: Tensor = field(repr=False)  # (n_tokens, d_model) float16 on CPU
    look: Tensor = field(repr=False)  # (rows, cols, f) float16 on CPU, of length 1: what each place looks like
    state: StreamState  # after the last frame, on the model's device


class _RoundToHalf(torch.autograd.Function):
    """Round to float16 and back, with the gradient passed through as it is: float16 would lose small ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class StormProjector(nn.Module):
    """Pixel shuffle, then a linear layer to the language model's width (or two, as in LLaVA)."""

    def __init__(self, config: StormConfig):
        super().__init__()
        self.downsample = config.downsample
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * config.downsample**2, config.d_model)
        act = config.projector_hidden_act
        self.act = ACT2FN[act] if act else None
        self.linear_2 = nn.Linear(config.d_model, config.d_model) if act else None

    def forward(self, x: Tensor) -> Tensor:
        """Project (B, T, rows, cols, f) to (B, T, rows / downsample, cols / downsample, d_model)."""
        s = self.downsample
        x = rearrange(x, "b t (r i) (c j) f -> b t r c (i j f)", i=s, j=s)
        x = self.linear_1(x)
        return x if self.linear_2 is None or self.act is None else self.linear_2(self.act(x))


class StormPreTrainedModel(PreTrainedModel):
    """Initialisation and loading, shared with transformers."""

    config: StormConfig
    config_class = StormConfig
    input_modalities: ClassVar[list[str]] = ["video", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what no checkpoint has given; called by transformers, which marks what was loaded.

        The temporal encoder draws its own: transformers would give its last projections a random start, and asks a
        module for its own way only where it holds parameters directly.
        """
        super().initialize_weights()
        with guard_torch_init_functions():
            for block in self.modules():
                if isinstance(block, TemporalBlock):
                    block.reset_parameters()


class StormForConditionalGeneration(StormPreTrainedModel, GenerationMixin):
    """The whole model; see the file's top for its parts."""

    def __init__(self, config: StormConfig):
        super().__init__(config)
        imported = config.imported_config
        if imported is None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.multi_modal_projector = StormProjector(config)
        else:
            self.frame_encoder = FrameEncoder(config.vision_config, imported)
        self.temporal_encoder = TemporalEncoder(config.temporal_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's."""
        return self.language_model.get_output_embeddings()

    @property
    def tower(self) -> nn.Module:
        """Return the vision tower, its own or the imported model's."""
        return self.frame_encoder.tower if self.config.imported else self.vision_tower

    def parameters_of(self, part: str) -> dict[str, nn.Parameter]:
        """Return the named parameters of a part.

        Args:
            part: ``vision_tower``, ``multi_modal_projector`` (of an imported model: whatever else its vision side has),
                ``temporal_encoder`` or ``language_model``.

        Raises:
            ValueError: If there is no such part.
        """
        if part not in ("vision_tower", "multi_modal_projector", "temporal_encoder", "language_model"):
            raise ValueError(
                f"part is {part!r}; expected vision_tower, multi_modal_projector, temporal_encoder or language_model"
            )
        in_tower = {id(p) for p in self.tower.parameters()} if self.config.imported else set()

        def part_of(name: str, parameter: nn.Parameter) -> str:
            first = name.partition(".")[0]
            if first != "frame_encoder":
                return first
            return "vision_tower" if id(parameter) in in_tower else "multi_modal_projector"

        return {name: p for name, p in self.named_parameters() if part_of(name, p) == part}

    # ---- streaming ----

    def init_stream_state(self) -> StreamState:
        """Return the state of a stream before its first frame, on the model's device."""
        grid = self.config.temporal_grid
        return StreamState(self.temporal_encoder.init_state(1, grid, grid, self.device))

    @torch.inference_mode()
    def encode_chunks(
        self, frames: np.ndarray | Tensor, states: Sequence[StreamState], *, one_by_one: bool | None = None
    ) -> list[EncodedChunk]:
        """Advance several streams by one chunk each.

        On CPU the streams go through one by one: a batch would be hardly faster, and its matrix products may round
        differently with the number of streams and their places. So there a stream's tokens are bit for bit the same
        whichever streams share the call. On CUDA they go together, and agree to rounding.

        Args:
            frames: (B, T, H, W, 3) uint8 RGB at the model's size, T in 1…chunk_frames, the same for all.
            states: One per stream, from `init_stream_state`, a chunk before, or restored. Not modified.
            one_by_one: Force (True) or forbid (False) going one by one; None decides by device.

        Returns:
            One `EncodedChunk` per stream, in order; `config.n_tokens(T)` tokens each.

        Raises:
            ValueError: If frames or states do not fit the model or each other.
            FloatingPointError: If a token is no finite float16 number: the weights are damaged, or not for this dtype.
        """
        frames = self._check_frames(torch.as_tensor(frames))
        if frames.shape[0] != len(states) or not 1 <= frames.shape[1] <= self.config.chunk_frames:
            raise ValueError(
                f"frames have shape {tuple(frames.shape)} for {len(states)} states; expected as many streams "
                f"as states, and 1 to {self.config.chunk_frames} frames"
            )
        if one_by_one is None:
            one_by_one = self.device.type == "cpu"
        size = 1 if one_by_one else len(states)
        chunks: list[EncodedChunk] = []
        for i in range(0, len(states), size):
            chunks += self._encode_batch(frames[i : i + size], states[i : i + size])
        return chunks

    @torch.inference_mode()
    def encode_clip(self, frames: np.ndarray | Tensor) -> Tensor:
        """Encode a whole clip in one pass, on the same grid of chunks as a stream.

        Args:
            frames: (T, H, W, 3) uint8 RGB at the model's size, T of 1 or more.

        Returns:
            (n_tokens, d_model) float16 on CPU: on CPU bit for bit what `encode_chunks` gives chunk by chunk.

        Raises:
            ValueError: If the frames do not fit the model.
            FloatingPointError: If a token is no finite float16 number.
        """
        frames = self._check_frames(torch.as_tensor(frames)[None])
        tokens = self.encode_video(self._pixels(frames))[0]
        return self._to_storage(tokens)

    def encode_video(self, pixel_values: Tensor) -> Tensor:
        """Encode clips from their start; the part to train.

        Args:
            pixel_values: (B, T, 3, H, W), normalised (`StormProcessor.prepare_frames`).

        Returns:
            (B, n_tokens, d_model) in the model's dtype, not yet rounded to float16.
        """
        # By chunk, since the tower's products may round differently for another number of frames.
        features = torch.cat(
            [self._features(part) for part in pixel_values.split(self.config.chunk_frames, dim=1)], dim=1
        )
        tokens, _ = self._mix_and_pool(features, None)
        return tokens

    # ---- language ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        video_tokens: Tensor | None = None,
        pixel_values: Tensor | None = None,
        exact_video: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the language model over text and video.

        Args:
            input_ids: (B, n) with `video_token_id` wherever a video token goes.
            attention_mask: (B, n), 0 on padding.
            position_ids: (B, n), or None for the language model's own.
            past_key_values: Cache of the tokens before.
            inputs_embeds: (B, n, d_model) in place of `input_ids`; then without video.
            labels: (B, n), -100 where no loss is wanted; adds `loss`.
            video_tokens: (N, d_model) or (B, N / B, d_model): all video tokens, in the order of their placeholders.
            pixel_values: (B', T, 3, H, W) in place of `video_tokens`: clips to encode, with gradients.
            exact_video: Do not round video tokens to float16: to compare with another implementation.
            **kwargs: For the language model (`logits_to_keep`, `use_cache` …).

        Raises:
            ValueError: If the number of video tokens is not that of the placeholders.
        """
        if pixel_values is not None:
            if video_tokens is not None:
                raise ValueError("got both video_tokens and pixel_values; expected one of them")
            video_tokens = self.encode_video(pixel_values)
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed_inputs(input_ids, video_tokens, exact=exact_video)
            if video_tokens is not None:
                attention_mask = self._attend_to_frames(
                    input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
                )
        elif video_tokens is not None:
            raise ValueError(
                "got video tokens with inputs_embeds; expected input_ids, whose placeholders say where they go"
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    def embed_inputs(self, input_ids: Tensor, video_tokens: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """Return the language model's inputs (B, n, d_model), video tokens in the places of their placeholders.

        Args:
            input_ids: (B, n).
            video_tokens: As for `forward`.
            exact: Do not round them to float16.

        Raises:
            ValueError: If the number of video tokens is not that of the placeholders.
        """
        is_video = input_ids == self.config.video_token_id
        n_given = 0 if video_tokens is None else video_tokens.shape[:-1].numel()
        if (n_places := int(is_video.sum())) != n_given:
            raise ValueError(f"got {n_given} video tokens; expected {n_places}, one for each placeholder in input_ids")
        embeds = self.get_input_embeddings()(input_ids)
        imported = self.config.imported_config
        if imported is not None and imported.newline_token_id is not None:
            ends_video = input_ids == imported.newline_token_id
            embeds = torch.where(ends_video[..., None], self.frame_encoder.newline.to(embeds.dtype), embeds)
        if video_tokens is None or n_given == 0:
            return embeds
        rounded = (video_tokens if exact else _RoundToHalf.apply(video_tokens)).reshape(n_given, -1)
        return embeds.masked_scatter(is_video[..., None], rounded.to(embeds.device, embeds.dtype))

    @torch.inference_mode()
    def embed_text(self, input_ids: Tensor) -> np.ndarray:
        """Return the mean input embedding (d_model,) float32 of a text's tokens (n,), for the policy `relevant`."""
        embeds = self.get_input_embeddings()(input_ids.to(self.device))
        return embeds.float().mean(0).cpu().numpy()

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any) -> dict:
        """Give the video to the first step only: later ones have it in their cache."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("video_tokens", None)
            kwargs.pop("pixel_values", None)
        return GenerationMixin.prepare_inputs_for_generation(  # type: ignore[reportArgumentType]
            self, *args, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple:
        """Refuse what transformers would repeat in the wrong order, token by token instead of prompt by prompt."""
        video = kwargs.get("video_tokens")
        if expand_size > 1 and video is not None and video.dim() == 2:
            raise ValueError(
                f"video_tokens have shape {tuple(video.shape)} with {expand_size} beams or sequences; expected "
                "(B, n, d_model), as many for each prompt"
            )
        return GenerationMixin._expand_inputs_for_generation(  # type: ignore[reportArgumentType]
            self, expand_size=expand_size, **kwargs
        )

    # ---- parts ----

    def _attend_to_frames(
        self, input_ids: Tensor, inputs_embeds: Tensor, attention_mask: Any, position_ids: Any, past_key_values: Any
    ) -> Any:
        """Return the masks of a source whose tokens of one frame look at each other, as the source itself makes them.

        Every run of placeholders counts as one frame; the prompt's marks keep them apart.
        """
        imported = self.config.imported_config
        if imported is None or not imported.bidirectional_video or isinstance(attention_mask, dict):
            return attention_mask
        source: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.config.vision_config)]
        return source.create_masks_for_generate(
            self.language_model.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            token_type_ids=(input_ids == self.config.video_token_id).long(),
        )

    def _check_frames(self, frames: Tensor) -> Tensor:
        size = self.config.image_size
        if (
            frames.dtype != torch.uint8
            or frames.dim() != 5
            or frames.shape[1] < 1
            or frames.shape[2:] != (size, size, 3)
        ):
            raise ValueError(
                f"frames are {frames.dtype} of shape {tuple(frames.shape)}; "
                f"expected torch.uint8 of shape (B, T, {size}, {size}, 3) with T of 1 or more"
            )
        return frames

    def _chunks_of(self, x: Tensor) -> list[Tensor]:
        """Cut (B, T, …) into chunks, as copies: they start at an aligned address, where products round alike."""
        size = self.config.chunk_frames
        return [part.clone(memory_format=torch.contiguous_format) for part in x.split(size, dim=1)]

    def _pixels(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.device, non_blocking=True)  # as bytes: a quarter of what the floats would be
        dtype = self.frame_encoder.model.dtype if self.config.imported else self.vision_tower.dtype
        return normalise_frames(frames, self.config.image_mean, self.config.image_std, dtype)

    def _features(self, pixel_values: Tensor) -> Tensor:
        """Return the tower's patches, or an imported model's places: (B, T, 3, H, W) → (B, T, rows, cols, f)."""
        if self.config.imported:
            return self.frame_encoder(pixel_values)
        n_streams, grid, layer = pixel_values.shape[0], self.config.patch_grid, self.config.vision_feature_layer
        flat = pixel_values.flatten(0, 1).contiguous()
        out = self.vision_tower(pixel_values=flat, output_hidden_states=layer is not None)
        patches = out.last_hidden_state if layer is None else out.hidden_states[layer]
        patches = patches[:, patches.shape[1] - grid * grid :]  # without class tokens, which come first
        return rearrange(patches, "(b t) (r c) f -> b t r c f", b=n_streams, r=grid)

    def _project(self, features: Tensor) -> Tensor:
        """Return places of the language model's width; what an imported vision side gives is projected already."""
        return features if self.config.imported else self.multi_modal_projector(features)

    def _looks(self, pixel_values: Tensor, features: Tensor) -> Tensor:
        """Return what each place looks like, on average over the frames.

        By the tower's first layer, in which a patch knows nothing of the others. What is deeper in it follows what was
        learnt to matter, such as objects; the background of a scene need not be among that.

        Args:
            pixel_values: (B, T, 3, H, W), normalised.
            features: (B, T, rows, cols, f) of the same, taken where there is no such layer, or it is not ours to ask.

        Returns:
            (B, rows, cols, f) float16 on CPU, vectors of length 1, at most `LOOK_GRID` rows and columns.
        """
        tower = None if self.config.imported else self.vision_tower
        embed = getattr(getattr(tower, "vision_model", tower), "embeddings", None)
        if embed is not None:
            n_streams, grid = pixel_values.shape[0], self.config.patch_grid
            patches = embed(pixel_values.flatten(0, 1).contiguous())
            patches = patches[:, patches.shape[1] - grid * grid :]  # without class tokens, which come first
            features = rearrange(patches, "(b t) (r c) f -> b t r c f", b=n_streams, r=grid)
        mean = reduce(features.float(), "b t r c f -> b f r c", "mean")
        looks = F.adaptive_avg_pool2d(mean, (min(mean.shape[-2], LOOK_GRID), min(mean.shape[-1], LOOK_GRID)))
        # Contiguous, as from a snapshot: sums over another layout round differently.
        return F.normalize(rearrange(looks, "b f r c -> b r c f"), dim=-1).to(torch.float16).cpu().contiguous()

    def _mix_and_pool(self, features: Tensor, state: TemporalState | None) -> tuple[Tensor, TemporalState]:
        """Project, mix over time and pool: (B, T, rows, cols, f) → (B, n_tokens, d_model), on the grid of chunks."""
        config = self.config
        x = torch.cat([self._project(part) for part in self._chunks_of(features)], dim=1)
        if config.pool_before_temporal:
            x = spatial_pool(x, config.spatial_pool)
        x, new_state = self.temporal_encoder(x, state, chunk_frames=config.chunk_frames)
        x = temporal_pool(x, config.temporal_pool)
        if not config.pool_before_temporal:
            x = spatial_pool(x, config.spatial_pool)
        return x.flatten(1, 3), new_state

    def _encode_batch(self, frames: Tensor, states: Sequence[StreamState]) -> list[EncodedChunk]:
        pixels = self._pixels(frames)
        features = self._features(pixels)
        looks = self._looks(pixels, features)
        state = TemporalState.stack([s.temporal for s in states])
        tokens, state = self._mix_and_pool(features, state)
        stored = self._to_storage(tokens)
        return [EncodedChunk(stored[i], looks[i], StreamState(after)) for i, after in enumerate(state.unstack())]

    def _to_storage(self, tokens: Tensor) -> Tensor:
        stored = tokens.to(torch.float16).cpu()
        if not torch.isfinite(stored).all():
            raise FloatingPointError(
                f"video tokens have values that float16 cannot hold (largest {tokens.abs().max().item():g}); expected "
                "below 65,504 and no NaN. The weights are damaged or do not suit this dtype: try float32"
            )
        return stored
