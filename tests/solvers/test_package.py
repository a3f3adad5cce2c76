"""The package as somebody else would install it: light to import, alone, documented by what runs."""

from __future__ import annotations

import doctest
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import solvers
from solvers import SOLVERS, Problem, solve

ROOT = Path(solvers.__file__).parent


def test_readme_runs() -> None:
    flags = doctest.NORMALIZE_WHITESPACE
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=flags)
    assert results.attempted >= 10
    assert results.failed == 0


def test_import_is_light_and_alone() -> None:
    """Under 0.3 s of processor time (the best of three), without torch, autocompress or heavy libraries."""
    heavy = ("torch", "autocompress", "cvxpy", "optuna", "scipy", "numba", "pandas", "highspy")
    code = (
        "import time; t = time.process_time(); import solvers; t = time.process_time() - t; import sys; "
        f"print(t, [m for m in {heavy!r} if m in sys.modules])"
    )
    best = min(
        (
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
            ).stdout
        )
        .strip()
        .split(" ", 1)
        for _ in range(3)
    )
    assert best[1] == "[]"
    assert float(best[0]) < 0.3


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_nothing_is_printed_or_logged(
    solver: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not by the libraries below either (HiGHS prints from C)."""
    problem = Problem([[3.0, 1.0, 0.0]] * 4, [[0, 2, 5]] * 4, 11)
    with caplog.at_level(logging.DEBUG, logger="solvers"):
        solve(problem, solver)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_every_public_name_is_there_and_documented() -> None:
    for name in solvers.__all__:
        value = getattr(solvers, name)
        assert value.__doc__, name
    assert (ROOT / "py.typed").exists()


def test_no_file_is_too_long() -> None:
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
