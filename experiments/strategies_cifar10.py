"""Every allocation strategy on the same curves, the same bytes and the same networks: CIFAR-10, whole files.

    python experiments/strategies_cifar10.py                                    # ResNet-20, -32, -56 at 8x ... 32x
    python experiments/strategies_cifar10.py --tasks resnet20_cifar10 --ratios 16 --seeds 0 --strategies exact,auto
    python experiments/plot_strategies.py                                       # docs/strategies_cifar10.md and .png

Published, as the papers' own figures and not measured here (what each counts as size is another matter, see the last
column of docs/strategies_cifar10.md):

    ALDS (2107.11442), table 1: ResNet-20 91.39 - 0.47 with 74.91 % of the parameters removed, fp32, retrained
    ITPruner (2108.08532): ResNet-56 93.43 at 59.5 MFLOPs, trained from scratch
    Yang et al. (1910.05897): ResNet-50 on CIFAR-10 without loss at 836x, positions and codebooks not counted, trained
    results/published_cifar10.csv: whole files of NNCodec and Sony MCT with the published weights, post-training

One row of results/strategies_cifar10.csv per (network, effort, ratio, seed, strategy), kept as soon as it is known. The
seed draws 1,024 unaugmented training images, their split (a fifth is held out from the Hessians) and what searches
draw. Rows of a network and seed share one profile (families OPTIONS) and one context. Each strategy's own plan is
compared, not replaced where a single option measures better, but for `auto`, which is what users get; statistics are
corrected, nothing is compressed anew or tuned (`results/budgets_cifar10.csv` has whole runs). `kl` is measured on the
held-out fifth; `top1`, in percent on the 10,000 test images, only reports. `paper_bytes` counts codes of the weights
that are not zero and nothing else, as Yang et al. do; `ratio_paper` is that of the weights in fp32 to it,
`ratio_stored` that of the dense file to the file. Rows are on one thread each: run two of these at once on disjoint
shares (other --seeds or --tasks; or other --strategies, once the profile is there) for two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.comparing import task_context
from autocompress.compressors import FAMILIES
from autocompress.profiling import Profile
from autocompress.strategies import STRATEGIES
from autocompress.tasks import Task, load_task

KEYS = ("task", "effort", "ratio", "seed", "strategy")
TASKS = ("resnet20_cifar10", "resnet32_cifar10", "resnet56_cifar10")
# What density rules need (surface) and what per-channel widths need (mixed), beside what is offered by default.
OPTIONS = tuple(family for family in ("default", "surface", "mixed") if family in FAMILIES)
SECTIONS: dict[str, tuple[str, ...]] = {
    "baselines": ("uniform", "uniform_bits", "uniform_sparsity", "magnitude", "erk", "lamp", "greedy"),
    "exact on an objective": ("lagrangian", "dp", "exact", "raw", "loss", "kl", "fisher", "hawq"),
    "searches": ("spdy", "evopress", "tpe", "nsga2"),
    "rules of papers": ("yang", "opq", "opq_energy", "itpruner", "itpruner_quadratic", "alds_minimax"),
    "reinforcement learning": ("ajpq", "galen"),
    "portfolio": ("auto",),
}


def listed() -> list[str]:
    """The strategies to run, in the order of the sections; at the end, those that no section names."""
    named = [name for names in SECTIONS.values() for name in names]
    return [n for n in named if n in STRATEGIES] + [n for n in STRATEGIES if n not in named]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names in experiments/tasks, or what load_task takes")
    parser.add_argument("--ratios", default="16,24,12,8,20,32")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--strategies", default=",".join(listed()))
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "strategies_cifar10")
    parser.add_argument("--results", type=Path, default=RESULTS / "strategies_cifar10.csv")
    given = parser.parse_args(arguments)
    for name in given.tasks.split(","):
        known = ROOT / "experiments" / "tasks" / f"{name}.py"
        task = load_task(known if known.is_file() else name)
        for seed in map(int, given.seeds.split(",")):
            asked = [(r, s) for r in given.ratios.split(",") for s in given.strategies.split(",")]
            done = done_keys(given.results, KEYS)
            todo = [at for at in asked if (task.name, given.effort, at[0], str(seed), at[1]) not in done]
            if todo:
                run(task, seed, todo, given)


def run(task: Task, seed: int, todo: list[tuple[str, str]], given: argparse.Namespace) -> None:
    """The rows (ratio, strategy) of one network and seed, from one profile and context."""
    folder = given.out / task.name / f"seed{seed}"
    context = task_context(task, seed, given.effort)
    data = task.calibration_batches(seed)
    profile = ac.profile(
        context.model, ac.calibrate(context.model, data, seed=seed), folder / "profile", [given.options]
    )
    assert task.evaluate is not None
    dense = task.evaluate(context.model)

    def keep(row: Mapping[str, Any]) -> None:
        at = (row["budget"].removesuffix("x"), row["strategy"])
        if at in todo:
            keep_row(given.results, figures(task.name, given.effort, dense, profile, row), KEYS)
            print(task.name, f"seed {seed}:", *at, row["bytes"], row["metric"], row["error"][:80], flush=True)

    for ratio in dict.fromkeys(ratio for ratio, _ in todo):
        strategies = [s for r, s in todo if r == ratio]
        ac.compare(profile, [f"{ratio}x"], strategies, context, task.evaluate, (seed,), folder, task=task, on_row=keep)


def figures(task: str, effort: str, dense: float, profile: Profile, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the results from one of the comparison."""

    def text(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    weights = 4 * sum(layer.layer.size for layer in profile.layers.values())
    return {
        "task": task,
        "effort": effort,
        "ratio": row["budget"].removesuffix("x"),
        "seed": row["seed"],
        "strategy": row["strategy"],
        "budget_bytes": row["budget_bytes"],
        "bytes": text(row["bytes"], "d"),
        "paper_bytes": text(row["paper_bytes"], "d"),
        "ratio_stored": "" if row["bytes"] is None else f"{profile.template.dense_bytes / row['bytes']:.3f}",
        "ratio_paper": "" if row["paper_bytes"] is None else f"{weights / max(row['paper_bytes'], 1):.3f}",
        "top1": text(row["metric"], ".2f"),
        "top1_dense": f"{dense:.2f}",
        "kl": text(row["kl"], ".6f"),
        "predicted_loss": text(row["predicted_loss"], ".6g"),
        "gap": text(row["gap"], ".4g"),
        "evaluations": text(row["evaluations"], "d"),
        "seconds": f"{row['seconds']:.1f}",
        "plan": row["plan"],
        "error": row["error"],
        **environment(),
    }


if __name__ == "__main__":
    main()
