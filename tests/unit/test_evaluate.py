"""Evaluation: balanced questions about held-out clips, streamed, with their controls; and the model's card."""

import inspect
import json
import sys
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from stormline.models.loading import DEFAULT_FOLDER, LoadedModel, fingerprint_model, save_model
from stormline.models.training.clips import HELD_OUT_SEED
from stormline.models.training.evaluate import Evaluation, draw_items, evaluate, markdown_table
from stormline.models.training.model_card import card_text, write_card
from stormline.models.training.new_model import build_model
from stormline.models.training.questions import ORDER_NEEDED
from stormline.models.training.recipe import ModelSizes, recipe_from_dict
from stormline.operators.errors import SettingsError
from stormline.pipeline.cli import app

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


def write_training(folder):
    """Write what a training leaves in a model's folder; return it, and the one line of its log."""
    recipe = recipe_from_dict({"name": "tiny", "seed": 5, "stages": [STAGE]})
    line = {"stage": "see", "seconds": 90.0, "device": "cpu", "threads": 2, "loss": 1.25, "accuracy": {"all": 0.5}}
    training = {"recipe": recipe.to_dict(), "seconds": {"see": 90.0}, "torch": "2.13.0"}
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "training_log.jsonl").write_text(json.dumps(line) + "\n")
    return training, line


def test_eval_command_when_run_then_that_model_is_measured_as_asked_and_told_of(
    loaded, evaluation, tmp_path, monkeypatch
):
    """What measures is tested above; it is asked here as the command asks it, and answers with what it gave there."""
    measured = []

    def measure(*given, **options):
        measured.append(inspect.signature(evaluate).bind(*given, **options).arguments)
        options["on_progress"]("8 frames: 41 questions")
        return evaluation

    monkeypatch.setattr("stormline.models.training.evaluate.evaluate", measure)
    folder, told = tmp_path / "tiny", tmp_path / "told.json"
    save_model(folder, loaded.model, loaded.processor)
    write_training(folder)
    asked = ["--lengths", "8,16", "--per-kind", "2", "--frames-per-length", "1000", "--seed", "3", "--device", "cpu"]

    run = CliRunner().invoke(
        app, ["eval", str(folder), *asked, "--out", str(told), "--card", "--threads", str(torch.get_num_threads())]
    )

    assert run.exit_code == 0, run.output
    ((model, lengths, n_per_kind, seed, frames_per_length, _),) = [given.values() for given in measured]
    assert model.fingerprint == loaded.fingerprint
    assert (lengths, n_per_kind, seed, frames_per_length) == ([8, 16], 2, 3, 1000)
    as_json = json.loads(json.dumps(evaluation.to_dict()))
    assert json.loads(told.read_text()) == json.loads((folder / "evaluation.json").read_text()) == as_json
    table = markdown_table(evaluation)
    assert told.with_suffix(".md").read_text() == table + "\n"
    assert table in run.stdout
    assert "8 frames: 41 questions" in run.stderr
    n_compared = evaluation.one_pass["compared"]
    assert f"equal those of one pass in {n_compared} of {n_compared} clips" in run.stdout
    assert f"card: {folder / 'README.md'}" in run.stdout


@pytest.mark.parametrize("lengths", ["8,x", "", "2"])
def test_eval_command_when_the_lengths_are_none_then_refused(lengths):
    run = CliRunner().invoke(app, ["eval", "--lengths", lengths])

    assert isinstance(run.exception, SettingsError)


def test_card_when_written_then_training_numbers_and_plot(evaluation, tmp_path):
    training, line = write_training(tmp_path)

    text = write_card(tmp_path, evaluation).read_text()

    assert text == card_text(training, [line], evaluation)
    assert "| see | places | vision_tower | 7 | 2 | 1.250 | 50.0% |" in text
    assert "seed 5" in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "evaluation.json").read_text())["by_length"]["8"]


CARD_LINE = {"seconds": 60, "device": "cpu", "threads": 2, "loss": 1.0, "accuracy": {"all": 0.5}}


def card_of(evaluation, stages=(STAGE,), **values):
    recipe = recipe_from_dict({"name": "tried", "stages": list(stages), **values})
    training = {"recipe": recipe.to_dict(), "seconds": {"see": 60}, "torch": "2.13.0"}
    return card_text(training, [CARD_LINE] * len(stages), evaluation)


def test_card_when_the_model_is_the_shipped_one_then_the_text_that_it_ships_with():
    measured = json.loads((DEFAULT_FOLDER / "evaluation.json").read_text())
    measured["by_length"] = {int(n): kinds for n, kinds in measured["by_length"].items()}
    log = (DEFAULT_FOLDER / "training_log.jsonl").read_text().splitlines()

    text = card_text(
        json.loads((DEFAULT_FOLDER / "training.json").read_text()), [json.loads(x) for x in log], Evaluation(**measured)
    )

    assert text == (DEFAULT_FOLDER / "README.md").read_text()


def test_card_when_it_went_on_from_a_model_on_real_video_then_says_so_and_nothing_of_a_generated_world(evaluation):
    real = {"name": "real", "task": "text", "train": ["language_model"], "steps": 5, "data": "street/"}

    text = card_of(evaluation, [real], start_from="onevision", lora={"rank": 4})

    assert "It went on from `onevision`, and learnt on real video with text." in text
    assert "LoRA of rank 4" in text
    assert "Stage real learnt real video with text: `street/`." in text
    assert "holds what stands under `recipe`" in text
    training, measured = text.split("## Evaluation")
    assert "nothing" not in training
    assert "shapes" not in training
    assert "generated world of coloured shapes" in measured


def test_card_when_only_some_stages_saw_real_video_then_tells_both(evaluation):
    real = {"name": "real", "task": "text", "train": ["language_model"], "steps": 5, "data": "street/"}

    text = card_of(evaluation, [STAGE, real])

    assert "from nothing, and learnt on a generated world of coloured shapes and real video with text" in text
    assert "nothing else" not in text


def test_eval_command_when_the_card_cannot_be_written_then_says_so_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr("stormline.models.loading.load_model", None)  # not even that
    command = ["eval", "--threads", str(torch.get_num_threads())]

    no_training = CliRunner().invoke(app, [*command, str(tmp_path), "--card"])
    no_folder = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "none" / "o.json")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    no_plot = CliRunner().invoke(app, [*command, "--card"])

    for result, message in (
        (no_training, "has no training.json and no training_log.jsonl"),
        (no_folder, "there is no folder"),
        (no_plot, "needs matplotlib"),
    ):
        assert isinstance(result.exception, SettingsError)
        assert message in str(result.exception)


def test_eval_command_when_the_card_fails_all_the_same_then_the_numbers_are_written(evaluation, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("stormline.models.training.evaluate.evaluate", lambda *_, **__: evaluation)
    monkeypatch.setattr("stormline.models.training.model_card.write_card", fail)
    command = ["eval", "--threads", str(torch.get_num_threads()), "--card", "--out", str(tmp_path / "o.json")]

    result = CliRunner().invoke(app, command)

    assert isinstance(result.exception, OSError)
    assert json.loads((tmp_path / "o.json").read_text())["by_length"]
    assert (tmp_path / "o.md").read_text().startswith("| question |")
