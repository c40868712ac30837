"""One trainer for every stage of a recipe.

What step s of stage k does depends on (recipe, k, s) and the weights alone: its clips and questions come from
generators seeded with these numbers, and the state on disk holds weights and the optimisers' memory. So a training
that was killed and goes on gives the same model, bit for bit on the same machine, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..host_memory import give_back_freed_memory
from ..loading import choose_device, load_model, save_model
from ..processing import StormProcessor
from ..storm import StormForConditionalGeneration
from .lora import PART as ADAPTED
from .lora import Adapters
from .new_model import build_model
from .pairs import check_videos, read_pairs
from .ranks import Ranks
from .recipe import PARTS, Recipe, Stage, check_chunks, recipe_from_dict
from .tasks import Task, build_task
from .train_state import Optimizers, build_optimizers, load_state, save_state

SAVE_EVERY_S = 60.0
REPORT_EVERY_S = 5.0
MAX_GRADIENT_NORM = 1.0
FINAL_RATE_SHARE = 0.05  # of the highest learning rate, at a stage's end
_SMOOTHING = 0.98  # of the reported loss and accuracy, a step


@dataclass(frozen=True)
class TrainProgress:
    """Where a training stands."""

    stage: str
    stage_index: int
    n_stages: int
    step: int  # done, of this stage
    n_steps: int
    loss: float  # smoothed
    accuracy: dict[str, float] = field(repr=False)  # smoothed, by target or kind of question; and "all"
    left_s: float  # of this stage, at the pace so far
    note: str = ""  # what else is going on, such as encoding the cache


@dataclass
class _Meter:
    """Running means of loss and accuracy, weighted so that the first steps count in full."""

    loss: float = 0.0
    weight: float = 0.0
    right: dict[str, float] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, counts: dict[str, Tensor]) -> None:
        self.loss, self.weight = _SMOOTHING * self.loss + loss, _SMOOTHING * self.weight + 1.0
        for name, (right, asked) in ((n, c.tolist()) for n, c in counts.items()):
            self.right[name] = _SMOOTHING * self.right.get(name, 0.0) + right
            self.asked[name] = _SMOOTHING * self.asked.get(name, 0.0) + asked

    def mean_loss(self) -> float:
        return self.loss / max(self.weight, 1e-9)

    def accuracy(self) -> dict[str, float]:
        told = {n: self.right[n] / self.asked[n] for n in sorted(self.asked) if self.asked[n] > 0.01}
        total = sum(self.asked.values())
        return {"all": sum(self.right.values()) / total if total else 0.0, **told}


class _StoppedError(Exception):
    """Whoever trains wants to stop before a stage's first step."""


class Trainer:
    """Trains a recipe in a folder: ``state/`` to go on from, ``cache/``, ``log.jsonl`` and ``model/``, the result."""

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        *,
        device: str = "auto",
        clock: Callable[[], float] = time.monotonic,
        save_every_s: float = SAVE_EVERY_S,
        ranks: Ranks | None = None,
    ):
        """Build the model, or take up the training that the folder holds.

        Args:
            recipe: What to train.
            folder: Made if need be.
            device: ``auto``, ``cpu`` or ``cuda``.
            clock: In seconds; for progress and saving alone.
            save_every_s: How often the state is written; it also is at each stage's end.
            ranks: This process among others that train with it; None: alone. The same number of them gives the same
                model again, another number nearly the same.

        Raises:
            FileNotFoundError: If the data of a stage that is left, or a video that they name, is not there.
            ValueError: If a stage's batch cannot be shared, the data of a stage that is left cannot be trained on, its
                clips are no whole chunks of the model, or the folder holds the training of another recipe. Stages not
                yet begun may have changed.
        """
        self.recipe, self.folder = recipe, Path(folder)
        self._clock, self._save_every_s = clock, save_every_s
        self.ranks = ranks or Ranks()
        for stage in recipe.stages:
            self.ranks.share_of(stage.batch)
        self.model, self.processor, self._start_name = _start(recipe)
        self._adapters = None if recipe.lora is None else Adapters(self.model, recipe.lora, recipe.seed)
        self.device = choose_device(device)
        nn.Module.to(self.model, self.device)
        self._stage_index, self._step = 0, 0
        self._meter = _Meter()
        self._seconds = {stage.name: 0.0 for stage in recipe.stages}
        self._restored: dict[str, Tensor] = {}
        self._restore()
        for stage in recipe.stages[self._stage_index :]:
            check_chunks(stage, self.model.config.chunk_frames)
            if stage.data is not None:
                check_videos(read_pairs(stage.data))

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self._stage_index >= len(self.recipe.stages)

    def run(
        self,
        on_progress: Callable[[TrainProgress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Path | None:
        """Train to the end, or until `should_stop` says so after a step; then the state is kept.

        Returns:
            The model's folder, or None where it was stopped before the end.
        """
        report = on_progress or (lambda _: None)
        while not self.finished:
            if not self._run_stage(report, should_stop or (lambda: False)):
                return None
        if self.ranks.first:
            self.export()
        self.ranks.wait()
        return self.folder / "model"

    def export(self) -> Path:
        """Write the model as it stands to ``model/``."""
        folder = self.folder / "model"
        if self._adapters is not None:
            self._adapters.merge()
            self._adapters = None
        config = self.model.config
        config.trained = True
        if config.imported is not None:  # trained, it is another model than the one imported
            config.imported = {**config.imported, "name": f"{self._start_name}-{self.recipe.name}"}
        save_model(folder, self.model.float(), self.processor)
        log = self.folder / "log.jsonl"
        if log.is_file():
            (folder / "training_log.jsonl").write_bytes(log.read_bytes())
        about = {"recipe": self.recipe.to_dict(), "seconds": self._seconds, "torch": torch.__version__}
        (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return folder

    # ---- a stage ----

    def _run_stage(self, report: Callable[[TrainProgress], None], should_stop: Callable[[], bool]) -> bool:
        stage = self.recipe.stages[self._stage_index]
        torch.manual_seed(self.recipe.seed * 1000 + self._stage_index)  # for the task's heads
        mine = replace(stage, batch=self.ranks.share_of(stage.batch))
        task = build_task(mine, self._stage_index, self.recipe, self.model, self.processor)
        task.heads.to(self.device)
        optimizers = self._prepare(stage, task)
        began_s = reported_s = saved_s = self._clock()
        if not self.ranks.first:
            self.ranks.wait()  # until the first has filled the cache

        def on_clips(n: int) -> None:
            report(self._progress(stage, began_s, 0, f"{n} of {stage.cached_streams} clips encoded"))
            if self.ranks.world == 1 and should_stop():  # others would wait for the cache
                self._count_time(stage, began_s, self._clock())
                begun = self._step > 0  # else the stage may still change, and what is laid out for it
                self._save(*((task, optimizers) if begun else (None, None)))
                raise _StoppedError

        try:
            task.prepare(self.folder / "cache" / stage.name, on_clips)
        except _StoppedError:  # the clips encoded so far lie in their files
            return False
        if self.ranks.first:
            self.ranks.wait()
        first_step, steps_began_s = self._step, self._clock()
        while self._step < stage.steps:
            loss, counts = self._train_step(stage, task, optimizers)
            if counts:  # a step that had nothing to ask says nothing of the loss
                self._meter.add(loss, counts)
            self._step += 1
            now_s = self._clock()
            if now_s - reported_s >= REPORT_EVERY_S or self._step == stage.steps:
                report(self._progress(stage, steps_began_s, first_step))
                reported_s = now_s
            if now_s - saved_s >= self._save_every_s:
                self._count_time(stage, saved_s, now_s)
                self._save(task, optimizers)
                give_back_freed_memory()  # else a long stage of windows of many lengths takes ever more
                saved_s = now_s
            if self.ranks.any(should_stop(), self.device):
                self._count_time(stage, saved_s, self._clock())
                self._save(task, optimizers)
                return False
        self._count_time(stage, saved_s, self._clock())
        self._log(stage)
        self._stage_index, self._step, self._meter = self._stage_index + 1, 0, _Meter()
        self._save(None, None)
        return True

    def _prepare(self, stage: Stage, task: Task) -> Optimizers:
        """Freeze what the stage does not train, and take up the optimisers' memory where there is some."""
        for part in PARTS:
            for parameter in self.model.parameters_of(part).values():
                parameter.requires_grad_(False)
            for parameter in self._trained_of(part).values() if part in stage.train else ():
                parameter.requires_grad_(True)
        if stage.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        trained = {f"model/{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        trained |= {f"heads/{n}": p for n, p in task.heads.named_parameters()}
        optimizers = build_optimizers(trained, stage.optimizer, stage.learning_rate, stage.weight_decay)
        if self._restored:
            heads = {k.removeprefix("heads/"): v for k, v in self._restored.items() if k.startswith("heads/")}
            task.heads.load_state_dict(heads)
            optimizers.load_tensors(self._restored)
            self._restored = {}
        return optimizers

    def _train_step(self, stage: Stage, task: Task, optimizers: Optimizers) -> tuple[float, dict[str, Tensor]]:
        self.model.train()
        # Dropout, too, follows from the stage and the step alone, on each rank its own.
        place = (self.recipe.seed, self._stage_index, self._step, self.ranks.rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        with task.attention():
            loss, counts = task.loss(self._step * self.ranks.world + self.ranks.rank)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"stage {stage.name!r} has a loss of {loss.item()} at step {self._step}; expected a number. "
                    "Lower its learning_rate; the state saved last is from before"
                )
            loss.backward()
        trained = [p for o in optimizers.parts for g in o.param_groups for p in g["params"]]
        self.ranks.average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizers.step(learning_rate_at(stage, self._step))
        for parameter in trained:
            parameter.grad = None
        return loss.item(), counts

    # ---- what is kept ----

    def _save(self, task: Task | None, optimizers: Optimizers | None) -> None:
        if not self.ranks.first:
            return
        tensors = {f"model/{k}": v.detach().cpu().clone() for k, v in self._kept_parameters().items()}
        if task is not None and optimizers is not None:
            tensors |= {f"heads/{k}": v.detach().cpu().clone() for k, v in task.heads.state_dict().items()}
            tensors |= {k: v.clone() for k, v in optimizers.to_tensors().items()}
        values = {
            "stage": self._stage_index,
            "step": self._step,
            "recipe": self.recipe.to_dict(),
            "seconds": self._seconds,
            "meter": asdict(self._meter),
        }
        save_state(self.folder / "state", tensors, values)

    def _kept_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the state holds: all, or of a large model that was there before what the recipe trains."""
        if self.recipe.start_from is None:
            return dict(self.model.named_parameters())
        parts = {part for stage in self.recipe.stages for part in stage.train}
        return {name: p for part in sorted(parts) for name, p in self._trained_of(part).items()}

    def _trained_of(self, part: str) -> dict[str, nn.Parameter]:
        """Return what of a part changes where a stage trains it."""
        if part == ADAPTED and self._adapters is not None:
            return self._adapters.parameters()
        return self.model.parameters_of(part)

    def _restore(self) -> None:
        found = load_state(self.folder / "state")
        if found is None:
            return
        tensors, values = found
        n_begun = values["stage"] + (values["step"] > 0)
        self._check_recipe(values["recipe"], n_begun)
        parts = {part for stage in self.recipe.stages[:n_begun] for part in stage.train}
        begun = {name for part in parts for name in self._trained_of(part)}
        with torch.no_grad():
            for name, parameter in self._kept_parameters().items():
                # What only stages not yet begun train may be new among these: it is as it was at the start.
                if name in begun or f"model/{name}" in tensors:
                    parameter.copy_(tensors[f"model/{name}"])
        self._stage_index, self._step = values["stage"], values["step"]
        self._seconds |= {k: v for k, v in values["seconds"].items() if k in self._seconds}
        self._meter = _Meter(**values["meter"])
        self._restored = {k: v for k, v in tensors.items() if not k.startswith("model/")}

    def _check_recipe(self, saved: dict[str, Any], n_begun: int) -> None:
        """Refuse another recipe; stages after the first `n_begun` may differ."""
        recipe = json.loads(json.dumps(self.recipe.to_dict()))
        saved = json.loads(json.dumps(recipe_from_dict(saved).to_dict()))  # with what has come since, at its default
        got, expected = ({**r, "stages": r["stages"][:n_begun]} for r in (saved, recipe))
        if got != expected:
            different = sorted(k for k in expected if got.get(k) != expected[k])
            raise ValueError(
                f"{self.folder} holds the training of another recipe (different: {', '.join(different)}); expected "
                f"{recipe['name']!r} as it is now, but for stages not yet begun. Use another folder, or delete this one"
            )

    def _count_time(self, stage: Stage, began_s: float, now_s: float) -> None:
        self._seconds[stage.name] += now_s - began_s

    def _log(self, stage: Stage) -> None:
        if not self.ranks.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {
            "stage": stage.name,
            "steps": stage.steps,
            "seconds": round(self._seconds[stage.name], 1),
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "loss": round(self._meter.mean_loss(), 4),
            "accuracy": {k: round(v, 4) for k, v in self._meter.accuracy().items()},
        }
        log = self.folder / "log.jsonl"
        # A stage that was done again, because the state was not yet written, is told once.
        told = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        told = [each for each in told if json.loads(each)["stage"] != stage.name]
        temporary = log.with_suffix(".tmp")
        temporary.write_text("".join(f"{each}\n" for each in [*told, json.dumps(line)]), encoding="utf-8")
        os.replace(temporary, log)

    def _progress(self, stage: Stage, began_s: float, first_step: int, note: str = "") -> TrainProgress:
        done = self._step - first_step
        pace_s = (self._clock() - began_s) / done if done else 0.0
        return TrainProgress(
            stage=stage.name,
            stage_index=self._stage_index,
            n_stages=len(self.recipe.stages),
            step=self._step,
            n_steps=stage.steps,
            loss=self._meter.mean_loss(),
            accuracy=self._meter.accuracy(),
            left_s=pace_s * (stage.steps - self._step),
            note=note,
        )


def learning_rate_at(stage: Stage, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine down to a twentieth."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    n_steps = stage.schedule_steps or stage.steps
    share = (step - stage.warmup_steps) / max(1, n_steps - stage.warmup_steps)
    return stage.learning_rate * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))


def _start(recipe: Recipe) -> tuple[StormForConditionalGeneration, StormProcessor, str]:
    """Return the model to train, its processor and its name."""
    if recipe.start_from is None:
        model, processor = build_model(recipe.model, recipe.seed)
        if recipe.vision_from is not None:
            seeing: Any = load_model(recipe.vision_from, device="cpu", dtype="float32")
            model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
        return model, processor, recipe.name
    loaded: Any = load_model(recipe.start_from, device="cpu", dtype="float32")
    return loaded.model, loaded.processor, loaded.name
