"""Encoding frames to H.264 such that the result can be cut anywhere on a time grid.

Every keyframe is an IDR, there are no B-frames and no look-ahead: a frame goes in, its packet comes out.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from .segmenter import MATROSKA_OPTIONS, MS, PassClock

if TYPE_CHECKING:
    import av

CRF = "23"  # x264's own default quality
USUAL_FRAME_MS = 40  # where neither frames nor stream say how long a frame lasts
X264_OPTIONS = {
    "preset": "veryfast",
    "tune": "zerolatency",
    "bf": "0",
    "forced-idr": "1",  # a forced keyframe is an IDR, never an I-frame with a recovery point
    "sc_threshold": "0",  # no keyframes but ours
    "g": "100000",
}


class FrameEncoder:
    """Encodes frames of one size to H.264, with keyframes on a grid of session time.

    Args:
        width: In pixels; an odd size loses its last column (4:2:0 has even sizes).
        height: In pixels; likewise.
        rate: Nominal frames a second, for rate control alone: frames carry their own times.
        keyframe_ms: A frame that is the first at or after a multiple of this is a keyframe.
        bitrate: In bits a second; None for constant quality.
        orientation: How players are to set the frames upright (`operators.rgb.orientation`).
    """

    def __init__(
        self,
        width: int,
        height: int,
        rate: Fraction,
        *,
        keyframe_ms: int,
        bitrate: int | None = None,
        orientation: tuple[bool, bool, bool] = (False, False, False),
    ):
        import av

        self._holder = av.open(io.BytesIO(), "w", format="matroska", options=MATROSKA_OPTIONS)
        quality = {"crf": CRF} if bitrate is None else {"maxrate": str(bitrate), "bufsize": str(bitrate)}
        stream = self._holder.add_stream("libx264", rate=rate, options={**X264_OPTIONS, **quality})
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        stream.codec_context.time_base = MS
        if bitrate is not None:
            stream.bit_rate = bitrate
        if any(orientation):
            transposed, flip_y, flip_x = orientation  # a quarter turn is to transpose, then to flip rows
            stream.set_display_rotation(90 * transposed, hflip=flip_x, vflip=flip_y != transposed)
        self._holder.start_encoding()  # opens the codec and fills in the parameters that a copy needs
        self.template = stream
        self._keyframe_ms = keyframe_ms
        self._next_key_ms: int | None = None
        self._duration_ms: dict[int, int] = {}

    def encode(self, frame: av.VideoFrame, ms: int, duration_ms: int) -> Iterator[av.Packet]:
        """Encode the frame shown at `ms`; yield packets with pts and duration in milliseconds."""
        from av.video.frame import PictureType

        picture = frame.reformat(self.template.width, self.template.height, "yuv420p")
        picture.pts, picture.time_base = ms, MS
        picture.pict_type = PictureType.NONE
        if self._next_key_ms is None or ms >= self._next_key_ms:
            picture.pict_type = PictureType.I
            start_ms = ms if self._next_key_ms is None else self._next_key_ms
            steps = (ms - start_ms) // self._keyframe_ms + 1
            self._next_key_ms = start_ms + steps * self._keyframe_ms
        self._duration_ms[ms] = duration_ms
        yield from self._timed(self.template.encode(picture))

    def flush(self) -> Iterator[av.Packet]:
        """Yield what the encoder still holds; nothing can be encoded after it."""
        yield from self._timed(self.template.encode(None))

    def _timed(self, packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            packet.duration = self._duration_ms.pop(int(packet.pts or 0), USUAL_FRAME_MS)
            yield packet


class Transcoder:
    """Decodes one pass over a stream and encodes it again, each frame at its own session time.

    Args:
        stream: Opened input; its decoder must not have been used before.
        clock: The pass's clock; started by the first frame if it was not.
        keyframe_ms: Distance of keyframes, so the length of a segment.
        bitrate: In bits a second; None for constant quality.
        trust_pts: False takes decoding times, which rise where the container's presentation times are made up.
    """

    def __init__(
        self,
        stream: av.VideoStream,
        clock: PassClock,
        *,
        keyframe_ms: int,
        bitrate: int | None = None,
        trust_pts: bool = True,
    ):
        self._stream = stream
        self._clock = clock
        self._keyframe_ms = keyframe_ms
        self._bitrate = bitrate
        self._trust_pts = trust_pts
        self._encoder: FrameEncoder | None = None
        self._first_pts: int | None = None
        self._last_ms = clock.offset_ms - 1
        self._next_pts = 0  # where the next frame is expected, for those that have no time
        self.n_undecodable = 0  # packets that the decoder refused

    @property
    def template(self) -> av.VideoStream:
        """Return the encoder's stream; there is one once a packet came out."""
        assert self._encoder is not None
        return self._encoder.template

    def warm_up(self, packets: Iterable[av.Packet], first_pts: int | None) -> None:
        """Show the decoder what came before, leaving out every frame earlier than `first_pts`."""
        self._first_pts = first_pts
        for packet in packets:
            for _ in self.push(packet):
                pass

    def push(self, packet: av.Packet | None) -> Iterator[av.Packet]:
        """Take the next packet (None: the end); yield encoded ones, their pts in session milliseconds."""
        from av.error import InvalidDataError

        try:
            frames = self._stream.codec_context.decode(packet)
        except InvalidDataError:
            self.n_undecodable += 1
            return
        for frame in frames:
            yield from self._encode(frame)

    def flush(self) -> Iterator[av.Packet]:
        """Yield everything up to the last frame, at the end of the input."""
        yield from self.push(None)
        if self._encoder is not None:
            yield from self._encoder.flush()

    def _encode(self, frame: av.VideoFrame) -> Iterator[av.Packet]:
        told = frame.pts if self._trust_pts else frame.dts
        pts = told if told is not None else self._next_pts
        duration = frame.duration or self._usual_duration()
        self._next_pts = pts + duration
        if self._first_pts is not None and pts < self._first_pts:
            return
        self._clock.start_at(pts)
        ms = self._clock.ms(pts)
        if ms <= self._last_ms:  # a repeated time: the encoder takes rising ones only
            return
        self._last_ms = ms
        if self._encoder is None:
            from ...models.video_files import orientation

            rate = self._stream.average_rate or Fraction(1000, USUAL_FRAME_MS)
            self._encoder = FrameEncoder(
                frame.width,
                frame.height,
                rate,
                keyframe_ms=self._keyframe_ms,
                bitrate=self._bitrate,
                orientation=orientation(frame),
            )
        yield from self._encoder.encode(frame, ms, max(1, self._clock.ms(pts + duration) - ms))

    def _usual_duration(self) -> int:
        time_base = self._stream.time_base or MS
        rate = self._stream.average_rate
        seconds = 1 / rate if rate else Fraction(USUAL_FRAME_MS, 1000)
        return max(1, round(seconds / time_base))
