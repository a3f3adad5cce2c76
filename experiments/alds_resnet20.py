"""Low-rank allocation alone, ResNet-20 on CIFAR-10: ALDS's compress-only curve beside its baselines.

    python experiments/alds_resnet20.py                       # 20 keep ratios, .97 to .2 in equal factors
    python experiments/alds_resnet20.py --points 0,10,19 --strategies alds,svd --factors plain
    python experiments/alds_resnet20.py --table               # docs/alds_resnet20.md, docs/alds_resnet20.png

Published (ALDS, arXiv 2107.11442, table 1; one-shot *with retraining*, which this is not), change of top-1 | parameters
removed: ALDS -.47 | 74.91 %, PCA -.11 | 49.88 %, SVD-Energy -.21 | 49.88 %, SVD -.29 | 39.81 %, L-Rank -.44 | 28.71 %,
FT -.32 | 39.69 %, PFP -.28 | 40.28 %. Its compress-only curves are printed as figures without numbers.

`plain`: factors are float32 from the singular vectors of the weight, as in the paper; `data-aware`: those of least
output error, refitted. Every strategy chooses among ranks 1 to 64 in 1, 2, 4, 8 or 16 runs of channels (SVD,
SVD-Energy, PCA and L-Rank in one), and the dense layer. FT (the same part of the channels of every block; `ft_global`:
one threshold) and PFP make the blocks' inner layers narrower, in steps of a 32nd of their channels, FT in the order of
the filters' L1 norms, PFP in that of sensitivities; channels of the skip path stay, where the paper prunes them too.
`plain`: what stays is as it was; `data-aware`: refitted. A keep ratio bounds the file: that part of the dense file in
bytes, which in float32 is that part of the parameters. Statistics are corrected (the paper's are not), nothing is
trained. `kl` is on the held-out fifth of 1,024 training images; `top1_score` on 2,000 other training images, and `top1`
on the 10,000 test images, for reporting only. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.comparing import task_context
from autocompress.planning import running_cost, within
from autocompress.profiling import Profile
from autocompress.salience import widths
from autocompress.strategies import STRATEGIES
from autocompress.tasks import load_task
from autocompress.types import Budget

KEYS = ("factors", "point", "strategy")
RATIOS = tuple(0.97 * (0.2 / 0.97) ** (i / 19) for i in range(20))
FILTERS = {"ft": "l1", "ft_global": "l1", "pfp": "pfp"}  # rules that set widths, and what their channels go by
NAMES = ("alds", "svd", "svd_energy", "pca", "lrank", *FILTERS, "alds_paper", "alds_norm", "alds_minimax", "exact")
LEVELS = tuple(100 * i / 32 for i in range(31, 0, -1))
RANKS = (*range(1, 25), *range(26, 65, 2))


def options(plain: bool) -> list[str]:
    """Float32 factors of every rank on offer."""
    suffix = "p" * plain
    return [f"rank{r}{suffix}" for r in RANKS] + [f"k{k}r{r}{suffix}" for k in (2, 4, 8, 16) for r in RANKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default=",".join(map(str, (19, 0, 10, 5, 14, 12, 16, 8, 2, 17, *range(1, 19)))))
    parser.add_argument("--strategies", default=",".join(NAMES))
    parser.add_argument("--factors", default="plain,data-aware")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "alds_resnet20")
    parser.add_argument("--results", type=Path, default=RESULTS / "alds_resnet20.csv")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        from plot_alds import write

        write(given.results)
        return
    task = load_task(ROOT / "experiments" / "tasks" / "resnet20_cifar10.py")
    context = task_context(task, 0, "normal")
    stats = ac.calibrate(context.model, task.calibration_batches(0), seed=0)
    example = context.pieces("sample")[0]
    for factors in given.factors.split(","):
        profiles: dict[str, Profile] = {}

        def profile_of(kind: str, plain: bool = factors == "plain", found: dict[str, Profile] = profiles) -> Profile:
            """Of ranks (kind ""), or of widths whose channels go by a score."""
            folder = given.out / (("plain" if plain else "data-aware") + kind)
            if kind not in found and not kind:
                found[kind] = ac.profile(context.model, stats, folder, options(plain))
            elif kind not in found:
                kept = widths(context.model, example, stats, kind, LEVELS, batches=context.pieces("sample"))
                names = [f"n{level:g}/100" for level in LEVELS] + [f"n100/{level:g}" for level in LEVELS]
                found[kind] = ac.profile(context.model, flat(stats) if plain else stats, folder, names, channels=kept)
            return found[kind]

        for point in dict.fromkeys(map(int, given.points.split(","))):
            done = done_keys(given.results, KEYS)
            for strategy in given.strategies.split(","):
                if (factors, str(point), strategy) not in done:
                    row = {"factors": factors, "point": point, "strategy": strategy}
                    row |= measured(profile_of(FILTERS.get(strategy, "")), context, task, strategy, RATIOS[point])
                    keep_row(given.results, row | environment(), KEYS)
                    print(row, flush=True)


def flat(stats: ac.Statistics) -> ac.Statistics:
    """Statistics of inputs that are all alike and independent: nothing is refitted, errors are those of the weights."""
    layers = {
        n: dataclasses.replace(s, hessian=np.ones_like(s.hessian) * np.eye(s.hessian.shape[-1]))
        for n, s in stats.layers.items()
    }
    return dataclasses.replace(stats, layers=layers, fields={**stats.fields, "damping": "identity"})


def measured(profile: Profile, context: ac.Context, task: Any, strategy: str, ratio: float) -> dict[str, Any]:
    """The strategy's own plan within that part of the dense file, and what the network of it does."""
    budget = Budget(size=int(ratio * profile.template.dense_bytes))
    started = time.perf_counter()
    limited = within(profile, int(budget.size or 0))
    plan = STRATEGIES[strategy](limited, budget, context)
    seconds = time.perf_counter() - started
    small = context.build(limited, plan.layers)
    macs = running_cost(limited, "macs", plan.layers), running_cost(limited, "macs", dict.fromkeys(plan.layers, DENSE))
    return {
        "keep": f"{ratio:.4f}",
        "bytes": plan.predicted_bytes,
        "parameters_removed": f"{100 * (1 - plan.predicted_bytes / profile.template.dense_bytes):.2f}",
        "macs_removed": f"{100 * (1 - macs[0] / macs[1]):.2f}",
        "split": sum(option.rank is not None for option in plan.layers.values()),
        "narrower": sum(option.width is not None for option in plan.layers.values()),
        "groups": f"{sum(o.groups or 1 for o in plan.layers.values()) / len(plan.layers):.2f}",
        "kl": f"{context.divergence_of(small):.5g}",
        "top1_score": f"{task.score(small):.2f}",
        "top1": f"{task.evaluate(small):.2f}",
        "seconds": f"{seconds:.1f}",
    }


DENSE = ac.Option()

if __name__ == "__main__":
    main()
