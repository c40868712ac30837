"""A model's card: what it is, how it was trained, how good it is, from the files that training and evaluation left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluate import Evaluation, markdown_table
from .questions import KINDS, NEEDLE_KINDS, ORDERED_KINDS

CARD, PLOT, EVALUATION = "README.md", "accuracy.png", "evaluation.json"


def write_card(folder: str | Path, evaluation: Evaluation) -> Path:
    """Write the card, the evaluation's numbers and a plot beside a model that `Trainer` made.

    Raises:
        FileNotFoundError: If the folder has no training.json and training_log.jsonl.
        ImportError: If matplotlib is missing.
    """
    folder = Path(folder)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
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
    return "\n".join(
        [
            f"# {recipe['name']}",
            "",
            "A small video language model on STORM's plan (vision tower, linear projector, recurrent Mamba-2",
            "temporal encoder, pooling over 4 frames, decoder), trained from nothing on a generated world of coloured",
            "shapes. It knows that world and nothing else: of real video it will say something about shapes.",
            "",
            "## Training",
            "",
            f"Reproduce it with `stormline train {recipe['name']} --out FOLDER`, seed {recipe['seed']}; it took",
            f"{minutes:.0f} minutes on {' and '.join(places)}, torch {training['torch']}.",
            "",
            *stages,
            "",
            "The data are clips of `models/training/shapes.py` at 2 frames a second, drawn as they are needed. A clip",
            "is a function of its number; training uses seeds below 2^40, evaluation those from there on. Some of the",
            "clips are played backwards; a question that needs the order of events has the other answer then.",
            "Everything that decides the training is in `training.json`.",
            "",
            "## Evaluation",
            "",
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


def plot_accuracy(evaluation: Evaluation, path: str | Path) -> None:
    """Draw accuracy over length, a line for each family of questions and dots for shuffled frames, as PNG.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install 'stormline[train]'") from error

    families = {
        "order of frames": ORDERED_KINDS,
        "needles": NEEDLE_KINDS,
        "captions": ("caption",),
        "alerts": ("alert",),
        "all others": tuple(k for k in KINDS if k not in (*ORDERED_KINDS, *NEEDLE_KINDS, "caption", "alert")),
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
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
