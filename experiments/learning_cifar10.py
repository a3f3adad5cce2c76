"""What the learning allocators find on CIFAR-10, beside the exact solve of the same options, and how fast.

    python experiments/learning_cifar10.py                      # ResNet-20, 12x and 16x, seed 0, options `mixed`
    python experiments/learning_cifar10.py --options default,surface,mixed --strategies exact,galen

Each row is one plan of a strategy by itself, before the rule that no single option may be better: `kl` is its KL to the
dense model on the held-out fifth of 1,024 training images, `after_50` ... the least score (the same KL with statistics
corrected on fewer images) after that many episodes. Seconds count what was measured in this run alone: a run that was
stopped goes on where it was, and its row says `resumed`.
"""

from __future__ import annotations

import argparse
import re
import time

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.planning import budget_bytes, within
from autocompress.strategies import STRATEGIES
from autocompress.tasks import load_task

KEYS = ("task", "options", "ratio", "seed", "strategy", "effort")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--options", default="mixed")
    parser.add_argument("--ratios", default="12,16")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--strategies", default="exact,ajpq,galen")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--out", default="runs/learning_cifar10")
    arguments = parser.parse_args()
    path = RESULTS / "learning_cifar10.csv"
    names = arguments.options.split(",")
    for seed in map(int, arguments.seeds.split(",")):
        task = load_task(ROOT / "experiments" / "tasks" / f"{arguments.task}.py")
        model, data = task.build_model(), task.calibration_batches(seed)
        store = ROOT / arguments.out / arguments.task / f"seed{seed}" / "-".join(names)
        try:
            profile = ac.load_profile(store)
        except ac.AutocompressError:  # none yet, or not finished
            profile = ac.profile(model, ac.calibrate(model, data, seed=seed), store=store, options=names)
        for ratio in arguments.ratios.split(","):
            for strategy in arguments.strategies.split(","):
                facts = (arguments.task, "-".join(names), ratio, str(seed), strategy, arguments.effort)
                if facts in done_keys(path, KEYS):
                    continue
                context = ac.Context(model, data, seed=seed, effort=arguments.effort)
                budget = ac.Budget.parse(f"{ratio}x")
                fitting = within(profile, budget_bytes(budget, profile))
                start, known = time.perf_counter(), set(store.glob("extra/*"))
                plan = STRATEGIES[strategy](fitting, budget, context)
                seconds = time.perf_counter() - start
                curve = re.findall(r"([\d.e+-]+) after (\d+)", " ".join(plan.notes))
                row = {
                    **dict(zip(KEYS, facts, strict=True)),
                    "bytes": plan.predicted_bytes,
                    "kl": f"{context.measure(fitting, plan.layers):.6f}",
                    "loss": f"{plan.predicted_loss:.6f}",
                    "gap": f"{plan.gap:.4g}",
                    **{f"after_{episode}": value for value, episode in curve},
                    "evaluations": context.evaluations - 1,
                    "seconds": round(seconds, 1),
                    "resumed": int(bool(known)),
                    **environment(),
                }
                keep_row(path, row, KEYS)
                print(*(f"{name} {row[name]}" for name in (*KEYS, "bytes", "kl", "seconds")), plan.notes, flush=True)


if __name__ == "__main__":
    main()
