"""The layout of DESIGN.md, held: what may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from those above it, or from itself. A folder is one module.
ORDER = [
    "threads",
    "errors",
    "types",
    "files",
    "doctor",
    "tasks",
    "digits",
    "offloading",
    "batches",
    "hf",
    "layers",
    "factors",
    "narrowing",
    "channels",
    "inputs",
    "storage",
    "obs",
    "grams",
    "calibration",
    "costs",
    "synflow",
    "precropping",
    "compressors",
    "records",
    "workloads",
    "engines",
    "profiling",
    "streaming",
    "coupling",
    "planning",
    "correcting",
    "applying",
    "sequential",
    "measuring",
    "tuning",
    "strategies",
    "latents",
    "kvcache",
    "salience",
    "comparing",
    "packed",
    "saving",
    "verifying",
    "exporting",
    "timing",
    "training",
    "reporting",
    "pipeline",
    "estimating",
    "demo",
    "cli",
    "__main__",
]


def test_solvers_import_neither_torch_nor_autocompress() -> None:
    unwanted = ("torch", "autocompress", "cvxpy", "optuna")
    code = f"import sys, solvers; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_solvers_name_neither_torch_nor_autocompress() -> None:
    for path in sorted((ROOT / "solvers").rglob("*.py")):
        found = {name.partition(".")[0] for name in imported(path, "solvers")} & {"torch", "autocompress"}
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


MODULES = sorted(
    path for path in (ROOT / "autocompress").rglob("*.py") if path != ROOT / "autocompress" / "__init__.py"
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "autocompress")))
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    parts = path.relative_to(ROOT / "autocompress").with_suffix("").parts
    assert parts[0] in ORDER, f"{parts[0]} has no place in ORDER, and in the module order of DESIGN.md"
    package = ".".join(("autocompress", *parts[:-1]))
    for name in imported(path, package):
        if name == "autocompress" or name.startswith("autocompress."):
            # `from autocompress import x` of the package itself may only name modules: the façade would be a cycle.
            used = name.split(".")[1] if "." in name else ""
            if used == "__version__":
                continue
            assert used in ORDER, f"{name} is not a module of autocompress"
            assert ORDER.index(used) <= ORDER.index(parts[0]), f"{parts[0]} imports {used}, which stands below it"


def test_every_module_of_the_design_is_in_its_place() -> None:
    text = (ROOT / "DESIGN.md").read_text()
    block = text[text.index("    threads  ") : text.index("## Rules that hold everywhere")]
    assert [line.split()[0] for line in block.splitlines() if line.strip()] == ORDER


def imported(path: Path, package: str) -> list[str]:
    """Every module that the file imports, in functions too, but not for type checking; relative names resolved."""
    names: list[str] = []
    for node in _running(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from autocompress import obs` imports autocompress.obs.
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "autocompress" else [module]
    return names


def _running(node: ast.AST) -> list[ast.AST]:
    """The nodes below, without the bodies of `if TYPE_CHECKING:`."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            continue
        found += [child, *_running(child)]
    return found


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    lines = [
        "from typing import TYPE_CHECKING",
        "import autocompress.obs.rd",
        "from autocompress import cli",
        "from . import near",
        "from ..planning import plan",
        "if TYPE_CHECKING:",
        "    import torch",
        "def f():",
        "    from autocompress.digits import model",
    ]
    path.write_text("\n".join(lines))
    expected = ["typing", "autocompress.obs.rd", "autocompress.cli", "autocompress.storage", "autocompress.planning"]
    assert imported(path, "autocompress.storage") == [*expected, "autocompress.digits"]
