"""Make a STORM checkpoint of an image-text or video-text model that transformers knows.

The source's vision side, projector, language model, tokenizer and chat template are taken as they are; a fresh
temporal encoder goes between, which changes nothing until it is trained. What an import needs to know of a family
beyond its configuration is one line of `FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file

from .imported import FRAME_CALLS, ImportedConfig, call_source, drop_language, without_language
from .loading import resolve_model, save_model
from .processing import StormProcessor
from .storm import StormForConditionalGeneration
from .storm_config import StormConfig, frame_side_px
from .temporal import TemporalConfig, TemporalEncoder

TEMPORAL_WIDTH = 128  # of a fresh temporal encoder: at 196 places its state is 7 MB a stream
_PROBE = "stormline probe"  # a text that no template holds


@dataclass(frozen=True)
class Family:
    """What the prompts and the attention of a family's models want."""

    frame_prefix: tuple[str, ...] = ()  # names of tokenizer attributes, or tokens themselves
    frame_suffix: tuple[str, ...] = ()
    bidirectional_video: bool = False


FAMILIES = {
    "llava": Family(),
    "llava_onevision": Family(),
    "llava_next_video": Family(),
    "smolvlm": Family(("<fake_token_around_image>", "<global-img>"), ("<fake_token_around_image>",)),
    "idefics3": Family(("<fake_token_around_image>", "<global-img>"), ("<fake_token_around_image>",)),
    "internvl": Family(("start_image_token",), ("end_image_token",)),
    "gemma3": Family(("boi_token",), ("eoi_token",), bidirectional_video=True),
}


@dataclass(frozen=True)
class ImportOptions:
    """What the one who imports decides.

    Raises:
        ValueError: If `chunk_frames` is no multiple of `temporal_pool`, or a number is below 1; as the model is built.
    """

    name: str | None = None  # None: the source's, without its owner
    dtype: str = "auto"  # of the weights written: auto is the source's own
    chunk_frames: int = 4
    temporal_pool: int = 4
    spatial_pool: int = 1  # the source has pooled places already
    temporal_width: int = TEMPORAL_WIDTH
    bidirectional: bool = False


@dataclass(frozen=True)
class Imported:
    """An imported model in memory, in evaluation mode; `save_model` writes it."""

    model: StormForConditionalGeneration
    processor: StormProcessor


def import_model(source: str | Path, folder: str | Path, options: ImportOptions | None = None) -> Imported:
    """Import a model and write it where `load_model` finds it.

    Weights are read once, straight into the modules that are written; on CPU, in the source's dtype.

    Args:
        source: A folder that `save_pretrained` wrote, or a hub id.
        folder: For the checkpoint; made if need be.
        options: None for the defaults.

    Returns:
        What was written.

    Raises:
        ValueError: If the source does not fit; the message says why.
        FileExistsError: If the folder holds another model.
        OSError: If there is no such source, or the hub cannot be reached.
    """
    if (Path(folder) / "config.json").exists():
        raise FileExistsError(f"{folder} holds a model already; expected a new or empty folder")
    imported = build_imported(source, options or ImportOptions())
    save_model(folder, imported.model, imported.processor)
    return imported


def build_imported(source: str | Path, options: ImportOptions) -> Imported:
    """Load a source and make a STORM model of its modules, without a second copy of a weight.

    Raises:
        ValueError: If the source does not fit; the message says why.
        OSError: If there is no such source, or the hub cannot be reached.
    """
    source, own_name = resolve_model(source)
    config = AutoConfig.from_pretrained(source)
    check_family(config)
    tokenizer = AutoTokenizer.from_pretrained(source)
    frames = read_frame_settings(source)
    kind: Any = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    whole: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=kind).eval()
    base, head = whole.base_model, whole.get_output_embeddings()
    if head.weight is base.get_input_embeddings().weight:
        whole.config.tie_word_embeddings = True
    probed = probe_frames(base, whole.config)
    storm_config = make_config(whole.config, probed, frames, options, options.name or own_name.rsplit("/", 1)[-1])
    processor = make_processor(whole.config, storm_config, tokenizer, read_chat_template(source, tokenizer))
    model = _assemble(storm_config, whole, base, head)
    return Imported(model, processor)


# ---- what fits ----


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a model that this import would get wrong.

    Raises:
        ValueError: With what it is, what was expected, and what to do instead.
    """
    what = f"this is a model of type {config.model_type!r}"
    known = ", ".join(sorted(FAMILIES))
    if config.model_type == StormConfig.model_type:
        raise ValueError(f"{what}, which stormline loads as it is: give its folder as model.path")
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{what}, which transformers does not know as image-text model; expected one of {known}")
    if hasattr(MODEL_MAPPING.get(type(config), None), "get_rope_index"):
        raise ValueError(
            f"{what}: its language model counts positions along three axes (time, row, column), where tokens that are "
            "pooled, chosen and stored have one, and its tower joins frames in pairs before they can be streamed one "
            f"by one. Expected one of {known}. InternVL and LLaVA-OneVision have Qwen language models and fit"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{what}; expected one of {known}. Whether its prompt has marks around a frame and whether its video "
            "tokens look ahead is not known here: a line in models/importing.py, FAMILIES, says so, and "
            "tests/unit/test_import_models.py shows that it is right"
        )


@dataclass(frozen=True)
class ProbedFrames:
    """How a source takes frames, and what it makes of one."""

    frame_call: str
    grid: int
    has_newline: bool


@torch.inference_mode()
def probe_frames(base: Any, config: PreTrainedConfig) -> ProbedFrames:
    """Find by trying how a source's base model takes frames: two of them, in each of the ways there are.

    Raises:
        ValueError: If none gives a square of places of the language model's width for each frame.
    """
    side, width = _image_size(config), config.get_text_config().hidden_size
    tower_dtype = base.get_encoder(modality="image").dtype
    frames = torch.linspace(-1, 1, 2 * 3 * side * side, dtype=torch.float32).reshape(1, 2, 3, side, side)
    said = []
    for frame_call in FRAME_CALLS:
        if frame_call == "video" and not hasattr(base, "get_video_features"):
            continue
        try:
            tokens = call_source(base, frame_call, frames.to(tower_dtype))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            said.append(f"{frame_call}: {str(error).splitlines()[0]}")
            continue
        n = tokens.shape[1]
        extra = n % 2 if frame_call == "video" and hasattr(base, "image_newline") else 0
        grid = round(((n - extra) / 2) ** 0.5)
        if tokens.shape[2] == width and 2 * grid * grid + extra == n:
            return ProbedFrames(frame_call, grid, bool(extra))
        said.append(f"{frame_call}: {n} tokens of width {tokens.shape[2]} for two frames")
    raise ValueError(
        f"the vision side of this {config.model_type!r} gives no square of places of width {width} for each frame of "
        f"{side}×{side} pixels ({'; '.join(said)}). A model of this kind cannot be streamed frame by frame"
    )


# ---- what the source says of frames and prompts ----


@dataclass(frozen=True)
class FrameSettings:
    """How the source's processor prepares frames."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    fps: float | None  # None: it takes a number of frames, whatever their times


def read_frame_settings(source: str) -> FrameSettings:
    """Read a source's processor files; those for video go before those for images.

    Read as JSON, since transformers' own processors want torchvision.

    Raises:
        ValueError: If none says how pixels are normalised, or one scales them otherwise than to 0…1.
    """
    nested = _read_json(source, "processor_config.json")
    found = [
        *(_read_json(source, "video_preprocessor_config.json"), nested.get("video_processor") or {}),
        *(nested.get("image_processor") or {}, _read_json(source, "preprocessor_config.json")),
    ]

    def first(name: str, default: Any = None) -> Any:
        return next((values[name] for values in found if values.get(name) is not None), default)

    mean, std = first("image_mean"), first("image_std")
    if first("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        raise ValueError(
            f"{source} has no image_mean and image_std in its processor's files (preprocessor_config.json); expected "
            "them: pixels normalised otherwise than in training give nonsense. Save the processor beside the model"
        )
    scale = first("rescale_factor", 1 / 255)
    if abs(scale * 255 - 1) > 1e-3:
        raise ValueError(f"{source} scales pixels by {scale}; expected 1/255, from bytes to 0…1")
    fps = first("fps")
    return FrameSettings(tuple(mean), tuple(std), None if fps is None else float(fps))


def read_chat_template(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the source's chat template: the processor's, else the tokenizer's.

    Raises:
        ValueError: If there is none.
    """
    path = cached_file(source, "chat_template.jinja", _raise_exceptions_for_missing_entries=False)
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if template := _read_json(source, name).get("chat_template"):
            return template
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            f"{source} has no chat template; expected chat_template.jinja, or one in its tokenizer. Import the "
            "instruction-tuned model, or write that file into a local copy"
        )
    return tokenizer.chat_template


def wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template wants a message's content as a list of parts instead of a text.

    Raises:
        ValueError: If it writes neither.
    """
    for in_parts in (False, True):
        content = [{"type": "text", "text": _PROBE}] if in_parts else _PROBE
        messages: Any = [{"role": "user", "content": content}]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # noqa: BLE001 (a template is a program of somebody else's)
            continue
        if text.count(_PROBE) == 1:
            return in_parts
    raise ValueError("the chat template does not write a user's text; expected it once. Is it that of a chat model?")


def make_config(
    source_config: PreTrainedConfig, probed: ProbedFrames, frames: FrameSettings, options: ImportOptions, name: str
) -> StormConfig:
    """Return the configuration that follows from the source's own.

    Raises:
        ValueError: If sizes do not go together, or the source names no placeholder.
    """
    config: Any = source_config
    text = deepcopy(config.get_text_config())
    text.tie_word_embeddings = bool(config.tie_word_embeddings or text.tie_word_embeddings)
    image_id = getattr(config, "image_token_id", None)
    video_id = getattr(config, "video_token_id", None) if probed.frame_call == "video" else image_id
    if not isinstance(video_id, int):
        raise ValueError(f"this {config.model_type!r} names no token that stands for video; expected image_token_id")
    width = min(options.temporal_width, text.hidden_size)
    return StormConfig(
        vision_config=without_language(config),
        text_config=text,
        temporal=TemporalConfig(
            d_model=text.hidden_size,
            d_temporal=width,
            head_dim=next(n for n in (64, 32, 16, 8, 4, 2, 1) if 2 * width % n == 0),
            bidirectional=options.bidirectional,
        ).to_dict(),
        image_size=_image_size(config),
        image_mean=list(frames.mean),
        image_std=list(frames.std),
        chunk_frames=options.chunk_frames,
        temporal_pool=options.temporal_pool,
        spatial_pool=options.spatial_pool,
        sample_fps=frames.fps or 2.0,
        video_token_id=video_id,
        imported=ImportedConfig(
            name=name,
            frame_call=probed.frame_call,
            grid=probed.grid,
            newline_token_id=image_id if probed.has_newline else None,
            bidirectional_video=FAMILIES[config.model_type].bidirectional_video,
        ).to_dict(),
    )


def make_processor(
    source_config: PreTrainedConfig, config: StormConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> StormProcessor:
    """Return the processor that writes the source's prompts.

    Raises:
        ValueError: If the tokenizer or the chat template does not fit.
    """
    family, imported = FAMILIES[source_config.model_type], config.imported_config
    assert imported is not None
    tokenizer.chat_template = chat_template
    tokenizer.padding_side = "left"
    newline = imported.newline_token_id
    return StormProcessor(
        tokenizer,
        image_size=config.image_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        video_token=_token(tokenizer, config.video_token_id),
        frame_prefix=_marks(tokenizer, family.frame_prefix),
        frame_suffix=_marks(tokenizer, family.frame_suffix),
        video_suffix="" if newline is None else _token(tokenizer, newline),
        frame_tokens=config.n_tokens(1) if family.frame_prefix else 0,
        content_parts=wants_parts(tokenizer),
    )


# ---- parts ----


def _assemble(config: StormConfig, whole: Any, base: Any, head: nn.Module) -> StormForConditionalGeneration:
    """Put the source's modules into a STORM model: weights move, none is copied."""
    with torch.device("meta"):
        model = StormForConditionalGeneration(config)
    decoder = drop_language(base)
    language: Any = model.language_model
    setattr(language, language.base_model_prefix, decoder)
    language.set_output_embeddings(head)
    language.config = decoder.config
    model.frame_encoder.model = base
    model.temporal_encoder = TemporalEncoder(config.temporal_config).to(whole.dtype)
    if whole.generation_config is not None:
        model.generation_config = whole.generation_config
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise ValueError(f"the source has no weights for {left[:3]}; expected all. Its language model does not fit")
    return model.eval()


def _image_size(config: PreTrainedConfig) -> int:
    size: int | Sequence[int] | None = getattr(getattr(config, "vision_config", None), "image_size", None)
    if size is None:
        raise ValueError(
            f"this {config.model_type!r} has a vision tower without a fixed image_size; expected one, as a stream's "
            "frames all have the same size"
        )
    return frame_side_px(size)


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(token, str):
        raise ValueError(
            f"the tokenizer has no token {token_id}, which the model's configuration names; do they match?"
        )
    return token


def _marks(tokenizer: Any, names: Sequence[str]) -> str:
    marks = [name if name.startswith("<") else getattr(tokenizer, name, None) for name in names]
    for name, mark in zip(names, marks, strict=True):
        if not isinstance(mark, str) or len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            raise ValueError(f"the tokenizer has no single token for {name} ({mark!r}); expected that of the model")
    return "".join(str(mark) for mark in marks)


def _read_json(source: str, name: str) -> dict[str, Any]:
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
