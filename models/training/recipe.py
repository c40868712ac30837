"""A training recipe: the model's sizes and its stages, as frozen records read from YAML.

    name: shapes-tiny
    seed: 0
    stages:
      - {name: vision, task: places, train: [vision_tower], steps: 2000}
      - {name: language, task: text, train: [language_model], steps: 3000, cached_streams: 1000}

STORM's stages (arXiv 2503.04130, section 4) are such records: *align* trains the projector and the temporal encoder,
*fine-tune* everything, *long* goes on with longer clips. A model that starts from nothing first learns to see
(``places``) and to see motion (``motions``), on labels for each place of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..strict_yaml import load_yaml
from .clips import WORLDS
from .lora import PART, Lora
from .questions import KINDS, NAMED_ONLY, NEEDLE_KINDS

Task = Literal["places", "motions", "text"]
PARTS = ("vision_tower", "multi_modal_projector", "temporal_encoder", "language_model")
RECIPE_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that is trained from nothing."""

    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 3
    downsample: int = 2  # pixel shuffle, as in STORM
    spatial_pool: int = 1
    temporal_pool: int = 4
    chunk_frames: int = 4
    temporal_width: int = 128
    temporal_layers: int = 1  # one that is never trained changes nothing: as good as none, for comparison
    temporal_state: int = 32
    scan_order: Literal["location", "sweep"] = "location"
    bidirectional: bool = False
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 6
    vocab_size: int = 1024


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Shown in progress and log.
        task: ``places``: colour, shape and size at each place of single frames. ``motions``: also motion, speed and
            change, after the temporal encoder. ``text``: questions and captions.
        train: Of `PARTS`, those whose weights change.
        steps: Optimiser steps.
        schedule_steps: Steps that the learning rate is laid out for, where the stage ends before them; 0: `steps`.
        batch: Clips in a step; for ``text``, windows.
        learning_rate: At its highest, after the warm-up; it falls along a cosine to a twentieth of that.
        optimizer: ``adamw``, or ``muon`` for the matrices inside the blocks and AdamW for everything else.
        clip_frames: Frames of a clip or stream.
        window_chunks: Lengths of the windows that are asked about, in chunks; one is drawn for each step.
        budget_tokens: For each window length, the most video tokens that the language model sees; 0 for all. Only
            with cached streams.
        token_policy: How they are chosen, see `models.selection`.
        questions: Most questions and captions to a window.
        weights: Of kinds of question; kinds not named have weight 1, or 0 where `only` is set.
        seek: Of kinds of question, the share of windows that are drawn so that this kind can be asked: most windows
            have no caption without something at their ends, or two changes to compare. They are sought in other
            clips, where a row's own has none. {}: windows as they come.
        only: Whether kinds that `weights` does not name are left out.
        places: Of ``text``: weight, beside the texts, of what is at each place of each frame, which is read off the
            temporal encoder as for ``motions``. 0: texts alone.
        shade: Of ``motions``, and of ``text`` with `places`: also each place's mean colour and its change of late.
            Nothing else asks for a background, so that what follows could not tell one from another.
        ages: Of the same: also how long ago the object at a place last changed, which tells what came first.
        worlds: For each kind of world, its share of the clips.
        backwards: Share of the clips that are played backwards. Of those, captions and what objects do are not asked.
        cached_streams: Train on so many clips, which are seen once: where the language model alone trains, their
            tokens are kept on disk, and else what the vision tower gives, which must be frozen. 0: clips that are
            seen as they come.
        data: A folder, .jsonl or .parquet of real video with text, see `pairs`; nothing: the world of shapes. A clip
            is then a stretch of video as `clip_frames` evenly spaced frames, read whole: `window_chunks`, `worlds`,
            `weights` and `seek` do not apply.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, a third more time.
        bfloat16: Compute the language model and the vision tower in bfloat16 also on a CPU; on CUDA everything trains
            so.
    """

    name: str
    task: Task
    train: tuple[str, ...]
    steps: int
    schedule_steps: int = 0
    batch: int = 8
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.01
    warmup_steps: int = 100
    clip_frames: int = 16
    window_chunks: tuple[int, ...] = (2, 4, 5, 8)
    budget_tokens: tuple[int, ...] = ()
    token_policy: Literal["recent", "uniform", "global_local", "changes"] = "global_local"
    questions: int = 8
    weights: Mapping[str, float] = field(default_factory=dict)
    seek: Mapping[str, float] = field(default_factory=dict)
    only: bool = False
    places: float = 0.0
    shade: bool = False
    ages: bool = False
    worlds: Mapping[str, float] = field(default_factory=lambda: {"shapes": 1.0})
    backwards: float = 0.5
    cached_streams: int = 0
    data: str | None = None
    bfloat16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "window_chunks", "budget_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # YAML has lists
        where = f"stage {self.name!r}"
        _one_of(f"{where}: task", self.task, get_args(Task))
        _one_of(f"{where}: optimizer", self.optimizer, ("adamw", "muon"))
        _one_of(f"{where}: token_policy", self.token_policy, ("recent", "uniform", "global_local", "changes"))
        for part in self.train:
            _one_of(f"{where}: train", part, PARTS)
        for name in ("weights", "seek"):
            for kind in getattr(self, name):
                _one_of(f"{where}: {name}", kind, KINDS)
        if unasked := [kind for kind in self.seek if not self.question_weights()[kind]]:
            raise ValueError(f"{where}: seek names {', '.join(unasked)}, of weight 0; expected kinds that are asked")
        for kind in self.worlds:
            _one_of(f"{where}: worlds", kind, WORLDS)
        if self.task == "text" and self.data is None and not self._kinds_asked():
            raise ValueError(
                f"{where}: nothing can be asked: weights is {dict(self.weights)}, only is {self.only} and worlds is "
                f"{dict(self.worlds)}; expected a kind of weight above 0, and needles in a world for those of them"
            )
        for name in ("steps", "batch", "clip_frames", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name} is {getattr(self, name)}; expected 1 or more")
        if 0 < self.schedule_steps < self.steps:
            raise ValueError(
                f"{where}: schedule_steps is {self.schedule_steps} and steps is {self.steps}; expected as many "
                "or more, or 0 for as many: the learning rate would rise again behind the schedule's end"
            )
        if not 0.0 <= self.backwards <= 1.0:
            raise ValueError(f"{where}: backwards is {self.backwards}; expected a share, 0 to 1")
        if self.places and (self.task != "text" or self.data is not None or "temporal_encoder" not in self.train):
            raise ValueError(
                f"{where}: places is {self.places} but {', '.join(self.train)} train on {self.data or self.task!r}; "
                "expected task 'text' on the world of shapes, and a temporal encoder that trains"
            )
        if not 0.0 <= self.places < math.inf:
            raise ValueError(f"{where}: places is {self.places}; expected a weight, 0 or more")
        for name in ("shade", "ages"):
            if getattr(self, name) and self.task != "motions" and not self.places:
                raise ValueError(
                    f"{where}: {name} is set for task {self.task!r}; expected 'motions', or 'text' with places"
                )
        if not self.train:
            raise ValueError(f"{where}: train names no part; expected one or more of {', '.join(PARTS)}")
        if self.cached_streams and (self.task != "text" or "vision_tower" in self.train):
            raise ValueError(
                f"{where}: cached_streams is {self.cached_streams} but {', '.join(self.train)} train on {self.task!r}; "
                "expected task 'text' and a vision tower that does not train: what it gives could not be kept"
            )
        if any(self.budget_tokens) and not self.keeps_tokens:
            raise ValueError(
                f"{where}: budget_tokens is {self.budget_tokens}; expected cached_streams with it, and train "
                "[language_model]: tokens are chosen from those on disk"
            )
        if self.data is not None and self.task != "text":
            raise ValueError(f"{where}: data is {self.data!r} for task {self.task!r}; expected task 'text'")
        if self.budget_tokens and len(self.budget_tokens) != len(self.window_chunks):
            raise ValueError(
                f"{where}: budget_tokens has {len(self.budget_tokens)} entries; expected one for each of the "
                f"{len(self.window_chunks)} window_chunks, or none"
            )

    @property
    def keeps_tokens(self) -> bool:
        """Whether the stage trains on tokens that lie on disk."""
        return self.cached_streams > 0 and self.train == ("language_model",)

    def question_weights(self) -> dict[str, float]:
        """Return the weight of every kind of question."""
        return {kind: self.weights.get(kind, 0.0 if self.only or kind in NAMED_ONLY else 1.0) for kind in KINDS}

    def _kinds_asked(self) -> list[str]:
        """Return the kinds of question that have a weight, and that a world of the stage can answer."""
        never = () if self.worlds.get("needles") else NEEDLE_KINDS
        return [kind for kind, weight in self.question_weights().items() if weight > 0 and kind not in never]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained: the same recipe gives the same model on the same machine."""

    name: str
    stages: tuple[Stage, ...]
    seed: int = 0
    model: ModelSizes = field(default_factory=ModelSizes)
    vision_from: str | None = None  # a model folder whose vision tower to take, of the same sizes
    start_from: str | None = None  # a model folder or hub id to go on from; None: from nothing, with `model`'s sizes
    lora: Lora | None = None  # stages that train the language model train these small matrices in its place

    def __post_init__(self) -> None:
        if self.lora is not None and not any(PART in stage.train for stage in self.stages):
            raise ValueError(f"recipe {self.name!r} has lora, but no stage trains {PART}; expected one, or no lora")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"recipe {self.name!r} has stages {names}; expected one or more, each with its own name")
        if self.start_from is None:  # else the model to start from knows its chunks
            for stage in self.stages:
                check_chunks(stage, self.model.chunk_frames)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)

    def scaled(self, factor: float) -> Recipe:
        """Return it with `factor` times the steps and cached clips of each stage, at least one: to try it out."""
        stages = []
        for stage in self.stages:
            values = {f.name: getattr(stage, f.name) for f in fields(Stage)}
            values["steps"] = max(1, round(stage.steps * factor))
            values["schedule_steps"] = round(stage.schedule_steps * factor)
            values["warmup_steps"] = round(stage.warmup_steps * min(1.0, factor))
            if stage.cached_streams:
                values["cached_streams"] = max(1, round(stage.cached_streams * factor))
            stages.append(Stage(**values))
        values = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        return Recipe(**{**values, "stages": tuple(stages)})


def check_chunks(stage: Stage, chunk_frames: int) -> None:
    """Refuse a stage whose clips or windows do not go with a model's frames in a chunk.

    Raises:
        ValueError: If a clip is no whole number of chunks, or has no room for the windows.
    """
    if stage.task != "text":
        return
    n_longest = max(stage.window_chunks) if stage.data is None else 0
    if stage.clip_frames % chunk_frames or n_longest * chunk_frames > stage.clip_frames:
        raise ValueError(
            f"stage {stage.name!r}: clip_frames is {stage.clip_frames}; expected a multiple of the model's "
            f"{chunk_frames} frames in a chunk{f', and room for windows of {n_longest} chunks' if n_longest else ''}"
        )


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe from a YAML file, or one of those built in by its name.

    Raises:
        FileNotFoundError: If there is no such file; the message names those built in.
        ValueError: If the file is no YAML; on unknown keys or values that do not go together.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPE_FOLDER / f"{source}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPE_FOLDER.glob("*.yaml"))
        raise FileNotFoundError(f"recipe {str(source)!r} is no file; expected a YAML file or one of {', '.join(known)}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return recipe_from_dict(values, str(path))


def recipe_from_dict(values: Any, where: str = "recipe") -> Recipe:
    """Build a recipe from what YAML or JSON gave.

    Raises:
        ValueError: On unknown or missing keys, or values that do not go together.
    """
    values = dict(_mapping(values, where))
    stages = values.pop("stages", [])
    if not isinstance(stages, (list, tuple)):
        raise ValueError(f"{where}: stages is {type(stages).__name__}; expected a list")
    values["stages"] = tuple(_build(Stage, s, f"{where}: stage {i + 1}") for i, s in enumerate(stages))
    if "model" in values:
        values["model"] = _build(ModelSizes, values["model"], f"{where}: model")
    if values.get("lora") is not None:
        values["lora"] = _build(Lora, values["lora"], f"{where}: lora")
    return _build(Recipe, values, where)


def _build(kind: type, values: Any, where: str) -> Any:
    values = _mapping(values, where)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown keys {unknown}; expected only {sorted(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: got {type(values).__name__}; expected keys with values")
    return values


def _one_of(what: str, got: object, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{what} is {got!r}; expected one of {', '.join(known)}")
