"""`stormline eval`: measure a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...operators.errors import SettingsError


def evaluate_model(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model folder; nothing: the model that stormline ships.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write the numbers; the table goes beside it.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the model's card into its folder: README.md, numbers and a plot.")
    ] = False,
    lengths: Annotated[str, typer.Option(help="Frames of a clip, at 2 fps.")] = "8,16,32,128,512,2048",
    per_kind: Annotated[int, typer.Option(min=2, help="Questions of each kind and length.")] = 100,
    frames_per_length: Annotated[
        int, typer.Option(min=1000, help="Frames drawn for a length, at most: more give the long ones more questions.")
    ] = 24_000,
    seed: Annotated[int, typer.Option(min=0, max=7, help="Which held-out clips.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Measure a model on generated clips that it was never trained on.

    Accuracy by kind of question and by length, streamed chunk by chunk with the state carried, beside chance, the
    same questions without video, and the same frames shuffled.

    [bold]Examples[/]

      stormline eval                                         # the model that stormline ships

      stormline eval train-out/model --card

      stormline eval --lengths 8,32 --per-kind 20            # a quick look
    """
    import torch

    from ...models.loading import DEFAULT_FOLDER, load_model
    from ...models.training.evaluate import evaluate, markdown_table
    from ...models.training.model_card import check_card, write_card

    torch.set_num_threads(threads)
    try:
        frames = [int(part) for part in lengths.split(",")]
        if not frames or min(frames) < 4:
            raise ValueError(f"--lengths {lengths!r}: expected numbers of frames, 4 or more, such as 8,32,512")
        if out is not None and not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}; make it first")
        if card:
            check_card(model or DEFAULT_FOLDER)
        loaded = load_model(model, device=device)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SettingsError(str(error)) from error
    typer.echo(str(loaded))
    result = evaluate(
        loaded,
        lengths=frames,
        n_per_kind=per_kind,
        seed=seed,
        frames_per_length=frames_per_length,
        on_progress=lambda text: typer.echo(text, err=True),
    )
    table = markdown_table(result)
    typer.echo(table)
    compared = result.one_pass
    typer.echo(
        f"\nstreamed tokens equal those of one pass in {compared['equal']} of {compared['compared']} clips; "
        f"encoded {result.encoded_frames_per_s:.0f} frames/s; took {result.seconds:.0f} s"
    )
    if out is not None:
        out.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    if card:
        typer.echo(f"card: {write_card(model or DEFAULT_FOLDER, result)}")
