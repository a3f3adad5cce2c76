"""What rules that set sparsities and widths make of one profile, beside exact solves of the relative error.

    python experiments/rules_cifar10.py                     # ResNet-20 at 12x, 16x, 24x, seed 0
    python experiments/rules_cifar10.py --ratios 20 --strategies erk,lamp

One row per (network, ratio, seed, strategy). The profile has the options `default,surface`; `exact` chooses from all of
them, `exact_integers` from what the rules choose from: plain integers, pruned or not (s60w4, w4). Plans are the rules'
own, not improved by the never-worse rule. `plan` names what the rule settled on, `loss` is the summed relative error,
`kl` the mean KL to the dense model on the held-out fifth of the calibration images, `score` top-1 in percent on 2,000
training images that calibration never draws. `bytes` is the file's length; `paper_bytes` counts codes of weights that
are not zero, without positions, as Yang et al. do. `seconds` is what the rule takes, on whatever else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.errors import InfeasibleError
from autocompress.measuring import Context
from autocompress.planning import budget_bytes, energy_losses, within
from autocompress.profiling import Profile
from autocompress.strategies import STRATEGIES, paper_counted
from autocompress.tasks import Task, load_task
from autocompress.types import Budget, Option, Plan

KEYS = ("task", "ratio", "seed", "strategy")
RULES = ("uniform_bits", "uniform_sparsity", "magnitude", "erk", "lamp", "yang", "opq", "opq_energy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--ratios", default="12,16,24")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--strategies", default=",".join(("exact", "exact_integers", *RULES)))
    parser.add_argument("--out", default="runs/rules_cifar10")
    arguments = parser.parse_args()
    path = RESULTS / "rules_cifar10.csv"
    for seed in arguments.seeds.split(","):
        task = load_task(ROOT / "experiments" / "tasks" / f"{arguments.task}.py")
        model, data = task.build_model(), task.calibration_batches(int(seed))
        store = ROOT / arguments.out / arguments.task / f"seed{seed}" / "profile"
        statistics = ac.calibrate(model, data, seed=int(seed))
        profile = ac.profile(model, statistics, store=store, options=["default,surface"])
        context = Context(model, data, seed=int(seed))
        for ratio in arguments.ratios.split(","):
            for strategy in arguments.strategies.split(","):
                if (arguments.task, ratio, seed, strategy) in done_keys(path, KEYS):
                    continue
                key = {"task": arguments.task, "ratio": ratio, "seed": seed, "strategy": strategy}
                try:
                    row = {**key, **measured(task, profile, context, f"{ratio}x", strategy)}
                except InfeasibleError as error:
                    row = {**key, "plan": f"nothing below {error.smallest_bytes} bytes", **environment()}
                keep_row(path, row, KEYS)
                print(*(f"{n} {row.get(n)}" for n in (*KEYS, "plan", "bytes", "loss", "kl", "score")), flush=True)


def measured(task: Task, profile: Profile, context: Context, budget: str, strategy: str) -> dict[str, Any]:
    """The figures of one plan."""
    assert task.score is not None
    wanted = Budget.parse(budget)
    profile = within(profile, budget_bytes(wanted, profile))
    offered = integers(profile) if strategy.endswith("_integers") else profile
    start = time.perf_counter()
    plan: Plan = STRATEGIES[strategy.removesuffix("_integers")](offered, wanted, context)
    seconds = time.perf_counter() - start
    assert plan.predicted_bytes <= plan.budget_bytes
    losses = energy_losses(profile)
    rows = {n: profile.layers[n].row(option) for n, option in plan.layers.items()}
    small = context.build(profile, plan.layers)
    return {
        "plan": plan.strategy,
        "bytes": plan.predicted_bytes,
        "loss": f"{sum(losses[n][profile.layers[n].rows.index(row)] for n, row in rows.items()):.5f}",
        "kl": f"{context.divergence_of(small):.5f}",
        "score": f"{task.score(small):.2f}",
        "paper_bytes": paper_counted(profile, plan),
        "seconds": f"{seconds:.1f}",
        **environment(),
    }


def integers(profile: Profile) -> Profile:
    """The profile with nothing but what rules choose from: plain integers, pruned or not."""

    def plain(option: Option) -> bool:
        return option.bits is not None and option == Option(sparsity=option.sparsity, bits=option.bits)

    layers = {
        name: dataclasses.replace(layer, rows=tuple(r for r in layer.rows if plain(r.option)))
        for name, layer in profile.layers.items()
    }
    return dataclasses.replace(profile, layers=layers)


if __name__ == "__main__":
    main()
