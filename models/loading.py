"""Get a model by name: a checkpoint folder, a hub id, or the small one built in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LlamaConfig, SiglipVisionConfig
from transformers.utils.import_utils import is_accelerate_available

from .exact_attention import use_exact_decoding
from .processing import StormProcessor
from .storm import StormForConditionalGeneration
from .storm_config import StormConfig
from .temporal import TemporalBlock, TemporalConfig
from .tokenizer import BOS, END, PAD, VIDEO, build_tokenizer, sample_corpus

DEFAULT_FOLDER = Path(__file__).parent / "checkpoints" / "shapes-tiny"
SHARD_SIZE = "4GB"  # of a file of weights, so that a large model is read in pieces
WHOLE_BYTES = 1 << 22  # a tensor up to 4 MiB goes into the fingerprint whole
SAMPLE_BYTES, N_SAMPLES = 1 << 12, 256  # of a larger one: 256 evenly spaced pieces of 4 KiB, so that 7B takes seconds


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to use."""

    model: StormForConditionalGeneration
    processor: StormProcessor
    name: str  # for people and for the `model` column of a table
    trained: bool  # False: its answers mean nothing
    fingerprint: str  # of configuration and weights: states and tokens of one model are none of another's

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        return f"LoadedModel({self.name!r}, {n:,} parameters, trained={self.trained}, fingerprint={self.fingerprint})"


def load_model(path: str | Path | None = None, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a model and its processor, in evaluation mode.

    Args:
        path: A folder that `save_model` wrote, a hub id (``owner/name``; downloaded by transformers), or None for the
            small model built in: ``checkpoints/shapes-tiny`` where it is there, else an untrained one.
        device: ``auto`` (CUDA where there is one, else CPU) or a torch device.
        dtype: ``auto`` (float32 on CPU, the checkpoint's own elsewhere) or ``float32``, ``bfloat16``, ``float16``.

    Raises:
        FileNotFoundError: If there is no such folder and the name is no hub id.
        ValueError: On an unknown dtype, a device that is not there, a model that was not imported, or a checkpoint that
            cannot be read or lacks weights.
    """
    place = choose_device(device)
    kind = _choose_dtype(dtype, place)
    if path is None and not (DEFAULT_FOLDER / "config.json").is_file():
        model, processor = build_untrained_tiny()
        name = "untrained-tiny"
        if isinstance(kind, torch.dtype):
            nn.Module.to(model, dtype=kind)
    else:
        source, name = resolve_model(DEFAULT_FOLDER if path is None else path)
        # With accelerate, weights go from the file to the device one by one; without, through memory.
        straight: dict[str, Any] = {"device_map": place} if place.type != "cpu" and is_accelerate_available() else {}
        model = _read_model(source, dtype=kind, **straight)
        processor = StormProcessor.from_pretrained(source)
        if model.config.imported_config is not None:
            name = model.config.imported_config.name
    _check_pair(model.config, processor)
    fingerprint = fingerprint_model(model)
    nn.Module.to(model, device=place)
    model.eval()
    if place.type == "cpu":
        use_exact_decoding(model)
    return LoadedModel(model, processor, name, model.config.trained, fingerprint)


def _read_model(source: str, **options: Any) -> StormForConditionalGeneration:
    """Build the model of a folder or the hub. transformers draws weights that it does not find; here none may lack.

    Raises:
        ValueError: If it cannot be read, is no STORM model, or its weights are not those of its configuration.
    """
    try:
        values, _ = StormConfig.get_config_dict(source)
        if (kind := values.get("model_type")) != StormConfig.model_type:
            raise ValueError(
                f"{source} holds a model of type {kind!r}; expected {StormConfig.model_type!r}. "
                f"Import it first: stormline import {source}"
            )
        with _no_load_report():
            loaded: Any = StormForConditionalGeneration.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model {source} cannot be read: {error}") from error
    model, found = loaded
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "too many": sorted(found["unexpected_keys"]),
        "of another size": sorted(key for key, *_ in found["mismatched_keys"]),
    }
    if told := [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys]:
        raise ValueError(
            f"the weights of {source} are not those that its config.json needs: {', '.join(told)}. "
            "Copy the model again, or undo what was changed in its config.json"
        )
    return model


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Within, transformers logs no table of what is missing, which is told in one line after it."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)  # at a higher level than its own it would log something else
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def save_model(
    folder: str | Path,
    model: StormForConditionalGeneration,
    processor: StormProcessor,
) -> None:
    """Write a folder that `load_model` reads: weights as safetensors, configuration, tokenizer, processor."""
    _check_pair(model.config, processor)
    model.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    processor.save_pretrained(folder)


def build_untrained_tiny(seed: int = 0) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Build the small model with random weights: 64×64 pixels, 16 tokens for 4 frames, 2.6 million parameters.

    The same seed gives the same weights. Its captions mean nothing, but everything happens as in a trained one. A
    fresh temporal encoder would change nothing; here its last projections are random too, so that tokens depend on
    the frames before.

    Returns:
        The model in float32 on CPU in evaluation mode, and its processor.
    """
    tokenizer = build_tokenizer(sample_corpus())
    ids = tokenizer.get_vocab()
    config = StormConfig(
        vision_config=SiglipVisionConfig(
            image_size=64,
            patch_size=8,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            initializer_range=0.1,  # random layers that do something: at the usual 0.02 an answer ignores its prompt
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[END],
        ),
        temporal=TemporalConfig(d_model=192, d_temporal=128).to_dict(),
        image_size=64,
        video_token_id=ids[VIDEO],
        trained=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StormForConditionalGeneration(config)
        for block in model.modules():
            if isinstance(block, TemporalBlock) and block.proj_out is not None:
                nn.init.normal_(block.proj_out.weight, std=0.1)
    processor = StormProcessor(
        tokenizer, image_size=config.image_size, image_mean=config.image_mean, image_std=config.image_std
    )
    return model.eval(), processor


def fingerprint_model(model: StormForConditionalGeneration) -> str:
    """Return 16 hex digits that change with the configuration, the dtype or the weights.

    Tensors above 4 MiB are sampled: enough to tell two trainings apart, not to tell that somebody tampered.
    """
    values = _without_run_time(json.loads(json.dumps(model.config.to_dict(), default=str)))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _hash_tensor(digest, tensor)
    return digest.hexdigest()[:16]


def _without_run_time(values: Any) -> Any:
    """Return a configuration, at any depth, without what says nothing of the model; the weights' own dtypes do."""
    if not isinstance(values, dict):
        return values
    left_out = ("transformers_version", "_name_or_path", "architectures", "dtype")
    kept = {name: _without_run_time(value) for name, value in values.items() if name not in left_out}
    if kept.get("imported", 0) is None:
        del kept["imported"]  # came later: what was encoded before goes on
    return kept


def _hash_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() > WHOLE_BYTES:  # only the pieces leave the device
        step = (data.numel() - SAMPLE_BYTES) // (N_SAMPLES - 1)
        data = torch.cat([data[i * step : i * step + SAMPLE_BYTES] for i in range(N_SAMPLES)])
    digest.update(data.cpu().numpy().data)


def resolve_model(path: str | Path) -> tuple[str, str]:
    """Return where to load from, and the model's name.

    Raises:
        FileNotFoundError: If there is no such folder and the name is no hub id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; expected a model's folder")
        return str(folder), folder.resolve().name
    parts = str(path).split("/")
    if len(parts) == 2 and all(parts) and not str(path).startswith((".", "~")):
        return str(path), str(path)
    raise FileNotFoundError(f"model {str(path)!r} is no folder here; expected one, or a hub id like owner/name")


def choose_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one.

    Raises:
        ValueError: If torch knows none of that name, or it is CUDA and there is none, or not so many.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:1', for one") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no CUDA device; expected 'cpu' or 'auto' here")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(f"device is {device!r}, but torch sees {n} CUDA device(s); expected at most 'cuda:{n - 1}'")
    return chosen


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}; expected 'auto' or one of {tuple(known)}")
    return known[dtype]


def _check_pair(config: StormConfig, processor: StormProcessor) -> None:
    """Refuse a processor that prepares frames or prompts for another model."""
    got = (processor.video_token_id, processor.image_size, processor.image_mean, processor.image_std)
    expected = (config.video_token_id, config.image_size, tuple(config.image_mean), tuple(config.image_std))
    if got != expected:
        raise ValueError(
            f"the processor has (video token, image size, mean, std) = {got}; expected the model's {expected}. "
            "The folder mixes files of two models"
        )
