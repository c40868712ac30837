"""Small sound segments, one for each container and codec that FFmpeg can write here and stormline lets in."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import numpy as np

N_FRAMES = 24
HW = (48, 64)

# container, codec, pixel format, further options of the muxer; FFmpeg's defaults otherwise
WAYS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("matroska", "libx264", "yuv420p", {}),
    ("matroska", "libx265", "yuv420p10le", {}),
    ("matroska", "mpeg4", "yuv420p", {}),
    ("matroska", "mjpeg", "yuvj420p", {}),
    ("matroska", "ffv1", "bgra", {}),
    ("matroska", "mpeg2video", "yuv420p", {}),
    ("matroska", "prores_ks", "yuva444p10le", {}),
    ("matroska", "rawvideo", "yuv420p", {}),
    ("matroska", "huffyuv", "rgb24", {}),
    ("webm", "libvpx", "yuv420p", {}),
    ("webm", "libvpx-vp9", "yuv420p", {}),
    ("webm", "libsvtav1", "yuv420p", {}),
    ("webm", "libaom-av1", "yuv420p", {}),
    ("mp4", "libx264", "yuv420p", {}),
    ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ("mp4", "libx264", "yuv422p", {"movflags": "faststart"}),
    ("mp4", "libx265", "yuv420p", {}),
    ("mp4", "libsvtav1", "yuv420p", {}),
    ("mp4", "libaom-av1", "yuv420p", {}),
    ("mp4", "mpeg4", "yuv420p", {}),
    ("mp4", "libvpx-vp9", "yuv420p", {"movflags": "frag_every_frame+empty_moov"}),
    ("mov", "mjpeg", "yuvj422p", {}),
    ("mov", "prores_ks", "yuv422p10le", {}),
    ("mov", "png", "rgba", {}),
    ("mov", "qtrle", "rgb24", {}),
    ("3gp", "mpeg4", "yuv420p", {}),
    ("mpegts", "libx264", "yuv420p", {}),
    ("mpegts", "libx265", "yuv420p", {}),
    ("mpegts", "mpeg2video", "yuv420p", {}),
    ("mpegts", "mpeg4", "yuv420p", {}),
    ("mpeg", "mpeg1video", "yuv420p", {}),
    ("vob", "mpeg2video", "yuv420p", {}),
    ("flv", "libx264", "yuv420p", {}),
    ("flv", "flv", "yuv420p", {}),
    ("avi", "mpeg4", "yuv420p", {}),
    ("avi", "mjpeg", "yuvj420p", {}),
    ("avi", "libx264", "yuv420p", {}),
    ("avi", "msmpeg4", "yuv420p", {}),
    ("avi", "ffvhuff", "yuv420p", {}),
    ("avi", "rawvideo", "bgr24", {}),
    ("asf", "wmv2", "yuv420p", {}),
    ("asf", "msmpeg4", "yuv420p", {}),
    ("ogg", "libtheora", "yuv420p", {}),
    ("ivf", "libvpx", "yuv420p", {}),
    ("ivf", "libvpx-vp9", "yuv420p", {}),
    ("nut", "ffv1", "yuv420p", {}),
    ("nut", "libx264", "yuv420p", {}),
    ("nut", "snow", "yuv420p", {}),
    ("mxf", "mpeg2video", "yuv420p", {}),
    ("gif", "gif", "rgb8", {}),
    ("apng", "apng", "rgba", {}),
    ("yuv4mpegpipe", "wrapped_avframe", "yuv420p", {}),
    ("h264", "libx264", "yuv420p", {}),
    ("hevc", "libx265", "yuv420p", {}),
    ("obu", "libaom-av1", "yuv420p", {}),
    ("obu", "libsvtav1", "yuv420p", {}),
    ("m4v", "mpeg4", "yuv420p", {}),
    ("mpeg2video", "mpeg2video", "yuv420p", {}),
    ("mjpeg", "mjpeg", "yuvj420p", {}),
)
# codec, pixel format
IMAGES = (
    ("mjpeg", "yuvj420p"),
    ("mjpeg", "yuvj444p"),
    ("png", "rgb24"),
    ("png", "rgba64be"),
    ("png", "gray"),
    ("libwebp", "yuva420p"),
    ("bmp", "bgr24"),
    ("tiff", "rgb24"),
    ("libjxl", "rgb24"),
)
SOUNDS = (("mp3", "libmp3lame"), ("wav", "pcm_s16le"), ("flac", "flac"), ("adts", "aac"), ("ac3", "ac3"))
ENCODER_OPTIONS = {
    "libx264": {"g": "8", "preset": "veryfast"},
    "libx265": {"x265-params": "log-level=none:pools=1:keyint=8:bframes=2"},
    "libvpx": {"g": "8", "cpu-used": "8"},
    "libvpx-vp9": {"g": "8", "cpu-used": "8"},
    "libaom-av1": {"g": "8", "cpu-used": "8"},
    "libsvtav1": {"g": "8", "preset": "12", "svtav1-params": "lp=1"},
    "snow": {"strict": "experimental"},
}


@dataclass(frozen=True)
class Sample:
    """One sound segment."""

    name: str
    data: bytes
    content_type: str = ""
    has_video: bool = True


def picture(i: int, hw: tuple[int, int] = HW) -> np.ndarray:
    """Return a picture (H, W, 3) that moves with i."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    return np.stack([(3 * x + 5 * i) % 256, (4 * y + 3 * i) % 256, (x + y + 7 * i) % 256], -1).astype(np.uint8)


def make_video(container: str, codec: str, pixels: str, options: dict[str, str]) -> bytes:
    """Encode a second of moving gradients."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = HW[1], HW[0], pixels
        stream.options = ENCODER_OPTIONS.get(codec, {})
        stream.codec_context.thread_count = 1
        for i in range(N_FRAMES):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24").reformat(format=pixels)))
        output.mux(stream.encode())
    return file.getvalue()


def make_image(codec: str, pixels: str) -> bytes:
    """Encode one picture."""
    context = av.VideoCodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = HW[1], HW[0], pixels, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture(3), "rgb24").reformat(format=pixels)
    return b"".join(bytes(p) for p in [*context.encode(frame), *context.encode()])


def make_sound(container: str, codec: str) -> bytes:
    """Encode half a second of silence: media, but nothing to see."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=44100, layout="mono")
        n = stream.codec_context.frame_size or 4410
        for i in range(22050 // n):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, n), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 44100, i * n
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def make_corpus() -> tuple[list[Sample], list[str]]:
    """Return the samples, and what this build of FFmpeg cannot write."""
    os.environ.setdefault("SVT_LOG", "0")  # it talks
    samples, missing = [], []

    def attempt(name: str, make, *args, **fields) -> None:
        try:
            samples.append(Sample(name, make(*args), **fields))
        except (av.error.FFmpegError, ValueError, RuntimeError, OSError) as error:
            missing.append(f"{name}: {error}")

    for container, codec, pixels, options in WAYS:
        more = f"+{options['movflags'].split('+')[0]}" if options else ""
        content_type = "video/x-motion-jpeg" if container == "mjpeg" else ""
        name = f"{container}{more}/{codec}/{pixels}"
        attempt(name, make_video, container, codec, pixels, options, content_type=content_type)
    for codec, pixels in IMAGES:
        attempt(f"image/{codec}/{pixels}", make_image, codec, pixels)
    for container, codec in SOUNDS:
        attempt(f"{container}/{codec}", make_sound, container, codec, has_video=False)
    return samples, missing
