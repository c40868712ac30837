"""A model that is trained from nothing: fresh weights, and a tokenizer that knows the world of shapes' words."""

from __future__ import annotations

import itertools

import torch
from transformers import LlamaConfig, SiglipVisionConfig

from ..processing import StormProcessor
from ..storm import StormForConditionalGeneration
from ..storm_config import StormConfig
from ..temporal import TemporalConfig
from ..tokenizer import BOS, END, PAD, VIDEO, build_tokenizer, sample_corpus
from .questions import question_corpus
from .recipe import ModelSizes


def build_model(sizes: ModelSizes, seed: int) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Build a model and its processor; the same sizes and seed always give the same weights."""
    # Questions three times: their words become whole tokens, and what is left goes to common English.
    corpus = list(question_corpus())
    tokenizer = build_tokenizer(itertools.chain(corpus, corpus, corpus, sample_corpus()), vocab_size=sizes.vocab_size)
    ids = tokenizer.get_vocab()
    config = StormConfig(
        vision_config=SiglipVisionConfig(
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=4,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=sizes.text_width,
            intermediate_size=-(-8 * sizes.text_width // 3 // 64) * 64,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[END],
        ),
        temporal=TemporalConfig(
            d_model=sizes.text_width,
            d_temporal=sizes.temporal_width,
            n_layers=sizes.temporal_layers,
            d_state=sizes.temporal_state,
            bidirectional=sizes.bidirectional,
            scan_orders=(sizes.scan_order,) * sizes.temporal_layers,
        ).to_dict(),
        image_size=sizes.image_size,
        downsample=sizes.downsample,
        spatial_pool=sizes.spatial_pool,
        temporal_pool=sizes.temporal_pool,
        chunk_frames=sizes.chunk_frames,
        video_token_id=ids[VIDEO],
        trained=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StormForConditionalGeneration(config)
    processor = StormProcessor(
        tokenizer, image_size=config.image_size, image_mean=config.image_mean, image_std=config.image_std
    )
    return model.float(), processor
