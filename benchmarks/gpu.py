"""The whole model at a real size on a GPU: where the time goes, and how far that is from the card's own limits.

    python benchmarks/gpu.py                  # STORM's size on CUDA, in about five minutes
    python benchmarks/gpu.py --size demo      # a small one, on whatever there is: to see that all of it runs

Random weights: speed does not depend on their values. In one run it measures the card (matrix products in the model's
dtype, copying in memory), then

- vision tower; projector, temporal encoder and pooling: frames a second, and the share of the card's matrix rate;
- a chunk at the stream's 1st, 10th and 100th: what a stream's length costs;
- reading a prompt of video tokens and writing an answer, 1, 8 and 32 answers at once, and the share of the memory's
  bandwidth that writing uses;
- STORM's headline (arXiv 2503.04130, table 5: 128 frames 4,270, 1,800 and 1,500 ms, 256 frames 10,340, 3,680 and
  3,000 ms with 1, 1/4 and 1/8 of the tokens on one A100): the same, as ratios;
- streams that the card sustains at 10-second windows with 100 tokens written about each, of 80 and of 20 frames at
  448 x 448. NVIDIA's RT-VLM states 33 at 80 frames, in FP8 on one H100 with another model.

Needs torch and transformers alone. Writes `benchmarks/results/gpu-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("stormline") is None:  # not installed: the folders as they lie here
    package = types.ModuleType("stormline")
    package.__path__ = [str(ROOT)]
    sys.modules["stormline"] = package

from stormline.models.storm import StormForConditionalGeneration  # noqa: E402
from stormline.models.storm_config import StormConfig  # noqa: E402
from stormline.models.temporal import TemporalConfig  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WINDOW_S, WRITTEN_TOKENS = 10.0, 100
PAPER_MS = {128: (4270, 1800, 1500), 256: (10340, 3680, 3000)}
PEER_STREAMS = 33
SIZES = {
    # SigLIP-so400m at 448 pixels, pixel shuffle to 256 tokens a frame, a language model of Qwen2-7B's sizes.
    "storm": {
        "vision": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 448,
            "patch_size": 14,
        },
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
        },
        "temporal": {"d_temporal": 256, "d_state": 32},
        "matrix": 8192,
        "copy_bytes": 4 << 30,
        "streams": (1, 8, 32),
        "frames": (128, 256),
        "windows": (80, 20),
    },
    "demo": {
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        "text": {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 1024,
            "max_position_embeddings": 8192,
        },
        "temporal": {"d_temporal": 128, "d_state": 32},
        "matrix": 512,
        "copy_bytes": 1 << 26,
        "streams": (1, 8),
        "frames": (128, 256),
        "windows": (80, 20),
    },
}


class Clock:
    """Seconds of work on a device, the median of several tries after one that warms up."""

    def __init__(self, device: torch.device):
        self._device = device

    def seconds(self, work: Callable[[], Any], tries: int = 5) -> float:
        """Return how long the work takes."""
        took = []
        for turn in range(tries + 1):
            self._wait()
            began_s = time.perf_counter()
            work()
            self._wait()
            if turn:
                took.append(time.perf_counter() - began_s)
        return statistics.median(took)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def build(size: dict[str, Any], device: torch.device, dtype: torch.dtype) -> StormForConditionalGeneration:
    """Return a model with random weights, made where it will be."""
    text_class = Qwen2Config if size["text"]["hidden_size"] > 1000 else LlamaConfig
    text = text_class(**size["text"])
    temporal = TemporalConfig(d_model=text.hidden_size, **size["temporal"])
    config = StormConfig(
        vision_config=SiglipVisionConfig(**size["vision"], vision_use_head=False).to_dict(),
        text_config=text.to_dict(),
        temporal=temporal.to_dict(),
        image_size=size["vision"]["image_size"],
        downsample=2,
        chunk_frames=4,
        temporal_pool=4,
        spatial_pool=2,
        pool_before_temporal=True,  # the state of a stream is then 4 MB at STORM's size
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = StormForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.temporal_encoder.reset_parameters()
    return model.eval()


def card_limits(size: dict[str, Any], device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """Return what the device does at best: operations a second in matrix products, bytes a second in memory."""
    n = size["matrix"]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul_s = clock.seconds(lambda: a @ b, tries=10)
    source = torch.zeros(size["copy_bytes"] // 2, device=device, dtype=torch.int16)
    target = torch.empty_like(source)
    copy_s = clock.seconds(lambda: target.copy_(source), tries=10)
    return {"flops_per_s": 2 * n**3 / matmul_s, "bytes_per_s": 2 * source.nbytes / copy_s}


def linear_flops(module: torch.nn.Module, n_tokens: int) -> float:
    """Return the operations of a module's matrices over so many tokens.

    Tables that rows are looked up in are not multiplied; attention's own products are not counted.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    return 2.0 * n_tokens * sum(p.numel() for p in module.parameters() if p.dim() == 2 and id(p) not in tables)


@torch.inference_mode()
def encoding(model: StormForConditionalGeneration, limits: dict[str, float], clock: Clock, n: int) -> dict[str, Any]:
    """Measure one chunk of each of `n` streams, as a whole and by its parts."""
    config = model.config
    side, t = config.image_size, config.chunk_frames
    frames = torch.randint(0, 255, (n, t, side, side, 3), dtype=torch.uint8, device=model.device)
    states = [model.init_stream_state() for _ in range(n)]
    pixels = model._pixels(frames)
    features = model._features(pixels)
    told: dict[str, Any] = {"streams": n, "frames": n * t}
    whole_s = clock.seconds(lambda: model.encode_chunks(frames, states))
    vision_s = clock.seconds(lambda: model._features(model._pixels(frames)))
    mix_s = clock.seconds(lambda: model._mix_and_pool(features, None))
    n_patches, n_projected = n * t * config.patch_grid**2, n * t * (config.patch_grid // config.downsample) ** 2
    rest = linear_flops(model.multi_modal_projector, n_projected)
    rest += linear_flops(model.temporal_encoder, n * t * config.temporal_grid**2)
    told["frames_per_s"] = n * t / whole_s
    told["vision"] = {
        "share_of_time": vision_s / whole_s,
        "of_matrix_rate": linear_flops(model.vision_tower, n_patches) / vision_s / limits["flops_per_s"],
    }
    told["projector_temporal_pooling"] = {
        "share_of_time": mix_s / whole_s,
        "of_matrix_rate": rest / mix_s / limits["flops_per_s"],
    }
    return told


@torch.inference_mode()
def length_cost(model: StormForConditionalGeneration, clock: Clock) -> dict[str, float]:
    """Return the seconds of a stream's 1st, 10th and 100th chunk."""
    config = model.config
    frames = torch.randint(
        0, 255, (1, config.chunk_frames, config.image_size, config.image_size, 3), dtype=torch.uint8,
        device=model.device,
    )  # fmt: skip
    state = model.init_stream_state()
    told = {}
    for index in range(1, 101):
        if index in (1, 10, 100):
            told[str(index)] = clock.seconds(lambda before=state: model.encode_chunks(frames, [before]))
        state = model.encode_chunks(frames, [state])[0].state
    return told


@torch.inference_mode()
def read(model: StormForConditionalGeneration, n_rows: int, n_tokens: int) -> Any:
    """Read a prompt of video tokens, as embeddings; returns its cache."""
    embeds = torch.zeros(n_rows, n_tokens, model.config.d_model, device=model.device, dtype=model.dtype)
    return model.language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def write(model: StormForConditionalGeneration, cache: Any, n_rows: int, n_tokens: int) -> None:
    """Write so many tokens in each row."""
    ids = torch.zeros(n_rows, 1, dtype=torch.long, device=model.device)
    for _ in range(n_tokens):
        out = model.language_model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)


def writing(model: StormForConditionalGeneration, limits: dict[str, float], clock: Clock, n: int) -> dict[str, float]:
    """Measure `n` answers written at once after prompts of 1,280 video tokens."""
    n_prompt, n_written = 1280, 16

    def whole() -> None:
        write(model, read(model, n, n_prompt), n, n_written)

    read_s = clock.seconds(lambda: read(model, n, n_prompt), tries=3)
    step_s = max(1e-9, (clock.seconds(whole, tries=3) - read_s) / n_written)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    is_tied = head is table
    weights = sum(p.nbytes for p in model.language_model.parameters()) - (0 if is_tied else table.nbytes)
    # The head is asked for one token of each row alone.
    flops = linear_flops(model.language_model.get_decoder(), n * n_prompt) + 2.0 * n * head.numel()
    layers: list[Any] = read(model, n, n_prompt).layers
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return {
        "answers": n,
        "read_tokens_per_s": n * n_prompt / read_s,
        "read_of_matrix_rate": flops / read_s / limits["flops_per_s"],
        "written_tokens_per_s": n / step_s,
        "step_ms": step_s * 1e3,
        "step_of_bandwidth": (weights + cached) / step_s / limits["bytes_per_s"],
    }


def headline(model: StormForConditionalGeneration, clock: Clock, n_frames: int) -> dict[str, Any]:
    """Measure a clip from pixels to the 16th token of an answer with 1, 1/4 and 1/8 of the tokens."""
    config = model.config
    side = config.image_size
    frames = torch.randint(0, 255, (n_frames, side, side, 3), dtype=torch.uint8, device=model.device)
    encode_s = clock.seconds(lambda: _encode_clip(model, frames), tries=2)
    n_all = n_frames * (config.patch_grid // config.downsample) ** 2
    totals = []
    for fewer in (1, 4, 8):
        n_tokens = n_all // fewer
        answer_s = clock.seconds(lambda n=n_tokens: write(model, read(model, 1, n), 1, 16), tries=2)
        totals.append(encode_s + answer_s)
    paper = PAPER_MS[n_frames]
    return {
        "frames": n_frames,
        "tokens": n_all,
        "encode_ms": encode_s * 1e3,
        "total_ms": [t * 1e3 for t in totals],
        "faster": [totals[0] / t for t in totals[1:]],
        "faster_in_the_paper": [paper[0] / ms for ms in paper[1:]],
    }


@torch.inference_mode()
def _encode_clip(model: StormForConditionalGeneration, frames: torch.Tensor, at_once: int = 32) -> None:
    for part in frames.split(at_once):
        pixels = model._pixels(part[None])
        model._mix_and_pool(model._features(pixels), None)


def sustained(model: StormForConditionalGeneration, clock: Clock, n_streams: int, n_frames: int) -> dict[str, float]:
    """Measure a window of each of `n_streams` streams, encoded chunk by chunk, then read and written about.

    All at once: what the card can do. A lane encodes its streams one after the other, and is slower.
    """
    config = model.config
    side, t = config.image_size, config.chunk_frames
    frames = torch.randint(0, 255, (n_streams, t, side, side, 3), dtype=torch.uint8, device=model.device)

    def encode() -> None:
        states = [model.init_stream_state() for _ in range(n_streams)]
        for _ in range(n_frames // t):
            states = [chunk.state for chunk in model.encode_chunks(frames, states)]

    def answer() -> None:
        n_tokens = config.n_tokens(n_frames)
        write(model, read(model, n_streams, n_tokens), n_streams, WRITTEN_TOKENS)

    encode_s, answer_s = clock.seconds(encode, tries=1), clock.seconds(answer, tries=1)
    total_s = encode_s + answer_s
    return {
        "frames": n_frames,
        "at_once": n_streams,
        "encode_s": encode_s,
        "answer_s": answer_s,
        "streams": n_streams * WINDOW_S / total_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default=None, help="storm where there is CUDA, else demo")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.size or ("storm" if device.type == "cuda" else "demo")
    size = SIZES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    clock = Clock(device)
    report: dict[str, Any] = {
        "device": label,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "size": name,
        "random_weights": True,
    }
    path = RESULTS / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', label).strip('-').lower()}.json"

    def note(key: str, value: Any) -> None:
        report[key] = value
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(_rounded(report), indent=1) + "\n")  # what a cut leaves is worth having
        print(f"{time.perf_counter() - began_s:6.0f} s  {key}: {json.dumps(_rounded(value))}", flush=True)

    began_s = time.perf_counter()
    limits = card_limits(size, device, dtype, clock)
    note("limits", limits)
    model = build(size, device, dtype)
    note("parameters", sum(p.numel() for p in model.parameters()))
    note("encoding", [encoding(model, limits, clock, n) for n in size["streams"]])
    note("seconds_of_chunk", length_cost(model, clock))
    note("writing", [writing(model, limits, clock, n) for n in size["streams"]])
    note("headline", [headline(model, clock, n) for n in size["frames"]])
    best = []
    for n_frames in size["windows"]:
        tried = [sustained(model, clock, n, n_frames) for n in size["streams"]]
        best.append(max(tried, key=lambda each: each["streams"]) | {"peer_streams": PEER_STREAMS})
    note("sustained", best)
    if device.type == "cuda":
        note("peak_bytes", torch.cuda.max_memory_allocated(device))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
