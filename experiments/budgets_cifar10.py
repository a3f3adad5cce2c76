"""Accuracy of whole files against their budgets, on CIFAR-10: the table of the README.

    python experiments/budgets_cifar10.py                                     # ResNet-20 at 8x ... 32x, seeds 0-2
    python experiments/budgets_cifar10.py --task resnet56_cifar10 --seeds 0

    python experiments/budgets_cifar10.py --task resnet56_cifar10 --seeds 0 --effort fast --out runs/fast

Each row is one `autocompress compress` in its own process: strategy auto, effort normal unless told otherwise, 1,024
unaugmented training images, of which a fifth is held out from the Hessians to measure plans on; the seed draws the
images. Within a task and seed the later budgets find the profile of the first. The metric is top-1 in percent on the
10,000 test images, of the network read back from the file. Rows that stand in the CSV are not computed again; with
`--collect` no row is computed, and those results are added that stand in --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from common import RESULTS, ROOT, done_keys, environment, keep_row

KEYS = ("task", "effort", "ratio", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--ratios", default="12,16,24,8,20,32")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--out", default="runs/budgets_cifar10")
    arguments = parser.parse_args()
    path = RESULTS / "budgets_cifar10.csv"
    known = done_keys(path, KEYS)
    for seed in arguments.seeds.split(","):
        for ratio in arguments.ratios.split(","):
            if (arguments.task, arguments.effort, ratio, seed) in known:
                continue
            out = ROOT / arguments.out / arguments.task / f"seed{seed}"
            command = [sys.executable, "-m", "autocompress", "compress", f"experiments/tasks/{arguments.task}.py"]
            command += [
                "--budget",
                f"{ratio}x",
                "--seed",
                seed,
                "--effort",
                arguments.effort,
                "--out",
                str(out / f"{ratio}x"),
                "--store",
                str(out / "profile"),
            ]
            fresh = not (out / "profile" / "profile.json").exists()
            start = time.perf_counter()
            if not arguments.collect:
                subprocess.run(command, cwd=ROOT, check=True)
            seconds = time.perf_counter() - start
            metrics = json.loads((out / f"{ratio}x" / "metrics.json").read_text())
            if metrics["asked"]["effort"] != arguments.effort:
                raise SystemExit(f"{out}/{ratio}x was made with effort {metrics['asked']['effort']}")
            if arguments.collect:
                seconds, fresh = metrics["seconds"], metrics["stage_seconds"]["profile"] > 5.0
            row = {
                "task": arguments.task,
                "effort": arguments.effort,
                "ratio": ratio,
                "seed": seed,
                "budget_bytes": metrics["budget_bytes"],
                "bytes": (out / f"{ratio}x" / "model.acz").stat().st_size,
                "top1": round(metrics["metric"], 2),
                "top1_dense": round(metrics["baseline_metric"], 2),
                "kl": f"{metrics['measured']['kl']:.6f}",
                "single_option_kl": f"{metrics['measured'].get('single_option_kl', float('nan')):.6f}",
                "strategy": metrics["strategy"],
                "gap": metrics["gap"],
                "seconds": round(seconds, 1),
                "with_profiling": int(fresh),
                **environment(),
            }
            keep_row(path, row, KEYS)
            print(row["task"], f"{ratio}x seed {seed}:", row["bytes"], "bytes,", row["top1"], "%,", row["seconds"], "s")


if __name__ == "__main__":
    main()
