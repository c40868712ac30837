"""`stormline train`: train a model by a recipe."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...operators.errors import SettingsError

if TYPE_CHECKING:
    from ...models.training.trainer import TrainProgress


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that stormline has.")
    ] = "shapes-tiny",
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="For the state, the log and the model; goes on where it is.")
    ] = Path("train-out"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; another number gives a slightly other model.")] = 2,
    scale: Annotated[
        float, typer.Option(min=1e-4, max=100, help="Times so many steps: 0.01 to see whether it runs.")
    ] = 1.0,
) -> None:
    """Train a video language model, stage by stage.

    Ctrl-C ends it after the current step and keeps the state; the same command goes on there, with the same result
    as if it had never stopped. A kill loses at most a minute.

    [bold]Examples[/]

      stormline train                                     # the model that stormline ships, 9 hours on 2 cores

      stormline train shapes-two-hours                    # less good, in 2 to 2½ hours: to try changes with

      stormline train --out /tmp/try --scale 0.01         # a hundredth of the steps: does it run?

      stormline train my-recipe.yaml --device cuda

      torchrun --nproc-per-node 8 --no-python stormline train my-recipe.yaml --device cuda    # eight GPUs
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from ...models.host_memory import keep_freed_memory
    from ...models.loading import choose_device
    from ...models.training.ranks import Ranks
    from ...models.training.recipe import load_recipe
    from ...models.training.trainer import Trainer
    from ..stop_signals import EXIT_INTERRUPTED, on_stop_signal

    torch.set_num_threads(threads)
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    stop = threading.Event()
    try:
        chosen = load_recipe(recipe)
        chosen = chosen if scale == 1.0 else chosen.scaled(scale)
        place = str(choose_device(device))
        _make_folder(out)
        ranks = Ranks.join(place)
        trainer = Trainer(chosen, out, device=place, ranks=ranks)
        with on_stop_signal(stop.set, typer.echo):
            folder = trainer.run(_show if ranks.first else None, stop.is_set)
    except (ValueError, FileNotFoundError) as error:
        raise SettingsError(str(error)) from error
    ranks.leave()
    if not ranks.first:
        return
    if folder is None:
        typer.echo(f"stopped; the same command goes on from {out}")
        raise typer.Exit(EXIT_INTERRUPTED)
    typer.echo(f"model in {folder}; measure it with: stormline eval {folder}")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write to {out}: {error.strerror or error}; expected a folder for --out") from error


def _show(progress: TrainProgress) -> None:
    p = progress
    head = f"[{p.stage_index + 1}/{p.n_stages}] {p.stage:<10} {p.step:>6}/{p.n_steps}"
    if p.note:
        typer.echo(f"{head}  {p.note}")
        return
    worst = sorted((v, k) for k, v in p.accuracy.items() if k != "all")[:6]
    told = "  ".join(f"{name} {share:.0%}" for share, name in worst)
    left = f"{p.left_s / 60:.1f} min left" if p.left_s >= 90 else f"{p.left_s:.0f} s left"
    typer.echo(f"{head}  loss {p.loss:.3f}  accuracy {p.accuracy['all']:.1%}  {left}  lowest: {told}")
