"""Which rate-distortion options a solve misses: the default grid beside larger and smaller ones, on the same profile.

    python experiments/grid_trial.py                        # digits and ResNet-20; some 5 minutes of a core
    python experiments/grid_trial.py --networks resnet56    # 10 more

One profile per network, seed 0, with every option of FULL beside the uniform widths and the trellis; then strategy
`exact` at every ratio on the rows of each set. `loss` is the least sum of relative errors, `over_all` that over what
all options reach; blank where no file of that size can be made.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.compressors import default_options
from autocompress.errors import InfeasibleError
from autocompress.tasks import load_task
from autocompress.types import Option

TASKS = {
    "resnet20": str(ROOT / "experiments" / "tasks" / "resnet20_cifar10.py"),
    "resnet56": str(ROOT / "experiments" / "tasks" / "resnet56_cifar10.py"),
    "digits": "digits",
}
KEYS = ("network", "set", "ratio")
RATIOS = (6, 8, 12, 16, 20, 24, 32, 40, 50, 64, 80)
DEFAULT = set(default_options())
OTHERS = [o for o in default_options() if o.step is None or o.trellis]
FULL = [
    Option(sparsity=s, step=round(0.1 * 2 ** (k / 2), 3), lam=lam)
    for s in (0.0, 35.0, 60.0, 77.5, 90.0, 97.0)
    for k in range(11)
    for lam in (0.1, 0.3, 0.7)
]
FINE = [
    Option(sparsity=s, step=round(0.1 * 2 ** (k / 4), 3), lam=lam)
    for s in (0.0, 35.0)
    for k in range(21)
    for lam in (0.05, 0.1, 0.2)
]
SETS: dict[str, Callable[[Option], bool]] = {
    "all": lambda o: True,
    "full": lambda o: o in FULL,
    "default": lambda o: o in DEFAULT,
    "default and fine steps": lambda o: o in DEFAULT or o in FINE,
    "default, one price": lambda o: o in DEFAULT and o.lam == 0.1,
    "default, below 50 % pruned": lambda o: o in DEFAULT and o.sparsity < 50,
    "none": lambda o: False,
    "default, no trellis": lambda o: o in DEFAULT,
}


def _offered(name: str, option: Option) -> bool:
    if option.trellis:
        return "no trellis" not in name
    return option.step is None or SETS[name](option)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits,resnet20")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "grid_trial")
    given = parser.parse_args()
    path = RESULTS / "grid_trial.csv"
    for network in given.networks.split(","):
        done = done_keys(path, KEYS)
        if all((network, name, str(ratio)) in done for name in SETS for ratio in RATIOS):
            continue
        task = load_task(TASKS[network])
        model = task.build_model()
        stats = ac.calibrate(model, task.calibration_batches(0), seed=0)
        options = list(dict.fromkeys([*OTHERS, *FULL, *FINE]))
        found = ac.profile(model, stats, options=options, store=given.store / network)
        full: dict[int, float] = {}
        for name in SETS:
            part = dataclasses.replace(
                found,
                layers={
                    n: dataclasses.replace(
                        x,
                        rows=tuple(r for r in x.rows if _offered(name, r.option)),
                    )
                    for n, x in found.layers.items()
                },
            )
            for ratio in RATIOS:
                try:
                    loss = ac.plan(part, f"{ratio}x", "exact").predicted_loss
                except InfeasibleError:
                    loss = float("nan")
                full.setdefault(ratio, loss)
                known = loss == loss
                row = {
                    "network": network,
                    "set": name,
                    "ratio": ratio,
                    "options": max(len(x.rows) for x in part.layers.values()),
                    "loss": f"{loss:.6g}" if known else "",
                    "over_all": f"{loss / full[ratio]:.4f}" if known else "",
                }
                keep_row(path, row | environment(), KEYS)
            print(network, name, flush=True)


if __name__ == "__main__":
    main()
