"""Evaluation: balanced questions about held-out clips, streamed, with their controls; and the model's card."""

import json
from collections import Counter

import pytest

from stormline.models.loading import LoadedModel, fingerprint_model
from stormline.models.training.clips import HELD_OUT_SEED
from stormline.models.training.evaluate import draw_items, evaluate, markdown_table
from stormline.models.training.model_card import card_text, write_card
from stormline.models.training.new_model import build_model
from stormline.models.training.questions import ORDER_NEEDED
from stormline.models.training.recipe import ModelSizes, recipe_from_dict

TINY = ModelSizes(
    image_size=32,
    vision_width=32,
    vision_layers=1,
    temporal_width=32,
    temporal_state=8,
    text_width=32,
    text_layers=1,
    text_heads=2,
    vocab_size=512,
)
STAGE = {"name": "see", "task": "places", "train": ["vision_tower"], "steps": 7}


@pytest.fixture(scope="module")
def loaded():
    model, processor = build_model(TINY, seed=0)
    return LoadedModel(model.eval(), processor, "tiny", False, fingerprint_model(model))


@pytest.fixture(scope="module")
def evaluation(loaded):
    return evaluate(loaded, lengths=(8, 16), n_per_kind=2, frames_per_length=160)


def test_items_when_drawn_then_held_out_and_repeatable():
    items = draw_items(16, 10, 0, 1600)

    assert all(item.clip.seed >= HELD_OUT_SEED for item in items)
    assert [i.questions for i in items] == [i.questions for i in draw_items(16, 10, 0, 1600)]


def test_items_when_order_matters_then_asked_both_ways_with_opposite_answers():
    asked = Counter()
    for item in draw_items(16, 20, 0, 3200):
        for q in item.questions:
            if q.kind in ORDER_NEEDED:
                asked[item.clip.seed, q.prompt, item.clip.backwards] += 1
                assert q.answer != q.reversed_answer
    pairs = {(seed, prompt) for seed, prompt, _ in asked}

    assert len(pairs) > 10
    assert all(asked[seed, prompt, False] == asked[seed, prompt, True] == 1 for seed, prompt in pairs)


def test_items_when_yes_or_no_then_as_many_of_each():
    answers = Counter(q.answer for item in draw_items(16, 32, 0, 9600) for q in item.questions if q.kind == "alert")

    assert abs(answers["yes"] - answers["no"]) <= 0.2 * answers.total()


def test_items_when_a_kind_can_have_one_answer_only_then_it_is_not_asked():
    asked = {n: Counter(q.kind for item in draw_items(n, 24, 0, 4800) for q in item.questions) for n in (8, 128)}

    assert asked[8]["needle seen"]
    assert not asked[8]["needle count"]  # none comes and goes within four seconds
    assert asked[128]["needle count"]


def test_evaluate_when_untrained_then_counts_and_controls(evaluation):
    kinds = evaluation.by_length[16]

    assert evaluation.one_pass["equal"] == evaluation.one_pass["compared"] > 0
    assert {"direction", "caption", "alert"} <= set(kinds)
    for told in kinds.values():
        assert told["asked"] >= 1
        assert 0 <= told["accuracy"] <= 1
        assert 0 < told["chance"] <= 1
        assert told["no_video"] is not None
        assert told["shuffled"] is not None
    assert all(kinds[kind]["accuracy"] <= 0.5 for kind in ORDER_NEEDED & set(kinds))


def test_table_when_written_then_a_row_for_each_kind(evaluation):
    rows = [[cell.strip() for cell in row.split("|")] for row in markdown_table(evaluation).splitlines()]

    assert rows[0][1:-1] == ["question", "chance", "no video", "8 frames", "16 frames"]
    assert {"caption", "alert", "direction"} <= {row[1] for row in rows if len(row) > 1}


def test_card_when_written_then_training_numbers_and_plot(evaluation, tmp_path):
    recipe = recipe_from_dict({"name": "tiny", "seed": 5, "stages": [STAGE]})
    line = {"stage": "see", "seconds": 90.0, "device": "cpu", "threads": 2, "loss": 1.25, "accuracy": {"all": 0.5}}
    training = {"recipe": recipe.to_dict(), "seconds": {"see": 90.0}, "torch": "2.13.0"}
    (tmp_path / "training.json").write_text(json.dumps(training))
    (tmp_path / "training_log.jsonl").write_text(json.dumps(line) + "\n")

    text = write_card(tmp_path, evaluation).read_text()

    assert text == card_text(training, [line], evaluation)
    assert "| see | places | vision_tower | 7 | 2 | 1.250 | 50.0% |" in text
    assert "seed 5" in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "evaluation.json").read_text())["by_length"]["8"]
