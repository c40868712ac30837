"""What a frozen vision tower makes of clips, on disk: see once, and train what follows it many times.

Works for any tower, also one deep inside an imported model's vision side: its forward pass is replaced by the reading
of what it gave before. Of a tower that gives many layers only what the rest of the vision side uses is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..processing import StormProcessor
from ..storm import StormForConditionalGeneration
from .cache_folder import SHARD_CLIPS, keep_only, shard_path, weights_hash, written_whole
from .clips import Clip


class FeatureCache:
    """The tower's outputs for clips 0, 1, 2… of one stage, read from disk as they are used.

    They are kept as float16, so that training on them is training on slightly rounded features.

    Args:
        folder: For the cache; what another tower or another `key` wrote there is deleted.
        model: Sees, in evaluation mode; with gradients for what follows its tower.
        processor: Prepares its frames.
        key: Says which clips they are.
    """

    def __init__(self, folder: Path, model: StormForConditionalGeneration, processor: StormProcessor, key: str):
        self.folder, self.model, self.processor = folder, model, processor
        self.key = key
        self._n_layers: dict[str, int] = {}  # of each output that is a tuple

    def fill(
        self, n_clips: int, clip_at: Callable[[int], Clip], on_clips: Callable[[int], None] | None = None
    ) -> FeatureCache:
        """See the clips, but for those that lie on disk already.

        Args:
            n_clips: How many.
            clip_at: Gives clip i, always the same.
            on_clips: Told after each file how many clips are seen.

        Raises:
            FloatingPointError: If the tower gives what float16 cannot hold.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        seen_by = weights_hash(self.model, ("vision_tower",))
        keep_only(self.folder, {"key": self.key, "tower": seen_by, "n_clips": n_clips})
        used = self._used(self._pixels(clip_at(0)))
        for first in range(0, n_clips, SHARD_CLIPS):
            last = min(first + SHARD_CLIPS, n_clips)
            path = shard_path(self.folder, first)
            if not path.is_file():
                seen = {i: self._see(self._pixels(clip_at(i)), used) for i in range(first, last)}
                tensors = {f"{i}/{name}": t for i, outputs in seen.items() for name, t in outputs.items()}
                written_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
            if on_clips:
                on_clips(last)
        return self

    def features(self, indices: Sequence[int], n_frames: int) -> Tensor:
        """Return what `_features` gives for clips, (B, T, rows, cols, f), with gradients for what follows the tower."""
        size = self.model.config.image_size
        # The tower does not look at them. Ones, for Idefics and SmolVLM leave out frames that are all zero, as padding.
        pixels = torch.ones(1, n_frames, 3, size, size, device=self.model.device, dtype=self.model.dtype)
        found = []
        for index in indices:
            with _tower_gives(self.model, lambda *_, index=index, **__: self._read(index)):
                found.append(self.model._features(pixels))
        return torch.cat(found)

    def _pixels(self, clip: Clip) -> Tensor:
        frames = self.processor.prepare_frames(clip.render())[None]
        return frames.to(self.model.device, self.model.dtype)

    def _used(self, pixels: Tensor) -> list[str]:
        """Return which of the tower's outputs the rest of the vision side uses: those that get a gradient."""
        leaves: dict[str, Tensor] = {}

        def give(outputs: Mapping[str, Any]) -> BaseModelOutputWithPooling:
            leaves.update({k: t.detach().clone().requires_grad_() for k, t in _tensors_of(outputs).items()})
            self._n_layers = {k: len(v) for k, v in outputs.items() if isinstance(v, tuple)}
            return self._outputs(leaves)

        with torch.enable_grad(), self._watched(give):
            total = self.model._features(pixels).float().sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None]

    def _see(self, pixels: Tensor, used: Sequence[str]) -> dict[str, Tensor]:
        """Return the tower's used outputs for a clip, float16 on CPU."""
        kept: dict[str, Tensor] = {}

        def give(outputs: Mapping[str, Any]) -> Any:
            tensors = _tensors_of(outputs)
            kept.update({name: tensors[name].to(torch.float16).cpu().contiguous() for name in used})
            return outputs

        with torch.no_grad(), self._watched(give):
            self.model._features(pixels)
        for name, tensor in kept.items():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(
                    f"the vision tower's {name} has values that float16 cannot hold; train without cached_streams"
                )
        return kept

    def _read(self, index: int) -> BaseModelOutputWithPooling:
        path = shard_path(self.folder, index // SHARD_CLIPS * SHARD_CLIPS)
        with safe_open(path, "pt") as shard:
            names = [name for name in shard.keys() if name.startswith(f"{index}/")]  # noqa: SIM118 (no mapping)
            tensors = {name.partition("/")[2]: shard.get_tensor(name) for name in names}
        return self._outputs({k: t.to(self.model.device, self.model.dtype) for k, t in tensors.items()})

    @contextmanager
    def _watched(self, give: Callable[[Any], Any]) -> Iterator[None]:
        """Within, what the tower gives goes through `give`."""
        seeing = self.model.tower.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                outputs = seeing(*args, **kwargs)
            return give(outputs)

        with _tower_gives(self.model, watched):
            yield

    def _outputs(self, tensors: Mapping[str, Tensor]) -> BaseModelOutputWithPooling:
        """Build what a tower gives, with nothing where an output is not kept."""
        values: dict[str, Any] = {k: t for k, t in tensors.items() if "." not in k}
        for name, n_layers in self._n_layers.items():
            values[name] = tuple(tensors.get(f"{name}.{i}") for i in range(n_layers))
        return BaseModelOutputWithPooling(**values)


@contextmanager
def _tower_gives(model: StormForConditionalGeneration, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, calling the model's vision tower calls `forward`."""
    tower = model.tower
    own = {k: v for k, v in vars(tower).items() if k == "forward"}  # where somebody has replaced it before
    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
        vars(tower).update(own)


def _tensors_of(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return every tensor of a tower's outputs by name; of a tuple, by name and number."""
    found: dict[str, Tensor] = {}
    for name, value in outputs.items():
        many = {f"{name}.{i}": each for i, each in enumerate(value)} if isinstance(value, tuple) else {name: value}
        found |= {key: each for key, each in many.items() if isinstance(each, Tensor)}
    return found
