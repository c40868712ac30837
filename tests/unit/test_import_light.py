"""Nothing happens at import: no socket, no file written, no process, no CUDA context, no Ray.

One fresh process imports every module of the four folders under an audit hook (PEP 578), which sees what goes
through the interpreter. What the libraries that we stand on do while they are imported
is their own: they are imported first, before the hook is set.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("models", "infra", "operators", "pipeline")
LIBRARIES = (
    *("torch", "torch.nn.functional", "transformers", "tokenizers", "safetensors.torch", "einops", "numpy"),
    *("ray", "ray.data", "ray.serve", "av", "kafka", "pyarrow.parquet", "pyarrow.dataset"),
    *("pydantic", "yaml", "typer", "rich.console", "rich.progress", "fastapi"),
)

WATCHED_IMPORT = """
import importlib, json, os, sys, traceback

sys.dont_write_bytecode = True
libraries, modules = json.loads(sys.argv[1])
for library in libraries:
    importlib.import_module(library)

SIMPLE = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system",
          "os.exec", "os.fork", "os.posix_spawn", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
importing, seen = None, []

def audit(event, args):
    happened = event in SIMPLE or (event == "open" and args[2] is not None and args[2] & WRITES)
    if happened and importing and not (event == "open" and args[0] == os.devnull):
        where = next((f for f in reversed(traceback.extract_stack()) if "importlib" not in f.filename), None)
        seen.append(f"{importing}: {event} {args[:2]!r} from {where.filename}:{where.lineno}")

sys.addaudithook(audit)
for importing in modules:
    try:
        importlib.import_module(importing)
    except Exception as error:
        seen.append(f"{importing}: cannot be imported: {error!r}")
importing = None

import ray, torch
if torch.cuda.is_initialized():
    seen.append("a CUDA context was made")
if ray.is_initialized():
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


def watch(modules: list[str], cwd: Path, libraries: tuple[str, ...] = ()) -> list[str]:
    """Import modules in a fresh process; return what they did that an import must not."""
    child = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, json.dumps([libraries, modules])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, f"importing failed:\n{child.stderr[-3000:]}"
    return json.loads(child.stdout.splitlines()[-1])


def test_modules_when_imported_then_nothing_happens(tmp_path):
    seen = watch(module_names(), tmp_path, LIBRARIES)

    assert seen == [], "\n".join(seen)
    assert list(tmp_path.iterdir()) == []


def test_watch_when_a_module_acts_at_import_then_it_is_seen(tmp_path):
    (tmp_path / "guilty.py").write_text(
        "import socket, subprocess\nopen('made', 'w').close()\nsocket.socket().bind(('127.0.0.1', 0))\n"
        "subprocess.run(['true'])\n"
    )

    seen = watch(["guilty"], tmp_path)

    assert ["open" in seen[0], "socket.bind" in seen[1], "subprocess.Popen" in seen[2]] == [True, True, True]
