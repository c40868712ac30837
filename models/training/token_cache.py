"""Tokens of clips that a frozen encoder has made, on disk: encode once, train the language model on them many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..processing import StormProcessor
from ..storm import StormForConditionalGeneration
from .cache_folder import SHARD_CLIPS, keep_only, shard_path, weights_hash, written_whole
from .clips import Clip

ENCODER_PARTS = ("vision_tower", "multi_modal_projector", "temporal_encoder")


class TokenCache:
    """Tokens of clips 0, 1, 2… of one stage, by one state of the encoder."""

    def __init__(self, folder: Path, tokens: Tensor):
        self.folder = folder
        self.tokens = tokens  # (n_clips, n_chunks, tokens of a chunk, d_model) float16


def fill_cache(
    folder: Path,
    model: StormForConditionalGeneration,
    processor: StormProcessor,
    n_clips: int,
    clip_at: Callable[[int], Clip],
    key: str,
    *,
    on_clips: Callable[[int], None] | None = None,
    batch: int = 4,
) -> TokenCache:
    """Encode clips, but for those that lie on disk already.

    Args:
        folder: For the cache; what another encoder or another `key` wrote there is deleted.
        model: Encodes, in evaluation mode.
        processor: Prepares its frames.
        n_clips: How many.
        clip_at: Gives clip i, always the same.
        key: Says which clips they are.
        on_clips: Told after each file how many clips are encoded.
        batch: Clips that are encoded together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep_only(folder, {"key": key, "encoder": weights_hash(model, ENCODER_PARTS), "n_clips": n_clips})
    shards = []
    for first in range(0, n_clips, SHARD_CLIPS):
        path = shard_path(folder, first)
        if not path.is_file():
            clips = [clip_at(i) for i in range(first, min(first + SHARD_CLIPS, n_clips))]
            parts = [encode_clips(model, processor, clips[i : i + batch]) for i in range(0, len(clips), batch)]
            tokens = {"tokens": torch.cat(parts).contiguous()}
            written_whole(path, lambda temporary, tokens=tokens: save_file(tokens, temporary))
        shards.append(load_file(path)["tokens"])
        if on_clips:
            on_clips(min(first + SHARD_CLIPS, n_clips))
    return TokenCache(folder, torch.cat(shards))


@torch.inference_mode()
def encode_clips(model: StormForConditionalGeneration, processor: StormProcessor, clips: Sequence[Clip]) -> Tensor:
    """Encode clips of one length: (B, n_chunks, tokens of a chunk, d_model) float16 on CPU."""
    frames = torch.stack([processor.prepare_frames(clip.render()) for clip in clips])
    tokens = model.encode_video(frames.to(model.device, model.dtype))
    n_chunks = -(-clips[0].n_frames // model.config.chunk_frames)
    return tokens.to(torch.float16).unflatten(1, (n_chunks, -1)).cpu()
