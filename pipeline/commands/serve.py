"""`stormline serve`: answers questions about a finished output folder, without lanes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...operators.errors import SettingsError

if TYPE_CHECKING:
    from ..settings import Settings
    from ..video_llm import ModelDescription

MEANWHILE = ("front.deployment",)


def serve(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `stormline run` wrote to.")] = Path("out"),
    settings_path: Annotated[
        Path | None, typer.Option("--settings", "-s", metavar="FILE.yaml", help="The settings that it was run with.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, over the file: model.path=… May be repeated."),
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Same as --set serve.host=ADDRESS.")] = None,
    port: Annotated[int | None, typer.Option(metavar="PORT", help="Same as --set serve.port=PORT.")] = None,
    make_key: Annotated[bool, typer.Option("--new-key", help="Print a new key and its hash, and leave.")] = False,
) -> None:
    """Answer questions about what the streams in an output folder have shown. The lanes need not run.

    Speaks OpenAI's chat completions at http://127.0.0.1:8000/v1. To have it beside running lanes, give
    [bold]stormline run --serve[/] instead.

    [bold]Examples[/]

      stormline serve out                                    # then: stormline ask gate "What happened?"

      stormline serve /data/out -s cameras.yaml --port 9000  # the model must be the one that encoded it

      curl http://127.0.0.1:8000/v1/streams

    [bold]Beyond this machine[/] it starts only with keys; settings hold their hashes alone:

      stormline serve --new-key

      stormline serve out --host 0.0.0.0 --set 'serve.keys=[HASH]'
    """
    from ..front.access import new_key
    from ..settings import load_settings
    from ..table_reader import check_output_folder

    if make_key:
        key, digest = new_key()
        typer.echo(f"key, for who asks; it is shown this once:  {key}")
        typer.echo(f"hash, for the settings:                    serve: {{keys: [{digest}]}}")
        return
    given = {"output.path": str(out), "serve.enabled": True, "serve.host": host, "serve.port": port}
    more = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    settings = load_settings(settings_path, [*(overrides or []), *more])
    check_output_folder(out)
    if not (out / "tokens").is_dir():
        raise SettingsError(
            f"{out} has no tokens, so there is nothing to ask about. They are written with output.keep_tokens, from "
            f"the first commit after a chunk of video is full."
        )
    _serve(settings, out)


def _serve(settings: Settings, out: Path) -> None:
    import threading

    from rich.console import Console

    from ..embedded_ray import embedded_ray
    from ..front.address import base_url, check_port
    from ..progress import PlainProgress
    from ..ray_watch import begin_again, unless_stopped
    from ..stop_signals import on_stop_signal

    check_port(settings.serve)
    progress = PlainProgress(Console(highlight=False))
    stop = threading.Event()
    leave = unless_stopped(stop, begin_again)
    with on_stop_signal(stop.set, progress.phase), embedded_ray(settings, progress.phase, leave, MEANWHILE):
        from ..serving import describe_model, services  # which imports Ray: not before it is set up

        progress.phase("starting the LLM and the HTTP service on Ray Serve")
        with services(settings):
            check_same_model(out, describe_model())
            progress.phase(f"listening at {base_url(settings.serve)}; Ctrl-C stops")
            stop.wait()


def check_same_model(out: Path, model: ModelDescription) -> None:
    """See that the model is the one that encoded the folder's tokens; another one cannot read them.

    Raises:
        SettingsError: If it is another.
    """
    from ..checkpoint import list_committed, list_lanes, read_manifest

    for lane in list_lanes(out):
        for epoch in list_committed(out, lane)[:1]:
            manifest = read_manifest(out, lane, epoch)
            if manifest.identity.get("model", model.fingerprint) != model.fingerprint:
                raise SettingsError(
                    f"the tokens in {out} are of model {manifest.model!r} ({_short(manifest.identity['model'])}); "
                    f"the one here is {model.name!r} ({_short(model.fingerprint)}), which cannot read them. Give the "
                    f"settings that the folder was written with (-s FILE.yaml), or --set model.path=…"
                )


def _short(fingerprint: str) -> str:
    return f"fingerprint {fingerprint[:12]}"
