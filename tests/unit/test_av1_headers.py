"""AV1's headers: units, and what is refused rather than guessed."""

import pytest

from stormline.operators.av1_headers import FRAME, SEQUENCE_HEADER, Frame, Sequence, read_frame, read_sequence, units

PLAIN = Sequence(frame_id_bits=0, screen_content_tools=0, integer_mv=2, order_hint_bits=7)


def bits(text):
    """Return bytes of a string of bits, spaces left out, filled up with zeros."""
    digits = text.replace(" ", "")
    return int(digits.ljust(-(-len(digits) // 8) * 8, "0"), 2).to_bytes(-(-len(digits) // 8))


def test_units_when_sizes_are_told_then_each_until_the_one_that_tells_none():
    packet = bytes([0b0_0001_0_1_0, 2, 7, 8, 0b0_0110_1_1_0, 0, 1, 9, 0b0_0110_0_0_0, 5, 6])

    assert list(units(packet)) == [(SEQUENCE_HEADER, b"\7\x08"), (FRAME, b"\x09"), (FRAME, b"\5\6")]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("0 01 1  0 0  0 0000001 111  00000000", Frame(True, 0)),  # inter, shown, refreshes nothing
        ("0 01 0 1  0 0  0 0000001 111  00001000", Frame(False, 8)),  # hidden, refreshes a slot
        ("0 01 1  1 0  0 0000001  10000000", Frame(True, 0x80)),  # resilient: no statistics of another
        ("0 10 1  0 0  0 0000001  00000010", Frame(True, 2)),  # intra only
        ("0 00 1", Frame(True, 0xFF)),
        ("0 11 1", Frame(True, 0xFF)),  # switch
        ("1", None),  # shows one that is there
    ],
)
def test_frame_when_read_then_what_it_refreshes(header, expected):
    assert read_frame(bits(header), PLAIN) == expected


def test_frame_when_cut_off_then_refused():
    with pytest.raises(ValueError, match="cut off"):
        read_frame(bits("0 01 1 0 0 0"), PLAIN)


SIZE = "0101 0101 111111 111111"  # frames of 64x64
TAIL = "0  000 0000  1 00  1 1 110"  # no frame ids, tools, an order of 7 bits, both choices left to the frame


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"000 0 0  0 0 00000 000000000000 00100  {SIZE} {TAIL}", Sequence(0, 2, 2, 7)),
        (f"000 0 0  1 {'0' * 64} 1 1 0  0 00000 000000000000 00100  {SIZE} {TAIL}", Sequence(0, 2, 2, 7)),  # timed
        (f"000 0 0  0 1 00000 000000000000 01000 0 1 1111  {SIZE} {TAIL}", Sequence(0, 2, 2, 7)),  # level 8, a delay
        (f"000 0 0  0 0 00000 000000000000 00100  {SIZE} 1 0001 010  000 0000  0 0 0", Sequence(6, 0, 2, 0)),
        ("000 1 1  00100", None),  # a still picture
        (f"000 0 0  1 {'0' * 64} 0 1", None),  # a decoder model
        ("000 0 0  0 0 00001", None),  # two operating points
    ],
)
def test_sequence_when_read_then_what_frames_are_read_by_or_nothing(header, expected):
    assert read_sequence(bits(header)) == expected
