"""Importing: a family's small random model gives the same logits before and after; what does not fit says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_sources import SOURCES, llama, save_source
from transformers import Qwen2VLConfig
from typer.testing import CliRunner

from stormline.models.generation import _prefill, generate_answers
from stormline.models.importing import ImportOptions, check_family, import_model
from stormline.models.loading import load_model
from stormline.models.prefix_cache import PrefixCache
from stormline.models.prompts import VideoPrompt
from stormline.models.selection import VideoChunk
from stormline.models.sizing import plan_import, plan_model
from stormline.operators.errors import SettingsError
from stormline.pipeline.cli import app

TOLERANCE = 1e-5  # of logits, in float32


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a function that gives a family's model and its folder, made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / f"tiny-{family}"
            made[family] = save_source(family, folder), folder
        return made[family]

    return get


@pytest.fixture(scope="module")
def imported(sources, tmp_path_factory):
    """Return a function that gives a family's model imported without pooling and loaded, made once."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            folder = tmp_path_factory.mktemp("storm") / "folder"
            import_model(sources(family)[1], folder, ImportOptions(temporal_pool=1))
            made[family] = load_model(folder, device="cpu")
        return made[family]

    return get


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frames_of(loaded: Any) -> np.ndarray:
    size = loaded.model.config.image_size
    return np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", SOURCES)
def test_import_when_nothing_is_pooled_then_logits_are_the_sources_own(family, sources, imported):
    model, _ = sources(family)
    source, loaded = SOURCES[family], imported(family)
    frames = frames_of(loaded)
    pixels = loaded.processor.prepare_frames(frames)[None]
    chunks = [VideoChunk(0.0, 2.0, np.zeros((4 * source.tokens_per_frame, 48), np.float16)) for _ in range(2)]
    prompt = loaded.processor.build_prompt("What moves?", chunks)
    # What the source's own processor would write: its placeholder also for what ends a video.
    vocab = loaded.processor.tokenizer.get_vocab()
    ids = prompt.input_ids.clone()
    if source.newline:
        ids[ids == vocab[source.newline]] = vocab[source.placeholder]

    with torch.inference_mode():
        expected = source.ask(model, ids[None], pixels)
        exact = loaded.model(input_ids=prompt.input_ids[None], pixel_values=pixels, exact_video=True).logits
        stored = loaded.model.encode_clip(frames)
        rounded = loaded.model(input_ids=prompt.input_ids[None], video_tokens=stored.float()).logits

    assert expected.std() > 0.1
    torch.testing.assert_close(exact, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(rounded, expected, atol=2e-2, rtol=0)  # tokens are stored as float16
    assert len(stored) == 8 * source.tokens_per_frame


@pytest.mark.parametrize("family", SOURCES)
def test_imported_when_an_answer_begins_then_its_logits_are_those_of_the_whole_prompt(family, imported):
    loaded = imported(family)
    n_tokens = loaded.model.config.n_tokens(4)
    tokens = np.random.default_rng(0).normal(size=(2, n_tokens, loaded.model.config.d_model)).astype(np.float16)
    prompt = loaded.processor.build_prompt(
        "What moves?", [VideoChunk(2.0 * i, 2.0 * i + 2, t) for i, t in enumerate(tokens)]
    )

    with torch.inference_mode():
        got = _prefill(loaded.model, prompt, PrefixCache()).logits
        whole = loaded.model(input_ids=prompt.input_ids[None], video_tokens=prompt.video_tokens.float()).logits[0, -1]

    text = torch.arange(len(whole)) != loaded.model.config.video_token_id
    torch.testing.assert_close(got[text], whole[text], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_imported_when_streamed_then_tokens_and_answers_are_those_of_one_pass(family, imported):
    loaded = imported(family)
    for block in loaded.model.temporal_encoder.blocks:  # as if trained
        torch.nn.init.normal_((block.proj_out or block.forward_mixer.out_proj).weight, std=0.1)
    frames, state, parts = frames_of(loaded), loaded.model.init_stream_state(), []

    for start in (0, 4):
        [chunk] = loaded.model.encode_chunks(frames[None, start : start + 4], [state])
        state = chunk.state
        parts.append(VideoChunk(start / 2, start / 2 + 2, chunk.tokens.numpy()))
    prompts = [VideoPrompt(text, tuple(parts), max_new_tokens=4) for text in ("What?", "What moves there?")]
    answers = generate_answers(loaded.model, loaded.processor, prompts)
    built = loaded.processor.build_prompt("What?", parts)
    out = loaded.model.generate(
        built.input_ids[None], video_tokens=built.video_tokens.float(), max_new_tokens=4, do_sample=False
    )

    assert np.array_equal(np.concatenate([p.tokens for p in parts]), loaded.model.encode_clip(frames).numpy())
    assert answers[0].video_tokens == len(built.video_tokens)
    assert loaded.processor.decode(out[0, built.n_tokens :].tolist()).startswith(answers[0].text)


@pytest.mark.parametrize("family", ["llava_onevision", "internvl", "gemma3"])
def test_prompt_when_imported_then_it_is_in_the_sources_format(family, imported):
    source, processor = SOURCES[family], imported(family).processor
    n = source.tokens_per_frame
    chunks = [VideoChunk(s, s + 2, np.zeros((k, 48), np.float16)) for s, k in ((12.0, 2 * n), (14.0, n - 1))]

    text = processor.tokenizer.decode(processor.build_prompt(f"What {source.placeholder}?", chunks).input_ids)

    frame, rest = (source.marks[0] + source.placeholder * k + source.marks[1] for k in (n, n - 1))
    whole = frame * 2 if source.marks[0] else source.placeholder * 2 * n
    split = f"{source.placeholder[0]} {source.placeholder[1:]}"  # typed by somebody: means nothing
    assert text == f"<|bos|><|user|>[00:12]{whole}[00:14]{rest}{source.newline}\nWhat {split}?<|end|><|assistant|>"


def test_import_when_done_then_sizes_name_and_pixels_follow_from_the_source(sources, imported, tmp_path):
    _, folder = sources("llava_onevision")
    config = imported("llava_onevision").model.config

    assert imported("llava_onevision").name == "tiny-llava_onevision"
    assert (config.image_size, config.imported_config.grid, config.n_tokens(4)) == (40, 3, 36)
    assert (tuple(config.image_mean), tuple(config.image_std)) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1] * 3, "image_std": [0.9] * 3, "fps": 1.0})
    )
    again = import_model(folder, tmp_path / "b", ImportOptions(name="mine", dtype="bfloat16", spatial_pool=2))
    again_config = load_model(tmp_path / "b", device="cpu", dtype="bfloat16").model.config
    assert again.model.dtype == torch.bfloat16
    assert (again_config.image_mean, again_config.sample_fps) == ([0.1] * 3, 1.0)
    assert (again_config.imported_config.name, again_config.n_tokens(4)) == ("mine", 4)
    with pytest.raises(FileExistsError, match="holds a model already"):
        import_model(folder, tmp_path / "b")


def test_import_when_it_is_done_then_no_weight_is_there_twice(sources, tmp_path):
    _, folder = sources("internvl")

    written = import_model(folder, tmp_path / "storm").model

    places = [p.data_ptr() for p in written.parameters()]
    n_bytes = sum(p.nbytes for p in written.parameters())
    on_disk = sum(path.stat().st_size for path in (tmp_path / "storm").glob("*.safetensors"))
    assert len(set(places)) == len(places)
    assert on_disk == pytest.approx(n_bytes, rel=0.1)


@pytest.mark.parametrize("family", SOURCES)
def test_plan_when_made_from_the_configuration_then_it_agrees_with_the_import(family, sources, imported):
    model, _ = sources(family)
    loaded = imported(family)

    plan = plan_import(model.config, "x", ImportOptions(temporal_pool=1))

    assert plan.to_dict() == plan_model(loaded.model.config, "x").to_dict()
    assert sum(plan.parameters.values()) == sum(p.numel() for p in loaded.model.parameters())
    assert plan.state_bytes_per_stream == loaded.model.init_stream_state().n_bytes
    assert plan.tokens_per_hour == 7200 * SOURCES[family].tokens_per_frame


def test_import_command_when_asked_for_a_plan_then_it_tells_what_is_needed_without_weights(sources, tmp_path):
    model, folder = sources("internvl")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = plan_import(model.config, "mine", ImportOptions(temporal_pool=2, name="mine"))

    run = CliRunner().invoke(app, ["import", str(bare), "--plan", "--temporal-pool", "2", "--name", "mine"])

    assert run.exit_code == 0, run.output
    said = " ".join(run.output.split())
    assert "mine, in bfloat16, at 2 frames a second" in said
    assert f"{plan.tokens_per_chunk} every {plan.chunk_s:g} s, {plan.tokens_per_hour:,} an hour" in said
    assert f"state a stream {plan.state_bytes_per_stream / 1e6:.1f} MB" in said.replace("│ ", "")
    for device in plan.streams_by_memory:
        assert f"streams on {device}" in said
    assert sorted(tmp_path.iterdir()) == [bare], "a plan writes nothing"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "DIR is missing"),
        (["--plan", "--dtype", "int8"], "--dtype is 'int8'; expected one of"),
        (["--plan", "--temporal-pool", "3"], "chunk_frames"),
    ],
)
def test_import_command_when_asked_wrongly_then_refused(options, said, sources):
    _, folder = sources("internvl")

    run = CliRunner().invoke(app, ["import", str(folder), *options])

    assert isinstance(run.exception, SettingsError)
    assert said in str(run.exception)


def test_import_when_the_model_does_not_fit_then_says_why(sources, tmp_path):
    qwen_vl = Qwen2VLConfig()
    with pytest.raises(ValueError, match=r"counts positions along three axes.*InternVL and LLaVA-OneVision"):
        check_family(qwen_vl)
    with pytest.raises(ValueError, match="'llama', which transformers does not know as image-text model"):
        check_family(llama())
    with pytest.raises(FileNotFoundError, match="is no folder here; expected one, or a hub id"):
        import_model(tmp_path / "nowhere", tmp_path / "out")
    _, folder = sources("llava_next_video")
    for name, message in (
        ("preprocessor_config.json", "has no image_mean and image_std"),
        ("chat_template.jinja", "has no chat template"),
    ):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        (broken / name).unlink()
        with pytest.raises(ValueError, match=message):
            import_model(broken, tmp_path / "out")
