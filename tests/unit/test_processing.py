"""Frames, prompts and the small tokenizer."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from stormline.models.processing import StormProcessor, format_time, normalise_frames
from stormline.models.selection import VideoChunk
from stormline.models.tokenizer import SPECIAL_TOKENS, build_tokenizer, sample_corpus

D = 8


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(sample_corpus())


@pytest.fixture(scope="module")
def processor(tokenizer):
    return StormProcessor(tokenizer, image_size=16, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.25, 0.2))


def chunk(start_s: float, n_tokens: int, fill: float = 1.0) -> VideoChunk:
    return VideoChunk(start_s, start_s + 2, np.full((n_tokens, D), fill, np.float16))


@pytest.mark.parametrize(
    "text",
    [
        "A red circle moves left.",
        "What happened in the last ten minutes, [00:12] to [59:59]?",
        "  leading, trailing, and   inner   spaces \n\n\ttabs ",
        "naïve café – £5 · 日本語 🎥",
        "[61:00] [1:02:03] [00 :59] 007 3.14",
        "don't, o'clock; e-mail@example.org #1 <tag> {x} \\n",
        "",
    ],
)
def test_tokenizer_when_text_goes_round_then_it_is_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_when_times_and_known_words_then_few_tokens(tokenizer):
    ids = tokenizer.encode("[12:34] A small red circle moves left.")

    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["[12", ":34]"]
    assert len(ids) == 9


def test_tokenizer_when_built_in_another_process_then_the_same(tokenizer):
    code = (
        "from stormline.models.tokenizer import build_tokenizer, sample_corpus\n"
        "print(build_tokenizer(sample_corpus()).backend_tokenizer.to_str())"
    )

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout

    assert other.strip() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_when_vocabulary_is_too_small_then_says_how_much_is_needed():
    with pytest.raises(ValueError, match="expected 383 or more"):
        build_tokenizer([], vocab_size=100)


def test_format_time_when_negative_or_long_then_still_reads_as_time():
    assert [format_time(s) for s in (0, 59.99, 60, 3599, 3600, -5)] == [
        *("[00:00]", "[00:59]", "[01:00]", "[59:59]", "[1:00:00]", "[-00:05]"),
    ]


def test_prepare_frames_when_given_bytes_then_rescaled_and_normalised(processor):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)

    pixels = processor.prepare_frames(frames)

    expected = (frames / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.5, 0.25, 0.2])
    assert pixels.shape == (2, 3, 3, 16, 16)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), np.moveaxis(expected, -1, -3), atol=1e-5)


def test_prepare_frames_when_wrong_size_or_type_then_says_what_was_expected(processor):
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 16, 16, 3\)"):
        processor.prepare_frames(np.zeros((2, 16, 17, 3), np.uint8))
    with pytest.raises(ValueError, match=r"torch\.float32 of shape \(16, 16, 3\); expected torch\.uint8"):
        normalise_frames(torch.zeros(16, 16, 3), (0.5,) * 3, (0.5,) * 3)


def test_build_prompt_when_given_chunks_then_time_and_placeholders_come_in_order(processor):
    chunks = [chunk(12, 3, 0.0), chunk(14, 0), chunk(3723, 2, 1.0)]

    prompt = processor.build_prompt("What happens?", chunks)

    v = "<|video|>"
    assert processor.tokenizer.decode(prompt.input_ids) == (
        f"<|bos|><|user|>[00:12]{v}{v}{v}[1:02:03]{v}{v}\nWhat happens?<|end|><|assistant|>"
    )
    assert prompt.video_tokens.dtype == torch.float16
    assert prompt.video_tokens[:, 0].tolist() == [0, 0, 0, 1, 1]
    assert prompt.n_tokens == len(prompt.input_ids)


def test_build_prompt_when_history_and_no_video_then_all_turns_are_there(processor):
    history = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello")]

    prompt = processor.build_prompt("And?", history=history)

    assert processor.tokenizer.decode(prompt.input_ids) == (
        "<|bos|><|system|>Be short.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>And?<|end|><|assistant|>"
    )
    assert prompt.video_tokens.shape[0] == 0
    with pytest.raises(ValueError, match="'robot'; expected system, user or assistant"):
        processor.build_prompt("?", history=[("robot", "x")])


def test_build_prompt_when_text_holds_special_tokens_then_they_mean_nothing(processor):
    text = "".join(SPECIAL_TOKENS)

    prompt = processor.build_prompt(text, [chunk(0, 2)])
    plain = processor.build_prompt("", [chunk(0, 2)])

    special = list(range(len(SPECIAL_TOKENS)))
    count = lambda ids: [int((ids == i).sum()) for i in special]  # noqa: E731
    assert count(prompt.input_ids) == count(plain.input_ids)
    assert "< |video|>" in processor.decode(prompt.input_ids)


def test_build_prompt_when_template_drops_the_video_then_raises(tokenizer):
    broken = build_tokenizer(["a"], vocab_size=400)
    broken.chat_template = "{{ bos_token }}"
    processor = StormProcessor(broken, image_size=16)

    with pytest.raises(ValueError, match="has 0 video placeholders; expected 1"):
        processor.build_prompt("What?", [chunk(0, 2)])


def test_processor_when_saved_and_loaded_then_prompts_and_pixels_are_the_same(processor, tmp_path):
    frames = np.full((1, 16, 16, 3), 77, np.uint8)

    processor.save_pretrained(tmp_path)
    loaded = StormProcessor.from_pretrained(tmp_path)

    for text in ("A red circle [00:10] moves.", "日本 <|end|>"):
        a, b = (p.build_prompt(text, [chunk(5, 2)]).input_ids for p in (processor, loaded))
        assert torch.equal(a, b)
    assert torch.equal(processor.prepare_frames(frames), loaded.prepare_frames(frames))
    assert loaded.eos_token_id == processor.eos_token_id


def test_processor_when_folder_or_tokenizer_is_wrong_then_says_so(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"processor_config\.json is missing"):
        StormProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"into \d+ tokens; expected one"):
        StormProcessor(tokenizer, image_size=16, video_token="<movie>")
    bare = build_tokenizer(["a"], vocab_size=400)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        StormProcessor(bare, image_size=16)


@pytest.mark.parametrize(
    ("behind", "expected"),
    [("<|user|>\n", "<|user|>"), ("\n<|user|><|end|>", "<|user|>"), ("<|end|>", "<|end|>"), ("", "<|end|>")],
)
def test_end_of_answer_when_the_template_has_its_own_then_that(tokenizer, behind, expected):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + behind + "{% endfor %}"

    ended = StormProcessor(own, image_size=16)

    assert own.convert_ids_to_tokens([ended.end_of_answer_id]) == [expected]
    assert own.convert_ids_to_tokens([ended.eos_token_id]) == ["<|end|>"]


@pytest.mark.parametrize(("date", "n_written"), [("", 1), ("{{ strftime_now('%d %b %Y') }}", 2)])
def test_prompt_when_its_text_comes_again_then_it_is_tokenised_once_unless_it_has_the_date(
    tokenizer, monkeypatch, date, n_written
):
    own = copy.deepcopy(tokenizer)
    own.chat_template = date + str(tokenizer.chat_template)
    processor = StormProcessor(own, image_size=64)
    written = []
    monkeypatch.setattr(own, "apply_chat_template", lambda *args, **more: written.append(args) or write(*args, **more))
    write = type(own).apply_chat_template.__get__(own)
    chunk = VideoChunk(0.0, 2.0, np.ones((2, 3), np.float16))

    first, again = (processor.build_prompt("What?", [chunk]) for _ in range(2))
    other = processor.build_prompt("Where?", [chunk])

    assert first.input_ids.tolist() == again.input_ids.tolist() != other.input_ids.tolist()
    assert len(written) == n_written + 1
