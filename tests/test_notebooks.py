"""The notebooks run on the digits network, by nbmake; as committed they are small, complete, and use the public API."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import autocompress as ac
import solvers

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIBRARIES = {"os", "pathlib", "matplotlib", "numpy", "pandas"}
LARGEST = 400_000  # bytes of a notebook in the repository
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(path: Path) -> tuple[int, str]:
    """What nbmake says of a notebook, run in its own folder on the digits network, with one seed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AUTOCOMPRESS_", "PYTEST_"))}
    own["AUTOCOMPRESS_CACHE"] = os.environ["AUTOCOMPRESS_CACHE"]
    own["AUTOCOMPRESS_SEEDS"] = "1"
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=200", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run([*command, path.name], cwd=path.parent, env=own, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_all_three_are_there() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@each
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path)
    code, said = run(tmp_path / path.name)
    assert code == 0, said
    assert "1 passed" in said


def test_a_broken_cell_fails(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3, 'a broken cell'")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    code, said = run(tmp_path / "broken.ipynb")
    assert code == 1, said
    assert "a broken cell" in said


@each
def test_a_committed_notebook_is_complete_and_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.encode()) < LARGEST
    assert not re.search(r"(?<![\w.$~-])/(?:home|root|Users|tmp|work|mnt|opt|usr|private)/", text), "an absolute path"
    notebook: Any = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 3
    assert [cell.id for cell in notebook.cells] == [f"cell-{n:02d}" for n in range(1, len(notebook.cells) + 1)]
    assert all(cell.metadata == {} for cell in notebook.cells), "experiments/execute_notebooks.py leaves these out"


@each
def test_a_notebook_uses_the_public_api_only(path: Path) -> None:
    notebook: Any = nbformat.read(path, 4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert private_uses(code) == []


def private_uses(code: str) -> list[str]:
    """What of the code reaches behind the public API of the two packages, or into names that begin with one `_`."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [a for a in node.names if a.name.partition(".")[0] not in LIBRARIES]
            found += [a.name for a in names if (a.name, a.asname) != ("autocompress", "ac")]
        elif isinstance(node, ast.ImportFrom):
            home = (node.module or "").partition(".")[0]
            public = solvers.__all__ if node.module == "solvers" else None
            known = home in LIBRARIES
            found += [a.name for a in node.names if not known and a.name not in (public or ())]
        elif isinstance(node, ast.Attribute):
            of_ac = isinstance(node.value, ast.Name) and node.value.id == "ac"
            if node.attr.startswith("_") or (of_ac and node.attr not in ac.__all__):
                found.append(node.attr)
    return found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import autocompress as ac\nfrom solvers import frontier, solve\nac.profile(1).table", []),
        ("import autocompress", ["autocompress"]),
        ("from autocompress.planning import problem_of", ["problem_of"]),
        ("from solvers.hulls import hulls", ["hulls"]),
        ("import autocompress as ac\nac.planning.problem_of()", ["planning"]),
        ("import torch", ["torch"]),
        ("profile._secret", ["_secret"]),
    ],
)
def test_the_search_for_private_uses_finds_them(code: str, found: list[str]) -> None:
    assert private_uses(code) == found
