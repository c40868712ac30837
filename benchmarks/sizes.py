"""What models of real sizes need on a device, computed from their configurations: no weights are loaded or downloaded.

    python benchmarks/sizes.py [--fps 2]

The configurations are those that the makers publish, written out here, so that the table needs no network. For another
model: `stormline import MODEL --plan`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import LlamaConfig, LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig, SmolVLMConfig
from transformers.configuration_utils import PreTrainedConfig

from stormline.models.sizing import (
    CACHED_PROMPTS,
    CACHED_TOKENS,
    DEVICES,
    RESERVE_BYTES,
    SHARE_OF_PEAK,
    SizePlan,
    plan_import,
)

RESULT = Path(__file__).parent / "results" / "sizes.json"
SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}


def onevision(**text: int) -> PreTrainedConfig:
    tower = SiglipVisionConfig(**SIGLIP_SO400M, num_hidden_layers=26, vision_use_head=False)
    return LlavaOnevisionConfig(vision_config=tower, text_config=Qwen2Config(**text))


def source_configs() -> dict[str, PreTrainedConfig]:
    """Return one model for each size."""
    return {
        "0.5B: LLaVA-OneVision Qwen2 0.5B": onevision(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=152000,
            tie_word_embeddings=True,
        ),
        "2B: SmolVLM2 2.2B": SmolVLMConfig(
            vision_config={**SIGLIP_SO400M, "num_hidden_layers": 27},
            text_config=LlamaConfig(
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                num_key_value_heads=32,
                vocab_size=49280,
            ),
            scale_factor=3,
            image_token_id=49190,
        ),
        "7B: LLaVA-OneVision Qwen2 7B": onevision(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152128,
        ),
    }


def table(plans: list[SizePlan]) -> str:
    """Return the plans as Markdown."""
    devices = [device.name for device in DEVICES]
    head = ["", "weights", "tokens a frame", "state a stream", "tokens a stream and hour"]
    lines = [head + [f"streams, {name}: by memory / by computing" for name in devices]]
    lines.append(["---"] * len(lines[0]))
    lines += [
        [
            plan.name,
            f"{plan.weight_bytes / 1e9:.1f} GB",
            str(plan.places_per_frame),
            f"{plan.state_bytes_per_stream / 1e6:.1f} MB",
            f"{plan.tokens_per_hour:,} ({plan.stored_bytes_per_hour / 1e9:.1f} GB)",
            *(f"{plan.streams_by_memory[name]:,} / {plan.streams_by_compute[name]:,}" for name in devices),
        ]
        for plan in plans
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fps", type=float, default=2.0, help="sampled frames a second")
    fps = parser.parse_args().fps
    plans = [plan_import(config, name, fps=fps) for name, config in source_configs().items()]
    assumed = {
        "fps": fps,
        "reserve_bytes": RESERVE_BYTES,
        "cached_prompts": CACHED_PROMPTS,
        "cached_tokens": CACHED_TOKENS,
        "share_of_peak": SHARE_OF_PEAK,
        "measured": False,
    }
    RESULT.write_text(json.dumps({"assumed": assumed, "plans": [p.to_dict() for p in plans]}, indent=2) + "\n")
    print(table(plans))


if __name__ == "__main__":
    main()
