"""A model's card: what it is, how it was trained, how good it is, from the files that training and evaluation left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluate import Evaluation, markdown_table
from .questions import KINDS, NEEDLE_KINDS, ORDERED_KINDS
from .recipe import RECIPE_FOLDER, load_recipe, recipe_from_dict

CARD, PLOT, EVALUATION = "README.md", "accuracy.png", "evaluation.json"
TRAINING, LOG = "training.json", "training_log.jsonl"  # what `Trainer` left


def check_card(folder: str | Path) -> None:
    """Say before a long evaluation that `write_card` could not write.

    Raises:
        FileNotFoundError: If the folder is not one that `Trainer` made.
        ImportError: If matplotlib is missing.
    """
    if missing := [name for name in (TRAINING, LOG) if not (Path(folder) / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; expected the folder of a model that `stormline train` made: "
            "a card tells how it was trained. Measure other models without a card"
        )
    _figure_class()


def write_card(folder: str | Path, evaluation: Evaluation) -> Path:
    """Write the card, the evaluation's numbers and a plot beside a model that `Trainer` made.

    Raises:
        FileNotFoundError: If the folder is not one that `Trainer` made.
        ImportError: If matplotlib is missing.
    """
    check_card(folder)
    folder = Path(folder)
    training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    (folder / EVALUATION).write_text(json.dumps(evaluation.to_dict(), indent=1) + "\n", encoding="utf-8")
    plot_accuracy(evaluation, folder / PLOT)
    path = folder / CARD
    path.write_text(card_text(training, log, evaluation), encoding="utf-8")
    return path


def card_text(training: Mapping[str, Any], log: Sequence[Mapping[str, Any]], evaluation: Evaluation) -> str:
    """Return the card as Markdown."""
    recipe = training["recipe"]
    minutes = sum(training["seconds"].values()) / 60
    stages = [
        "| stage | learns | trains | steps | minutes | loss | accuracy while training |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, line in zip(recipe["stages"], log, strict=True):
        stages.append(
            f"| {stage['name']} | {stage['task']} | {', '.join(stage['train'])} | {stage['steps']} "
            f"| {line['seconds'] / 60:.0f} | {line['loss']:.3f} | {line['accuracy']['all']:.1%} |"
        )
    places = sorted({f"{line['device']}, {line['threads']} threads" for line in log})
    one_pass = evaluation.one_pass
    real = _real_video_of(recipe)
    return "\n".join(
        [
            f"# {recipe['name']}",
            "",
            *_what_it_is(recipe),
            "",
            "## Training",
            "",
            f"{_how_to_reproduce(recipe)}, seed {recipe['seed']}; it took",
            f"{minutes:.0f} minutes on {' and '.join(places)}, torch {training['torch']}.",
            "",
            *stages,
            "",
            *_what_it_saw(recipe),
            "",
            "## Evaluation",
            "",
            *(["The generated world of coloured shapes, whatever else the model was trained on."] if real else []),
            "Held-out clips, streamed chunk by chunk with the state carried, at most",
            f"{evaluation.budget_tokens} video tokens to an answer, chosen by the policy `{evaluation.token_policy}`;",
            f"`stormline eval`, seed {evaluation.seed}.",
            f"Encoded {evaluation.encoded_frames_per_s:.0f} frames a second. Streamed tokens equal those of one pass",
            f"in {one_pass['equal']} of {one_pass['compared']} clips.",
            "",
            markdown_table(evaluation),
            "",
            f"![Accuracy over length]({PLOT})",
            "",
            "Chance is the best that always says the same or tosses a coin between the options. Clips of needles are",
            "long and dull, with few short events; from 128 frames on only kinds that make sense there are asked.",
            "",
        ]
    )


def _real_video_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the data of the stages that train on real video, by the stage's name."""
    return {stage["name"]: stage["data"] for stage in recipe["stages"] if stage.get("data")}


def _what_it_is(recipe: Mapping[str, Any]) -> list[str]:
    real, start, tower = _real_video_of(recipe), recipe.get("start_from"), recipe.get("vision_from")
    if not (real or start or tower):
        return [
            "A small video language model on STORM's plan (vision tower, linear projector, recurrent Mamba-2",
            f"temporal encoder, pooling over {recipe['model']['temporal_pool']} frames, decoder), trained from nothing "
            "on a generated world of coloured",
            "shapes. It knows that world and nothing else: of real video it will say something about shapes.",
        ]
    begun = f"It went on from `{start}`" if start else "It was trained from nothing"
    if tower and not start:
        begun += f", but for the vision tower, which began as that of `{tower}`"
    seen = ["a generated world of coloured shapes"] if len(real) < len(recipe["stages"]) else []
    seen += ["real video with text"] if real else []
    lines = [
        "A video language model on STORM's plan (vision tower, projector, recurrent Mamba-2 temporal encoder, pooling,",
        "decoder).",
        f"{begun}, and learnt on {' and '.join(seen)}.",
    ]
    if lora := recipe.get("lora"):
        lines.append(f"Its language model was adapted by LoRA of rank {lora['rank']}, merged into its weights.")
    return lines


def _how_to_reproduce(recipe: Mapping[str, Any]) -> str:
    """Return the command, where the recipe is one that stormline has, and what to write into a file where it is not."""
    name = recipe["name"]
    path = RECIPE_FOLDER / f"{name}.yaml"
    if path.is_file() and load_recipe(path) == recipe_from_dict(recipe):
        return f"Reproduce it with `stormline train {name} --out FOLDER`"
    return (
        "Reproduce it with `stormline train RECIPE.yaml --out FOLDER`, where RECIPE.yaml holds what stands under "
        "`recipe`\nin `training.json`"
    )


def _what_it_saw(recipe: Mapping[str, Any]) -> list[str]:
    real, lines = _real_video_of(recipe), []
    if len(real) < len(recipe["stages"]):
        lines += [
            "The data are clips of `models/training/shapes.py` at 2 frames a second, drawn as they are needed. A clip",
            "is a function of its number; training uses seeds below 2^40, evaluation those from there on. Some of the",
            "clips are played backwards; a question that needs the order of events has the other answer then.",
        ]
    lines += [f"Stage {name} learnt real video with text: `{data}`." for name, data in real.items()]
    rest = "Everything else" if real else "Everything"
    return [*lines, f"{rest} that decides the training is in `training.json`."]


def plot_accuracy(evaluation: Evaluation, path: str | Path) -> None:
    """Draw accuracy over length, a line for each family of questions and dots for shuffled frames, as PNG.

    Raises:
        ImportError: If matplotlib is missing.
    """
    families = {
        "order of frames": ORDERED_KINDS,
        "needles": NEEDLE_KINDS,
        "captions": ("caption",),
        "alerts": ("alert",),
        "all others": tuple(k for k in KINDS if k not in (*ORDERED_KINDS, *NEEDLE_KINDS, "caption", "alert")),
    }
    figure = _figure_class()(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, kinds) in enumerate(families.items()):
        for share, style in (("accuracy", "o-"), ("shuffled", "x:")):
            means = [(n, evaluation.mean(n, kinds, share)) for n in sorted(evaluation.by_length)]
            points = [(n, mean) for n, mean in means if mean is not None]
            if points and (share == "accuracy" or name == "order of frames"):
                label = name if share == "accuracy" else f"{name}, shuffled"
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(evaluation.by_length), [str(n) for n in sorted(evaluation.by_length)])
    axes.set(xlabel="frames at 2 a second", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install 'stormline[train]'") from error
    return Figure
