"""Small models of each family that can be imported, with random weights, as their makers would save them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from stormline.models.tokenizer import CHAT_TEMPLATE, build_tokenizer, sample_corpus

TINY_SIZES = {
    "image_size": 32,
    "vision_width": 32,
    "vision_layers": 1,
    "temporal_width": 32,
    "temporal_state": 8,
    "text_width": 32,
    "text_layers": 1,
    "text_heads": 2,
    "vocab_size": 512,
}
"""Of a model of our own, for recipes."""

TOWER: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Source:
    """A family's small model, and how it is asked about a clip without stormline."""

    config: Any  # from ids by name
    placeholder: str  # its token for what is shown
    tokens_per_frame: int
    marks: tuple[str, str] = ("", "")
    newline: str = ""  # the token that we write for what ends its videos
    template: str = PARTS_TEMPLATE
    extra: dict[str, str] = field(default_factory=dict)  # tokenizer attributes
    pixels: str = "pixel_values"

    def ask(self, model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Return the source's own logits for ids (1, n) and frames (1, T, 3, H, W)."""
        flat = self.pixels == "pixel_values" and model.config.model_type not in ("smolvlm", "idefics3")
        kwargs: dict[str, Any] = {self.pixels: pixels.flatten(0, 1) if flat else pixels}
        if model.config.model_type == "gemma3":  # as its processor gives it
            kwargs["token_type_ids"] = (ids == model.config.image_token_id).long()
        return model(input_ids=ids, **kwargs).logits


def llama() -> LlamaConfig:
    return LlamaConfig(**TEXT)


def qwen() -> Qwen2Config:
    return Qwen2Config(**TEXT)


IMAGE, VIDEO = "<image>", "<video>"
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
IMG, IMG_END = "<img>", "</img>"
SPECIAL = [IMAGE, VIDEO, FAKE, GLOBAL, IMG, IMG_END]
SOURCES = {
    "llava_onevision": Source(
        lambda ids: LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(
                **{**TOWER, "image_size": 40}, vision_use_head=False
            ),  # 5 patches: 3 places
            text_config=qwen(),
            image_token_index=ids[IMAGE],
            video_token_index=ids[VIDEO],
        ),
        placeholder=VIDEO,
        tokens_per_frame=9,
        newline=IMAGE,
        pixels="pixel_values_videos",
    ),
    "llava_next_video": Source(
        lambda ids: LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=llama(),
            image_token_index=ids[IMAGE],
            video_token_index=ids[VIDEO],
        ),
        placeholder=VIDEO,
        tokens_per_frame=4,
        pixels="pixel_values_videos",
    ),
    "smolvlm": Source(
        lambda ids: SmolVLMConfig(vision_config=TOWER, text_config=llama(), image_token_id=ids[IMAGE], scale_factor=2),
        placeholder=IMAGE,
        tokens_per_frame=4,
        marks=(FAKE + GLOBAL, FAKE),
    ),
    "idefics3": Source(
        lambda ids: Idefics3Config(vision_config=TOWER, text_config=llama(), image_token_id=ids[IMAGE], scale_factor=2),
        placeholder=IMAGE,
        tokens_per_frame=4,
        marks=(FAKE + GLOBAL, FAKE),
    ),
    "internvl": Source(
        lambda ids: InternVLConfig(
            vision_config=InternVLVisionConfig(**TOWER), text_config=qwen(), image_token_id=ids[IMAGE]
        ),
        placeholder=IMAGE,
        tokens_per_frame=4,
        marks=(IMG, IMG_END),
        template=CHAT_TEMPLATE,
        extra={"start_image_token": IMG, "end_image_token": IMG_END},
    ),
    "gemma3": Source(
        lambda ids: Gemma3Config(
            vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=Gemma3TextConfig(
                **TEXT,
                head_dim=12,
                query_pre_attn_scalar=12,
                sliding_window=24,
                layer_types=["sliding_attention", "full_attention"],
            ),
            image_token_index=ids[IMAGE],
            boi_token_index=ids[IMG],
            eoi_token_index=ids[IMG_END],
            mm_tokens_per_image=4,
        ),
        placeholder=IMAGE,
        tokens_per_frame=4,
        marks=(IMG, IMG_END),
        extra={"boi_token": IMG, "eoi_token": IMG_END},
    ),
    "llava": Source(
        lambda ids: LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER), text_config=llama(), image_token_index=ids[IMAGE]
        ),
        placeholder=IMAGE,
        tokens_per_frame=16,
    ),
}


def save_source(family: str, folder: Path) -> Any:
    """Save a family's model with random weights, tokenizer and processor files; return the model."""
    source = SOURCES[family]
    tokenizer = build_tokenizer(sample_corpus(), vocab_size=480)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    for name, token in source.extra.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    tokenizer.chat_template = source.template
    torch.manual_seed(1)
    config = source.config(tokenizer.get_vocab())
    model = AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():  # what starts at zero or one shall matter too
        if "norm" in name or "projection" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return model
