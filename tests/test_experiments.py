"""Experiments: rows that are kept as they come, by several processes; the table of strategies, on a tiny task."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from tiny_tasks import write_task

from autocompress.strategies import STRATEGIES

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def strategies_cifar10(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("strategies_cifar10")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_several_processes_all_stay(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r})\n"
        "from pathlib import Path; from common import keep_row\n"
        f"for i in range(40): keep_row(Path({str(tmp_path / 'new' / 'rows.csv')!r}), "
        "{'who': sys.argv[1], 'i': i}, ('who', 'i'))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, who]) for who in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = [(row["who"], int(row["i"])) for row in rows_of(tmp_path / "new" / "rows.csv")]
    assert found == [(who, i) for who in "abc" for i in range(40)]


def test_every_strategy_has_its_place(strategies_cifar10: ModuleType) -> None:
    assert sorted(strategies_cifar10.listed()) == sorted(STRATEGIES)
    named = [name for names in strategies_cifar10.SECTIONS.values() for name in names]
    assert len(set(named)) == len(named)


def test_the_table_of_strategies_goes_on_where_it_was_stopped(
    strategies_cifar10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.profiling.default_workers", lambda: 1)  # processes take longer than three layers
    path, evaluated = tmp_path / "rows.csv", tmp_path / "evaluated"
    body = f"open({str(evaluated)!r}, 'a').write('.'); return 50.0 + model.head.bias[0].item()"
    task = write_task(tmp_path, "tiny.py", evaluate=f"def evaluate(model):\n    {body}\n")

    def run(ratios: str, strategies: str, seeds: str = "0,1") -> int:
        before = len(evaluated.read_text()) if evaluated.exists() else 0
        arguments = {"--tasks": task, "--ratios": ratios, "--seeds": seeds, "--strategies": strategies}
        arguments |= {"--options": "w2,s50w3,w8", "--out": tmp_path / "out", "--results": path}
        strategies_cifar10.main([str(text) for pair in arguments.items() for text in pair])
        return len(evaluated.read_text()) - before

    run("3,100", "exact,uniform")
    first = rows_of(path)
    at = [(r["task"], r["ratio"], r["seed"], r["strategy"]) for r in first]
    assert at == [("tiny", x, seed, name) for x in ("3", "100") for seed in "01" for name in ("exact", "uniform")]
    for row in first:
        if row["ratio"] == "100":
            assert row["error"].startswith("InfeasibleError")
            assert row["bytes"] == row["top1"] == row["kl"] == ""
        else:
            assert row["error"] == ""
            assert int(row["bytes"]) <= int(row["budget_bytes"])
            assert float(row["ratio_stored"]) >= 3
            assert float(row["ratio_paper"]) > 3  # no positions, norms, header
            assert 49 < float(row["top1"]) < 53
            assert row["commit"]
    assert run("3,100", "exact,uniform") == 0  # nothing is computed, the dense model's figure neither
    assert rows_of(path) == first
    # A row that the results lost is found in the store; a new one is computed. The dense model is evaluated for both.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if ",3,0,uniform," not in line) + "\n")
    assert run("3", "uniform", seeds="0") == 1
    assert rows_of(path) == first
    assert run("3", "uniform,greedy", seeds="0") == 2
    assert len(rows_of(path)) == len(first) + 1

    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot_strategies")
    plot.main(["--results", str(path), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "strategies_cifar10.md").read_text()
    top1 = pd.DataFrame(first).query("strategy == 'exact' and ratio == '3'")["top1"].astype(float)
    (line,) = [line for line in text.splitlines() if line.startswith("| exact |") and "±" in line]
    assert f"{top1.mean():.2f} ± {top1.std():.2f}" in line
    assert line.endswith("| no plan |")
    assert "| *baselines* | | |" in text
    assert "- exact at 100x: InfeasibleError" in text
    assert (tmp_path / "docs" / "strategies_cifar10.png").stat().st_size > 10_000


def test_auto_stands_beside_the_best_single_strategy_with_the_noise(strategies_cifar10: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot_strategies")
    values = {"a": (90.0, 91.0, 92.0), "b": (91.0, 91.5, None), "c": (80.0, 80.0, 80.0), "auto": (90.5, 91.0, 91.0)}
    rows = pd.DataFrame(
        [(s, seed, v, None if v else "x") for s, of in values.items() for seed, v in enumerate(of)],
        columns=["strategy", "seed", "top1", "error"],
    )
    # b lacks a seed; the differences of auto to a are +0.5, 0 and -1.
    assert plot.verdict(rows) == "a 91.00, c 80.00; auto 90.83, -0.17 ± 0.76 to a"
    assert plot.verdict(rows[rows["seed"] == 0]).endswith("auto 90.50, -0.50 (one seed: no noise known) to b")
    assert (
        plot.verdict(rows[(rows["strategy"] == "b") & (rows["seed"] == 2)]) == "no strategy has a plan for every seed"
    )


def test_a_killed_profile_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    kill_engines = importlib.import_module("kill_engines")
    task = str(write_task(tmp_path, "tiny.py"))
    run, other = (kill_engines.Run(task, tmp_path / name, "inline", "w4,w8") for name in ("killed", "undisturbed"))
    found = kill_engines.killed(run, "driver", 0.0, 0)
    assert found.hit
    assert not found.survived
    assert (found.again, len(run.layers())) == (0, 3)
    assert found.fingerprint == other.finish()
    assert run.contents() == other.contents()
