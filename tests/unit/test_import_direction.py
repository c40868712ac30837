"""Imports go one way: models and infra import nothing of ours, operators imports models, pipeline imports all.

Read from the source, so that an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "models": {"models"},
    "infra": {"infra"},
    "operators": {"operators", "models"},
    "pipeline": {"pipeline", "operators", "models", "infra"},
}
# What models/ may import when it is imported. Kernels (mamba_ssm) are imported where they are used. huggingface_hub
# is part of transformers' own interface: its configurations are classes under `huggingface_hub.dataclasses.strict`.
MODELS_THIRD_PARTY = {"torch", "transformers", "huggingface_hub", "tokenizers", "safetensors", "numpy", "einops"}

SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of each import in a tree; relative ones start at `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*kept, node.module] if node.module else kept)
            for alias in node.names:  # the name may itself be a module: `from .. import models`
                yield node.lineno, f"{base}.{alias.name}"


def forbidden_imports(source: str, package: str) -> list[str]:
    """Return what a module in ``stormline.FOLDER…`` imports against the one-way rule, as ``line N: name``."""
    folder = package.split(".")[1]
    found = []
    for line, name in imported_modules(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] in MAY_IMPORT:  # `import models` works from a checkout and breaks in a wheel
            found.append(f"line {line}: {name} (say it relatively, or stormline.{name})")
        elif parts[0] == "stormline" and (len(parts) < 2 or parts[1] not in MAY_IMPORT[folder]):
            found.append(f"line {line}: {name}")
    return found


def run_at_import(tree: ast.Module) -> ast.Module:
    """Return the tree without the bodies of functions, which do not run at import."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

    return WithoutFunctions().visit(tree)


def heavy_model_imports(source: str) -> list[str]:
    """Return third-party packages outside `MODELS_THIRD_PARTY` that a module of models/ imports at its top level."""
    tree = run_at_import(ast.parse(source))
    names = {(line, name.split(".")[0]) for line, name in imported_modules(tree, "stormline.models")}
    allowed = MODELS_THIRD_PARTY | set(sys.stdlib_module_names) | {"stormline"}
    return [f"line {line}: {name}" for line, name in sorted(names) if name not in allowed]


def package_of(path: Path) -> str:
    """Return the package that a file's relative imports start at."""
    return ".".join(["stormline", *path.relative_to(ROOT).parts[:-1]])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_when_walked_then_has_modules(folder):
    assert any(path.is_relative_to(ROOT / folder) for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_when_read_then_imports_go_one_way(path):
    assert forbidden_imports(path.read_text(), package_of(path)) == []


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.is_relative_to(ROOT / "models")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_models_module_when_read_then_needs_only_torch_and_transformers(path):
    assert heavy_model_imports(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from ..operators import rows", "stormline.models"),
        ("from ...operators.rows import Row", "stormline.models.training"),
        ("from .. import pipeline", "stormline.operators"),
        ("import stormline.pipeline.settings", "stormline.operators"),
        ("from stormline import models", "stormline.infra"),
        ("import stormline", "stormline.models"),
        ("def f():\n    from ..pipeline.settings import Settings", "stormline.operators"),
        ("from operators.rows import Row", "stormline.pipeline"),
    ],
)
def test_import_when_against_the_rule_then_found(source, package):
    assert len(forbidden_imports(source, package)) == 1


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from ..models.storm import StormConfig", "stormline.operators"),
        ("from .rows import Row\nfrom . import errors", "stormline.operators"),
        ("from ...infra.broker import EmbeddedBroker", "stormline.pipeline.commands"),
        ("from ..ssd import scan", "stormline.models.training"),
        ("import torch\nfrom transformers import models", "stormline.models"),
    ],
)
def test_import_when_along_the_rule_then_passes(source, package):
    assert forbidden_imports(source, package) == []


def test_models_import_when_ray_at_top_level_then_found():
    assert heavy_model_imports("import os\nimport torch.nn\ntry:\n    import ray.data\nexcept ImportError: ...") == [
        "line 4: ray"
    ]
    assert heavy_model_imports("def kernel():\n    import mamba_ssm") == []
