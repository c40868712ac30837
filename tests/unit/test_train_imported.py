"""Training an imported model: only what should change does, the loss falls, and a stop leaves no trace."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_sources import save_source

from stormline.models.importing import ImportOptions, import_model
from stormline.models.loading import load_model
from stormline.models.training.feature_cache import FeatureCache
from stormline.models.training.lora import Lora
from stormline.models.training.recipe import recipe_from_dict
from stormline.models.training.trainer import Trainer

ALIGN = {
    "name": "align",
    "task": "text",
    "train": ["multi_modal_projector", "temporal_encoder"],
    "steps": 24,
    "batch": 2,
    "clip_frames": 8,
    "window_chunks": [2],
    "questions": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 2,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_source("gemma3", folder / "source")
    import_model(folder / "source", folder / "storm")
    return folder / "storm"


def make_recipe(start, **changes):
    return recipe_from_dict({"name": "tried", "start_from": str(start), "stages": [ALIGN | changes]})


def hashes(model: Any) -> dict[str, str]:
    """Return a hash of each part's weights."""
    found = {}
    for part in ("vision_tower", "multi_modal_projector", "temporal_encoder", "language_model"):
        digest = hashlib.sha256()
        for name, parameter in sorted(model.parameters_of(part).items()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
        found[part] = digest.hexdigest()
    return found


def run(recipe, folder, **more):
    clock = itertools.count(step=10.0)  # each look at it is ten seconds later: every step reports
    reports = []
    result = Trainer(recipe, folder, device="cpu", clock=lambda: next(clock), save_every_s=1e9).run(
        reports.append, **more
    )
    return result, [report.loss for report in reports]


def test_trainer_when_it_aligns_an_imported_model_then_loss_falls_and_the_rest_is_untouched(start, tmp_path):
    before = hashes(load_model(start, device="cpu").model)

    result, losses = run(make_recipe(start), tmp_path / "whole")

    loaded = load_model(result, device="cpu")
    after = hashes(loaded.model)
    assert {part for part in before if before[part] != after[part]} == {"multi_modal_projector", "temporal_encoder"}
    assert losses[-1] < 0.9 * losses[0]  # running means
    assert loaded.name == "source-tried"


def test_trainer_when_stopped_then_the_same_model_and_only_what_trains_is_kept(start, tmp_path):
    recipe = make_recipe(start, steps=3, gradient_checkpointing=True)
    whole, _ = run(make_recipe(start, steps=3), tmp_path / "whole")

    stopped, _ = run(recipe, tmp_path / "pieces", should_stop=lambda: True)
    kept = sum(path.stat().st_size for path in (tmp_path / "pieces" / "state").glob("*.safetensors"))
    steps = itertools.count()
    run(recipe, tmp_path / "pieces", should_stop=lambda: next(steps) == 1)
    pieces, _ = run(recipe, tmp_path / "pieces")

    assert stopped is None
    assert hashes(load_model(pieces, device="cpu").model) == hashes(load_model(whole, device="cpu").model)
    trained = [p for part in ALIGN["train"] for p in load_model(start, device="cpu").model.parameters_of(part).values()]
    assert kept < 1.5 * 3 * sum(p.nbytes for p in trained) + 50_000  # weights and two moments


def test_trainer_when_a_later_stage_trains_another_part_then_goes_on(start, tmp_path):
    def two_stages(later):
        tune = {**ALIGN, "name": "tune", "steps": 1, "train": later}
        return recipe_from_dict({"name": "t", "start_from": str(start), "stages": [ALIGN | {"steps": 2}, tune]})

    stopped, _ = run(two_stages(ALIGN["train"]), tmp_path / "pieces", should_stop=lambda: True)
    pieces, _ = run(two_stages(["language_model"]), tmp_path / "pieces")
    whole, _ = run(two_stages(["language_model"]), tmp_path / "whole")

    assert stopped is None
    assert hashes(load_model(pieces, device="cpu").model) == hashes(load_model(whole, device="cpu").model)


def test_trainer_when_clips_are_no_whole_chunks_of_the_model_then_refused(start, tmp_path):
    for name, chunk_frames, temporal_pool in (("eight", 8, 4), ("two", 2, 2)):
        options = ImportOptions(chunk_frames=chunk_frames, temporal_pool=temporal_pool)
        import_model(start.parent / "source", tmp_path / name, options)

    for clip_frames in (4, 12, 20):
        with pytest.raises(ValueError, match=rf"clip_frames is {clip_frames}; expected a multiple of the model's 8"):
            Trainer(make_recipe(tmp_path / "eight", clip_frames=clip_frames), tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match="room for windows of 2 chunks"):
        Trainer(make_recipe(tmp_path / "eight", clip_frames=8), tmp_path / "out", device="cpu")
    Trainer(make_recipe(tmp_path / "two", clip_frames=6), tmp_path / "out", device="cpu")


def test_trainer_when_it_adapts_the_language_model_with_lora_then_the_result_is_an_ordinary_model(start, tmp_path):
    recipe = make_recipe(start, train=["language_model"], steps=12)
    lora = replace(recipe, lora=Lora(rank=4, alpha=8, dropout=0.1))
    before = load_model(start, device="cpu").model

    whole, losses = run(lora, tmp_path / "whole")
    _, _ = run(lora, tmp_path / "pieces", should_stop=lambda: True)
    kept = sum(path.stat().st_size for path in (tmp_path / "pieces" / "state").glob("*.safetensors"))
    pieces, _ = run(lora, tmp_path / "pieces")

    after = load_model(whole, device="cpu").model
    assert {p for p in hashes(before) if hashes(before)[p] != hashes(after)[p]} == {"language_model"}
    assert hashes(load_model(pieces, device="cpu").model) == hashes(after)
    assert [name for name, _ in after.named_parameters()] == [name for name, _ in before.named_parameters()]
    changed = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)
    for name in changed:
        update = (after.get_parameter(name) - before.get_parameter(name)).detach()
        assert torch.linalg.matrix_rank(update, rtol=1e-3) <= 4
    assert losses[-1] < losses[0]
    assert kept < 0.5 * sum(p.nbytes for p in before.parameters_of("language_model").values())


def test_recipe_when_lora_has_nothing_to_adapt_then_says_so(start):
    with pytest.raises(ValueError, match="no stage trains language_model"):
        recipe_from_dict({"name": "tried", "start_from": str(start), "lora": {"rank": 8}, "stages": [ALIGN]})
    for wrong in ({"rank": 0}, {"alpha": 0}, {"dropout": 1}, {"ranks": 3}):
        with pytest.raises(ValueError, match="expected"):
            recipe_from_dict({"name": "tried", "lora": wrong, "stages": [ALIGN | {"train": ["language_model"]}]})


def test_trainer_when_video_is_bidirectional_then_it_learns_on_the_logits_that_answers_come_from(start):
    from stormline.models.training.tasks import build_task

    trainer = Trainer(make_recipe(start), start.parent / "unused", device="cpu")
    trainer.model.eval()
    task: Any = build_task(trainer.recipe.stages[0], 0, trainer.recipe, trainer.model, trainer.processor)
    batch, tokens = task.draw(0)

    with torch.inference_mode():
        packed, wanted = task._predict(batch, tokens)
        row = batch.texts == 0
        first = int((batch.input_ids[0] == trainer.model.config.video_token_id).sum())
        in_first = batch.columns[row]
        ids = batch.input_ids[0, : int(in_first.max()) + 1][None]
        alone = trainer.model(input_ids=ids, video_tokens=tokens[:first]).logits[0, in_first]

    torch.testing.assert_close(packed[row], alone, atol=1e-4, rtol=1e-4)
    assert len(wanted) == len(packed)


def test_trainer_when_features_are_kept_then_looks_once_and_learns_and_a_stop_leaves_no_trace(
    start, tmp_path, monkeypatch
):
    recipe = make_recipe(start, cached_streams=6)
    before = hashes(load_model(start, device="cpu").model)
    seen = []
    see = FeatureCache._see
    monkeypatch.setattr(FeatureCache, "_see", lambda *args: seen.append(1) or see(*args))

    whole, losses = run(recipe, tmp_path / "whole")
    steps = itertools.count()
    run(recipe, tmp_path / "pieces", should_stop=lambda: next(steps) == 5)
    n_seen = len(seen)
    pieces, _ = run(recipe, tmp_path / "pieces")

    after = hashes(load_model(whole, device="cpu").model)
    assert {part for part in before if before[part] != after[part]} == set(ALIGN["train"])
    assert hashes(load_model(pieces, device="cpu").model) == after
    assert losses[-1] < 0.9 * next(loss for loss in losses if loss)  # the first report is of the clips
    assert (n_seen, len(seen)) == (12, 12)  # six clips for each folder, none again after the stop


def test_recipe_when_the_tower_trains_then_its_features_cannot_be_kept():
    stage = {**ALIGN, "train": ["vision_tower", "temporal_encoder"], "cached_streams": 4}
    with pytest.raises(ValueError, match="a vision tower that does not train"):
        recipe_from_dict({"name": "r", "stages": [stage]})
    with pytest.raises(ValueError, match="tokens are chosen from those on disk"):
        recipe_from_dict({"name": "r", "stages": [{**ALIGN, "cached_streams": 4, "budget_tokens": [8]}]})
