"""Solver speed: ours and scipy's HiGHS on the same instances in the same run, medians over seeds, as a CSV.

    python experiments/bench_solvers.py                   all tables -> experiments/results/bench_solvers.csv
    python experiments/bench_solvers.py --only exact      one table; the others' rows are kept

Rows carry commit, versions, processor and seeds, and are sorted. Known limitations: times are wall clock on a shared
machine, so ratios within one run mean more than seconds; the library's cost is added up again in integers, because its
"optimal" can be over the budget. HiGHS is stopped at 60 s per instance; a median at that limit understates the ratio.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from solvers import Problem, frontier, solve
from solvers.instances import correlated, curves, several, surfaces
from solvers.milp import MILP

OUT = Path(__file__).parent / "results" / "bench_solvers.csv"
LIMIT = 60.0
# (groups, options): those of the engine's notes (60 x 200, 224 x 64, 1000 x 256), a small and a large one.
SIZES = [(20, 100), (60, 200), (224, 64), (1000, 256)]
FAMILIES: dict[str, Callable[..., Problem]] = {"curves": curves, "surfaces": surfaces}


def library(problem: Problem, gap: float = 1e-4) -> dict[str, Any]:
    """scipy.optimize.milp on the whole problem; its answer added up in integers."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    flat = problem.flat
    n, unit = len(flat.loss), flat.limit.astype(np.float64)
    one = csr_matrix((np.ones(n), (flat.group, np.arange(n))))
    begun = time.perf_counter()
    answer = milp(
        flat.loss,
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(csr_matrix((flat.cost / unit).T), -np.inf, flat.limit / unit),
        ],
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap, "time_limit": LIMIT},
    )
    seconds = time.perf_counter() - begun
    if answer.x is None:
        return {"seconds": seconds, "status": "none", "loss": float("nan"), "over": float("nan"), "gap": float("nan")}
    choice = np.array([int(part.argmax()) for part in np.split(answer.x, flat.start[1:-1])])
    over = int((problem.total_cost(choice) - problem.budget).max())
    return {
        "seconds": seconds,
        "status": "optimal" if answer.status == 0 else "limit",
        "loss": problem.total_loss(choice),
        "over": max(over, 0),
        "gap": float(answer.mip_gap),
    }


def ours(problem: Problem, solver: Any, repeats: int = 3) -> dict[str, Any]:
    """Our solver, checked; the median of a few repeats."""
    runs = [solve(problem, solver, time_limit=LIMIT) for _ in range(repeats)]
    s = runs[0]
    return {
        "seconds": statistics.median(r.seconds for r in runs),
        "status": str(s.status),
        "loss": s.loss,
        "over": 0,
        "gap": s.gap,
    }


def rows(table: str, name: str, size: tuple[int, int], solver: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the CSV from the results per seed."""
    return {
        "table": table,
        "instance": name,
        "groups": size[0],
        "options": size[1],
        "solver": solver,
        "seconds": f"{statistics.median(r['seconds'] for r in results):.5f}",
        "slowest": f"{max(r['seconds'] for r in results):.5f}",
        "gap": f"{max(r['gap'] for r in results):.2e}",
        "optimal": sum(r["status"] == "optimal" for r in results),
        "over_budget": sum(r["over"] > 0 for r in results),
        "worst_excess": max(r["over"] for r in results),
        "seeds": len(results),
    }


def bench_exact(seeds: range) -> list[dict[str, Any]]:
    """`exact` against the library, and the baselines' losses relative to the optimum."""
    out = []
    for name, make in FAMILIES.items():
        for size in SIZES:
            found: dict[str, list[dict[str, Any]]] = {}
            for seed in seeds:
                problem = make(*size, seed)
                assert len(problem.flat.loss)
                best = ours(problem, "exact")
                found.setdefault("exact", []).append(best)
                for baseline in ("lagrangian", "greedy", "uniform"):
                    result = ours(problem, baseline, 1)
                    # For baselines the gap is to the proven optimum.
                    gap = result["loss"] / best["loss"] - 1
                    found.setdefault(baseline, []).append({**result, "gap": gap})
                found.setdefault("scipy.milp", []).append(library(problem))
            out += [rows("exact", name, size, solver, results) for solver, results in found.items()]
    return out


def bench_large(seeds: range) -> list[dict[str, Any]]:
    """`exact` where the library is not asked: the largest shape, and the classical hard one."""
    out = []
    for name, make, size in (("curves", curves, (10_000, 500)), ("correlated", correlated, (224, 64))):
        results = []
        for seed in seeds:
            problem = make(*size, seed)
            assert len(problem.flat.loss)
            results.append(ours(problem, "exact", 1))
        out.append(rows("large", name, size, "exact", results))
    return out


def bench_milp(seeds: range) -> list[dict[str, Any]]:
    """Three resources at 224 x 64: reduced, not reduced, and the library alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        problem = several(224, 64, 3, seed)
        assert len(problem.flat.loss)
        found.setdefault("milp", []).append(ours(problem, "milp"))
        found.setdefault("scipy.milp", []).append(library(problem))
        found.setdefault("highs unreduced", []).append(ours(problem, MILP(reduce=False, start=False), 1))
    return [rows("milp", "several, 3 resources", (224, 64), solver, results) for solver, results in found.items()]


def bench_frontier(seeds: range) -> list[dict[str, Any]]:
    """The whole curve of 1000 x 256."""
    results = []
    for seed in seeds:
        problem = surfaces(1000, 256, seed)
        assert len(problem.flat.loss)
        begun = time.perf_counter()
        front = frontier(problem)
        seconds = time.perf_counter() - begun
        gap = float(front.gap.max())
        results.append({"seconds": seconds, "status": "optimal", "loss": 0.0, "over": 0, "gap": gap})
    return [rows("frontier", "surfaces", (1000, 256), "frontier", results)]


def bench_import(seeds: range) -> list[dict[str, Any]]:
    """`import solvers` in a fresh process."""
    results = []
    code = "import time; t = time.perf_counter(); import solvers; print(time.perf_counter() - t)"
    for _ in seeds:
        seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        results.append({"seconds": seconds, "status": "optimal", "loss": 0.0, "over": 0, "gap": 0.0})
    return [rows("import", "-", (0, 0), "import solvers", results)]


TABLES = {
    "exact": bench_exact,
    "large": bench_large,
    "milp": bench_milp,
    "frontier": bench_frontier,
    "import": bench_import,
}


def provenance(seeds: range) -> dict[str, str]:
    """What a row was made with."""
    import highspy
    import scipy

    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "highspy": f"{highspy.Highs().version()}",
        "cpu": f"{model[0] if model else platform.processor()} x {os.cpu_count()}",
        "seed": f"{seeds.start}-{seeds.stop - 1}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(TABLES), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    asked = arguments.only or sorted(TABLES)
    seeds = range(1, 1 + arguments.seeds)
    kept = []
    if arguments.out.exists():
        with arguments.out.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["table"] not in asked]
    for name in asked:
        stamp = provenance(seeds)
        kept += [{**row, **stamp} for row in TABLES[name](seeds)]
    kept.sort(key=lambda r: (r["table"], r["instance"], int(r["groups"]), int(r["options"]), r["solver"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    for row in kept:
        if row["table"] in asked:
            print(*(f"{row[key]!s:>12}" for key in list(row)[:12]))


if __name__ == "__main__":
    main()
