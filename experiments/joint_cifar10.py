"""Sparsity, bits, ranks and channels in one solve: ResNet-20 and -56 on CIFAR-10, a size and MACs limited at once.

    python experiments/joint_cifar10.py          # results/joint_cifar10.csv

One profile of a network has the families `default`, `lowrank` and `channels`. For each budget the solver chooses among
all of it (joint), among whole layers alone (default: sparsity x bits), among low-rank layers and plain widths
(lowrank), and among narrower networks and what compresses their layers (channels); where a family cannot keep the
budget, its row says so. Plans are those of least relative error, and where a family's name ends in "auto" those of
`auto`, whose gap is on the objective that measured best. The file is written, verified and read back, and
what is read is measured: `kl` on the held-out fifth of 1,024 training images, `top1_score` on 2,000 other training
images, and `top1` on the 10,000 test images, for reporting only. Statistics are corrected, nothing is compressed again,
tuned or trained. `loss` is the sum of relative errors; `gap` its proof over all that the family offers, and `proof`
whose word that is. One thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.comparing import task_context
from autocompress.errors import InfeasibleError
from autocompress.measuring import Context
from autocompress.planning import allocate, budget_bytes, energy_losses, limits_of, make_plan, running_cost, within
from autocompress.profiling import Profile
from autocompress.salience import widths
from autocompress.strategies.auto import Auto
from autocompress.tasks import load_task
from autocompress.types import Budget, Option, Plan

KEYS = ("task", "budget", "family")
TASKS = ("resnet20_cifar10", "resnet56_cifar10")
BUDGETS = ("12x, macs=60%", "8x, macs=75%", "16x, macs=50%", "12x")
PLAIN = ("dense", "fp16", "w8", "w6", "w4")
AUTO = ", auto"
FAMILIES: dict[str, Callable[[Option], bool]] = {
    "joint": lambda o: True,
    "default": lambda o: o.rank is None and o.width is None,
    "lowrank": lambda o: o.rank is not None or str(o) in PLAIN,
    "channels": lambda o: o.rank is None,
}
FAMILIES |= {family + AUTO: FAMILIES[family] for family in ("joint", "lowrank", "channels")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--budgets", default=";".join(BUDGETS))
    parser.add_argument("--families", default=";".join(FAMILIES))
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "joint_cifar10")
    parser.add_argument("--results", type=Path, default=RESULTS / "joint_cifar10.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.tasks.split(","):
        run(name, given)


def run(name: str, given: argparse.Namespace) -> None:
    """The rows of one network, from one profile."""
    task = load_task(ROOT / "experiments" / "tasks" / f"{name}.py")
    context, data = task_context(task, 0), task.calibration_batches(0)
    stats = ac.calibrate(context.model, data, seed=0)
    families = ["default", "lowrank", "channels"]
    kept = widths(context.model, data[0], stats)
    profile = ac.profile(context.model, stats, given.store / name, families, workers=1, channels=kept)
    assert task.score is not None
    assert task.evaluate is not None
    for text in given.budgets.split(";"):
        budget = Budget.of(text)
        for family in given.families.split(";"):
            belongs = FAMILIES[family]
            if (name, str(budget), family) in done_keys(given.results, KEYS):
                continue
            part = within(only(profile, belongs), budget_bytes(budget, profile))
            row: dict[str, object] = {"task": name, "budget": str(budget), "family": family}
            began = time.process_time()
            try:
                plan, proof = planned(part, budget, context if family.endswith(AUTO) else None)
            except InfeasibleError as error:
                row["error"] = " ".join(str(error).split())
            else:
                seconds = time.process_time() - began
                small = ac.apply(context.model, plan, profile, data, seed=0)
                path = given.store / f"{name}-{family}.acz"
                size = ac.save(small, plan, path).bytes
                loaded = ac.load(path, copy.deepcopy(context.model))
                dense = running_cost(part, "macs", dict.fromkeys(plan.layers, Option()))
                row |= {
                    "bytes": size,
                    "budget_bytes": plan.budget_bytes,
                    "macs": f"{100 * running_cost(part, 'macs', plan.layers) / dense:.2f}",
                    "split": sum(o.rank is not None for o in plan.layers.values()),
                    "narrower": sum(o.width is not None for o in plan.layers.values()),
                    "loss": f"{plan.predicted_loss:.6g}",
                    "gap": f"{plan.gap:.2e}",
                    "proof": proof,
                    "cpu_seconds": f"{seconds:.1f}",
                    "kl": f"{context.divergence_of(loaded):.5g}",
                    "top1_score": f"{task.score(loaded):.2f}",
                    "top1": f"{task.evaluate(loaded):.2f}",
                }
            keep_row(given.results, {**row, **environment()}, KEYS)
            print(row, flush=True)


def planned(profile: Profile, budget: Budget, context: Context | None) -> tuple[Plan, str]:
    """The plan of least relative error and whose word its bound is; with a context, `auto`'s plan and its name."""
    if context is not None:
        plan = Auto()(profile, budget, context)
        return plan, plan.strategy
    found = allocate(profile, limits_of(budget, profile), energy_losses(profile))
    return make_plan(profile, budget, found, "exact"), "" if found.solution is None else found.solution.message


def only(profile: Profile, belongs: Callable[[Option], bool]) -> Profile:
    """The joint profile with those of its rows only."""
    joint = profile.joint()
    layers = {
        n: dataclasses.replace(x, rows=tuple(r for r in x.rows if belongs(r.option))) for n, x in joint.layers.items()
    }
    found = dataclasses.replace(joint, layers=layers)
    found.__dict__["fingerprint"] = profile.fingerprint
    return found


if __name__ == "__main__":
    main()
