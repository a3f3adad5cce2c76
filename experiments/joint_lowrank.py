"""Ranks beside widths, sparsity and the trellis in one solve: ResNet-20 on CIFAR-10, a size and MACs limited at once.

    python experiments/joint_lowrank.py          # results/joint_lowrank.csv

One profile has the families `default` and `lowrank`. For each budget the exact solve chooses among all of it (joint),
among whole layers alone (default), and among low-rank layers and plain widths alone (lowrank: ranks, fp16, w8, w6, w4);
where a family cannot keep the budget, its row says what the least is. Plans are the solver's own, statistics are
corrected, nothing is compressed again or tuned. `loss` is the sum of relative errors and `gap` its proof; `kl` is on
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
from autocompress.errors import InfeasibleError
from autocompress.planning import budget_bytes, running_cost, within
from autocompress.strategies import STRATEGIES
from autocompress.tasks import load_task
from autocompress.types import Budget, Option

KEYS = ("budget", "family")
BUDGETS = ("6x, macs=60%", "12x, macs=60%", "8x, macs=50%", "16x, macs=75%", "12x, macs=90%", "12x", "16x")
PLAIN = ("dense", "fp16", "w8", "w6", "w4")
FAMILIES: dict[str, Callable[[Option], bool]] = {
    "joint": lambda o: True,
    "default": lambda o: o.rank is None,
    "lowrank": lambda o: o.rank is not None or str(o) in PLAIN,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default=";".join(BUDGETS))
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
            row: dict[str, object] = {"budget": str(budget), "family": family}
            try:
                limited = within(part, budget_bytes(budget, part))
                plan = STRATEGIES["exact"](limited, budget, context)
            except InfeasibleError as error:
                row["error"] = str(error)
            else:
                small = context.build(limited, plan.layers)
                dense = dict.fromkeys(plan.layers, Option())
                macs = running_cost(limited, "macs", plan.layers) / running_cost(limited, "macs", dense)
                assert task.score is not None
                assert task.evaluate is not None
                row |= {
                    "bytes": plan.predicted_bytes,
                    "macs": f"{100 * macs:.2f}",
                    "split": sum(o.rank is not None for o in plan.layers.values()),
                    "loss": f"{plan.predicted_loss:.6g}",
                    "gap": f"{plan.gap:.2e}",
                    "kl": f"{context.divergence_of(small):.5g}",
                    "top1_score": f"{task.score(small):.2f}",
                    "top1": f"{task.evaluate(small):.2f}",
                }
            keep_row(given.results, row | environment(), KEYS)
            print(row, flush=True)


if __name__ == "__main__":
    main()
