"""Which divergence tells whether sequential mode is worth keeping: on the held-out slice, plain or softened.

    python experiments/sequential_cifar10.py --modes independent      # makes the profiles and plans
    python experiments/keeping_trial.py

The plans of sequential_cifar10.py, applied and compressed again layer by layer. `plain` and `soft`: mean KL to the
dense model of outputs as they are and divided by the context's temperature, on the held-out fifth of the calibration
images (`held`), by which plans were chosen too, and on other training images (`other`), which nothing saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import RESULTS, ROOT, done_keys, environment, keep_row
from sequential_cifar10 import OTHER

import autocompress as ac
from autocompress.batches import sample_digests
from autocompress.measuring import Context
from autocompress.profiling import load_profile
from autocompress.sequential import apply_sequentially
from autocompress.tasks import load_task

KEYS = ("task", "ratio", "seed", "mode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--ratios", default="24,16,12")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default=str(ROOT / "runs" / "sequential_cifar10"), help="of sequential_cifar10.py")
    arguments = parser.parse_args()
    path = RESULTS / "keeping_trial.csv"
    done = done_keys(path, KEYS)
    task = load_task(ROOT / "experiments" / "tasks" / f"{arguments.task}.py")
    model = task.build_model()
    for seed in map(int, arguments.seeds.split(",")):
        folder = Path(arguments.out) / arguments.task / f"seed{seed}"
        data, profile = task.calibration_batches(seed), load_profile(folder / "profile")
        context = Context(model, data, seed=seed)
        seen = {digest for batch in data for digest in sample_digests(batch)}
        draw = [b[[d not in seen for d in sample_digests(b)]] for b in task.calibration_batches(seed + OTHER)]
        other = Context(model, draw, seed=seed)
        for ratio in arguments.ratios.split(","):
            plan = ac.Plan.from_json((folder / f"{ratio}x.json").read_text())
            for mode in ("independent", "sequential"):
                if (arguments.task, ratio, str(seed), mode) in done:
                    continue
                make = ac.apply if mode == "independent" else apply_sequentially
                small = make(model, plan, profile, data, seed)
                figures: dict[str, str] = {}
                for name, (plain, soft) in (("held", context.judge(small)), ("other", other.judge(small, "all"))):
                    figures |= {f"plain_{name}": f"{plain:.6f}", f"soft_{name}": f"{soft:.6f}"}
                row = {"task": arguments.task, "ratio": ratio, "seed": seed, "mode": mode, **figures, **environment()}
                keep_row(path, row, KEYS)
                print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
