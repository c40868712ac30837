"""Answers in batches: an answer never depends on who shares its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, MistralConfig

from stormline.models import exact_attention, generation, slots
from stormline.models.exact_attention import EXACT_ATTENTION, use_exact_decoding
from stormline.models.generation import FIXED_BATCH, AnswerWriter, check_prompt, generate_answers, stream_answer
from stormline.models.loading import build_untrained_tiny, load_model
from stormline.models.prefix_cache import PrefixCache
from stormline.models.prompts import VideoAnswer, VideoPrompt
from stormline.models.selection import VideoChunk
from stormline.models.storm import StormForConditionalGeneration


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def untrained(tmp_path_factory):
    """Random weights answer with whatever the video makes of them; a trained model's answers would be less various."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stormline.models.loading.DEFAULT_FOLDER", tmp_path_factory.mktemp("none"))
        yield


def make_prompt(n_chunks: int, video: int, text: str = "Describe the video.", **changes: Any) -> VideoPrompt:
    rng = np.random.default_rng(video)
    tokens = rng.standard_normal((n_chunks, 16, 192)).astype(np.float16)
    chunks = tuple(VideoChunk(2.0 * i, 2.0 * i + 2, tokens[i]) for i in range(n_chunks))
    return VideoPrompt(text, chunks, **({"max_new_tokens": 6} | changes))


def answer(loaded, prompt: VideoPrompt, **kwargs: Any) -> VideoAnswer:
    return generate_answers(loaded.model, loaded.processor, [prompt], **kwargs)[0]


def record_logits(loaded, prompts: Sequence[VideoPrompt], **kwargs: Any) -> list[torch.Tensor]:
    """Answer one group of prompts; return each one's logits (steps, vocab) as the language model gave them."""
    first: list[torch.Tensor] = []
    steps: list[torch.Tensor] = []

    def prefill(*args: Any, **kwargs: Any) -> Any:
        read = generation_prefill(*args, **kwargs)
        first.append(read.logits.clone())
        return read

    def hook(*args: Any) -> None:
        if len(args[2].logits) == FIXED_BATCH:
            steps.append(args[2].logits[:, -1].clone())

    generation_prefill = generation._prefill
    handle = loaded.model.language_model.register_forward_hook(hook)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "_prefill", prefill)
            answers = generate_answers(loaded.model, loaded.processor, prompts, **kwargs)
    finally:
        handle.remove()
    order = sorted(range(len(prompts)), key=lambda i: answers[i].prompt_tokens)  # a group is ordered by length
    place = {i: row for row, i in enumerate(order)}
    n_steps = [answers[i].generated_tokens - 1 for i in range(len(prompts))]
    return [
        torch.stack([first[place[i]], *(step[place[i]] for step in steps[: n_steps[i]])]) for i in range(len(prompts))
    ]


@pytest.fixture
def set_threads():
    """Change torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_generate_when_companions_change_then_logits_are_bit_for_bit_the_same(loaded, set_threads):
    set_threads(1)
    prompts = [make_prompt(n, video=n, text="What?" + " x" * (n % 7)) for n in (0, 1, 2, 3, 5, 8, 13, 21)]
    alone = [record_logits(loaded, [prompt])[0] for prompt in prompts]
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 7, 8):
        chosen = rng.permutation(len(prompts))[:n]

        together = record_logits(loaded, [prompts[i] for i in chosen])

        for i, logits in zip(chosen, together, strict=True):
            assert logits.shape[0] == 6
            assert torch.equal(logits, alone[i])


def test_generate_when_two_threads_share_a_batch_then_logits_are_still_the_same(loaded, set_threads):
    # Little of it: threads that wait for each other on busy cores take a hundred times longer than one.
    set_threads(2)
    prompts = [make_prompt(1, video=n, text="What?" + " x" * n, max_new_tokens=2) for n in range(8)]

    together = record_logits(loaded, prompts)

    for i in (0, 6, 7):  # of both threads' rows
        assert torch.equal(record_logits(loaded, [prompts[i]])[0], together[i])


def test_generate_when_many_companions_then_the_answer_is_the_same_at_every_place(loaded):
    prompts = [
        make_prompt(n % 7, video=n, max_new_tokens=1 + n % 9, temperature=0.8 * (n % 2), seed=n) for n in range(19)
    ]
    alone = [answer(loaded, prompt) for prompt in prompts]

    for order in (range(19), np.random.default_rng(1).permutation(19)):
        together = generate_answers(loaded.model, loaded.processor, [prompts[i] for i in order])

        assert together == [alone[i] for i in order]
    assert len({a.text for a in alone}) > 15  # they could have differed


def test_generate_when_the_video_was_read_before_then_the_answer_is_the_same(loaded):
    prompts = [make_prompt(3, video=v, max_new_tokens=12) for v in (1, 2, 1)]
    prompts += [replace(prompt, text="Which way does it go?") for prompt in prompts]
    alone = [record_logits(loaded, [prompt])[0] for prompt in prompts]
    prefixes = PrefixCache()

    for prompt, expected in zip(prompts, alone, strict=True):
        assert torch.equal(record_logits(loaded, [prompt], prefixes=prefixes)[0], expected)

    assert (prefixes.misses, prefixes.hits) == (2, 4)
    generate_answers(loaded.model, loaded.processor, [prompts[0], make_prompt(3, video=4)], prefixes=prefixes)
    assert (prefixes.misses, prefixes.hits) == (3, 5)


@pytest.fixture(scope="module")
def few_key_heads():
    """A model whose three query heads share one of keys."""
    small, processor = build_untrained_tiny()
    config = small.config.to_dict()
    config["text_config"] |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = StormForConditionalGeneration(type(small.config)(**config)).eval()
    use_exact_decoding(model)
    return SimpleNamespace(model=model, processor=processor)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("which", ["loaded", "few_key_heads"])
def test_generate_when_several_ask_about_one_video_then_logits_are_as_if_each_asked_alone(
    which, n_threads, request, set_threads
):
    set_threads(n_threads)
    model = request.getfixturevalue(which)
    asked = [(3, 1), (3, 1), (7, 2), (3, 1), (0, 0), (7, 2), (1, 3), (3, 1)]  # chunks, video
    prompts = [make_prompt(n, v, text="What?" + " x" * i, max_new_tokens=3) for i, (n, v) in enumerate(asked)]
    prefixes = PrefixCache()

    together = record_logits(model, prompts, prefixes=prefixes)

    assert (prefixes.misses, prefixes.hits) == (3, 4)
    for prompt, logits in zip(prompts, together, strict=True):
        assert torch.equal(record_logits(model, [prompt])[0], logits)
        [first] = record_logits(model, [prompt], fixed_batch=1)[0]  # transformers' own attention and cache
        assert torch.allclose(first, logits[0], atol=1e-4)
    texts = [[a.text for a in generate_answers(model.model, model.processor, prompts, fixed_batch=n)] for n in (1, 8)]
    assert texts[0] == texts[1]


def test_writer_when_several_ask_about_one_video_then_it_lies_in_memory_once(loaded):
    prefixes = PrefixCache()
    writer = AnswerWriter(loaded.model, loaded.processor, prefixes=prefixes)
    for text in ("What?", "Where?", "When?"):
        prompt = make_prompt(30, 1, text=text)
        writer.begin(writer.make(prompt, check_prompt(loaded.model, loaded.processor, prompt)))
        writer.step()

    assert len({id(prefix) for prefix in writer._slots._prefixes if prefix is not None}) == 1
    own_bytes = sum(layer.n_bytes for layer in writer._slots._cache.layers) / FIXED_BATCH
    assert own_bytes < prefixes.n_bytes / 5


def test_generate_when_a_model_puts_other_keys_in_place_then_answers_are_the_same(loaded, monkeypatch):
    prompts = [make_prompt(3, video=1), make_prompt(2, video=2), make_prompt(3, video=1, text="Which way?")]
    expected = [answer(loaded, prompt).text for prompt in prompts]
    attend = exact_attention._attend

    def with_other_keys(module, query, key, *args, **kwargs):
        return attend(module, query, key.clone(), *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, EXACT_ATTENTION, with_other_keys)

    assert [a.text for a in generate_answers(loaded.model, loaded.processor, prompts)] == expected


@pytest.mark.parametrize("kept_bytes", [64 << 20, 0])
def test_writer_when_all_rows_were_free_then_the_next_answer_is_as_from_a_new_one(loaded, monkeypatch, kept_bytes):
    monkeypatch.setattr(slots, "KEPT_BYTES", kept_bytes)
    writer = AnswerWriter(loaded.model, loaded.processor, prefixes=PrefixCache(0))
    rooms = []

    def write(prompt: VideoPrompt) -> str:
        pending = writer.make(prompt, check_prompt(loaded.model, loaded.processor, prompt))
        writer.begin(pending)
        while writer.busy:
            writer.step()
        rooms.append(writer._slots._cache)
        return pending.answer().text

    prompts = [make_prompt(n, n, max_new_tokens=12) for n in (12, 2, 5)]
    assert [write(prompt) for prompt in prompts] == [answer(loaded, prompt).text for prompt in prompts]
    assert all(room is (rooms[0] if kept_bytes else None) for room in rooms)


def test_prefix_cache_when_full_then_the_one_not_used_for_longest_leaves(loaded):
    prompts = [make_prompt(3, video=v, max_new_tokens=1) for v in range(3)]
    ample = PrefixCache()
    generate_answers(loaded.model, loaded.processor, prompts[:1], prefixes=ample)
    prefixes = PrefixCache(2 * ample.n_bytes)

    for at in (0, 1, 0, 2, 0, 1):
        generate_answers(loaded.model, loaded.processor, [prompts[at]], prefixes=prefixes)

    assert (prefixes.misses, prefixes.hits) == (4, 2)  # 2 pushed 1 out
    assert prefixes.n_bytes == prefixes.max_bytes
    none = PrefixCache(0)
    generate_answers(loaded.model, loaded.processor, prompts[:1], prefixes=none)
    assert none.n_bytes == 0


def test_generate_when_greedy_then_equals_transformers_own(loaded):
    prompt = make_prompt(3, video=5, max_new_tokens=12)
    built = check_prompt(loaded.model, loaded.processor, prompt)

    ours = answer(loaded, prompt)
    out = loaded.model.generate(
        built.input_ids[None], video_tokens=built.video_tokens.float(), max_new_tokens=12, do_sample=False
    )

    assert ours.text == loaded.processor.decode(out[0, built.n_tokens :].tolist())
    assert ours == VideoAnswer(ours.text, built.n_tokens, 48, 12, "length")


def test_generate_when_video_or_its_time_changes_then_the_answer_does(loaded):
    prompt = make_prompt(3, video=5, max_new_tokens=12)
    later = tuple(replace(chunk, start_s=chunk.start_s + 60, end_s=chunk.end_s + 60) for chunk in prompt.chunks)

    texts = {
        answer(loaded, p).text
        for p in (prompt, make_prompt(3, video=6, max_new_tokens=12), replace(prompt, chunks=later))
    }

    assert len(texts) == 3


def test_generate_when_sampled_then_the_seed_decides(loaded):
    prompt = make_prompt(2, video=1, max_new_tokens=12, temperature=1.0, seed=7)

    first, again, other = (answer(loaded, p) for p in (prompt, prompt, replace(prompt, seed=8)))

    assert first == again
    assert first.text != other.text


@pytest.mark.parametrize("temperature", [1e-7, 1e-300, 1e-310, 5e-324])
def test_generate_when_the_temperature_is_next_to_nothing_then_as_at_zero(loaded, temperature):
    prompt = make_prompt(2, video=1, max_new_tokens=6, seed=7)

    assert answer(loaded, replace(prompt, temperature=temperature)) == answer(loaded, prompt)


def test_generate_when_limits_differ_then_each_prompt_has_its_own(loaded):
    prompts = [make_prompt(2, video=3, max_new_tokens=n) for n in (9, 1, 4)]

    answers = generate_answers(loaded.model, loaded.processor, prompts)

    assert [a.generated_tokens for a in answers] == [9, 1, 4]
    assert {a.finish_reason for a in answers} == {"length"}
    assert answers[0].text.startswith(answers[2].text.rstrip("\ufffd"))


def test_generate_when_a_stop_text_comes_then_the_answer_ends_before_it(loaded):
    free = answer(loaded, make_prompt(2, video=3, max_new_tokens=20))
    stop = free.text[12:15]

    stopped = answer(loaded, make_prompt(2, video=3, max_new_tokens=20, stop=("never there", stop)))

    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.generated_tokens < free.generated_tokens


def test_generate_when_the_end_token_comes_then_the_answer_ends(loaded, monkeypatch):
    prompt = make_prompt(2, video=3, max_new_tokens=20)
    built = check_prompt(loaded.model, loaded.processor, prompt)
    ids = loaded.model.generate(
        built.input_ids[None], video_tokens=built.video_tokens.float(), max_new_tokens=5, do_sample=False
    )[0, built.n_tokens :].tolist()
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [ids[3]])

    ended = answer(loaded, prompt)

    assert ended.finish_reason == "stop"
    assert ended.generated_tokens == ids.index(ids[3])
    assert ended.text == loaded.processor.decode(ids[: ids.index(ids[3])])


def test_stream_answer_when_read_to_the_end_then_pieces_are_the_answer(loaded):
    free = answer(loaded, make_prompt(2, video=3, max_new_tokens=30))
    for stop in ((), (free.text[12:15],), ("\ufffd",)):
        prompt = make_prompt(2, video=3, max_new_tokens=30, stop=stop)

        *pieces, last = stream_answer(loaded.model, loaded.processor, prompt)

        assert last == answer(loaded, prompt)
        assert "".join(map(str, pieces)) == last.text
        assert len(pieces) > 2 or stop


def test_generate_when_listened_to_then_pieces_are_the_answer_that_nobody_listened_to(loaded):
    prompts = [make_prompt(i, video=i, max_new_tokens=12 + i) for i in range(3)]
    heard: list[list[str]] = [[], []]

    answers = generate_answers(
        loaded.model, loaded.processor, prompts, listeners=[heard[0].append, None, heard[1].append]
    )

    assert answers == generate_answers(loaded.model, loaded.processor, prompts)
    assert ["".join(pieces) for pieces in heard] == [answers[0].text, answers[2].text]
    assert len(heard[0]) > 2
    with pytest.raises(ValueError, match="1 listeners for 3 prompts"):
        generate_answers(loaded.model, loaded.processor, prompts, listeners=[None])


def test_generate_when_a_prompt_does_not_fit_then_names_it(loaded):
    fits = make_prompt(1, video=0)
    wide = VideoPrompt("?", (VideoChunk(0, 1, np.zeros((2, 100), np.float16)),))
    long = VideoPrompt("?", (VideoChunk(0, 1, np.zeros((9000, 192), np.float16)),))

    with pytest.raises(ValueError, match="prompt 1: video tokens are 100 wide; expected 192"):
        generate_answers(loaded.model, loaded.processor, [fits, wide])
    with pytest.raises(ValueError, match=r"prompt 0: the prompt has 9\d+ tokens, 9000 of them video"):
        generate_answers(loaded.model, loaded.processor, [long])
    with pytest.raises(ValueError, match="fixed_batch is 0"):
        generate_answers(loaded.model, loaded.processor, [fits], fixed_batch=0)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"stop": ("",)}):
        with pytest.raises(ValueError, match="expected"):
            VideoPrompt("?", **wrong)


def test_generate_when_the_context_fills_up_then_the_answer_is_cut_off_there(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.config.get_text_config(), "max_position_embeddings", 64)

    cut = answer(loaded, make_prompt(2, video=0, max_new_tokens=100))

    assert cut.prompt_tokens + cut.generated_tokens == 64
    assert cut.finish_reason == "length"


def test_generate_when_there_are_no_prompts_then_no_answers(loaded):
    assert generate_answers(loaded.model, loaded.processor, []) == []


def test_generate_when_the_decoder_slides_its_window_then_answers_one_by_one_or_says_so():
    small, processor = build_untrained_tiny()
    config = small.config.to_dict()
    text = {k: config["text_config"][k] for k in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    config["text_config"] = MistralConfig(
        **text, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, sliding_window=16, head_dim=32
    ).to_dict()
    torch.manual_seed(0)
    model = StormForConditionalGeneration(type(small.config)(**config)).eval()
    use_exact_decoding(model)
    prompt = make_prompt(2, video=0)
    built = check_prompt(model, processor, prompt)

    [ours] = generate_answers(model, processor, [prompt], fixed_batch=1)
    out = model.generate(
        built.input_ids[None], video_tokens=built.video_tokens.float(), max_new_tokens=6, do_sample=False
    )

    assert ours.text == processor.decode(out[0, built.n_tokens :].tolist())
    assert generate_answers(model, processor, [prompt, prompt]) == [ours, ours]
    with pytest.raises(ValueError, match="expected fixed_batch=1"):
        generate_answers(model, processor, [prompt, prompt], fixed_batch=2)
