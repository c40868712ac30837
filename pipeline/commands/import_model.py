"""`stormline import`: make a streaming checkpoint of a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...operators.errors import SettingsError

if TYPE_CHECKING:
    from ...models.importing import ImportOptions
    from ...models.sizing import SizePlan
    from ...models.storm import StormForConditionalGeneration

DTYPES = ("auto", "bfloat16", "float16", "float32")


def import_model(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id: owner/name.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="New folder for the checkpoint. Not needed with --plan.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Load no weights; say what it would need, and leave.")] = False,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What /v1/models and the tables call it. Default: MODEL's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights written: auto (MODEL's own), bfloat16, float32.")] = "auto",
    temporal_pool: Annotated[
        int, typer.Option(min=1, metavar="N", help="Frames averaged into one; 1 keeps every frame's tokens.")
    ] = 4,
    spatial_pool: Annotated[
        int, typer.Option(min=1, metavar="N", help="Average squares of N×N places, beyond what MODEL does itself.")
    ] = 1,
    chunk_frames: Annotated[
        int, typer.Option(min=1, metavar="N", help="Frames encoded together; a multiple of --temporal-pool.")
    ] = 4,
    temporal_width: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of the fresh temporal encoder; a stream's state grows with it.")
    ] = 128,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="Let the temporal encoder look back from each chunk's end, too.")
    ] = False,
) -> None:
    """Make a Hugging Face image-text or video-text model stream.

    Families: LLaVA, LLaVA-OneVision, LLaVA-NeXT-Video, SmolVLM, Idefics 3, InternVL, Gemma 3. What does not fit says
    why.

    Its vision tower, projector, language model, tokenizer and chat template stay as they are. Between them comes a
    temporal encoder that changes nothing until it is trained: use the model at once, train it when order and motion
    over time matter.

    [bold]Examples[/]

      stormline import llava-hf/llava-onevision-qwen2-0.5b-ov-hf models/onevision

      stormline run --set model.path=models/onevision             # and: --serve, then stormline ask

      stormline import ~/my-gemma-3 models/gemma --dtype bfloat16

      stormline import HuggingFaceTB/SmolVLM2-2.2B-Instruct --plan # weights, state and streams per device

      stormline train align.yaml --device cuda                    # its recipe has start_from: models/onevision
    """
    from transformers.utils import logging as transformers_logging

    from ...models.importing import ImportOptions

    if dtype not in DTYPES:
        raise SettingsError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if folder is None and not plan:
        raise SettingsError("DIR is missing: where shall the checkpoint go? Or give --plan, which writes none.")
    transformers_logging.disable_progress_bar()
    options = ImportOptions(
        name=name,
        dtype=dtype,
        chunk_frames=chunk_frames,
        temporal_pool=temporal_pool,
        spatial_pool=spatial_pool,
        temporal_width=temporal_width,
        bidirectional=bidirectional,
    )
    try:
        if plan:
            _show_plan(source, options)
        else:
            _import(source, Path(str(folder)), options)
    except (ValueError, OSError) as error:
        raise SettingsError(f"{source}: {error}") from error


def _import(source: str, folder: Path, options: ImportOptions) -> None:
    from ...models.importing import import_model as write

    typer.echo(f"reading {source}")
    imported = write(source, folder, options)
    typer.echo(_describe(imported.model))
    fps = imported.model.config.sample_fps
    pace = "" if fps == 2 else f" --set sampling.fps={fps:g}"  # 2 is what lanes sample at by themselves
    typer.echo(f"model in {folder}; use it with: stormline run --set model.path={folder}{pace}")


def _describe(model: StormForConditionalGeneration) -> str:
    config, state = model.config, model.init_stream_state()
    assert config.imported_config is not None
    grid = config.imported_config.grid
    n_parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{config.imported_config.name}: {n_parameters:,} parameters in {str(model.dtype).removeprefix('torch.')}; "
        f"frames of {config.image_size}×{config.image_size} px become {grid}×{grid} places, "
        f"{config.chunk_frames} frames {config.n_tokens(config.chunk_frames)} tokens; "
        f"{state.n_bytes / 1e6:.1f} MB of state a stream\n"
        "its temporal encoder is fresh and changes nothing yet"
    )


def _show_plan(source: str, options: ImportOptions) -> None:
    from rich.console import Console
    from transformers import AutoConfig

    from ...models.loading import resolve_model
    from ...models.sizing import plan_import

    place, own_name = resolve_model(source)
    plan = plan_import(AutoConfig.from_pretrained(place), options.name or own_name, options)
    Console(highlight=False).print(_plan_table(plan))


def _plan_table(plan: SizePlan) -> object:
    from rich.table import Table

    table = Table(title=f"{plan.name}, in bfloat16, at 2 frames a second", show_header=False, title_justify="left")
    rows = {
        "parameters": ", ".join(f"{part} {n / 1e6:,.0f} M" for part, n in plan.parameters.items()),
        "weights": f"{plan.weight_bytes / 1e9:.1f} GB",
        "a frame": f"{plan.places_per_frame} places; {plan.flops_per_frame / 1e12:.2f} TFLOP",
        "tokens a stream": f"{plan.tokens_per_chunk} every {plan.chunk_s:g} s, {plan.tokens_per_hour:,} an hour, "
        f"{plan.stored_bytes_per_hour / 1e9:.2f} GB an hour in float16",
        "state a stream": f"{plan.state_bytes_per_stream / 1e6:.1f} MB",
        "cache of the LLM": f"{plan.cache_bytes_per_token / 1e3:.0f} kB a token",
    }
    for device, by_memory in plan.streams_by_memory.items():
        rows[f"streams on {device}"] = (
            f"{by_memory:,} by memory, {plan.streams_by_compute[device]:,} by computing at 40 % of its peak"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table
