"""Features of a frozen tower, kept on disk: what they replace, for every family."""

from __future__ import annotations

import pytest
import torch
from small_sources import SOURCES, TINY_SIZES, save_source

from stormline.models.importing import import_model
from stormline.models.loading import load_model
from stormline.models.training.clips import make_clip
from stormline.models.training.feature_cache import FeatureCache
from stormline.models.training.new_model import build_model
from stormline.models.training.recipe import ModelSizes

N_FRAMES = 4


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Return a function that gives a family's imported model, made once."""
    made = {}

    def give(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save_source(family, folder / "source")
            import_model(folder / "source", folder / "storm")
            made[family] = folder / "storm"
        return made[family]

    return give


def load(family, imported):
    if family == "native":
        model, processor = build_model(ModelSizes(**TINY_SIZES), seed=1)
        return model.eval(), processor
    loaded = load_model(imported(family), device="cpu", dtype="float32")
    return loaded.model, loaded.processor


@pytest.mark.parametrize("family", ["native", *SOURCES])
def test_features_when_read_from_disk_then_are_those_of_the_tower_and_gradients_reach_what_follows(
    family, imported, tmp_path, monkeypatch
):
    model, processor = load(family, imported)
    clips = [make_clip(i, N_FRAMES, "shapes", size_px=model.config.image_size) for i in range(3)]
    pixels = torch.stack([processor.prepare_frames(clip.render()) for clip in clips])
    with torch.no_grad():
        expected = model._project(model._features(pixels))
    cache = FeatureCache(tmp_path, model, processor, "k").fill(3, clips.__getitem__)
    monkeypatch.setattr(model.tower, "forward", None)  # nobody looks any more

    found = model._project(cache.features([2, 0, 1, 2], N_FRAMES))

    torch.testing.assert_close(found, expected[[2, 0, 1, 2]], rtol=1e-2, atol=1e-2)
    found.sum().backward()
    trained = model.parameters_of("multi_modal_projector").values()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.parameters_of("vision_tower").values())


def test_cache_when_the_tower_is_another_then_is_made_anew(imported, tmp_path):
    model, processor = load("native", imported)
    clips = [make_clip(i, N_FRAMES, "shapes", size_px=model.config.image_size) for i in range(2)]
    FeatureCache(tmp_path, model, processor, "k").fill(2, clips.__getitem__)
    with torch.no_grad():
        for parameter in model.parameters_of("vision_tower").values():
            parameter.mul_(1.5)
        expected = model._features(processor.prepare_frames(clips[1].render())[None])

    found = FeatureCache(tmp_path, model, processor, "k").fill(2, clips.__getitem__).features([1], N_FRAMES)

    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_cache_when_float16_cannot_hold_a_feature_then_says_so(imported, tmp_path):
    model, processor = load("native", imported)
    with torch.no_grad():
        next(reversed(model.parameters_of("vision_tower").values())).mul_(0).add_(1e6)

    with pytest.raises(FloatingPointError, match="without cached_streams"):
        FeatureCache(tmp_path, model, processor, "k").fill(
            1, lambda i: make_clip(i, N_FRAMES, "shapes", size_px=model.config.image_size)
        )
