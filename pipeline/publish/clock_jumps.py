"""Where the timestamps of one connection begin anew: a restarted encoder, a playlist's discontinuity, a clock set back.

Told by decoding times, which only rise in a sound stream. A single wild time is no new beginning: the packet after the
first that jumps decides. One that is alone with its time is left out, for nobody knows when to show it. FFmpeg has
unwrapped MPEG-TS's 33-bit times by then, at least the first time that they wrap.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import av

MOST_BACK_S = 1  # a decoding time that falls back by more is of another clock
MOST_AHEAD_S = 3600  # and one that leaps ahead by more (`DecodeLimits.max_span_ns`): nobody stays connected and silent
# for an hour, and a clock that falls back behind its start is taken by FFmpeg for one that wrapped: 26.5 hours ahead


class PlacedPacket(NamedTuple):
    """A packet, and by how much the times jump with it: not 0 for a keyframe from which all times are new ones."""

    packet: av.Packet
    jump_s: float = 0.0


class JumpFinder:
    """Tells packets that go on from a keyframe with which times begin anew; for one connection, in decode order.

    At most one packet is held back, and only where it jumps. What comes between a jump and the next keyframe belongs to
    neither side, and is left out, as is a packet with a wild time (both are counted in `n_skipped`).
    """

    def __init__(self, time_base: Fraction):
        self._time_base = time_base
        self._last_dts: int | None = None
        self._last_pts: int | None = None  # shown last, of what came so far
        self._held: av.Packet | None = None  # jumps, and may be wild
        self._awaits_keyframe = False  # of the new times
        self.n_skipped = 0

    def push(self, packet: av.Packet) -> list[PlacedPacket]:
        """Take the next packet; return what is known now, in order."""
        if self._is_wild(packet):
            self.n_skipped += 1
            return []
        jump_s = self._jump_s(packet)
        held, self._held = self._held, None
        may_go_on = not self._awaits_keyframe and (held is None or self._is_nearer_than(held, packet))
        if jump_s == 0 or (jump_s is None and may_go_on):
            self.n_skipped += held is not None  # it was wild
            self._awaits_keyframe = False
            self._note(packet)
            return [PlacedPacket(packet)]
        if held is None and not self._awaits_keyframe:
            self._held = packet
            return []
        return self._begin_anew([packet] if held is None else [held, packet])

    def flush(self) -> list[PlacedPacket]:
        """Return what is still held back, at the end of the input."""
        held, self._held = self._held, None
        return [] if held is None else self._begin_anew([held])

    def _begin_anew(self, packets: list[av.Packet]) -> list[PlacedPacket]:
        first = next((i for i, packet in enumerate(packets) if packet.is_keyframe), len(packets))
        self.n_skipped += first
        self._awaits_keyframe = first == len(packets)
        placed = [PlacedPacket(packet) for packet in packets[first:]]
        if placed:
            placed[0] = PlacedPacket(packets[first], self._jump_s(packets[first]) or 0.0)
            self._last_dts = self._last_pts = None
        for packet in packets[first:]:
            self._note(packet)
        return placed

    def _is_wild(self, packet: av.Packet) -> bool:
        """Whether a packet is shown at no time near to its decoding, or where that is not told, to the other frames."""
        if packet.pts is None or (packet.dts is None and packet.is_keyframe):
            return False
        others = (self._last_pts, self._held and self._held.pts) if packet.dts is None else (packet.dts,)
        distances = [abs(packet.pts - other) for other in others if other is not None]
        return bool(distances) and min(distances) * self._time_base > MOST_AHEAD_S

    def _is_nearer_than(self, held: av.Packet, packet: av.Packet) -> bool:
        """Whether a packet without a decoding time goes on from what came before the one that is held back."""
        if packet.pts is None or held.pts is None or self._last_pts is None:
            return False
        return abs(packet.pts - self._last_pts) < abs(packet.pts - held.pts)

    def _jump_s(self, packet: av.Packet) -> float | None:
        """Return how far a packet's time is off; 0 if it may follow, None if that cannot be told."""
        if packet.dts is not None and self._last_dts is not None:
            step_s = float((packet.dts - self._last_dts) * self._time_base)
        elif packet.is_keyframe and packet.pts is not None and self._last_pts is not None:
            step_s = float((packet.pts - self._last_pts) * self._time_base)
        else:
            return None
        return 0.0 if -MOST_BACK_S <= step_s <= MOST_AHEAD_S else step_s

    def _note(self, packet: av.Packet) -> None:
        self._last_dts = packet.dts if packet.dts is not None else self._last_dts
        if packet.pts is not None:
            self._last_pts = packet.pts if self._last_pts is None else max(self._last_pts, packet.pts)
