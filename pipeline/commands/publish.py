"""`stormline publish`: video into Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from ...operators.errors import SettingsError


def publish(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files, folders, globs, devices, URLs, - or shapes:…, see above."),
    ],
    bootstrap: Annotated[
        str, typer.Option("--bootstrap", "-b", metavar="HOST:PORT", help="Kafka brokers, by commas.")
    ] = "127.0.0.1:9092",
    topic: Annotated[str, typer.Option("--topic", "-t", help="Topic to publish to.")] = "video",
    stream_id: Annotated[
        str | None, typer.Option(help="The stream's name, where there is one source; by default the file's name.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0, help="Of files: 1 as a camera would, 4 four times as fast, 0 as fast as possible.")
    ] = 1.0,
    loop: Annotated[
        int, typer.Option(metavar="N", min=0, help="Play files N times, 0 for ever, as one unbroken session.")
    ] = 1,
    copy: Annotated[
        bool | None,
        typer.Option(
            "--copy/--transcode",
            help="Never re-encode (and drop what then cannot be decoded), or always. By default re-encode only "
            "what cannot be cut otherwise.",
            show_default=False,
        ),
    ] = None,
    bitrate: Annotated[
        str | None,
        typer.Option(metavar="BITS", help="Of transcoded video, a second: 800k, 2M. Default: constant quality."),
    ] = None,
    segment_s: Annotated[
        float, typer.Option(min=0.1, max=600, help="Length to aim at; never shorter than from keyframe to keyframe.")
    ] = 2.0,
    start_time: Annotated[
        str,
        typer.Option(metavar="ISO|now", help="Time of the first frame: 2026-05-01T08:00:00Z. UTC if it has no zone."),
    ] = "now",
    session: Annotated[
        str | None, typer.Option(help="Name of the session. Default: a new one, as it should be.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1024, help="Largest record. Default: the topic's own max.message.bytes.")
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For Kafka: security_protocol=SSL… Values may be ${env:NAME}."),
    ] = None,
    input_options: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="KEY=VALUE", help="For FFmpeg's input: rtsp_transport=udp, video_size=1280x720…"
        ),
    ] = None,
    reconnects: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tries in a row to reach a lost URL again; of several cameras, also one that is off at the start. "
            "Default: for ever.",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write what the shapes: feed shows, as it is sent.")
    ] = None,
) -> None:
    """Publish video to Kafka as segments that each decode on their own: what [bold]stormline run[/] reads.

    Packets are copied, not re-encoded, wherever the video can be cut; where it cannot (open GOPs, gradual refresh)
    it says so and transcodes from there. Ctrl-C or SIGTERM ends every stream cleanly, marked as ended.

    [bold]What a SOURCE can be[/]

      [cyan]a file, folder or glob[/]: one stream for each video, named after the file

      [cyan]rtsp:// http:// tcp:// udp:// srt://[/]: a live stream; a lost one is called again, as a new session

      [cyan]/dev/video0[/]: a capture device

      [cyan]-[/]: standard input, in any format that FFmpeg reads

      [cyan]shapes:?seed=1&size=256&fps=10&duration=60[/]: a generated feed; --truth writes what it shows

    [bold]Examples[/]

      stormline publish video.mp4

      stormline publish recordings/ --speed 0 --topic archive

      stormline publish 'rtsp://me:secret@camera/stream1' --stream-id gate

      ffmpeg -i anything -f mpegts - | stormline publish - --stream-id anything

      stormline publish 'shapes:?seed=1' --truth truth.jsonl

      stormline publish video.mp4 -b kafka:9093 --client security_protocol=SASL_SSL --client sasl_mechanism=PLAIN
      --client sasl_plain_username=me --client 'sasl_plain_password=${env:KAFKA_PASSWORD}'
    """
    from rich.console import Console

    from ..publish.group import PublishGroup
    from ..publish.inputs import expand_sources
    from ..publish.options import PublishOptions
    from ..publish.producer import SegmentProducer
    from ..secret_references import resolve_secrets

    options = PublishOptions(
        speed=speed,
        loop=loop or None,
        session=session,
        start_ns=parse_start_time(start_time),
        segment_s=segment_s,
        method="auto" if copy is None else "copy" if copy else "transcode",
        bitrate=parse_bitrate(bitrate) if bitrate else None,
        input_options=parse_pairs("--input", input_options or ()),
        max_reconnects=reconnects,
        truth=truth,
    )
    client_options = resolve_secrets(parse_client_options(client or ()))
    specs = expand_sources(sources, stream_id)
    console = Console(highlight=False, stderr=True)
    with SegmentProducer(bootstrap, topic, max_bytes=max_bytes, client=client_options) as producer:
        n_failed = PublishGroup(specs, producer, options, console).run()
    if n_failed:
        raise typer.Exit(1)


def parse_start_time(text: str) -> int | None:
    """Read a time in ISO 8601 as UTC nanoseconds; None for ``now``.

    Raises:
        SettingsError: If it is neither.
    """
    if text == "now":
        return None
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise SettingsError(f"--start-time {text!r}: expected now or a time such as 2026-05-01T08:00:00Z") from error
    time = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
    return round(time.timestamp() * 1000) * 1_000_000


def parse_bitrate(text: str) -> int:
    """Read bits a second: ``2500000``, ``800k`` or ``2M``.

    Raises:
        SettingsError: If it is none of them.
    """
    unit = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        return round(float(text if unit == 1 else text[:-1]) * unit)
    except ValueError as error:
        raise SettingsError(f"--bitrate {text!r}: expected bits a second such as 800k or 2M") from error


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` options.

    Raises:
        SettingsError: If one has no ``=`` or no key.
    """
    pairs = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not key or not sign:
            raise SettingsError(f"{option} {key!r}: expected KEY=VALUE")  # the value may be a password
        pairs[key] = value
    return pairs


def parse_client_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read options for the Kafka client; numbers and true or false become such, as kafka-python wants them.

    Raises:
        SettingsError: If one is no ``KEY=VALUE``, or kafka-python has no such option.
    """
    from kafka import KafkaProducer

    options: dict[str, Any] = {}
    for key, value in parse_pairs("--client", texts).items():
        if key not in KafkaProducer.DEFAULT_CONFIG:
            raise SettingsError(f"--client {key}=…: kafka-python's producer has no such option")
        usual = KafkaProducer.DEFAULT_CONFIG[key]
        if isinstance(usual, bool):
            options[key] = value.lower() in ("true", "1", "yes")
        elif isinstance(usual, int) and value.lstrip("-").isdigit():
            options[key] = int(value)
        else:
            options[key] = value
    return options
