"""Which packets of a segment must be decoded where few of its frames are wanted. Decodes nothing itself.

Two kinds of packets can be left out, and every other frame still comes out the same to the last bit:

- *Unreferenced* ones, of which the codec's own syntax says that no other picture is predicted from them: H.264's
  `nal_ref_idc` 0, H.265's sub-layer non-reference pictures of the highest sub-layer, MPEG-2's B pictures, AV1's frames
  that refresh no slot.
- What is stored after the last wanted frame of a closed group of pictures, up to the next picture that nothing
  reaches back over: an IDR picture of H.264 and H.265, a key frame of VP9 and AV1, any picture of a codec without
  prediction.

A container's own flags (keyframe, discardable) are not believed: who wrote them need not have known.
Sources: ITU-T H.264 (7.3.1, 7.4.1), H.265 (7.3.1.2, 7.4.2.2), H.262 (6.2.3), the VP9 bitstream's specification (6.2).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from av.codec.codec import Properties

from . import av1_headers

if TYPE_CHECKING:
    import av
    from av.video.codeccontext import VideoCodecContext

MAX_REORDERED = 16
"""Frames that may be stored before one that is shown earlier: the largest picture buffer of H.264 and H.265.
Timestamps that are out of order by more are wrong."""


class Role(Enum):
    """What a packet is to the others of its stream."""

    BARRIER = "nothing after it reaches back over it"
    UNREFERENCED = "no other picture is predicted from it"
    REFERENCE = "other pictures may be predicted from it"
    SETUP = "holds what later packets are read with, or is not understood"


def can_leave_out(codec: VideoCodecContext) -> bool:
    """Tell whether a stream's packets say enough for some to be left out."""
    return codec.name in ROLES or codec.codec.intra_only


def roles_of(packets: Sequence[av.Packet], codec: VideoCodecContext) -> list[Role]:
    """Return the role of each packet.

    Args:
        packets: Of one stream, in decoding order.
        codec: The stream's, one of those that `can_leave_out`.
    """
    if codec.codec.intra_only:
        return [Role.BARRIER] * len(packets)
    return ROLES[codec.name]([bytes(packet) for packet in packets], bytes(codec.extradata or b""))


def shown_in_sound_order(packets: Sequence[av.Packet], codec: VideoCodecContext) -> bool:
    """Tell whether all packets have timestamps that a sound stream could have, each its own.

    Args:
        packets: In decoding order.
        codec: The stream's.
    """
    allowed = MAX_REORDERED if codec.codec.properties & Properties.REORDER.value else 0
    shown: list[int] = []
    for packet in packets:
        if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            return False
        place = bisect.bisect_left(shown, packet.pts)
        if len(shown) - place > allowed or shown[place : place + 1] == [packet.pts]:
            return False
        shown.insert(place, packet.pts)
    return True


def needed_packets(roles: Sequence[Role], is_wanted: Sequence[bool]) -> list[bool]:
    """Return which packets must be decoded for the wanted frames to come out as if all were.

    Args:
        roles: Of all packets, in decoding order.
        is_wanted: Whether each one's own frame is wanted.
    """
    needed = [wanted or role is not Role.UNREFERENCED for role, wanted in zip(roles, is_wanted, strict=True)]
    after_last_wanted = True  # of its group
    for i in reversed(range(len(roles))):
        after_last_wanted = after_last_wanted and not is_wanted[i] and roles[i] is not Role.SETUP
        needed[i] = needed[i] and not after_last_wanted
        after_last_wanted = after_last_wanted or roles[i] is Role.BARRIER
    return needed


def _roles_in_h264(packets: Sequence[bytes], extradata: bytes) -> list[Role]:
    length_bytes = (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else 0
    return [_role_in_h264(packet, length_bytes) for packet in packets]


def _role_in_h264(packet: bytes, length_bytes: int) -> Role:
    headers = [(first & 31, first >> 5 & 3) for first, _ in _unit_headers(packet, length_bytes)]
    slices = [(kind, ref_idc) for kind, ref_idc in headers if 1 <= kind <= 5]
    if slices and all(kind == 5 for kind, _ in slices):
        return Role.BARRIER
    if not slices or any(kind in {7, 8, 13, 15} for kind, _ in headers):  # sets of parameters
        return Role.SETUP
    return Role.REFERENCE if any(ref_idc for _, ref_idc in slices) else Role.UNREFERENCED


def _roles_in_hevc(packets: Sequence[bytes], extradata: bytes) -> list[Role]:
    length_bytes = (extradata[21] & 3) + 1 if len(extradata) > 22 and extradata[:3] > b"\0\0\1" else 0
    # (type, temporal sub-layer) of the units of the base layer
    found = [
        [(a >> 1 & 63, b & 7) for a, b in _unit_headers(packet, length_bytes) if not a & 1 and not b >> 3]
        for packet in packets
    ]
    highest = max((sub_layer for units in found for kind, sub_layer in units if kind < 32), default=0)
    roles = []
    for units in found:
        slices = [unit for unit in units if unit[0] < 32]
        if slices and all(kind in {19, 20} for kind, _ in slices):
            roles.append(Role.BARRIER)
        elif not slices or any(32 <= kind <= 34 for kind, _ in units):
            roles.append(Role.SETUP)
        else:  # up to 14, the even ones are those that their own sub-layer does not refer to
            unreferenced = all(kind <= 14 and kind % 2 == 0 and layer == highest for kind, layer in slices)
            roles.append(Role.UNREFERENCED if unreferenced else Role.REFERENCE)
    return roles


def _unit_headers(packet: bytes, length_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the first two bytes of each network abstraction layer unit; (0, 0) for what is cut off.

    Args:
        packet: Of H.264 or H.265.
        length_bytes: Size of the length before each unit; 0 where start codes separate them (ITU-T H.264, annex B).
    """
    at = 0 if length_bytes else packet.find(b"\0\0\1")
    while 0 <= at < len(packet):
        begin = at + (length_bytes or 3)
        if begin + 2 > len(packet):
            yield 0, 0
            return
        yield packet[begin], packet[begin + 1]
        at = begin + int.from_bytes(packet[at:begin]) if length_bytes else packet.find(b"\0\0\1", begin)


def _roles_in_mpeg2(packets: Sequence[bytes], _: bytes) -> list[Role]:
    roles = []
    for packet in packets:
        picture = packet.find(b"\0\0\1\0")
        is_b = 0 <= picture < len(packet) - 5 and packet[picture + 5] >> 3 & 7 == 3
        setup = picture < 0 or b"\0\0\1\xb3" in packet[:picture]
        roles.append(Role.SETUP if setup else Role.UNREFERENCED if is_b else Role.REFERENCE)
    return roles


def _roles_in_vp9(packets: Sequence[bytes], _: bytes) -> list[Role]:
    # frame_marker 2 bits (0b10), profile 2, show_existing_frame 1 (0), frame_type 1 (0: key); in profile 3, all move on
    is_key = [bool(p) and p[0] & 0b11001100 == 0b10000000 and p[0] & 0b00110000 != 0b00110000 for p in packets]
    return [Role.BARRIER if key else Role.REFERENCE for key in is_key]


def _roles_in_av1(packets: Sequence[bytes], extradata: bytes) -> list[Role]:
    # ISO/IEC 14496-15: four bytes, then units
    sequence = _sequence_in(av1_headers.units(extradata[4:]), None) if extradata[:1] == b"\x81" else None
    roles = []
    for packet in packets:
        units = list(av1_headers.units(packet))
        before, sequence = sequence, _sequence_in(units, sequence)
        roles.append(_role_in_av1(units, sequence, sequence != before))
    return roles


def _sequence_in(
    units: Iterable[tuple[int, bytes]], before: av1_headers.Sequence | None
) -> av1_headers.Sequence | None:
    """Return by which sequence header frames are read after these units; None where it is not understood."""
    sequence = before
    for kind, data in units:
        if kind == av1_headers.SEQUENCE_HEADER:
            try:
                sequence = av1_headers.read_sequence(data)
            except ValueError:
                sequence = None
    return sequence


def _role_in_av1(units: Sequence[tuple[int, bytes]], sequence: av1_headers.Sequence | None, is_new: bool) -> Role:
    headers = [data for kind, data in units if kind in {av1_headers.FRAME_HEADER, av1_headers.FRAME}]
    # show_existing_frame 1 bit (0), frame_type 2 (0: key), show_frame 1: this one refreshes all
    if headers and headers[0][:1] and headers[0][0] >> 4 == 0b0001:
        return Role.BARRIER
    if sequence is None or is_new or len(headers) != 1:  # of several, all but one are hidden: others refer to them
        return Role.REFERENCE
    try:
        frame = av1_headers.read_frame(headers[0], sequence)
    except ValueError:
        return Role.REFERENCE
    return Role.UNREFERENCED if frame and frame.is_shown and not frame.refreshed else Role.REFERENCE


ROLES: dict[str, Callable[[Sequence[bytes], bytes], list[Role]]] = {
    "h264": _roles_in_h264,
    "hevc": _roles_in_hevc,
    "mpeg2video": _roles_in_mpeg2,
    "vp9": _roles_in_vp9,
    "libdav1d": _roles_in_av1,
    "av1": _roles_in_av1,
}
