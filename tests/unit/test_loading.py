"""Getting a model by name."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_sources import save_source
from typer.testing import CliRunner

from stormline.models import loading
from stormline.models.generation import generate_answers
from stormline.models.loading import build_untrained_tiny, choose_device, fingerprint_model, load_model, save_model
from stormline.models.prompts import VideoPrompt
from stormline.models.selection import VideoChunk
from stormline.operators.errors import SettingsError
from stormline.pipeline.cli import app

FRAMES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "my-model"
    save_model(path, *build_untrained_tiny(seed=3))
    return path


def test_load_when_nothing_is_named_and_no_checkpoint_is_there_then_untrained(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "DEFAULT_FOLDER", tmp_path / "missing")

    loaded = load_model(None, device="cpu")

    assert (loaded.name, loaded.trained) == ("untrained-tiny", False)
    assert not loaded.model.training
    assert loaded.model.encode_clip(FRAMES).shape == (32, 192)


def test_load_when_nothing_is_named_and_a_checkpoint_is_there_then_it(monkeypatch, folder):
    monkeypatch.setattr(loading, "DEFAULT_FOLDER", folder)

    assert load_model(None, device="cpu").name == "my-model"


def test_load_when_saved_then_tokens_answers_and_fingerprint_are_the_same(folder):
    model, processor = build_untrained_tiny(seed=3)
    loading.use_exact_decoding(model)

    loaded = load_model(folder, device="cpu")

    tokens = model.encode_clip(FRAMES)
    prompt = VideoPrompt("What moves?", (VideoChunk(0, 3, tokens.numpy()),), max_new_tokens=8)
    assert torch.equal(loaded.model.encode_clip(FRAMES), tokens)
    assert generate_answers(loaded.model, loaded.processor, [prompt]) == generate_answers(model, processor, [prompt])
    assert loaded.fingerprint == fingerprint_model(model)
    assert loaded.name == "my-model"


def test_fingerprint_when_weights_or_settings_differ_then_it_does():
    model, _ = build_untrained_tiny()
    first = fingerprint_model(model)

    assert fingerprint_model(build_untrained_tiny()[0]) == first
    assert fingerprint_model(build_untrained_tiny(seed=1)[0]) != first
    with torch.no_grad():
        model.multi_modal_projector.linear_1.bias[0] += 1e-3
    changed = fingerprint_model(model)
    assert changed != first
    model.config.chunk_frames = 8
    assert fingerprint_model(model) != changed


def test_load_when_asked_wrongly_then_says_what_was_expected(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder here; expected one, or a hub id"):
        load_model("nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'; expected 'auto' or one of"):
        load_model(folder, dtype="int8")


def test_load_when_the_folder_mixes_two_models_then_raises(tmp_path):
    save_model(tmp_path, *build_untrained_tiny())
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": 96}))

    with pytest.raises(ValueError, match="The folder mixes files of two models"):
        load_model(tmp_path, device="cpu")


def without_a_weight(weights):
    del weights["temporal_encoder.blocks.0.norm.weight"]


def with_one_too_many(weights):
    weights["temporal_encoder.blocks.9.norm.weight"] = torch.ones(128)


def with_a_smaller_one(weights):
    weights["temporal_encoder.blocks.0.norm.weight"] = torch.ones(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_weight, "1 missing"),
        (with_one_too_many, r"1 too many \(temporal_encoder.blocks.9.norm.weight"),
        (with_a_smaller_one, "1 of another size"),
    ],
)
def test_load_when_weights_are_not_those_of_the_configuration_then_raises(folder, tmp_path, change, message):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    weights = load_file(copied / "model.safetensors")
    change(weights)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})

    with pytest.raises(ValueError, match=rf"the weights of .*copied are not those .*: {message}"):
        load_model(copied, device="cpu")


def test_load_when_the_configuration_wants_more_weights_then_raises(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    config["temporal"] |= {"n_layers": 2, "scan_orders": ["location", "location"]}
    (copied / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"missing \(temporal_encoder\.blocks\.1"):
        load_model(copied, device="cpu")


def test_load_when_files_are_cut_off_or_gone_then_the_error_names_the_folder(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    weights = copied / "model.safetensors"

    for damage in (lambda: weights.write_bytes(weights.read_bytes()[:-1000]), weights.unlink):
        damage()
        with pytest.raises(ValueError, match=r"the model .*copied cannot be read"):
            load_model(copied, device="cpu")


def test_eval_when_a_model_was_not_imported_then_says_so_in_one_line(tmp_path, caplog):
    save_source("llava", tmp_path / "source")

    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(app, ["eval", str(tmp_path / "source"), "--device", "cpu"])

    assert isinstance(result.exception, SettingsError)
    assert re.search(r"holds a model of type 'llava'; expected 'storm'\. Import it first", str(result.exception))
    assert (caplog.messages, len(str(result.exception).splitlines())) == ([], 1)


def test_load_when_bfloat16_is_asked_for_then_streams_and_answers_in_it(folder):
    loaded = load_model(folder, device="cpu", dtype="bfloat16")

    tokens = loaded.model.encode_clip(FRAMES)
    full = load_model(folder, device="cpu").model.encode_clip(FRAMES)
    [answer] = generate_answers(
        loaded.model, loaded.processor, [VideoPrompt("?", (VideoChunk(0, 3, tokens.numpy()),), max_new_tokens=4)]
    )

    assert loaded.model.dtype == torch.bfloat16
    assert torch.cosine_similarity(tokens.float().flatten(), full.float().flatten(), dim=0) > 0.99
    assert answer.generated_tokens == 4


@pytest.mark.parametrize("device", ["nope", "cuda:", "gpu:0", ""])
def test_device_when_torch_knows_none_of_that_name_then_the_error_says_what_is_expected(device):
    with pytest.raises(ValueError, match=rf"device is '{device}'; expected 'auto', 'cpu'"):
        choose_device(device)


def test_device_when_there_are_not_so_many_then_the_error_says_how_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="torch sees 2 CUDA"):
        choose_device("cuda:2")
