"""What sequential mode and label-free tuning gain on CIFAR-10, each alone and both, at the same bytes.

    python experiments/sequential_cifar10.py                                # ResNet-20 at 24x ... 12x, seeds 0-2
    python experiments/sequential_cifar10.py --ratios 16 --seeds 0 --modes independent,sequential

One row per (network, ratio, seed, mode). All modes of a ratio and seed start from one plan of strategy auto on 1,024
unaugmented training images; profiles and plans are kept in --out. Nothing is dropped here, as `compress` would where
the held-out slice says worse: `kl_held` is what it looks at, the mean KL to the dense model on the fifth of the
calibration images that nothing else saw. `kl_other` is the same on other training images, another draw of 1,024 without
those of the first; `score` is top-1 in percent on the 2,000 training images that calibration never draws. `top1` is
top-1 in percent on the 10,000 test images, which nothing was chosen by. `bytes` is the file's length, `seconds` that of
the mode alone, on top of calibration, profile and plan.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, done_keys, environment, keep_row
from torch import nn

import autocompress as ac
from autocompress.applying import encoded_of
from autocompress.batches import sample_digests
from autocompress.files import atomic_path
from autocompress.measuring import Context
from autocompress.pipeline import TUNING_STEPS
from autocompress.sequential import apply_sequentially
from autocompress.tasks import load_task
from autocompress.tuning import tune

KEYS = ("task", "ratio", "seed", "mode")
MODES = ("independent", "sequential", "tuning", "both")
OTHER = 1_000  # added to a seed, it draws the images of `kl_other`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--ratios", default="24,16,20,12")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--steps", type=int, default=TUNING_STEPS["normal"], help="of tuning")
    parser.add_argument("--out", default="runs/sequential_cifar10")
    arguments = parser.parse_args()
    path = RESULTS / "sequential_cifar10.csv"
    for seed in arguments.seeds.split(","):
        for ratio in arguments.ratios.split(","):
            known = done_keys(path, KEYS)
            modes = [m for m in arguments.modes.split(",") if (arguments.task, ratio, seed, m) not in known]
            folder = ROOT / arguments.out / arguments.task / f"seed{seed}"
            for row in measured(arguments.task, ratio, int(seed), modes, arguments.steps, folder) if modes else ():
                keep_row(path, row, KEYS)
                print(*(f"{name} {row[name]}" for name in (*KEYS, "bytes", "top1", "kl_other", "seconds")), flush=True)


def measured(name: str, ratio: str, seed: int, modes: list[str], steps: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one ratio and seed, as they come."""
    task = load_task(ROOT / "experiments" / "tasks" / f"{name}.py")
    assert task.evaluate is not None
    assert task.score is not None
    model, data = task.build_model(), task.calibration_batches(seed)
    profile = ac.profile(model, ac.calibrate(model, data, seed=seed), store=folder / "profile")
    context = Context(model, data, seed=seed)
    seen = {digest for batch in data for digest in sample_digests(batch)}
    draw = [b[[d not in seen for d in sample_digests(b)]] for b in task.calibration_batches(seed + OTHER)]
    other = Context(model, draw, seed=seed)
    kept = folder / f"{ratio}x.json"
    plan = ac.Plan.from_json(kept.read_text()) if kept.exists() else None
    if plan is None or plan.fingerprint != profile.fingerprint:
        plan = ac.plan(profile, f"{ratio}x", "auto", context).replace(seed=seed)
        with atomic_path(kept) as scratch:
            scratch.write_text(plan.to_json())
    made: dict[str, tuple[nn.Module, float]] = {}
    needed = {"independent", *modes, *(["sequential"] if "both" in modes else [])}
    for mode in (m for m in MODES if m in needed):
        began = time.perf_counter()
        if mode == "independent":
            small = ac.apply(model, plan, profile, data, seed=seed)
        elif mode == "sequential":
            small = apply_sequentially(model, plan, profile, data, seed)
        else:
            small, before = made["independent" if mode == "tuning" else "sequential"]
            began -= before
            small = tune(model, small, context, steps, seed)
        made[mode] = small, time.perf_counter() - began
        if mode not in modes:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            final = encoded_of(small).plan
            info = ac.save(small, final, Path(scratch) / "model.acz")
            assert info.bytes == final.predicted_bytes
            restored = ac.load(info.path, task.build_model())
        yield {
            "task": name,
            "ratio": ratio,
            "seed": seed,
            "mode": mode,
            "budget_bytes": final.budget_bytes,
            "bytes": info.bytes,
            "top1": round(task.evaluate(restored), 2),
            "score": round(task.score(restored), 2),
            "kl_held": f"{context.divergence_of(restored):.6f}",
            "kl_other": f"{other.divergence_of(restored, 'all'):.6f}",
            "strategy": plan.strategy,
            "steps": steps if mode in ("tuning", "both") else 0,
            "seconds": round(made[mode][1], 1),
            **environment(),
        }


if __name__ == "__main__":
    main()
