"""What codebooks are worth: kernel and product quantisation beside the default family, layer by layer and in one solve.

    python experiments/codebooks_layers.py                 # results/codebooks_layers.csv
    python experiments/codebooks_layers.py --solve resnet20        # results/codebooks_solved.csv

Layers of ResNet-20 and ResNet-56 (CIFAR-10, Hessians of 819 unaugmented training images) and of the digits network.
`plain`: k-means on the weights, words of 6 bits, as the papers have it; `output`: of least output error, without a
price of a bit and with one. Relative error is ½ tr(ΔW H ΔWᵀ) / energy; bits per weight are of the whole payload,
codebook included. `default_error`: the least that an option of the family `default` has in no more bytes;
`finer_error`: the same with its own kinds of options on a finer grid of coarse steps too, of which it has few.
`bytes_ratio`: bytes over the fewest of an option of either whose error is no larger; below 1 the codebook is ahead.

--solve: the exact solver's plans for a network over `default`, and over `default` and `codebooks`. `loss` is the sum of
relative errors, `bound` its proof; statistics are corrected, nothing is compressed again or tuned. `kl` is on the
held-out fifth of the calibration samples; `score` and `evaluate` are the task's (of CIFAR-10: top-1 on 2,000 other
training images, and on the 10,000 test images for reporting only; dense ResNet-20: 91.73). Nothing here is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.comparing import task_context
from autocompress.compressors import LayerProblem, Measured, default_options, named_options, profile_layer
from autocompress.files import atomic_path
from autocompress.layers import find_layers
from autocompress.tasks import load_task
from autocompress.types import Budget, Option

KEYS = ("network", "layer", "option")
SOLVED_KEYS = ("network", "budget", "family")
RESNET20 = ROOT / "experiments" / "tasks" / "resnet20_cifar10.py"
NETWORKS: dict[str, tuple[str | Path, tuple[str, ...]]] = {
    "resnet20": (RESNET20, ("layer1.1.conv1", "layer2.1.conv2", "layer3.1.conv1", "linear")),
    "resnet56": (ROOT / "experiments" / "tasks" / "resnet56_cifar10.py", ("layer2.4.conv1", "layer3.4.conv1")),
    "digits": ("digits", ()),  # all of its layers
}
KERNELS = [f"kq{k}{how}" for k in (8, 16, 32, 64, 128, 256) for how in ("pw6", "w4", "@4w4", "@8w4")]
VECTORS = [f"pq{v}x{k}{how}" for v in (2, 3, 4, 8, 18) for k in (16, 64, 256) for how in ("pw6", "w4", "@4w4")]
DEFAULT = frozenset(default_options())
AT_ONCE = 24  # options of a layer that are made before they are kept
BUDGETS = ("24x", "32x", "16x", "12x")


def finer() -> list[Option]:
    """Coarse steps of the trellis and of sparse rate-distortion codes, beyond and between those of the default."""
    steps = [round(1.2 * 2 ** (k / 4), 3) for k in range(9)]
    dependent = [Option(step=step, lam=lam, trellis=True) for step in steps for lam in (0.1, 0.25, 0.55)]
    steps = [round(1.6 * 2 ** (k / 2), 3) for k in range(4)]
    sparse = [
        Option(sparsity=s, step=step, lam=lam) for s in (80.0, 86.0, 93.0) for step in steps for lam in (0.1, 0.3)
    ]
    return dependent + sparse


def measured(problem: LayerProblem, options: list[Option], path: Path) -> list[Measured]:
    """Rows of a layer, some options at a time, kept in a file so that a run that is stopped goes on there."""
    known: dict[Option, Measured | None] = pickle.loads(path.read_bytes()) if path.exists() else {}
    while missing := [option for option in options if option not in known][:AT_ONCE]:
        found = {row.option: row for row in profile_layer(problem, missing)[0]}
        known |= {option: found.get(option) for option in missing}
        with atomic_path(path) as scratch:
            scratch.write_bytes(pickle.dumps(known))
    return [row for option in options if (row := known[option]) is not None]


def of_layers(given: argparse.Namespace) -> None:
    for network, (spec, names) in NETWORKS.items():
        task = load_task(spec)
        model = task.build_model()
        layers = {layer.name: layer for layer in find_layers(model)}
        given.store.mkdir(parents=True, exist_ok=True)
        kept = given.store / f"{network}.npz"
        if not kept.exists():
            ac.calibrate(model, task.calibration_batches(0), seed=0).save(kept)
        stats = ac.Statistics.load(kept)
        for name in names or layers:
            layer = layers[name]
            weight = layer.matrix(model.get_parameter(layer.key))
            problem = LayerProblem(name, layer.stored_shape, weight, stats.layers[name].hessian)
            path = given.store / f"{network} {name}.pickle"
            others = list(dict.fromkeys([*default_options(), *finer()]))
            rest = measured(problem, others, path)
            for row in measured(problem, named_options(KERNELS + VECTORS), path):
                option = row.option
                figures = {
                    "network": network,
                    "layer": name,
                    "option": str(option),
                    "family": "kq" if option.vector is None else f"pq{option.vector}",
                    "how": "plain" if option.plain else "output",
                    "weights": weight.size,
                    "bytes": row.bytes,
                    "bits_per_weight": f"{8 * row.bytes / weight.size:.3f}",
                    "relative_error": f"{row.error / problem.energy:.5f}",
                }
                for kind, beside in (("default", [r for r in rest if r.option in DEFAULT]), ("finer", rest)):
                    fits = [r.error for r in beside if r.bytes <= row.bytes]
                    as_good = [r.bytes for r in beside if r.error <= row.error]
                    figures[f"{kind}_error"] = f"{min(fits) / problem.energy:.5f}" if fits else ""
                    figures[f"bytes_ratio_{kind}"] = f"{row.bytes / min(as_good):.3f}"
                keep_row(given.results, figures | environment(), KEYS)
            print(network, name, flush=True)


def in_one_solve(given: argparse.Namespace, added: str, is_added: Callable[[Option], bool]) -> None:
    """Plans over the default options, and over these and those of a family that is added."""
    network = given.solve
    task = load_task(NETWORKS[network][0])
    assert task.score is not None
    assert task.evaluate is not None
    context = task_context(task, 0, "normal")
    stats = ac.calibrate(context.model, task.calibration_batches(0), seed=0)
    profile = ac.profile(context.model, stats, given.store / network, ["default", added])
    for text in given.budgets.split(";"):
        budget = Budget.of(text)
        for family in ("default", added):
            if (network, str(budget), family) in done_keys(given.solved, SOLVED_KEYS):
                continue
            layers = {
                n: dataclasses.replace(x, rows=tuple(r for r in x.rows if family == added or r.option in DEFAULT))
                for n, x in profile.layers.items()
            }
            part = dataclasses.replace(profile, layers=layers)
            plan = ac.plan(part, budget, "exact")
            fitting = part.with_vectors(plan.vector_bits)
            small = context.build(fitting, plan.layers)
            row = {
                "network": network,
                "budget": str(budget),
                "family": family,
                "bytes": plan.predicted_bytes,
                added: sum(map(is_added, plan.layers.values())),
                "loss": f"{plan.predicted_loss:.6g}",
                "bound": f"{plan.bound:.6g}",
                "kl": f"{context.divergence_of(small):.5g}",
                "score": f"{task.score(small):.2f}",
                "evaluate": f"{task.evaluate(small):.2f}",
                "chosen": " ".join(str(o) for o in plan.layers.values() if is_added(o)),
            }
            keep_row(given.solved, row | environment(), SOLVED_KEYS)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solve", choices=list(NETWORKS), help="plans of a network in place of layers")
    parser.add_argument("--budgets", default=";".join(BUDGETS))
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "codebooks")
    parser.add_argument("--results", type=Path, default=RESULTS / "codebooks_layers.csv")
    parser.add_argument("--solved", type=Path, default=RESULTS / "codebooks_solved.csv")
    given = parser.parse_args()
    if given.solve:
        in_one_solve(given, "codebooks", lambda option: option.words is not None)
    else:
        of_layers(given)


if __name__ == "__main__":
    main()
