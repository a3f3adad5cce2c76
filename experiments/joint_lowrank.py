"""Ranks beside widths, sparsity and the trellis in one solve: ResNet-20 on CIFAR-10, a size and MACs limited at once.

    python experiments/joint_lowrank.py          # results/joint_lowrank.csv

One profile has the families `default` and `lowrank`. For each budget the solver chooses among all of it (joint),
among whole layers alone (default), and among low-rank layers and plain widths alone (lowrank: ranks, fp16, w8, w6, w4);
where a family cannot keep the budget, its row says so. Plans are the solver's own (`milp`, for at most --seconds of the
wall clock, so that a busy machine gets a larger gap and maybe another plan; with no limit it ends at a gap of 1e-4),
statistics are corrected, nothing is compressed again or tuned. `loss` is the sum of relative errors, `gap` its proof
over what the payloads may take; `kl` is on
the held-out fifth of 1,024 training images; top-1 on 2,000 other training images (`top1_score`), and on the 10,000 test
images (`top1`) for reporting only. Dense: 91.73.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.comparing import task_context
from autocompress.compressors import Measured
from autocompress.planning import Limits, budget_bytes, energy_losses, limits_of, problem_of, running_cost, within
from autocompress.profiling import Profile
from autocompress.tasks import load_task
from autocompress.types import Budget, Option
from solvers import Solution, solve

KEYS = ("budget", "family")
BUDGETS = ("6x, macs=60%", "12x, macs=60%", "16x, macs=75%", "8x, macs=50%", "12x", "16x")
PLAIN = ("dense", "fp16", "w8", "w6", "w4")
FAMILIES: dict[str, Callable[[Option], bool]] = {
    "joint": lambda o: True,
    "default": lambda o: o.rank is None,
    "lowrank": lambda o: o.rank is not None or str(o) in PLAIN,
}


def solved(profile: Profile, limits: Limits, seconds: float) -> tuple[Solution, dict[str, Measured]] | None:
    """The solver's answer and its rows, with less for the payloads until the whole file fits; None for no answer."""
    losses = energy_losses(profile)
    dense = {n: layer.rows[0] for n, layer in profile.layers.items()}
    room = limits.bytes - profile.template.file_bytes(dense) + sum(row.bytes for row in dense.values())
    while True:
        solution = solve(problem_of(profile, limits, losses, room), "milp", time_limit=seconds)
        if not solution.found:
            return None
        rows = {n: x.rows[int(i)] for (n, x), i in zip(profile.layers.items(), solution.choice, strict=True)}
        over = profile.template.file_bytes(rows) - limits.bytes
        if over <= 0:
            return solution, rows
        room -= over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default=";".join(BUDGETS))
    parser.add_argument("--seconds", type=float, default=120.0, help="of each solve, at most")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "joint_lowrank")
    parser.add_argument("--results", type=Path, default=RESULTS / "joint_lowrank.csv")
    given = parser.parse_args()
    task = load_task(ROOT / "experiments" / "tasks" / "resnet20_cifar10.py")
    context = task_context(task, 0, "normal")
    stats = ac.calibrate(context.model, task.calibration_batches(0), seed=0)
    profile = ac.profile(context.model, stats, given.store, ["default", "lowrank"])
    for text in given.budgets.split(";"):
        budget = Budget.of(text)
        for family, belongs in FAMILIES.items():
            if (str(budget), family) in done_keys(given.results, KEYS):
                continue
            layers = {
                n: dataclasses.replace(x, rows=tuple(r for r in x.rows if belongs(r.option)))
                for n, x in profile.layers.items()
            }
            part = dataclasses.replace(profile, layers=layers)
            row: dict[str, object] = {"budget": str(budget), "family": family, "seconds": given.seconds}
            limited = within(part, budget_bytes(budget, part))
            found = solved(limited, limits_of(budget, limited), given.seconds)
            if found is None:
                row["error"] = "no choice of this family is within both limits"
            else:
                solution, rows = found
                layers_of = {n: r.option for n, r in rows.items()}
                small = context.build(limited, layers_of)
                dense = dict.fromkeys(layers_of, Option())
                macs = running_cost(limited, "macs", layers_of) / running_cost(limited, "macs", dense)
                assert task.score is not None
                assert task.evaluate is not None
                row |= {
                    "bytes": limited.template.file_bytes(rows),
                    "macs": f"{100 * macs:.2f}",
                    "split": sum(o.rank is not None for o in layers_of.values()),
                    "loss": f"{solution.loss:.6g}",
                    "gap": f"{solution.gap:.2e}",
                    "kl": f"{context.divergence_of(small):.5g}",
                    "top1_score": f"{task.score(small):.2f}",
                    "top1": f"{task.evaluate(small):.2f}",
                }
            keep_row(given.results, row | environment(), KEYS)
            print(row, flush=True)


if __name__ == "__main__":
    main()
