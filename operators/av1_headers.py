"""What AV1's headers say of a frame: whether it is shown, and whether any later one can refer to it. Decodes nothing.

Source: AV1 Bitstream & Decoding Process Specification, 5.3 (units), 5.5 (sequence header), 5.9.2 (frame header).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SEQUENCE_HEADER, FRAME_HEADER, FRAME = 1, 3, 6  # kinds of units
_KEY_FRAME, _INTRA_ONLY_FRAME, _SWITCH_FRAME = 0, 2, 3
_CHOSEN_BY_FRAME = 2  # of a tool that the sequence leaves to each frame
_ALL_SLOTS = 0xFF


@dataclass(frozen=True)
class Sequence:
    """What a sequence's header says that its frames' headers are read by."""

    frame_id_bits: int  # 0 for none
    screen_content_tools: int
    integer_mv: int
    order_hint_bits: int


@dataclass(frozen=True)
class Frame:
    """A frame's header, as far as it is read."""

    is_shown: bool
    refreshed: int  # bits of the eight slots for pictures that later frames may refer to


class _Bits:
    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, n: int) -> int:
        self._left -= n
        if self._left < 0:
            raise ValueError("the header is cut off")
        return self._value >> self._left & (1 << n) - 1


def units(packet: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the first bytes of each unit (OBU) of a packet; it ends where a size is not told."""
    at = 0
    while at < len(packet):
        kind, has_extension, has_size = packet[at] >> 3 & 15, packet[at] >> 2 & 1, packet[at] >> 1 & 1
        at += 1 + has_extension
        size = 0
        for i in range(8 if has_size else 0):  # leb128
            byte = packet[at] if at < len(packet) else 0
            at, size = at + 1, size | (byte & 127) << 7 * i
            if not byte & 128:
                break
        yield kind, packet[at : min(at + size, at + 64) if has_size else at + 64]
        if not has_size:
            return
        at += size


def read_sequence(data: bytes) -> Sequence | None:
    """Read a sequence's header; None where its frames' headers hold more than is read here.

    That is the case with a decoder model, with several operating points (layers), and with still pictures.

    Raises:
        ValueError: If it is cut off.
    """
    bits = _Bits(data)
    bits.read(3)  # profile
    still, reduced, timed = bits.read(1), bits.read(1), bits.read(1)
    if still or reduced:
        return None
    if timed:
        bits.read(64)  # the length of a tick
        equal = bits.read(1)
        if equal:
            _skip_uvlc(bits)
        if bits.read(1):  # a decoder model
            return None
    delay_told = bits.read(1)
    if bits.read(5):  # operating points but the first
        return None
    bits.read(12)
    if bits.read(5) > 7:  # level
        bits.read(1)
    if delay_told and bits.read(1):
        bits.read(4)
    widths = bits.read(4) + 1, bits.read(4) + 1
    bits.read(sum(widths))
    frame_id_bits = bits.read(4) + bits.read(3) + 3 if bits.read(1) else 0
    bits.read(3 + 4)  # tools for intra and inter prediction
    has_order = bits.read(1)
    if has_order:
        bits.read(2)
    tools = _CHOSEN_BY_FRAME if bits.read(1) else bits.read(1)
    integer_mv = _CHOSEN_BY_FRAME
    if tools and not bits.read(1):
        integer_mv = bits.read(1)
    return Sequence(frame_id_bits, tools, integer_mv, bits.read(3) + 1 if has_order else 0)


def _skip_uvlc(bits: _Bits) -> None:
    zeros = 0
    while not bits.read(1):
        zeros += 1
    bits.read(zeros if zeros < 32 else 0)


def read_frame(data: bytes, sequence: Sequence) -> Frame | None:
    """Read the begin of a frame's header; None if it shows a frame that is there already.

    Raises:
        ValueError: If it is cut off.
    """
    bits = _Bits(data)
    if bits.read(1):
        return None
    kind, shown = bits.read(2), bits.read(1)
    if not shown:
        bits.read(1)  # whether it may be shown later
    if kind == _SWITCH_FRAME or (kind == _KEY_FRAME and shown):
        return Frame(bool(shown), _ALL_SLOTS)
    resilient = bits.read(1)
    bits.read(1)  # whether its statistics are kept
    tools = bits.read(1) if sequence.screen_content_tools == _CHOSEN_BY_FRAME else sequence.screen_content_tools
    if tools and sequence.integer_mv == _CHOSEN_BY_FRAME:
        bits.read(1)
    bits.read(sequence.frame_id_bits)
    bits.read(1)  # whether it has a size of its own
    bits.read(sequence.order_hint_bits)
    if not resilient and kind not in (_KEY_FRAME, _INTRA_ONLY_FRAME):
        bits.read(3)  # whose statistics it begins with
    return Frame(bool(shown), bits.read(8))
