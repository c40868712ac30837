"""Nothing happens at import: no socket, no file written, no process, no CUDA context, no Ray.

One fresh process imports every module of the four folders under an audit hook (PEP 578). What a library does while it
is itself imported is its own: an act counts where the innermost module body on the stack is one of ours.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("models", "infra", "operators", "pipeline")

WATCHED_IMPORT = """
import importlib, json, os, sys

sys.dont_write_bytecode = True
ours, modules = json.loads(sys.argv[1])
ACTS = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system",
        "os.exec", "os.fork", "os.posix_spawn", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
importing, seen = None, []

def importing_body():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame

def audit(event, args):
    if importing and (event in ACTS or event == "open" and args[2] & WRITES):
        body = importing_body()
        if body is not None and body.f_code.co_filename.startswith(tuple(ours)):
            seen.append(f"{importing}: {event} {args[:2]!r} from {body.f_code.co_filename}:{body.f_lineno}")

sys.addaudithook(audit)
for importing in modules:
    try:
        importlib.import_module(importing)
    except Exception as error:
        seen.append(f"{importing}: cannot be imported: {error!r}")
importing = None

if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
    seen.append("a CUDA context was made")
if "ray" in sys.modules and sys.modules["ray"].is_initialized():
    seen.append("Ray was started")
print(json.dumps(seen))
"""


def module_names() -> list[str]:
    """Return the dotted names of all our modules, but those that run when imported (`__main__`)."""
    names = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(("stormline", *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return names


def watch(modules: list[str], ours: list[Path], cwd: Path) -> list[str]:
    """Import modules in a fresh process; return what those below the folders `ours` did that an import must not."""
    child = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, json.dumps([[f"{folder}/" for folder in ours], modules])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, f"importing failed:\n{child.stderr[-3000:]}"
    return json.loads(child.stdout.splitlines()[-1])


def test_modules_when_imported_then_nothing_happens(tmp_path):
    seen = watch(module_names(), [ROOT / folder for folder in FOLDERS], tmp_path)

    assert seen == [], "\n".join(seen)
    assert list(tmp_path.iterdir()) == []


def test_watch_when_a_module_acts_at_import_then_it_is_seen(tmp_path):
    (tmp_path / "guilty.py").write_text(
        "import socket, subprocess, pathlib\npathlib.Path('made').write_text('')\n"
        "socket.socket().bind(('127.0.0.1', 0))\nsubprocess.run(['true'])\n"
    )

    seen = watch(["guilty"], [tmp_path], tmp_path)

    assert ["open" in seen[0], "socket.bind" in seen[1], "subprocess.Popen" in seen[2]] == [True, True, True]


@pytest.mark.parametrize(
    "module", ["pipeline.cli", "pipeline.lane", "pipeline.serving", "pipeline.supervisor", "operators.annotate"]
)
def test_module_when_it_only_asks_then_starts_without_torch(module):
    code = f"import sys, stormline.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert loaded.stdout.splitlines()[-1:] == ["[]"], loaded.stderr
