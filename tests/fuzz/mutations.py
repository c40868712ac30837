"""Ways to damage a segment. Each takes the bytes and a source of randomness, and returns other bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

from corpus import Sample

Mutation = Callable[[bytearray, random.Random, Sequence[Sample]], bytearray]

LARGEST_BYTES = 1 << 20
HEADER_BYTES = 1024  # at a file's start (or end, as in MP4), where its structure is told
EXTREME_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 8000, 16384, 50000)


def place(data: bytearray, rng: random.Random, n_bytes: int = 1) -> int:
    """Choose where: half of the time in the header, or at the end, where some containers have theirs."""
    last = max(0, len(data) - n_bytes)
    if rng.random() < 0.5:
        return rng.randint(0, min(last, HEADER_BYTES))
    if rng.random() < 0.3:
        return rng.randint(max(0, last - HEADER_BYTES), last)
    return rng.randint(0, last)


def flip_bits(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64, 512))):
        data[place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def set_extreme_bytes(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    for _ in range(rng.choice((1, 2, 4, 16))):
        data[place(data, rng)] = rng.choice(EXTREME_BYTES)
    return data


def set_numbers(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    """Sizes, counts, dimensions and timestamps are mostly numbers of two, four or eight bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        form = rng.choice((">H", "<H", ">I", "<I", ">Q", "<Q"))
        size = struct.calcsize(form)
        if len(data) >= size:
            number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(8 * size)
            at = place(data, rng, size)
            data[at : at + size] = struct.pack(form, number & ((1 << 8 * size) - 1))
    return data


def change_numbers(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    """Add a little to numbers, or multiply them: what is wrong but not absurd gets further."""
    for _ in range(rng.choice((1, 2, 5))):
        form = rng.choice((">B", ">H", "<H", ">I", "<I"))
        size = struct.calcsize(form)
        if len(data) >= size:
            at = place(data, rng, size)
            (number,) = struct.unpack_from(form, data, at)
            changed = rng.choice((number + rng.randint(-16, 16), number * 2, number * 100, number // 2, ~number))
            struct.pack_into(form, data, at, changed & ((1 << 8 * size) - 1))
    return data


def truncate(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    return data[: rng.randint(0, len(data))]


def cut_the_start(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    return data[rng.randint(0, len(data)) :]


def block(data: bytearray, rng: random.Random) -> slice:
    at = place(data, rng)
    return slice(at, min(len(data), at + rng.choice((1, 4, 16, 188, 512, 4096))))


def remove_block(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    del data[block(data, rng)]
    return data


def repeat_block(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    part = block(data, rng)
    data[part] = data[part] * rng.choice((2, 3, 50))
    return data


def swap_blocks(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    n = rng.choice((4, 16, 188, 512))
    a, b = place(data, rng, n), place(data, rng, n)
    if a + n <= b <= len(data) - n:
        data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
    return data


def zero_block(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    part = block(data, rng)
    data[part] = bytes(len(data[part]))
    return data


def randomise_block(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    part = block(data, rng)
    data[part] = rng.randbytes(len(data[part]))
    return data


def splice(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    """The start of one, the end of another: of the same container for as long as its header tells."""
    other = rng.choice(others).data
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def insert_other(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    other, at = rng.choice(others).data, place(data, rng)
    start = rng.randint(0, len(other))
    data[at:at] = other[start : start + rng.choice((16, 512, 4096))]
    return data


def append_other(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    return data + rng.choice(others).data


def keep_magic_alone(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    n = rng.choice((4, 8, 16, 64))
    return data[:n] + rng.randbytes(rng.choice((0, 100, 5000)))


def garbage(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    return bytearray(rng.randbytes(rng.choice((1, 7, 100, 5000))))


def empty(data: bytearray, rng: random.Random, others: Sequence[Sample]) -> bytearray:
    return bytearray()


MUTATIONS: dict[Mutation, int] = {  # and how often, to each other
    flip_bits: 20,
    set_extreme_bytes: 15,
    set_numbers: 20,
    change_numbers: 20,
    truncate: 6,
    cut_the_start: 2,
    remove_block: 6,
    repeat_block: 6,
    swap_blocks: 6,
    zero_block: 5,
    randomise_block: 6,
    splice: 6,
    insert_other: 4,
    append_other: 2,
    keep_magic_alone: 1,
    garbage: 1,
    empty: 0.2,
}


def mutate(sample: Sample, rng: random.Random, others: Sequence[Sample]) -> tuple[bytes, str]:
    """Return a damaged segment and what was done to it."""
    data, names = bytearray(sample.data), []
    for mutation in rng.choices(list(MUTATIONS), list(MUTATIONS.values()), k=rng.choice((1, 1, 1, 2, 3))):
        if data:
            data = mutation(data, rng, others)[:LARGEST_BYTES]
            names.append(mutation.__name__)
    return bytes(data), "+".join(names)
