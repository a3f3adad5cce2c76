"""What each objective and each search makes of one profile: measured KL, evaluations and seconds, before any correction
but that of statistics.

    AUTOCOMPRESS_DATA=... python experiments/objectives_cifar10.py [--ratios 12 16 24] [--strategies exact kl ...]

Results: experiments/results/objectives_cifar10.csv. `kl` is on the slice of calibration data that the Hessians never
saw (what searches score on, with statistics corrected on fewer samples), `kl_all` on all of it, `score` the top-1 on
2,000 training images that no calibration sample contains: no test image is used. `evaluations` and `cpu_seconds` are
those of this call; what a store holds already costs none. Processor seconds, as several things ran on the machine at a
time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import RESULTS, done_keys, environment, keep_row

from autocompress.batches import batch_samples
from autocompress.calibration import calibrate
from autocompress.measuring import Context
from autocompress.planning import budget_bytes, within
from autocompress.profiling import profile
from autocompress.strategies import STRATEGIES
from autocompress.tasks import load_task
from autocompress.types import Budget

KEYS = ("task", "ratio", "strategy", "seed")
NAMES = "exact raw kl loss fisher hawq alds_minimax itpruner itpruner_quadratic spdy evopress tpe nsga2".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--ratios", type=float, nargs="+", default=[12.0, 16.0, 24.0])
    parser.add_argument("--strategies", nargs="+", default=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, required=True, help="where the profile is kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives_cifar10.csv")
    given = parser.parse_args()
    task = load_task(Path(__file__).parent / "tasks" / f"{given.task}.py")
    model, data = task.build_model(), task.calibration_batches(given.seed)
    found = profile(model, calibrate(model, data, seed=given.seed), store=given.store)
    assert task.score is not None
    for name in given.strategies:
        for ratio in given.ratios:
            key = (given.task, f"{ratio:g}", name, str(given.seed))
            if key in done_keys(given.results, KEYS):
                continue
            budget = Budget(ratio=ratio)
            fitting = within(found, budget_bytes(budget, found))
            context = Context(model, data, seed=given.seed)
            began = time.process_time()
            plan = STRATEGIES[name](fitting, budget, context)
            seconds, evaluations = time.process_time() - began, context.evaluations
            small = context.build(fitting, plan.layers)
            held, fit = context.held_samples, sum(batch_samples(b) for b in context.fit)
            kl = context.divergence_of(small)
            overall = (kl * held + context.divergence_of(small, "fit") * fit) / (held + fit)
            row = dict(zip(KEYS, key, strict=True)) | {
                "kl": f"{kl:.5f}",
                "kl_all": f"{overall:.5f}",
                "score": f"{task.score(small):.2f}",
                "bytes": plan.predicted_bytes,
                "evaluations": evaluations,
                "cpu_seconds": f"{seconds:.1f}",
            }
            keep_row(given.results, row | environment(), KEYS)
            print(row, flush=True)


if __name__ == "__main__":
    main()
