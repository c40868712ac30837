"""What a stage learns from: clips turned into a loss and into counts of what was right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compress import spatial_pool, temporal_pool
from ..processing import StormProcessor
from ..selection import VideoChunk, select_chunks
from ..storm import StormForConditionalGeneration
from .cache_folder import SHARD_CLIPS
from .clips import FPS, Clip, label_places, make_clip, seed_of
from .feature_cache import FeatureCache
from .heads import MOVING_TARGETS, STILL_TARGETS, PlaceHeads, shades_of, stack_labels
from .packing import TextBatch, TextPacker, collate, look_back_at_most, look_within_frames
from .pairs import PairClip, read_pairs
from .plain_attention import plain_attention
from .questions import Question, ask
from .recipe import Recipe, Stage
from .token_cache import TokenCache, encode_clips, fill_cache

_TRIES = 4  # windows drawn for a row before it may have fewer questions
_SOUGHT_TRIES = 64  # before it may lack the kind of question that it is drawn for: a try takes a tenth of a millisecond
_FOR_SURE = 1e6  # weight of that kind: it is among the questions
_STEPS_KEPT = 2  # of clips that are drawn anew
_OTHER_CLIPS = 16  # looked at where a row's own has nothing to ask
Counts = dict[str, Tensor]  # by target or kind of question: (right, asked)


class Task:
    """What a stage learns. Step s always sees the same clips; stages and held-out clips have their own."""

    def __init__(
        self,
        stage: Stage,
        stage_index: int,
        recipe: Recipe,
        model: StormForConditionalGeneration,
        processor: StormProcessor,
    ):
        self.stage, self.stage_index, self.seed = stage, stage_index, recipe.seed
        self.model, self.processor = model, processor
        self.heads: nn.Module = nn.ModuleDict()
        # A clip holds megabytes once it is drawn, and what is drawn anew at each step does not come again.
        self._clip = lru_cache(maxsize=stage.cached_streams or _STEPS_KEPT * stage.batch)(self._make_clip)

    def prepare(self, folder: Path, on_clips: Callable[[int], None]) -> None:
        """Do what has to be done once before the steps."""

    def loss(self, step: int, *, held_out: bool = False) -> tuple[Tensor, Counts]:
        """Return the loss of a step's batch, with gradients, and what was right."""
        raise NotImplementedError

    def attention(self) -> AbstractContextManager[Any]:
        """Return what the loss and its backward pass, which may compute parts of it again, are to run in."""
        return nullcontext()

    def clip(self, index: int, held_out: bool = False) -> Clip:
        """Return clip `index` of this stage."""
        return self._clip(index, held_out)

    def _make_clip(self, index: int, held_out: bool) -> Clip:
        kind = _by_share(self.stage.worlds, (index * 0.6180339887) % 1.0)
        stream = (self.seed * 8 + self.stage_index) % 256
        seed, n_frames = seed_of(index, stream, held_out=held_out), self.stage.clip_frames
        # Windows of all lengths shall have needles: as many in a short stretch as in the whole clip.
        shortest = min(64, n_frames)
        needle_frames = round(shortest * (n_frames / shortest) ** ((index * 0.7548776662) % 1.0))
        size_px = self.model.config.image_size
        share = self.stage.backwards
        return make_clip(seed, n_frames, kind, size_px=size_px, backwards_share=share, needle_frames=needle_frames)

    def _pixels(self, clips: list[Clip]) -> Tensor:
        frames = torch.stack([self.processor.prepare_frames(clip.render()) for clip in clips])
        return frames.to(self.model.device, self.model.dtype)

    def _encode(self, clips: list[Clip], *, bfloat16: bool = False) -> Tensor:
        """Return what the temporal encoder gives, (B, T, rows, cols, d), with gradients for what the stage trains."""
        model = self.model
        # An imported vision side ends with its projector; its parts that are frozen keep no graph by themselves.
        seeing = "vision_tower" in self.stage.train or model.config.imported is not None
        with torch.set_grad_enabled(seeing), _autocast(model.device, bfloat16):
            features = model._features(self._pixels(clips))
        return self._mix(features)

    def _mix(self, features: Tensor) -> Tensor:
        """Return what the temporal encoder makes of features, (B, T, rows, cols, d) on the grid that it sees."""
        model = self.model
        with _autocast(model.device):
            x = model._project(features.float())
            if model.config.pool_before_temporal:
                x = spatial_pool(x, model.config.spatial_pool)
            x, _ = model.temporal_encoder(x, chunk_frames=_grid_of_chunks(model))
        return x


class PlacesTask(Task):
    """Single frames: colour, shape and size at each place, read off the vision tower."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.places = PlaceHeads(self.model.config.feature_dim, STILL_TARGETS)
        self.heads = self.places

    def loss(self, step: int, *, held_out: bool = False) -> tuple[Tensor, Counts]:
        """See `Task.loss`."""
        batch = self.stage.batch
        clips = [self.clip(step * batch + i, held_out) for i in range(batch)]
        labels = stack_labels([label_places(c, self.model.config.patch_grid) for c in clips], self.model.device)
        with _autocast(self.model.device, self.stage.bfloat16):
            x = self.model._features(self._pixels(clips))
        return self.places.loss(x, labels)


class MotionsTask(Task):
    """Clips: also motion, speed and change, read off the temporal encoder before pooling over time."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.places = _moving_heads(self.model, self.stage)
        self.heads = self.places

    def loss(self, step: int, *, held_out: bool = False) -> tuple[Tensor, Counts]:
        """See `Task.loss`."""
        batch = self.stage.batch
        clips = [self.clip(step * batch + i, held_out) for i in range(batch)]
        return _loss_of_places(self.places, clips, self._encode(clips, bfloat16=self.stage.bfloat16))


@dataclass(frozen=True)
class _Window:
    """What a row of a batch is about."""

    index: int  # of the clip
    first: int  # chunk
    asked: list[Question]
    chunk_s: float


class TextTask(Task):
    """Windows of clips: questions and captions, eight to a window that is read once."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._packer = TextPacker(self.processor)
        self._cache: TokenCache | FeatureCache | None = None
        self._weights = self.stage.question_weights()
        self._places: PlaceHeads | None = None
        if self.stage.places:
            self.heads = self._places = _moving_heads(self.model, self.stage)

    def prepare(self, folder: Path, on_clips: Callable[[int], None]) -> None:
        """Encode the stage's clips, where it says so."""
        if self.stage.cached_streams:
            self.model.eval()
            low = self.stage.bfloat16
            drawn = (self.stage.clip_frames, self._clips_key(), self.stage.backwards, low)
            key = f"{self.seed} {self.stage_index} {drawn}"
            n = self.stage.cached_streams
            drawn_once = partial(self._make_clip, held_out=False)  # a clip that was drawn holds megabytes
            if self.stage.keeps_tokens:
                self._cache = fill_cache(folder, self.model, self.processor, n, drawn_once, key, on_clips=on_clips)
            else:
                with _autocast(self.model.device, low):
                    features = FeatureCache(folder, self.model, self.processor, key)
                    self._cache = features.fill(n, drawn_once, on_clips)
            self._plan(n, on_clips)

    def _clips_key(self) -> Any:
        """Return what tells this stage's clips from other ones, whatever is said about them."""
        return dict(self.stage.worlds)

    def _plan(self, n_clips: int, on_clips: Callable[[int], None]) -> None:
        """Work out what happens in the clips, before the first step.

        As windows are drawn, the small things that are kept of each clip would come to lie between a step's large
        tensors: the gaps that these leave are then too many to search, and steps were seen to take twice as long.
        """
        for index in range(n_clips):
            self.clip(index).plan()
            if index % SHARD_CLIPS == SHARD_CLIPS - 1:
                on_clips(n_clips)

    def loss(self, step: int, *, held_out: bool = False) -> tuple[Tensor, Counts]:
        """See `Task.loss`."""
        batch, tokens, windows, encoded = self._draw(step, held_out)
        predicted, wanted = self._predict(batch, tokens)
        # A step whose windows had nothing to ask has no texts.
        loss = _mean_of_texts(predicted, wanted, batch) if batch.kinds else predicted.sum() * 0.0
        if self._places is not None and encoded is not None:
            clips = [self.clip(window.index) for window in windows]
            loss = loss + self.stage.places * _loss_of_places(self._places, clips, encoded)[0]
        return loss, _count_texts(predicted.detach(), wanted, batch)

    def attention(self) -> AbstractContextManager[Any]:
        """See `Task.attention`: on CPUs the fused kernel's backward pass is slower than plain products."""
        if self.model.device.type != "cpu":
            return nullcontext()
        if self.stage.bfloat16 and self.model.config.imported is None:
            return plain_attention(self.model.language_model)
        return sdpa_kernel(SDPBackend.MATH)

    def draw(self, step: int, held_out: bool = False) -> tuple[TextBatch, Tensor]:
        """Return a step's texts and the video tokens for their placeholders, (n, d_model)."""
        return self._draw(step, held_out)[:2]

    def _draw(self, step: int, held_out: bool) -> tuple[TextBatch, Tensor, list[_Window], Tensor | None]:
        """Return what `draw` does, the windows, and of a stage that trains it what the temporal encoder gives."""
        rng = np.random.default_rng([self.seed, self.stage_index, step, held_out])
        n_chunks, budget = self._draw_length(rng)
        first_row = step * self.stage.batch
        windows = [self._draw_window(rng, first_row + i, n_chunks, held_out) for i in range(self.stage.batch)]
        encoded = None
        if not held_out and set(self.stage.train) != {"language_model"}:
            encoded = self._encode_for_training(windows)
        rows, tokens = [], []
        for window, seen in zip(windows, self._tokens_of(windows, n_chunks, encoded, held_out), strict=True):
            starts_s = [k * window.chunk_s for k in range(n_chunks)]
            shown = _choose(starts_s, seen, budget, self.stage.token_policy) if budget else (starts_s, list(seen))
            rows.append(self._packer.pack(shown[0], [len(each) for each in shown[1]], window.asked))
            tokens += shown[1]
        pad = self.processor.tokenizer.pad_token_id
        batch = collate(rows, pad if isinstance(pad, int) else 0).to(self.model.device)
        return batch, torch.cat(tokens).to(self.model.device), windows, encoded

    def _draw_length(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw the length of a step's windows in chunks, and the budget that goes with it."""
        which = int(rng.integers(len(self.stage.window_chunks)))
        return self.stage.window_chunks[which], self.stage.budget_tokens[which] if self.stage.budget_tokens else 0

    def _draw_window(self, rng: np.random.Generator, row: int, n_chunks: int, held_out: bool) -> _Window:
        """Draw a window with something to ask about, if one is found."""
        size = self.model.config.chunk_frames
        n_clip_chunks = self.stage.clip_frames // size
        best = _Window(0, 0, [], size / FPS)
        sought = _by_share(self.stage.seek, rng.random()) if self.stage.seek else None
        weights = self._weights if sought is None else {**self._weights, sought: _FOR_SURE}
        n_tries = _TRIES if sought is None else _SOUGHT_TRIES
        n_cached = 0 if held_out else self.stage.cached_streams
        for left in reversed(range(n_tries)):
            index = int(rng.integers(n_cached)) if n_cached else row
            if sought is not None and not n_cached and n_tries - left > _TRIES:  # the row's own has it not
                index = int(rng.integers(1 << 32))
            first = int(rng.integers(n_clip_chunks - n_chunks + 1))
            clip = self.clip(index, held_out) if index == row or n_cached else self._make_clip(index, held_out)
            view = clip.window(first * size, (first + n_chunks) * size)
            if sought is not None and left and not ask(view, rng, 1, {sought: 1.0}, backwards=clip.backwards):
                continue
            asked = ask(view, rng, self.stage.questions, weights, backwards=clip.backwards)
            if len(asked) >= len(best.asked):
                best = _Window(index, first, asked, size / FPS)
            if len(asked) >= self.stage.questions // 2:
                break
        if best.asked or n_cached:  # then each try was of another clip
            return best
        return self._draw_elsewhere(row, n_chunks, held_out)

    def _draw_elsewhere(self, row: int, n_chunks: int, held_out: bool) -> _Window:
        """Draw a window of any other clip, for a row whose own has nothing to ask; it may be without questions too.

        From numbers of its own, so that the step's other rows are drawn as they would be without.
        """
        rng = np.random.default_rng([self.seed, self.stage_index, row, held_out, 1])
        size = self.model.config.chunk_frames
        n_clip_chunks = self.stage.clip_frames // size
        for index in rng.integers(1 << 32, size=_OTHER_CLIPS).tolist():
            first = int(rng.integers(n_clip_chunks - n_chunks + 1))
            clip = self.clip(index, held_out)
            view = clip.window(first * size, (first + n_chunks) * size)
            if asked := ask(view, rng, self.stage.questions, self._weights, backwards=clip.backwards):
                return _Window(index, first, asked, size / FPS)
        return _Window(row, 0, [], size / FPS)

    def _tokens_of(
        self, windows: Sequence[_Window], n_chunks: int, encoded: Tensor | None, held_out: bool
    ) -> list[Tensor]:
        """Return each window's tokens, (n_chunks, tokens of a chunk, d_model)."""
        if isinstance(self._cache, TokenCache) and not held_out:
            return [self._cache.tokens[w.index, w.first : w.first + n_chunks] for w in windows]
        if encoded is None:
            tokens = encode_clips(self.model, self.processor, [self.clip(w.index, held_out) for w in windows])
        else:
            tokens = self._pool(encoded).unflatten(1, (self.stage.clip_frames // self.model.config.chunk_frames, -1))
        return [tokens[i, w.first : w.first + n_chunks] for i, w in enumerate(windows)]

    def _encode_for_training(self, windows: Sequence[_Window]) -> Tensor:
        """Return what the temporal encoder gives for the windows' whole clips, (B, T, rows, cols, d)."""
        indices = [window.index for window in windows]
        if not isinstance(self._cache, FeatureCache):
            return self._encode([self.clip(index) for index in indices])
        with _autocast(self.model.device):
            return self._mix(self._cache.features(indices, self.stage.clip_frames))

    def _pool(self, x: Tensor) -> Tensor:
        """Average what the temporal encoder gives as the model does: (B, T, rows, cols, d) → (B, n_tokens, d)."""
        config = self.model.config
        x = temporal_pool(x, config.temporal_pool)
        if not config.pool_before_temporal:
            x = spatial_pool(x, config.spatial_pool)
        return x.flatten(1, 3)

    def _predict(self, batch: TextBatch, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits at the places where something is to be predicted, and what is."""
        model = self.model
        embeds = model.embed_inputs(batch.input_ids, tokens.to(model.dtype))
        with _autocast(model.device, self.stage.bfloat16):
            hidden = model.language_model.get_decoder()(
                inputs_embeds=embeds,
                attention_mask=self._masks(batch),
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            logits = model.get_output_embeddings()(hidden[batch.rows, batch.columns])
        return logits.float(), batch.targets

    def _masks(self, batch: TextBatch) -> Any:
        """Return who may look where, as answers are generated: by kind of layer where some see a window alone."""
        config, mask = self.model.config, batch.attention_mask
        if config.imported_config is not None and config.imported_config.bidirectional_video:
            mask = look_within_frames(mask, batch.input_ids == config.video_token_id)
        text: Any = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        if "sliding_attention" not in kinds or len(kinds) == 1:
            return mask
        near = look_back_at_most(mask, batch.position_ids, text.sliding_window)
        return {"full_attention": mask, "sliding_attention": near}


class PairsTask(TextTask):
    """Real video with texts: each stretch is read whole. All of it is trained on, none held out."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        assert self.stage.data is not None
        self._pairs = read_pairs(self.stage.data)

    def _make_clip(self, index: int, held_out: bool) -> Any:
        turn, place = divmod(index, len(self._pairs))  # every pair once before any comes again
        order = np.random.default_rng([self.seed, turn]).permutation(len(self._pairs))
        return PairClip(self._pairs[order[place]], self.stage.clip_frames, self.model.config.image_size)

    def _clips_key(self) -> str:
        """See `TextTask._clips_key`: a video that was added, changed or taken out moves the others' numbers."""
        stats = {pair.video: pair.video.stat() for pair in self._pairs}
        told = [
            (str(p.video), stats[p.video].st_size, stats[p.video].st_mtime_ns, p.start_s, p.stop_s) for p in self._pairs
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def _plan(self, n_clips: int, on_clips: Callable[[int], None]) -> None:
        """Nothing: the texts say what happens."""

    def _draw_length(self, rng: np.random.Generator) -> tuple[int, int]:
        return self.stage.clip_frames // self.model.config.chunk_frames, max(self.stage.budget_tokens, default=0)

    def _draw_window(self, rng: np.random.Generator, row: int, n_chunks: int, held_out: bool) -> _Window:
        n_cached = self.stage.cached_streams
        index = int(rng.integers(n_cached)) if n_cached and not held_out else row
        clip: Any = self.clip(index, held_out)
        asked = [clip.texts.questions[i] for i in rng.permutation(len(clip.texts.questions))[: self.stage.questions]]
        return _Window(index, 0, asked, clip.length_s() / n_chunks)


def build_task(
    stage: Stage, stage_index: int, recipe: Recipe, model: StormForConditionalGeneration, processor: StormProcessor
) -> Task:
    """Return what a stage learns."""
    kind = {"places": PlacesTask, "motions": MotionsTask, "text": TextTask}[stage.task]
    if stage.data is not None:
        kind = PairsTask
    return kind(stage, stage_index, recipe, model, processor)


def _by_share(shares: Mapping[str, float], place: float) -> str:
    """Return the name at a place in [0, 1) where each takes up its share."""
    ends = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(ends, place * ends[-1], side="right"))]


def _autocast(device: torch.device, on_cpu: bool = False) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or on_cpu)


def _grid_of_chunks(model: StormForConditionalGeneration) -> int | None:
    """Return the grid that the scan must follow: none without a backward scan, and one pass is then faster."""
    return model.config.chunk_frames if model.config.temporal_config.bidirectional else None


def _choose(starts_s: Sequence[float], tokens: Tensor, budget: int, policy: str) -> tuple[list[float], list[Tensor]]:
    """Choose tokens as for an answer: (n_chunks, tokens of a chunk, d) → start and (n, d) of each chunk shown."""
    chunks = [VideoChunk(s, s, each) for s, each in zip(starts_s, tokens.numpy(), strict=True)]
    chosen = select_chunks(chunks, budget, policy)
    return [c.start_s for c in chosen], [torch.from_numpy(c.tokens) for c in chosen]


def _moving_heads(model: StormForConditionalGeneration, stage: Stage) -> PlaceHeads:
    """Return heads that read the temporal encoder."""
    return PlaceHeads(model.config.d_model, MOVING_TARGETS, shade=stage.shade, ages=stage.ages)


def _loss_of_places(places: PlaceHeads, clips: Sequence[Clip], encoded: Tensor) -> tuple[Tensor, Counts]:
    """Return what `PlaceHeads.loss` does of whole clips, (B, T, rows, cols, d)."""
    grid = encoded.shape[2]
    labels = stack_labels([label_places(clip, grid) for clip in clips], encoded.device)
    if places.shade is not None:
        labels["shade"] = torch.stack([shades_of(clip.render(), grid) for clip in clips]).to(encoded.device)
    return places.loss(encoded, labels)


def _mean_of_texts(predicted: Tensor, wanted: Tensor, batch: TextBatch) -> Tensor:
    """Return the loss. Each text counts alike in half of it: a caption has ten times an answer's tokens."""
    each = F.cross_entropy(predicted, wanted, reduction="none")
    n_of_text = torch.bincount(batch.texts, minlength=len(batch.kinds)).to(each.dtype).to(each.device)
    weight = n_of_text[batch.texts] ** -0.5
    return (each * weight).sum() / weight.sum()


def _count_texts(predicted: Tensor, wanted: Tensor, batch: TextBatch) -> Counts:
    """Count the texts of each kind of which every token is predicted right, given those before."""
    right = torch.ones(len(batch.kinds), dtype=torch.bool, device=wanted.device)
    right[batch.texts[predicted.argmax(-1) != wanted]] = False
    counts: Counts = {}
    for kind in dict.fromkeys(batch.kinds):
        of_kind = [i for i, each in enumerate(batch.kinds) if each == kind]
        counts[kind] = torch.tensor([float(right[of_kind].sum()), float(len(of_kind))])
    return counts
