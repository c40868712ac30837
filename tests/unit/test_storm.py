"""The STORM model: configuration, streaming, language side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, GemmaConfig, LlamaConfig, Qwen3Config, SiglipVisionConfig

from stormline.models.compress import spatial_pool, temporal_pool
from stormline.models.storm import StormConfig, StormForConditionalGeneration, StreamState
from stormline.models.temporal import TemporalBlock, TemporalConfig

VIDEO_ID = 3
TOWER: dict[str, Any] = {
    "image_size": 24,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_config(**changes: Any) -> StormConfig:
    values: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(**TOWER, vision_use_head=False),
        "text_config": LlamaConfig(**DECODER),
        "temporal": TemporalConfig(d_model=48, d_temporal=32, head_dim=16, d_state=8).to_dict(),
        "image_size": 24,
        "video_token_id": VIDEO_ID,
    }
    return StormConfig(**(values | changes))


def make_model(seed: int = 0, **changes: Any) -> StormForConditionalGeneration:
    """Build a model whose temporal encoder does something, as after training."""
    torch.manual_seed(seed)
    model = StormForConditionalGeneration(make_config(**changes)).eval()
    for block in model.modules():
        if isinstance(block, TemporalBlock):
            for last in (block.proj_out, block.forward_mixer.out_proj):
                if last is not None:
                    nn.init.normal_(last.weight, std=1.0)
    return model


@pytest.fixture(scope="module")
def model() -> StormForConditionalGeneration:
    return make_model()


def make_frames(n_streams: int, n_frames: int, size: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_streams, n_frames, size, size, 3), dtype=np.uint8)


def encode_stream(model: StormForConditionalGeneration, frames: np.ndarray) -> tuple[torch.Tensor, StreamState]:
    """Encode one stream (T, H, W, 3) chunk by chunk; return all its tokens and its last state."""
    state, tokens = model.init_stream_state(), []
    for start in range(0, len(frames), model.config.chunk_frames):
        [chunk] = model.encode_chunks(frames[None, start : start + model.config.chunk_frames], [state])
        state = chunk.state
        tokens.append(chunk.tokens)
    return torch.cat(tokens), state


# ---- configuration ----


def test_config_when_saved_and_loaded_then_equal(tmp_path):
    config = make_config(downsample=2, chunk_frames=8, temporal_pool=2, sample_fps=1.5, vision_feature_layer=-2)

    config.save_pretrained(tmp_path)
    loaded = StormConfig.from_pretrained(tmp_path)

    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.vision_config) is SiglipVisionConfig
    assert type(loaded.text_config) is LlamaConfig
    assert loaded.temporal_config == config.temporal_config


def test_config_when_temporal_is_not_given_then_fits_the_language_model():
    config = make_config(temporal=None)

    assert config.temporal_config.d_model == config.d_model == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, "image_size is 32; expected the vision tower's 24"),
        ({"downsample": 4}, "downsample is 4; expected a divisor of the patch grid's side, 6"),
        ({"chunk_frames": 6}, "chunk_frames is 6; expected a multiple of temporal_pool, 4"),
        ({"spatial_pool": 0}, "spatial_pool is 0; expected 1 or more"),
        ({"sample_fps": 0.0}, "sample_fps is 0.0; expected more than 0"),
        ({"video_token_id": 64}, "video_token_id is 64; expected one of the vocabulary's 64 ids"),
        ({"temporal": TemporalConfig(d_model=32, d_temporal=32).to_dict()}, "d_model is 32; expected 48"),
        ({"temporal": {"d_model": 48, "d_temporal": 48, "colour": 1}}, r"unknown keys \['colour'\]"),
    ],
)
def test_config_when_sizes_do_not_fit_then_says_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


# ---- streaming ----

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "downsampled to an odd grid": {"downsample": 2},
    "pooled before": {"pool_before_temporal": True, "downsample": 2},
    "sweep": {
        "temporal": TemporalConfig(
            d_model=48, d_temporal=48, head_dim=16, d_state=8, n_layers=2, scan_orders=("sweep", "location")
        ).to_dict()
    },
    "short pool": {"temporal_pool": 2, "spatial_pool": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_when_encoded_chunk_by_chunk_then_equals_one_pass_bit_for_bit(variant):
    model = make_model(**VARIANTS[variant])
    for n_frames in (1, 3, 4, 5, 8, 11):
        frames = make_frames(1, n_frames, seed=n_frames)[0]

        tokens, _ = encode_stream(model, frames)
        clip = model.encode_clip(frames)

        n_expected = sum(model.config.n_tokens(min(4, n_frames - i)) for i in range(0, n_frames, 4))
        assert torch.equal(tokens, clip)
        assert clip.shape == (n_expected, model.config.d_model)
        assert clip.dtype == torch.float16


def test_stream_when_it_has_a_past_then_tokens_depend_on_it(model):
    frames = make_frames(1, 8)[0]

    with_past, _ = encode_stream(model, frames)
    without, _ = encode_stream(model, frames[4:])

    assert (with_past[-9:].float() - without.float()).abs().max() > 1e-3


def test_encode_chunks_when_streams_share_a_call_then_each_is_bit_for_bit_as_alone(model):
    frames = make_frames(5, 8)
    alone = [encode_stream(model, stream)[0] for stream in frames]

    states = [model.init_stream_state() for _ in frames]
    parts = []
    for order, start in (([3, 1, 4, 0, 2], 0), ([0, 2, 1, 4, 3], 4)):
        chunks = model.encode_chunks(frames[order, start : start + 4], [states[i] for i in order])
        for i, chunk in zip(order, chunks, strict=True):
            states[i] = chunk.state
        parts.append({i: chunk.tokens for i, chunk in zip(order, chunks, strict=True)})

    for i, tokens in enumerate(alone):
        assert torch.equal(torch.cat([part[i] for part in parts]), tokens)


def test_encode_chunks_when_forced_into_one_batch_then_agrees_to_rounding(model):
    frames = make_frames(5, 4)
    states = [model.init_stream_state() for _ in frames]

    together = model.encode_chunks(frames, states, one_by_one=False)
    apart = model.encode_chunks(frames, states, one_by_one=True)

    for a, b in zip(together, apart, strict=True):
        # One float16 step at the tokens' size of up to 4, though most are equal.
        torch.testing.assert_close(a.tokens, b.tokens, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(a.look, b.look, atol=2e-3, rtol=1e-3)


def test_stream_state_when_stored_and_restored_then_the_stream_goes_on_the_same(model, tmp_path):
    frames = make_frames(1, 12)[0]
    whole, _ = encode_stream(model, frames)
    first, state = encode_stream(model, frames[:8])

    save_file(state.to_tensors(), tmp_path / "state.safetensors")
    restored = StreamState.from_tensors(load_file(tmp_path / "state.safetensors"))
    [chunk] = model.encode_chunks(frames[None, 8:], [restored])

    assert torch.equal(torch.cat([first, chunk.tokens]), whole)
    assert restored.n_bytes == state.n_bytes > 0


def test_encode_chunks_when_called_then_the_old_state_still_stands(model):
    frames = make_frames(1, 4)
    _, state = encode_stream(model, make_frames(1, 4, seed=9)[0])
    before = {name: tensor.clone() for name, tensor in state.to_tensors().items()}

    first, again = (model.encode_chunks(frames, [state])[0] for _ in range(2))

    assert torch.equal(first.tokens, again.tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.to_tensors().items())


def test_encode_chunks_when_frames_or_states_do_not_fit_then_says_what_was_expected(model):
    state = model.init_stream_state()
    other = make_model(downsample=2).init_stream_state()

    with pytest.raises(ValueError, match=r"expected torch.uint8 of shape \(B, T, 24, 24, 3\)"):
        model.encode_chunks(make_frames(1, 4, size=32), [state])
    with pytest.raises(ValueError, match="expected as many streams as states, and 1 to 4 frames"):
        model.encode_chunks(make_frames(1, 5), [state])
    with pytest.raises(ValueError, match="for 2 states"):
        model.encode_chunks(make_frames(1, 4), [state, state])
    with pytest.raises(ValueError, match="with T of 1 or more"):
        model.encode_chunks(make_frames(1, 0), [state])
    with pytest.raises(ValueError, match="restore a snapshot of this model"):
        model.encode_chunks(make_frames(1, 4), [other])


def test_encode_chunks_when_tokens_leave_the_range_of_float16_then_raises():
    model = make_model()
    with torch.no_grad():
        model.multi_modal_projector.linear_1.weight.mul_(1e6)

    with pytest.raises(FloatingPointError, match="float16 cannot hold"):
        model.encode_chunks(make_frames(1, 4), [model.init_stream_state()])


def test_look_when_scenes_differ_then_it_differs_more_than_within_one(model):
    frames = np.concatenate([np.full((1, 8, 24, 24, 3), 30, np.uint8), np.full((1, 4, 24, 24, 3), 220, np.uint8)], 1)
    states = [model.init_stream_state()]

    a, b, c = (model.encode_chunks(frames[:, i : i + 4], states)[0].look for i in (0, 4, 8))

    assert (a.dtype, a.shape) == (torch.float16, (6, 6, 32))
    assert a.is_contiguous(), "a snapshot gives it back so, and its distances would round differently"
    torch.testing.assert_close(a.float().norm(dim=-1), torch.ones(6, 6), atol=2e-3, rtol=0)
    assert torch.equal(a, b)
    assert (a.float() * c.float()).sum(-1).median() < 0.99


def test_look_when_one_place_changes_then_only_that_one_differs(model):
    frames = np.full((1, 8, 24, 24, 3), 90, np.uint8)
    frames[0, 4:, :4, :4] = 250
    states = [model.init_stream_state()]

    a, b = (model.encode_chunks(frames[:, i : i + 4], states)[0].look for i in (0, 4))

    assert [tuple(place) for place in (a != b).any(-1).nonzero().tolist()] == [(0, 0)]


def test_fresh_temporal_encoder_when_wrapped_around_then_changes_nothing():
    torch.manual_seed(0)
    model = StormForConditionalGeneration(make_config()).eval()
    pixels = torch.randn(1, 4, 3, 24, 24)

    with torch.no_grad():
        tokens = model.encode_video(pixels)
        patches = model.vision_tower(pixel_values=pixels[0]).last_hidden_state.reshape(1, 4, 6, 6, 32)
        plain = spatial_pool(temporal_pool(model.multi_modal_projector(patches), 4), 2).flatten(1, 3)

    torch.testing.assert_close(tokens, plain)


# ---- saving ----


def test_model_when_saved_and_loaded_then_tokens_and_logits_are_the_same(model, tmp_path):
    frames = make_frames(1, 6)[0]
    ids = torch.tensor([[1, 20, *[VIDEO_ID] * 18, 30]])

    model.save_pretrained(tmp_path)
    loaded = StormForConditionalGeneration.from_pretrained(tmp_path).eval()

    tokens = model.encode_clip(frames)
    assert torch.equal(loaded.encode_clip(frames), tokens)
    with torch.no_grad():
        assert torch.equal(loaded(ids, video_tokens=tokens).logits, model(ids, video_tokens=tokens).logits)


def test_model_when_checkpoint_has_no_temporal_encoder_then_a_fresh_one_that_changes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "temporal_encoder" not in name}
    save_file(kept, path, metadata={"format": "pt"})

    loaded = StormForConditionalGeneration.from_pretrained(tmp_path).eval()

    block = next(m for m in loaded.modules() if isinstance(m, TemporalBlock))
    assert block.proj_out is not None
    assert not block.proj_out.weight.any()
    assert block.forward_mixer.in_proj.weight.std() > 0.01
    assert torch.equal(loaded.multi_modal_projector.linear_1.weight, model.multi_modal_projector.linear_1.weight)
    assert torch.isfinite(loaded.encode_clip(make_frames(1, 8)[0]).float()).all()


# ---- language ----


def test_forward_when_given_frames_or_their_tokens_then_the_same_logits(model):
    pixels = torch.randn(2, 4, 3, 24, 24)
    ids = torch.tensor([[1, 20, *[VIDEO_ID] * 9, 30, 31], [1, *[VIDEO_ID] * 9, 21, 22, 23]])

    with torch.no_grad():
        from_pixels = model(ids, pixel_values=pixels).logits
        tokens = model.encode_video(pixels)
        from_tokens = model(ids, video_tokens=tokens).logits
        from_stored = model(ids, video_tokens=tokens.half().flatten(0, 1).float()).logits
        swapped = model(ids, video_tokens=tokens.flip(0)).logits

    assert torch.equal(from_pixels, from_tokens)
    assert torch.equal(from_tokens, from_stored)
    assert (from_tokens - swapped).abs().max() > 1e-3


def test_forward_when_trained_on_frames_then_every_part_gets_a_gradient():
    model = make_model().train()
    ids = torch.tensor([[1, *[VIDEO_ID] * 18, 20, 21, 22]])
    labels = ids.masked_fill(ids == VIDEO_ID, -100)

    loss = model(ids, pixel_values=torch.randn(1, 8, 3, 24, 24), labels=labels).loss
    loss.backward()

    assert torch.isfinite(loss)
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all of a query's scores alike, which softmax does not see.
    assert [name for name in without if "k_proj.bias" not in name] == []


def test_forward_when_tokens_and_placeholders_differ_in_number_then_raises(model):
    ids = torch.tensor([[1, VIDEO_ID, VIDEO_ID, 20]])

    with pytest.raises(ValueError, match="got 3 video tokens; expected 2"):
        model(ids, video_tokens=torch.zeros(3, 48))
    with pytest.raises(ValueError, match="got 0 video tokens; expected 2"):
        model(ids)
    with pytest.raises(ValueError, match="expected one of them"):
        model(ids, video_tokens=torch.zeros(2, 48), pixel_values=torch.zeros(1, 4, 3, 24, 24))


def test_generate_when_given_video_tokens_then_runs_as_any_transformers_model(model):
    ids = torch.tensor([[1, *[VIDEO_ID] * 9, 20]])
    tokens = model.encode_clip(make_frames(1, 4)[0]).float()

    out = model.generate(ids, video_tokens=tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)

    with torch.no_grad():
        logits = model(out[:, :-1], video_tokens=tokens).logits[0, ids.shape[1] - 1 :]
    assert out.shape == (1, ids.shape[1] + 5)
    logits[:, 2] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(out[0, ids.shape[1] :], logits.argmax(-1))


def test_generate_when_several_beams_then_each_prompt_keeps_its_own_video(model):
    ids = torch.tensor([[1, *[VIDEO_ID] * 9, 20]] * 2)
    tokens = torch.stack([model.encode_clip(make_frames(1, 4, seed=s)[0]) for s in (1, 2)]).float()

    both = model.generate(ids, video_tokens=tokens, num_beams=3, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    for i in range(2):
        alone = model.generate(ids[:1], video_tokens=tokens[i : i + 1], num_beams=3, max_new_tokens=4, min_new_tokens=4)
        assert torch.equal(both[i : i + 1], alone)
    with pytest.raises(ValueError, match=r"expected \(B, n, d_model\)"):
        model.generate(ids, video_tokens=tokens.flatten(0, 1), num_beams=3, max_new_tokens=4)


OTHERS: dict[str, dict[str, Any]] = {
    "a tower with a class token, as LLaVA uses it": {
        "vision_config": CLIPVisionConfig(**TOWER),
        "vision_feature_layer": -2,
        "projector_hidden_act": "gelu",
    },
    "qwen3": {"text_config": Qwen3Config(**DECODER)},
    "gemma, which ties its embeddings": {"text_config": GemmaConfig(**DECODER)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_model_when_made_of_other_towers_and_decoders_then_encodes_answers_and_saves(other, tmp_path):
    model = make_model(**OTHERS[other])
    frames = make_frames(1, 4)[0]
    ids = torch.tensor([[1, *[VIDEO_ID] * 9, 20]])

    tokens = model.encode_clip(frames)
    out = model.generate(ids, video_tokens=tokens.float(), max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = StormForConditionalGeneration.from_pretrained(tmp_path).eval()

    assert tokens.shape == (9, 48)
    assert out.shape[1] > ids.shape[1]
    assert torch.equal(loaded.encode_clip(frames), tokens)
    assert torch.equal(loaded.generate(ids, video_tokens=tokens.float(), max_new_tokens=3, do_sample=False), out)
