"""What each part of the model is worth: variants trained alike, on the same clips, for the same steps.

    python benchmarks/ablation.py --out /tmp/ablation [--variants full,still] [--scale 1]

Every variant takes the vision tower of the model that stormline ships, frozen, and learns everything else from
nothing: the projector and the temporal encoder (motion at each place), then these and the language model together
(questions and captions about up to 16 s), then the language model alone about up to a minute under a budget of tokens.
Then it is measured on the same held-out clips:

    full           one direction, 4 frames pooled into one
    still          without the temporal encoder
    both-ways      with a backward scan within each chunk
    unpooled       without pooling over time: four times the tokens
    pooled-2x2     with 2 x 2 places pooled into one as well: a quarter of the tokens

and `full` and `still` again with every other chunk left out when they answer (STORM's test-time sampling), and
`unpooled` under the number of tokens that `full` has. Variants that were measured before with the same stages stay in
the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from stormline.models.loading import DEFAULT_FOLDER, load_model
from stormline.models.training.evaluate import evaluate
from stormline.models.training.questions import KINDS, NAMED_ONLY, ORDER_NEEDED
from stormline.models.training.recipe import Recipe, recipe_from_dict
from stormline.models.training.tasks import build_task
from stormline.models.training.trainer import Trainer, TrainProgress

RESULT = Path(__file__).parent / "results" / "ablation.json"
LENGTHS = (8, 32, 128)
TOKENS_PER_CHUNK = 16  # of `full`
VARIANTS = {
    "full": {},
    "still": {},
    "both-ways": {"bidirectional": True},
    "unpooled": {"temporal_pool": 1},
    "pooled-2x2": {"spatial_pool": 2},
}


SHARED = "together"  # the stage whose clips are seen once for all variants
LONGEST_TOKENS = TOKENS_PER_CHUNK * 32  # to an answer, of any variant
TEXT = {
    "task": "text",
    "optimizer": "muon",
    "batch": 16,
    "weights": {"caption": 3, "objects": 3, "first change": 4, "actions": 2, "after": 2, "colour change": 2},
    "seek": {"caption": 4, "first change": 4, "alert": 2, "needle first": 1, "needle count": 1},
    "worlds": {"shapes": 0.8, "needles": 0.2},
    "backwards": 0.4,
    "bfloat16": True,
}
STAGES = [
    {
        "name": "motion",
        "task": "motions",
        "optimizer": "muon",
        "steps": 400,
        "batch": 8,
        "clip_frames": 16,
        "learning_rate": 4.0e-3,
        "warmup_steps": 50,
        "bfloat16": True,
    },
    {
        **TEXT,
        "name": SHARED,
        "steps": 1500,
        "clip_frames": 32,
        "window_chunks": [2, 4, 5, 8],
        "learning_rate": 3.0e-3,
        "warmup_steps": 100,
        "cached_streams": 6000,
    },
    {
        **TEXT,
        "name": "long",
        "steps": 400,
        "clip_frames": 128,
        "window_chunks": [2, 5, 8, 16, 32, 32],
        "budget_tokens": [LONGEST_TOKENS] * 6,
        "token_policy": "uniform",
        "learning_rate": 2.0e-3,
        "warmup_steps": 30,
        "cached_streams": 600,
    },
]


def recipe_of(variant: str, scale: float) -> Recipe:
    aligned = ["multi_modal_projector"] if variant == "still" else ["multi_modal_projector", "temporal_encoder"]
    trained = {"motion": aligned, SHARED: [*aligned, "language_model"], "long": ["language_model"]}
    values = {
        "name": variant,
        "seed": 1,
        "vision_from": str(DEFAULT_FOLDER),
        "model": VARIANTS[variant],
        "stages": [{**stage, "train": trained[str(stage["name"])]} for stage in STAGES],
    }
    recipe = recipe_from_dict(values)
    return recipe if scale == 1.0 else recipe.scaled(scale)


def share_what_is_seen(variants: list[str], scale: float, out: Path) -> None:
    """Let the tower see the clips of stage `SHARED`, which are the same for all variants, before any is trained."""
    (out / "seen").mkdir(parents=True, exist_ok=True)
    for variant in variants:
        (out / variant / "cache").mkdir(parents=True, exist_ok=True)
        shared = out / variant / "cache" / SHARED
        if not shared.is_symlink():
            shared.symlink_to((out / "seen").resolve())
    trainer = Trainer(recipe_of(variants[0], scale), out / variants[0], device="cpu")
    index, stage = next((i, stage) for i, stage in enumerate(trainer.recipe.stages) if stage.name == SHARED)
    task = build_task(stage, index, trainer.recipe, trainer.model, trainer.processor)
    task.prepare(out / "seen", lambda n: print(f"{n} of {stage.cached_streams} clips seen", flush=True))


def train(variant: str, scale: float, out: Path) -> tuple[Path, int]:
    """Return the trained model's folder and the seconds that its stages took, in whichever processes."""
    shown_s = 0.0

    def show(p: TrainProgress) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s > 30:
            shown_s = time.monotonic()
            print(f"{variant} {p.stage} {p.step}/{p.n_steps} {p.accuracy['all']:.1%} {p.note}", flush=True)

    folder = Trainer(recipe_of(variant, scale), out / variant, device="cpu").run(show)
    assert folder is not None
    return folder, round(sum(json.loads((folder / "training.json").read_text())["seconds"].values()))


def measure(folder: Path, label: str, n_per_kind: int, keep: float = 1.0, tokens_per_chunk: int | None = None) -> dict:
    """Return accuracies by length, with `keep` of the chunks, or so many tokens for each chunk."""
    loaded = load_model(str(folder), device="cpu")
    size = loaded.model.config.chunk_frames
    whole = loaded.model.config.n_tokens(size)
    told = {}
    for n_frames in LENGTHS:
        budget = min(LONGEST_TOKENS, round((tokens_per_chunk or whole * keep) * n_frames / size))
        policy = "uniform" if budget < whole * n_frames / size else "recent"
        result = evaluate(
            loaded,
            lengths=(n_frames,),
            n_per_kind=n_per_kind,
            budget_tokens=max(1, budget),
            policy=policy,
            controls=False,
        )
        kinds = result.by_length[n_frames]
        told[n_frames] = {
            "tokens": budget,
            "order": round(result.mean(n_frames, ORDER_NEEDED) or 0.0, 4),
            "other": round(result.mean(n_frames, set(KINDS) - ORDER_NEEDED - NAMED_ONLY) or 0.0, 4),
            "kinds": {kind: round(r["accuracy"], 3) for kind, r in kinds.items() if r["accuracy"] is not None},
        }
        print(f"{label:<24} {n_frames:>5} frames  {budget:>5} tokens  order {told[n_frames]['order']:.1%}", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--scale", type=float, default=1.0, help="times so many steps")
    parser.add_argument("--per-kind", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULT, help="to add to, where the stages are the same")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages = recipe_of("full", options.scale).to_dict()["stages"]
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "stages": json.loads(json.dumps(stages)),
        "variants": {},
    }
    if options.json.is_file():
        before = json.loads(options.json.read_text())
        if before.get("stages") == report["stages"]:
            report["variants"] = before["variants"]
    variants = options.variants.split(",")
    share_what_is_seen(variants, options.scale, options.out)
    for variant in variants:
        folder, seconds = train(variant, options.scale, options.out)
        measured = {variant: measure(folder, variant, options.per_kind)}
        if variant in ("full", "still"):
            label = f"{variant}, one in two"
            measured[label] = measure(folder, label, options.per_kind, keep=0.5)
        if variant == "unpooled":
            label = "unpooled, tokens of full"
            measured[label] = measure(folder, label, options.per_kind, tokens_per_chunk=TOKENS_PER_CHUNK)
        for label, lengths in measured.items():
            report["variants"][label] = {"train_seconds": seconds, "lengths": lengths}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(options.json.read_text())


if __name__ == "__main__":
    main()
