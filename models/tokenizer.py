"""A small byte-level tokenizer, for models that are trained here from scratch.

Byte-level BPE never meets an unknown character, so every prompt survives the round trip. Imported language models
bring their own tokenizer; nothing else in stormline depends on this one.

A prompt shows the time before each chunk (`processing.format_time`). With digits by themselves a time would cost seven
tokens for a chunk's sixteen, so minutes ``[00`` … ``[59`` and seconds ``:00]`` … ``:59]`` are tokens of their own: two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END, VIDEO = "<|pad|>", "<|bos|>", "<|end|>", "<|video|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END, VIDEO, SYSTEM, USER, ASSISTANT)  # in this order from id 0
TIME_TOKENS = (*(f"[{m:02d}" for m in range(60)), *(f":{s:02d}]" for s in range(60)))

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Learn a tokenizer; the same corpus always gives the same one.

    Args:
        corpus: Texts like those to come.
        vocab_size: The most tokens; a small corpus gives fewer. At least 7 special, 120 for times and 256 bytes.

    Returns:
        The tokenizer, with a chat template. Padding is on the left, where generation wants it.

    Raises:
        ValueError: If `vocab_size` has no room for the fixed tokens.
    """
    n_fixed = len(SPECIAL_TOKENS) + len(TIME_TOKENS) + 256
    if vocab_size < n_fixed:
        raise ValueError(f"vocab_size is {vocab_size}; expected {n_fixed} or more: special tokens, times and all bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TIME_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TIME_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[VIDEO, SYSTEM, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def sample_corpus() -> Iterator[str]:
    """Yield English sentences of the kind that a small video model reads and writes, always the same ones."""
    for size, colour, shape, motion in itertools.product(_SIZES, _COLOURS, _SHAPES, _MOTIONS):
        yield f"A {size} {colour} {shape} {motion}."
        yield f"the {colour} {shape} {motion}, then it stops"
    for template, colour, shape in itertools.product(_QUESTIONS, _COLOURS, _SHAPES):
        yield template.format(colour=colour, shape=shape)
    for seconds in range(0, 3600, 7):
        yield f"[{seconds // 60:02d}:{seconds % 60:02d}] At {seconds} seconds a person walks by."
    for _ in range(20):
        yield from _COMMON
        yield " ".join(sorted({word for text in _COMMON for word in text.split()}))


_SIZES = ("small", "large")
_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black", "grey", "pink")
_SHAPES = ("circle", "square", "triangle", "star", "cross", "ball", "car", "person")
_MOTIONS = (
    *("moves left", "moves right", "moves up", "moves down", "stays still", "grows", "shrinks", "turns around"),
    *("appears", "disappears", "enters from the left", "leaves to the right", "bounces", "blinks", "moves in a circle"),
)
_QUESTIONS = (
    "What does the {colour} {shape} do?",
    "How many {colour} {shape}s are there?",
    "Is there a {colour} {shape}? Answer yes or no.",
    "What happens after the {colour} {shape} appears?",
    "What colour is the {shape} that is next to the {colour} one?",
    "When does the {colour} {shape} leave the picture?",
)
_COMMON = (
    "Describe what happens in the video.",
    "Describe the last minute in one sentence.",
    "What happened in the last ten minutes? What changed since then?",
    "Watch the camera and tell me when somebody enters the room.",
    "Is anything burning, broken, blocked or dangerous? Answer yes or no, and say why.",
    "How many people, cars, bicycles, dogs and birds can you see now?",
    "Nothing moves. There is nothing to see. The scene does not change.",
    "Yes, there is one. No, there is none. There are two, three, four, five of them.",
    "First it moves to the left, and after that it turns to the right and stops.",
    "A man and a woman are walking down the street with their children while it is raining.",
    "The light is on. The light is off. The door opens. The door closes. A train arrives at the station.",
    "At the beginning the road is empty; later a white van comes from behind and passes the other car.",
    "Summarise the events in order, with the time of each, as a short list.",
    "Who was here before? Which one was first? Where did it go? Could it have been the same person?",
)
