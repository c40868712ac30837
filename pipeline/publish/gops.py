"""Groups of pictures: where a stream can be cut so that what follows needs nothing before it.

A keyframe flag alone does not say that. In an *open* group, frames that are shown before the keyframe but stored
after it (leading frames) refer to the group before: H.264 with a recovery point instead of an IDR, HEVC's CRA with
RASL pictures, MPEG-2's and MPEG-4's B-frames after an I-frame. They show as packets whose pts lies before the
keyframe's. H.264 also knows keyframes that are none: with gradual refresh, the picture is whole only some frames
later (recovery_frame_cnt above 0), which is read from the stream itself (ITU-T H.264, 7.3.1 and D.1.8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

H264_IDR = 5
H264_SEI = 6
SEI_RECOVERY_POINT = 6


@dataclass(frozen=True)
class Gop:
    """The packets from one keyframe up to the next, in decode order; times in the input's own time base."""

    packets: tuple[av.Packet, ...]
    is_clean_start: bool = True  # False: its first picture is not a whole one
    has_new_parameters: bool = False  # its decoder is configured anew before it, or on the way

    @property
    def key_pts(self) -> int | None:
        """Return the keyframe's presentation time."""
        return self.packets[0].pts

    @property
    def leading(self) -> tuple[av.Packet, ...]:
        """Return the packets shown before the keyframe: they may need the group before this one."""
        key_pts = self.key_pts
        if key_pts is None:
            return ()
        return tuple(p for p in self.packets[1:] if p.pts is not None and p.pts < key_pts)

    def problem(self) -> str | None:
        """Say why the group cannot be copied as it is; None where it can."""
        if any(p.pts is None for p in self.packets):
            return "has frames without a time"
        if any(p.is_discard for p in self.packets):
            return "hides frames by an edit list"
        if self.has_new_parameters:
            return "changes its codec parameters on the way"
        if not self.is_clean_start:
            return "refreshes its picture gradually, without clean keyframes"
        if self.leading:
            return "has open GOPs, whose leading frames refer to the GOP before"
        return None


class CodecParameters:
    """A codec's configuration as a stream tells it: at its start, and again where an encoder has changed it.

    Args:
        extradata: The configuration at the stream's start.
    """

    def __init__(self, extradata: bytes | None):
        self._in_force = extradata or b""

    def change_with(self, packet: av.Packet) -> bool:
        """Take the next packet; return whether it tells another configuration. Servers repeat the one in force."""
        if not packet.has_sidedata("new_extradata"):
            return False
        before, self._in_force = self._in_force, bytes(packet.get_sidedata("new_extradata"))
        return self._in_force != before

    @property
    def nal_length_bytes(self) -> int:
        """Return how many bytes give a NAL unit's length in H.264 packets; 0 where start codes part them (Annex B)."""
        if len(self._in_force) < 5 or self._in_force[0] != 1:  # 1: AVCDecoderConfigurationRecord's version
            return 0
        return (self._in_force[4] & 3) + 1


class GopReader:
    """Collects packets into groups, one pass over one stream.

    Args:
        codec_name: FFmpeg's name of the codec.
        extradata: The stream's codec configuration at its start.
        merge_unclean: Let a group that has no clean start join the one before, instead of standing alone.
    """

    def __init__(self, codec_name: str, extradata: bytes | None = None, *, merge_unclean: bool = False):
        self._is_h264 = codec_name == "h264"
        self._parameters = CodecParameters(extradata)
        self._merge_unclean = merge_unclean
        self._pending: list[av.Packet] = []
        self._is_clean_start = True
        self._has_new_parameters = False
        self.pending_bytes = 0  # size of the group that is still growing
        self.n_skipped = 0  # packets before the first keyframe: nothing can be made of them

    @property
    def pending(self) -> tuple[av.Packet, ...]:
        """Return the packets of the group that is still growing."""
        return tuple(self._pending)

    @property
    def pending_pts(self) -> int | None:
        """Return the presentation time of the last packet taken."""
        return self._pending[-1].pts if self._pending else None

    def push(self, packet: av.Packet) -> Gop | None:
        """Take the next packet in decode order; return the group that it completes by starting another."""
        changes = self._parameters.change_with(packet)
        if not packet.is_keyframe and not self._pending:
            self._has_new_parameters |= changes
            self.n_skipped += 1
            return None
        completed = None
        if packet.is_keyframe:
            is_clean = not self._is_h264 or h264_starts_clean(bytes(packet), self._parameters.nal_length_bytes)
            if is_clean or not self._merge_unclean or not self._pending:
                completed = self.flush()
                self._is_clean_start = is_clean
        self._has_new_parameters |= changes
        self._pending.append(packet)
        self.pending_bytes += packet.size
        return completed

    def flush(self) -> Gop | None:
        """Return what is left as a group, at the end of the input."""
        if not self._pending:
            return None
        gop = Gop(tuple(self._pending), self._is_clean_start, self._has_new_parameters)
        self._pending, self._has_new_parameters = [], False
        self.pending_bytes = 0
        return gop


def h264_starts_clean(packet: bytes, length_bytes: int) -> bool:
    """Whether a keyframe's picture is whole: an IDR, or a recovery point that is reached at once."""
    for nal in nal_units(packet, length_bytes):
        kind = nal[0] & 0x1F
        if kind == H264_IDR:
            return True
        if kind == H264_SEI:
            recovery = sei_payload(nal, SEI_RECOVERY_POINT)
            if recovery:
                return bool(recovery[0] & 0x80)  # recovery_frame_cnt is ue(v): a leading 1 bit is 0
    return False


def nal_units(packet: bytes, length_bytes: int) -> Iterator[bytes]:
    """Split a packet into NAL units, without their start codes or lengths; a cut one ends it."""
    if length_bytes:
        at = 0
        while at + length_bytes < len(packet):
            start = at + length_bytes
            at = start + int.from_bytes(packet[at:start], "big")
            if packet[start:at]:
                yield packet[start:at]
        return
    for piece in packet.split(b"\x00\x00\x01")[1:]:
        if piece:
            yield piece


def sei_payload(nal: bytes, wanted: int) -> bytes | None:
    """Return the payload of one type from a supplemental enhancement information unit."""
    data = nal[1:].replace(b"\x00\x00\x03", b"\x00\x00")  # emulation prevention
    at = 0
    while at + 2 < len(data):
        kind, at = _sum_of_bytes(data, at)
        size, at = _sum_of_bytes(data, at)
        if kind == wanted:
            return data[at : at + size]
        at += size
    return None


def _sum_of_bytes(data: bytes, at: int) -> tuple[int, int]:
    """Read a number coded as a run of 255s and a last byte; return it and the place after it."""
    value = 0
    while at < len(data) and data[at] == 0xFF:
        value += 0xFF
        at += 1
    return value + (data[at] if at < len(data) else 0), at + 1
