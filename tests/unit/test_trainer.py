"""The trainer: the same model whether it was killed or not, on the world of shapes and on real video with text."""

import io
import itertools
import json
import shutil
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_media import RATE, make_video
from small_sources import TINY_SIZES
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from stormline.models.loading import load_model
from stormline.models.tokenizer import END, VIDEO
from stormline.models.training import real_video
from stormline.models.training.cache_folder import keep_only, shard_path
from stormline.models.training.heads import shades_of
from stormline.models.training.pairs import read_pairs
from stormline.models.training.plain_attention import PLAIN_ATTENTION
from stormline.models.training.real_video import LastUsed, length_of, read_stretch, stretch_s
from stormline.models.training.recipe import load_recipe, recipe_from_dict
from stormline.models.training.tasks import build_task
from stormline.models.training.trainer import Trainer, learning_rate_at
from stormline.operators.errors import SettingsError
from stormline.operators.rgb import RgbConverter
from stormline.pipeline.cli import app

STAGES = [
    {"name": "see", "task": "places", "train": ["vision_tower"], "steps": 3, "batch": 2, "clip_frames": 2},
    {
        "name": "align",
        "task": "motions",
        "train": ["multi_modal_projector", "temporal_encoder"],
        "optimizer": "muon",
        "steps": 3,
        "batch": 2,
        "clip_frames": 8,
    },
    {
        "name": "speak",
        "task": "text",
        "train": ["language_model"],
        "steps": 3,
        "batch": 2,
        "clip_frames": 16,
        "window_chunks": [2, 4],
        "budget_tokens": [0, 8],
        "cached_streams": 3,
        "worlds": {"shapes": 0.5, "needles": 0.5},
    },
]


def recipe(stages=STAGES):
    return recipe_from_dict({"name": "tiny", "seed": 1, "model": TINY_SIZES, "stages": stages})


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    reports = []
    Trainer(recipe(), folder, device="cpu").run(reports.append)
    return folder, reports


def test_trainer_when_it_ends_then_model_log_and_progress(trained):
    folder, reports = trained
    log = [json.loads(line) for line in (folder / "model" / "training_log.jsonl").read_text().splitlines()]

    assert [line["stage"] for line in log] == ["see", "align", "speak"]
    assert {"colour", "shape", "size"} < set(log[0]["accuracy"])
    assert {r.stage for r in reports} == {"see", "align", "speak"}
    assert all(np.isfinite(line["loss"]) for line in log)
    loaded = load_model(str(folder / "model"), device="cpu")
    assert loaded.model.config.trained
    assert json.loads((folder / "model" / "training.json").read_text())["recipe"]["seed"] == 1


def test_trainer_when_stopped_again_and_again_then_the_same_model(trained, tmp_path):
    result, n_runs = None, 0
    while result is None:
        steps = itertools.count()
        result = Trainer(recipe(), tmp_path, device="cpu").run(should_stop=lambda steps=steps: next(steps) == 1)
        n_runs += 1

    assert n_runs == 7  # steps 2, 4, 6; then, as each start asks once over its clips, 7, 8, 9; and the last
    whole, pieces = weights(trained[0] / "model"), weights(result)
    assert whole.keys() == pieces.keys()
    assert [name for name in whole if not torch.equal(whole[name], pieces[name])] == []


def test_trainer_when_stopped_while_it_encodes_clips_then_at_once_and_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("stormline.models.training.token_cache.SHARD_CLIPS", 1)
    speak = recipe([STAGES[2]])

    assert Trainer(speak, tmp_path, device="cpu").run(should_stop=lambda: True) is None
    (kept,) = (tmp_path / "cache" / "speak").glob("clips-*")
    written = kept.stat().st_mtime_ns
    assert Trainer(speak, tmp_path, device="cpu").run() is not None
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("text", ["", '{"key": "1 0', '{"key": "\\ud8'])
def test_cache_when_what_says_of_its_clips_is_cut_off_then_they_are_made_anew(tmp_path, text):
    (tmp_path / "about.json").write_text(text)
    clips = shard_path(tmp_path, 0)
    clips.write_bytes(b"of whom?")

    keep_only(tmp_path, {"key": "1 0 ()"})

    assert not clips.exists()
    assert json.loads((tmp_path / "about.json").read_text()) == {"key": "1 0 ()"}


def test_cache_when_what_says_of_its_clips_cannot_be_written_then_nothing_half_written_stays(tmp_path, monkeypatch):
    def write_half(path, text, **kwargs):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    keep_only(tmp_path, {"key": "1"})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="disk full"):
            keep_only(tmp_path, {"key": "2"})

    assert json.loads((tmp_path / "about.json").read_text()) == {"key": "1"}


def test_trainer_when_stopped_and_resumed_then_its_seconds_are_those_of_all_processes(tmp_path):
    n_runs, result = 0, None
    while result is None:
        clock, steps = itertools.count(), itertools.count()
        trainer = Trainer(recipe(), tmp_path, device="cpu", clock=lambda clock=clock: next(clock))
        result = trainer.run(should_stop=lambda steps=steps: next(steps) == 1)
        n_runs += 1
    told = json.loads((result / "training.json").read_text())["seconds"]
    Trainer(recipe(), tmp_path, device="cpu").run()

    assert n_runs > 2
    assert all(told[stage["name"]] >= stage["steps"] for stage in STAGES)  # a second a look at the clock
    assert json.loads((result / "training.json").read_text())["seconds"] == told


def test_trainer_when_stopped_while_it_encodes_then_the_time_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("stormline.models.training.token_cache.SHARD_CLIPS", 1)
    clock = itertools.count(step=10.0)
    Trainer(recipe([STAGES[2]]), tmp_path, device="cpu", clock=lambda: next(clock)).run(should_stop=lambda: True)

    assert json.loads((tmp_path / "state" / "state.json").read_text())["seconds"]["speak"] >= 10


def test_windows_when_drawn_for_a_kind_then_nearly_all_are_asked_it(tmp_path):
    stage = STAGES[2] | {"window_chunks": [4], "cached_streams": 40, "clip_frames": 64, "budget_tokens": []}
    seeking = stage | {"batch": 12, "seek": {"caption": 1.0}, "worlds": {"shapes": 1.0}}
    model = Trainer(recipe([seeking]), tmp_path, device="cpu")
    asked = {}
    for name, sought in (("as they come", {}), ("sought", {"caption": 1.0})):
        task = build_task(replace(model.recipe.stages[0], seek=sought), 0, model.recipe, model.model, model.processor)
        asked[name] = sum(task.draw(step)[0].kinds.count("caption") for step in range(3))

    assert asked["sought"] >= 30  # of 36
    assert asked["as they come"] < 18


def test_windows_when_clips_are_drawn_anew_then_what_their_own_lack_is_sought_in_others(tmp_path):
    stage = STAGES[2] | {"window_chunks": [4], "budget_tokens": [], "cached_streams": 0, "batch": 12}
    seeking = stage | {"seek": {"first change": 1.0}, "worlds": {"shapes": 1.0}}
    trainer = Trainer(recipe([seeking]), tmp_path, device="cpu")
    asked = {}
    for name, sought in (("as they come", {}), ("sought", {"first change": 1.0})):
        stage = replace(trainer.recipe.stages[0], seek=sought)
        task = build_task(stage, 0, trainer.recipe, trainer.model, trainer.processor)
        asked[name] = sum(task.draw(step)[0].kinds.count("first change") for step in range(2))
    again = build_task(trainer.recipe.stages[0], 0, trainer.recipe, trainer.model, trainer.processor)

    assert asked["sought"] >= 15  # of 24: 64 tries do not always find one
    assert asked["as they come"] <= 6
    assert torch.equal(task.draw(1)[0].input_ids, again.draw(1)[0].input_ids)


def test_text_loss_when_no_window_of_a_step_can_be_asked_then_it_is_zero_and_training_goes_on(tmp_path):
    few = {"weights": {"first change": 1.0}, "only": True, "worlds": {"shapes": 1.0}}
    stage = {"name": "rare", "task": "text", "train": ["language_model"], "steps": 2, "batch": 1, "clip_frames": 8}
    trainer = Trainer(recipe([stage | {"window_chunks": [2]} | few]), tmp_path, device="cpu")
    task = build_task(trainer.recipe.stages[0], 0, trainer.recipe, trainer.model, trainer.processor)

    kinds = [task.draw(step)[0].kinds for step in range(2)]
    loss, counts = task.loss(0)
    loss.backward()

    assert kinds == [(), ()]
    assert (loss.item(), counts) == (0.0, {})
    assert trainer.run() is not None


PLACES = {"name": "all", "task": "text", "train": ["vision_tower", "multi_modal_projector", "temporal_encoder"]} | {
    "steps": 2,
    "batch": 2,
    "clip_frames": 8,
    "window_chunks": [2],
}


def test_text_loss_when_it_has_places_then_their_loss_comes_on_top_and_trains_what_sees(tmp_path):
    trainer = Trainer(recipe([PLACES]), tmp_path, device="cpu")
    stages = [replace(trainer.recipe.stages[0], places=weight) for weight in (0.0, 0.5, 1.0)]
    losses = []
    for stage in stages:
        torch.manual_seed(0)  # of the heads
        task = build_task(stage, 0, trainer.recipe, trainer.model, trainer.processor)
        losses.append(task.loss(0)[0])
    losses[2].backward()

    texts, half, whole = (loss.item() for loss in losses)
    assert half - texts > 0.5
    assert whole - texts == pytest.approx(2 * (half - texts), rel=1e-4)
    assert all(head.grad.abs().sum() > 0 for head in task.heads.parameters())


def test_trainer_when_a_stage_with_places_is_stopped_then_it_goes_on_to_the_same_model(tmp_path):
    made = recipe([PLACES | {"places": 0.5}])
    Trainer(made, tmp_path / "stopped", device="cpu").run(should_stop=lambda: True)

    pieces = weights(Trainer(made, tmp_path / "stopped", device="cpu").run())

    whole = weights(Trainer(made, tmp_path / "whole", device="cpu").run())
    assert [name for name in whole if not torch.equal(whole[name], pieces[name])] == []


@pytest.mark.parametrize("places", [{"task": "motions"}, {"task": "text", "places": 1.0}])
@pytest.mark.parametrize(("told", "head"), [("shade", "shade"), ("ages", "age")])
def test_places_when_more_is_told_then_its_loss_comes_on_top(told, head, places, tmp_path):
    losses = []
    for more in (False, True):
        trainer = Trainer(recipe([PLACES | places | {told: more}]), tmp_path / str(more), device="cpu")
        torch.manual_seed(0)  # of the heads
        task = build_task(trainer.recipe.stages[0], 0, trainer.recipe, trainer.model, trainer.processor)
        losses.append(task.loss(0)[0])

    losses[1].backward()
    assert losses[1] - losses[0] > 0.1
    assert getattr(task.heads, head).weight.grad.abs().sum() > 0


def test_shades_when_a_quarter_of_a_frame_lights_up_then_that_place_is_bright_and_has_changed_of_late():
    frames = np.zeros((6, 8, 8, 3), np.uint8)
    frames[1:, 4:, :4, 1] = 255

    shades = shades_of(frames, 2)

    assert shades.shape == (6, 2, 2, 6)
    assert shades[0, 1, 0].tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0, 0.0]
    assert shades[1:, 1, 0, :3].tolist() == [[-1.0, 1.0, -1.0]] * 5
    assert shades[:, 1, 0, 4].tolist() == [0.0, 2.0, 2.0, 2.0, 0.0, 0.0]
    assert (shades[:, :, 1, :3] == -1.0).all()


def test_clips_when_drawn_anew_at_each_step_then_those_of_steps_ago_are_let_go(tmp_path):
    trainer = Trainer(recipe([PLACES]), tmp_path, device="cpu")
    task = build_task(trainer.recipe.stages[0], 0, trainer.recipe, trainer.model, trainer.processor)
    first = weakref.ref(task.clip(0))

    for index in range(1, 40):
        task.clip(index)

    assert first() is None


def test_windows_when_a_rows_own_clip_has_nothing_to_ask_then_another_clip_is_asked(tmp_path):
    stage = {"name": "tell", "task": "text", "train": ["language_model"], "steps": 1, "batch": 12, "clip_frames": 16}
    captions = stage | {"window_chunks": [2], "weights": {"caption": 1.0}, "only": True}
    trainer = Trainer(recipe([captions]), tmp_path, device="cpu")
    task = build_task(trainer.recipe.stages[0], 0, trainer.recipe, trainer.model, trainer.processor)

    batch, _ = task.draw(0)

    assert batch.kinds.count("caption") >= 10


def test_text_loss_when_attention_is_plain_then_gradients_are_those_of_torchs_own(tmp_path):
    trainer = Trainer(recipe([STAGES[2] | {"batch": 3, "bfloat16": True, "worlds": {"shapes": 1.0}}]), tmp_path)
    model = trainer.model
    task = build_task(trainer.recipe.stages[0], 0, trainer.recipe, model, trainer.processor)
    own = model.language_model.config._attn_implementation
    gradients = {}
    for name, attention in (("plain", task.attention), ("own", lambda: sdpa_kernel(SDPBackend.MATH))):
        model.zero_grad()
        with attention():
            used = model.language_model.config._attn_implementation
            task.loss(0)[0].backward()
        assert (used == PLAIN_ATTENTION) == (name == "plain")
        found = [p.grad.flatten() for n, p in model.language_model.named_parameters() if "_proj" in n]
        gradients[name] = torch.cat(found)

    assert model.language_model.config._attn_implementation == own
    assert F.cosine_similarity(gradients["plain"], gradients["own"], dim=0) > 0.999  # in bfloat16


@pytest.mark.parametrize("before", [False, True])
def test_tasks_when_squares_of_places_are_cut_off_by_the_edge_then_pooled_as_the_model_does(tmp_path, before):
    sizes = TINY_SIZES | {"downsample": 1, "spatial_pool": 3}  # of 4 places a side
    motions, text = STAGES[1] | {"batch": 1}, STAGES[1] | {"name": "text", "task": "text", "window_chunks": [2]}
    made = recipe_from_dict({"name": "tiny", "seed": 1, "model": sizes, "stages": [motions, text]})
    trainer = Trainer(made, tmp_path, device="cpu")
    trainer.model.config.pool_before_temporal = before
    of_places, of_text = (
        build_task(stage, i, made, trainer.model.eval(), trainer.processor) for i, stage in enumerate(made.stages)
    )
    clip = of_text.clip(0)

    with torch.no_grad():
        trained_on = of_text._pool(of_text._encode([clip]))
        answered_from = trainer.model.encode_video(of_text._pixels([clip]))
    loss, _ = of_places.loss(0)

    torch.testing.assert_close(trained_on, answered_from)
    assert torch.isfinite(loss)  # places and labels are on one grid


def test_trainer_when_stage_trains_one_part_then_others_stay(trained, tmp_path):
    Trainer(recipe(STAGES[:1]), tmp_path, device="cpu").run()
    first, last = weights(tmp_path / "model"), weights(trained[0] / "model")

    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    same = {name.split(".")[0] for name in first if torch.equal(first[name], last[name])}
    assert "vision_tower" not in changed
    assert {"temporal_encoder", "language_model"} <= changed
    assert "vision_tower" in same


def test_trainer_when_the_folder_holds_another_recipe_then_refused(trained):
    other = replace(recipe(), seed=2)

    with pytest.raises(ValueError, match=r"holds the training of another recipe \(different: seed\)"):
        Trainer(other, trained[0], device="cpu")


def test_learning_rate_when_over_a_stage_then_up_and_down():
    stage = replace(recipe().stages[0], steps=100, warmup_steps=10, learning_rate=1.0)

    rates = [learning_rate_at(stage, step) for step in range(100)]

    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "text", "train": ["ears"]}, r"train is 'ears'; expected one of"),
        ({"task": "places", "data": "x"}, "data is 'x' for task 'places'; expected task 'text'"),
        ({"task": "places", "cached_streams": 4}, "cached_streams is 4"),
        ({"task": "text", "window_chunks": [9]}, "room for windows of 9 chunks"),
        ({"task": "places", "colour": 1}, "unknown keys"),
        ({"task": "text", "seek": {"captions": 1}}, "seek is 'captions'; expected one of"),
        ({"task": "text", "seek": {"when": 1}, "weights": {"when": 0}}, "seek names when, of weight 0"),
        ({"task": "text", "only": True, "weights": {"needle count": 1}}, "nothing can be asked"),
        ({"task": "text", "only": True}, "nothing can be asked"),
        ({"task": "text", "places": 0.1}, "expected task 'text' on the world of shapes, and a temporal encoder that"),
        ({"task": "text", "train": ["temporal_encoder"], "places": -1}, "places is -1; expected a weight, 0 or more"),
        ({"task": "text", "shade": True}, "shade is set for task 'text'; expected 'motions', or 'text' with places"),
        ({"task": "text", "ages": True}, "ages is set for task 'text'; expected 'motions', or 'text' with places"),
    ],
)
def test_recipe_when_it_makes_no_sense_then_says_what(change, message):
    with pytest.raises(ValueError, match=message):
        recipe([{"name": "s", "train": ["vision_tower"], "steps": 1, **change}])


@pytest.mark.parametrize("name", ["shapes-tiny", "shapes-two-hours"])
def test_recipe_when_shipped_then_it_loads_and_scales(name):
    shipped = load_recipe(name)

    small = shipped.scaled(0.01)

    assert shipped.name == name
    assert [stage.name for stage in shipped.stages][:3] == ["vision", "motion", "together"]
    assert all(0 < s.steps <= b.steps / 50 for s, b in zip(small.stages, shipped.stages, strict=True))


# ---- real video with text ----


def write_video(path, n_frames, shade):
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(n_frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade + 2 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def pairs_folder(tmp_path):
    for name, shade in (("dark", 20), ("bright", 180)):
        write_video(tmp_path / f"{name}.mp4", 30, shade)
        (tmp_path / f"{name}.txt").write_text(f"the picture is {name}\n")
    return tmp_path


def test_pairs_when_a_folder_then_each_video_with_its_text(pairs_folder):
    pairs = read_pairs(pairs_folder)

    assert [(p.video.stem, p.questions[0].answer) for p in pairs] == [
        ("bright", "the picture is bright"),
        ("dark", "the picture is dark"),
    ]


def test_pairs_when_lines_and_parquet_then_the_same(pairs_folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"video": "dark.mp4", "answer": "dark", "prompt": "How bright?", "start_s": 1.0, "stop_s": 2.0},
        {"video": "dark.mp4", "answer": "a dark wall", "prompt": None, "start_s": 1.0, "stop_s": 2.0},
        {"video": "bright.mp4", "answer": "bright", "prompt": "How bright?", "start_s": None, "stop_s": None},
    ]
    (pairs_folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), pairs_folder / "pairs.parquet")

    lines = read_pairs(pairs_folder / "pairs.jsonl")

    assert lines == read_pairs(pairs_folder / "pairs.parquet")
    assert [len(p.questions) for p in lines] == [2, 1]


def test_pairs_when_text_begins_with_a_byte_order_mark_then_it_is_not_learnt(pairs_folder):
    (pairs_folder / "dark.txt").write_bytes("it is dark".encode("utf-8-sig"))
    (pairs_folder / "one.jsonl").write_bytes(b'\xef\xbb\xbf{"video": "dark.mp4", "answer": "dark"}')

    assert read_pairs(pairs_folder)[1].questions[0].answer == "it is dark"
    assert read_pairs(pairs_folder / "one.jsonl")[0].questions[0].answer == "dark"


def test_pairs_when_an_answer_holds_unicodes_line_ends_then_it_is_one_line(pairs_folder):
    answer = "Cars wait.\u2028Then they go.\u2029Night\u0085falls."
    line = json.dumps({"video": "dark.mp4", "answer": answer}, ensure_ascii=False)
    (pairs_folder / "one.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")

    (pair,) = read_pairs(pairs_folder / "one.jsonl")

    assert [q.answer for q in pair.questions] == [answer, answer]


def test_pairs_when_an_answer_holds_special_tokens_then_they_are_learnt_as_text(pairs_folder):
    line = {"video": "dark.mp4", "answer": f"it says {VIDEO} and then{END} nothing"}
    (pairs_folder / "one.jsonl").write_text(json.dumps(line))
    stage = {"name": "r", "task": "text", "train": ["language_model"], "steps": 1, "batch": 1, "clip_frames": 4}
    made = recipe([stage | {"data": str(pairs_folder / "one.jsonl")}])
    trainer = Trainer(made, pairs_folder / "out", device="cpu")
    task = build_task(made.stages[0], 0, made, trainer.model, trainer.processor)

    batch, tokens = task.draw(0)
    loss, _ = task.loss(0)

    assert torch.isfinite(loss)
    assert (batch.input_ids == trainer.processor.video_token_id).sum() == len(tokens)
    assert batch.targets.tolist().count(trainer.processor.end_of_answer_id) == 1


def test_pairs_when_text_is_not_utf8_then_says_which(pairs_folder):
    (pairs_folder / "dark.txt").write_bytes("über".encode("latin-1"))

    with pytest.raises(ValueError, match=r"dark\.txt is not UTF-8"):
        read_pairs(pairs_folder)


def test_pairs_when_decoded_then_frames_of_the_stretch(pairs_folder):
    stage = {"name": "r", "task": "text", "train": ["language_model"], "steps": 1, "clip_frames": 4}
    lines = [{"video": "dark.mp4", "answer": "dark", "start_s": 1.0, "stop_s": 2.0}]
    (pairs_folder / "one.jsonl").write_text(json.dumps(lines[0]))
    made = recipe([{**stage, "data": str(pairs_folder / "one.jsonl")}])
    trainer = Trainer(made, pairs_folder / "out", device="cpu")
    task = build_task(made.stages[0], 0, made, trainer.model, trainer.processor)

    frames = task.clip(0).render()

    assert frames.shape == (4, 32, 32, 3)
    # Frame i of the file has the shade 20 + 2 i; the stretch holds frames 10 to 19.
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx([42, 46, 52, 56], abs=5)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_pairs_when_a_video_is_rotated_then_frames_lie_as_in_a_lane(tmp_path, rotation):
    video = tmp_path / "phone.mp4"
    video.write_bytes(make_video("mp4", n_frames=4, rotation=rotation))
    with av.open(video) as container:
        lane = RgbConverter((32, 32))(next(container.decode(video=0)))

    frames = read_stretch(video, 0.0, None, 4, 32)

    assert np.abs(frames[0].astype(int) - lane).mean() < 4  # they scale in other ways
    turned = [np.abs(np.rot90(frames[0], k).astype(int) - lane).mean() for k in (1, 2, 3)]
    assert min(turned) > 20


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("h264", "libx264")]
)
def test_pairs_when_a_container_does_not_count_frames_then_it_is_read_all_the_same(tmp_path, container, codec):
    video = tmp_path / "video"
    video.write_bytes(make_video(container, codec, n_frames=20))

    frames = read_stretch(video, 0.0, None, 4, 32)

    assert length_of(video).n_frames == pytest.approx(20, abs=1)
    assert stretch_s(video, 0.5, None) == pytest.approx(20 / RATE - 0.5, abs=0.1)
    with av.open(io.BytesIO(make_video("mp4", n_frames=20))) as decoded:
        to_rgb, shown = RgbConverter((32, 32)), list(decoded.decode(video=0))
    for frame, i in zip(frames, (2, 7, 12, 17), strict=True):
        distances = [np.abs(frame.astype(int) - to_rgb(other)).mean() for other in shown]
        assert abs(int(np.argmin(distances)) - i) <= 1


def write_brightening_video(path, times_ms, sound_s=0):
    """Write frames as bright as their time is late: from 0 for the first to 250 for the last."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000) if sound_s else None
        for ms in times_ms:
            shade = np.full((48, 64, 3), 250 * ms // times_ms[-1], np.uint8)
            frame = av.VideoFrame.from_ndarray(shade, format="rgb24")
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for pts in range(0, 16000 * sound_s, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.rate, silence.pts = 16000, pts
            container.mux(sound.encode(silence))
        if sound is not None:
            container.mux(sound.encode())


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(("start_s", "stop_s"), [(0.0, 10.0), (5.0, 9.0), (10.0, 12.0), (0.0, None)])
def test_pairs_when_frames_come_at_uneven_times_then_those_seen_at_the_times_wanted(
    tmp_path, container, start_s, stop_s
):
    times_ms = [*range(0, 10_000, 500), *range(10_000, 12_000, 33)]
    write_brightening_video(tmp_path / f"video.{container}", times_ms)

    frames = read_stretch(tmp_path / f"video.{container}", start_s, stop_s, 4, 32)

    seconds = ((stop_s or 12.0) - start_s) / 4
    wanted_ms = [1000 * (start_s + (i + 0.5) * seconds) for i in range(4)]
    seen_ms = [max(ms for ms in times_ms if ms <= wanted) for wanted in wanted_ms]
    tolerance = 250 * 50 / times_ms[-1] + 2.5  # a frame of the fast part, as the container's end may be told; the codec
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx([250 * ms / times_ms[-1] for ms in seen_ms], abs=tolerance)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_pairs_when_sound_is_longer_than_the_picture_then_the_pictures_length_counts(tmp_path, container):
    video = tmp_path / f"video.{container}"
    write_brightening_video(video, range(0, 4000, 40), sound_s=8)

    frames = read_stretch(video, 0.0, None, 8, 32)

    assert stretch_s(video, 0.0, None) == pytest.approx(4.0, abs=0.1)
    assert np.diff(frames.mean(axis=(1, 2, 3))) == pytest.approx([250 / 8] * 7, abs=5)


def make_audio(path):
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate, sound.pts = 16000, 0
        container.mux([*stream.encode(sound), *stream.encode(None)])


@pytest.mark.parametrize(
    ("make", "start_s", "message"),
    [
        (lambda path: path.write_bytes(b"nonsense" * 100), 0, "cannot be trained on"),
        (make_audio, 0, "no video that can be decoded; its streams: audio"),
        (lambda path: write_video(path, 30, 20), 7, r"is 3\.0 s long; expected more than 7\.0 s"),
    ],
)
def test_trainer_when_a_later_stages_video_cannot_be_trained_on_then_says_which_at_once(
    tmp_path, make, start_s, message
):
    make(tmp_path / "bad.mp4")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"video": "bad.mp4", "answer": "x", "start_s": start_s}))
    real = {"name": "real", "task": "text", "train": ["language_model"], "steps": 1, "clip_frames": 4}

    with pytest.raises(ValueError, match=rf"bad\.mp4 .*{message}"):
        Trainer(recipe([STAGES[0], real | {"data": str(tmp_path / "pairs.jsonl")}]), tmp_path / "out", device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Trainer(recipe([STAGES[0], real | {"data": str(tmp_path / "nowhere")}]), tmp_path / "out", device="cpu")


def test_train_command_when_frames_cannot_be_decoded_then_the_error_names_the_file(tmp_path):
    whole = make_video("mp4", n_frames=20)
    at = whole.index(b"mdat") + 4
    size = int.from_bytes(whole[at - 8 : at - 4], "big") - 8
    (tmp_path / "bad.mp4").write_bytes(whole[:at] + bytes(size) + whole[at + size :])
    (tmp_path / "bad.txt").write_text("a broken film")
    real = {"name": "real", "task": "text", "train": ["language_model"], "steps": 1, "batch": 1, "clip_frames": 4}
    made = {"name": "tiny", "model": TINY_SIZES, "stages": [real | {"data": str(tmp_path)}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    threads = str(torch.get_num_threads())

    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--threads", threads])

    assert isinstance(result.exception, SettingsError)
    assert "bad.mp4 cannot be trained on" in str(result.exception)


def test_pairs_when_a_video_comes_or_changes_then_what_was_kept_of_others_is_not_taken_for_it(pairs_folder):
    stage = {"name": "r", "task": "text", "train": ["language_model"], "steps": 1, "clip_frames": 4}
    stage |= {"data": str(pairs_folder), "cached_streams": 2}

    def kept():
        made = recipe([stage])
        trainer = Trainer(made, pairs_folder / "out", device="cpu")
        build_task(made.stages[0], 0, made, trainer.model, trainer.processor).prepare(
            pairs_folder / "kept", lambda n: None
        )
        return json.loads((pairs_folder / "kept" / "about.json").read_text())["key"]

    first, again = kept(), kept()
    for name in ("dark.txt", "dark.mp4"):
        shutil.copy(pairs_folder / name, (pairs_folder / name).with_stem("another"))

    assert first == again
    assert kept() != first


def test_pairs_when_their_tokens_are_kept_then_steps_decode_nothing(pairs_folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(real_video, "_kept", LastUsed(0))
    decode = real_video._decode
    monkeypatch.setattr(real_video, "_decode", lambda *clip: decoded.append(clip) or decode(*clip))
    stage = {"name": "r", "task": "text", "train": ["language_model"], "steps": 1, "batch": 2, "clip_frames": 4}
    made = recipe([stage | {"data": str(pairs_folder), "cached_streams": 2}])
    trainer = Trainer(made, pairs_folder / "out", device="cpu")
    task = build_task(made.stages[0], 0, made, trainer.model, trainer.processor)

    task.prepare(pairs_folder / "kept", lambda n: None)
    n_before = len(decoded)
    for step in range(3):
        task.draw(step)

    assert (n_before, len(decoded)) == (2, 2)


def test_decoded_clips_when_more_than_fit_then_those_used_last_stay():
    kept = LastUsed(100)
    for name in "abc":
        kept.put(name, np.zeros(40, np.uint8))
        kept.get("a")

    assert [name for name in "abc" if kept.get(name) is not None] == ["a", "c"]
    assert kept.n_bytes == 80


def test_trainer_when_pairs_then_it_learns_them(pairs_folder):
    stage = {
        "name": "real",
        "task": "text",
        "train": ["vision_tower", "multi_modal_projector", "language_model"],
        "steps": 50,
        "batch": 2,
        "clip_frames": 4,
        "learning_rate": 2e-2,
        "warmup_steps": 4,
        "data": str(pairs_folder),
    }
    reports = []

    Trainer(recipe([stage]), pairs_folder / "out", device="cpu").run(reports.append)

    assert reports[-1].accuracy["caption"] > 0.5
    assert reports[-1].loss < 1.0


def test_pairs_when_many_videos_then_each_is_trained_on(pairs_folder):
    for i in range(12):
        for suffix in (".mp4", ".txt"):
            shutil.copy(pairs_folder / f"dark{suffix}", pairs_folder / f"{i:02}{suffix}")
    stage = {"name": "r", "task": "text", "train": ["language_model"], "steps": 1, "clip_frames": 4}
    made = recipe([stage | {"data": str(pairs_folder)}])
    trainer = Trainer(made, pairs_folder / "out", device="cpu")
    task = build_task(made.stages[0], 0, made, trainer.model, trainer.processor)

    videos = {task.clip(index).texts.video.stem for index in range(14)}

    assert videos == {"dark", "bright", *(f"{i:02}" for i in range(12))}


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", ValueError, r"bad.jsonl:1: no JSON"),
        ('{"video": "dark.mp4"}', ValueError, "expected a video and an answer"),
        ('{"video": "none.mp4", "answer": "x"}', FileNotFoundError, "there is no video"),
        ('{"video": "dark.mp4", "answer": "x", "start_s": 3, "stop_s": 1}', ValueError, "runs from 3.0 s to 1 s"),
        ('{"video": "dark.mp4", "answer": "x", "text": "y"}', ValueError, r"unknown keys \['text'\]"),
        ('{"video": "dark.mp4", "answer": "x", "start_s": "1", "stop_s": "2"}', ValueError, ":1: start_s is '1'"),
        ('{"video": "dark.mp4", "answer": "x", "start_s": NaN}', ValueError, "start_s is nan; expected a number of"),
        ('{"video": "dark.mp4", "answer": "x", "stop_s": 1e999}', ValueError, "stop_s is inf; expected a number of"),
        ('{"video": "dark.mp4", "answer": "x", "stop_s": true}', ValueError, "stop_s is True; expected a number of"),
        ('{"video": 5, "answer": "x"}', ValueError, "bad.jsonl:1: video is 5; expected text"),
        ('{"video": "dark.mp4", "answer": 0}', ValueError, "bad.jsonl:1: answer is 0; expected text"),
        ('{"video": "dark.mp4", "answer": "x", "prompt": 5}', ValueError, "bad.jsonl:1: prompt is 5; expected text"),
        ('{"video": "dark.mp4", "answer": "   "}', ValueError, "bad.jsonl:1: .*neither empty"),
    ],
)
def test_pairs_when_a_line_is_wrong_then_says_where(pairs_folder, line, error, message):
    (pairs_folder / "bad.jsonl").write_text(line)

    with pytest.raises(error, match=message):
        read_pairs(pairs_folder / "bad.jsonl")


def test_pairs_when_there_are_none_then_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="holds no pair"):
        read_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a folder, or a \.jsonl or \.parquet file"):
        read_pairs(tmp_path / "nothing")
