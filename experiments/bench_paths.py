"""What the order of columns and the number of paths do to error and bytes, layer by layer.

    python experiments/bench_paths.py                 # results/bench_paths.csv; some 15 minutes of a core
    python experiments/bench_paths.py --table         # the table of docs/options.md, from the CSV

One row per (network, layer, option, order, paths), all on the same Hessians, of the task's calibration data, seed 0.
Orders: `salient`, what pruning would take last goes first, row by row; `diagonal`, the largest diagonal of H first;
`pivots`, `obs.least_pivots`. `paths` is what a pass follows side by side (`obs.PATHS` where options are made).
`error` is ½ tr(ΔW H ΔWᵀ) over the layer's energy, `bytes` what the layer takes in a file, `seconds` processor time of
one thread, what the option has in common with others of its structure included, the trace left out.

The table: error and bytes over those of the order of pruning with one path, geometric means over all layers.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, done_keys, environment, keep_row
from wide_layers import TASKS, calibrated_layers

from autocompress import obs
from autocompress.compressors import LayerProblem, compressor_of, measure
from autocompress.threads import single_threaded
from autocompress.types import Option

KEYS = ("network", "layer", "option", "order", "paths")
NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "resnet20": (
        "resnet20_cifar10.py",
        (
            "conv1",
            "layer1.0.conv1",
            "layer1.2.conv2",
            "layer2.0.conv2",
            "layer2.1.conv1",
            "layer3.0.conv1",
            "layer3.1.conv1",
        ),
    ),
    "resnet56": ("resnet56_cifar10.py", ("layer1.4.conv1", "layer2.4.conv2", "layer3.5.conv1")),
    "minilm": ("minilm_stsb.py", ("encoder.layer.1.attention.self.query", "encoder.layer.4.attention.output.dense")),
}
OPTIONS = (
    *("w2", "w3", "w4", "w6", "s50w2", "s50w4", "w4g128"),
    *(f"rd({t},0.1){s}" for t in (0.2, 0.4, 0.8, 1.131, 1.6) for s in ("", "s35", "s60", "s90")),
)
SETTINGS = (
    ("salient", 1),
    ("diagonal", 1),
    ("pivots", 1),
    ("pivots", 2),
    ("pivots", 4),
    ("pivots", 8),
    ("pivots", 16),
    ("salient", 8),
    ("diagonal", 8),
)


class Ordered(LayerProblem):
    """A layer whose options are made in one order, whatever their grid."""

    by = "pivots"

    def _by_levels(self, cells: Sequence[obs.Cell]) -> tuple[np.ndarray, np.ndarray]:
        fine, coarse = super()._by_levels(cells)
        return fine | coarse, np.zeros_like(coarse)

    def visited(self, structure: Option) -> tuple[np.ndarray, np.ndarray]:
        return self.kept(structure) if self.by == "salient" else super().visited(structure)

    def visit(self) -> np.ndarray:
        if self.by == "pivots":
            return super().visit()
        return np.argsort(np.diagonal(self.shared_hessian(), axis1=1, axis2=2), axis=-1, kind="stable")


def measured(problem: Ordered, order: str, paths: int) -> list[tuple[str, float, int, float]]:
    """(option, error, bytes, seconds) of every option."""
    problem.by = order
    problem._found.clear()
    problem._visited = None
    before, obs.PATHS = obs.PATHS, paths
    options = [Option.parse(name) for name in OPTIONS]
    found = []
    try:
        for key in dict.fromkeys((compressor_of(o)[0], o.structure) for o in options):
            group = [o for o in options if (compressor_of(o)[0], o.structure) == key]
            began = time.process_time()
            rows = measure(compressor_of(group[0])[1], problem, group)
            each = (time.process_time() - began) / len(group)
            found += [(str(row.option), row.error / problem.energy, row.bytes, each) for row in rows]
    finally:
        obs.PATHS = before
    return found


def table(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["network"], r["layer"], r["option"], r["order"], int(r["paths"])): r for r in rows}
    layers = list(dict.fromkeys((r["network"], r["layer"]) for r in rows))
    print("| option |", " | ".join(f"{order}, {paths}" for order, paths in SETTINGS[1:]), "|")
    print("|---|" + "---|" * (len(SETTINGS) - 1))
    for option in OPTIONS:
        cells = []
        for setting in SETTINGS[1:]:
            mean = [
                np.exp(
                    np.mean(
                        [
                            np.log(
                                float(found[*layer, option, *setting][what])
                                / float(found[*layer, option, *SETTINGS[0]][what])
                            )
                            for layer in layers
                        ]
                    )
                )
                for what in ("error", "bytes")
            ]
            cells.append(f"{mean[0]:.2f} ({mean[1]:.3f})")
        print(f"| `{option}` |", " | ".join(cells), "|")
    for setting in SETTINGS:
        spent = sum(float(r["seconds"]) for key, r in found.items() if key[3:] == setting)
        print(f"{setting[0]}, {setting[1]}: {spent:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--store", type=Path, default=ROOT / "runs" / "wide", help="statistics, shared with wide_layers"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "bench_paths.csv")
    given = parser.parse_args()
    if given.table:
        table(given.results)
        return
    given.store.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    measured(Ordered("small", (8, 256), generator.normal(size=(1, 8, 256)), np.eye(256)[None]), "pivots", 1)  # compiles
    for network, (spec, names) in NETWORKS.items():
        done = done_keys(given.results, KEYS)
        todo = [n for n in names if any((network, n, o, b, str(p)) not in done for o in OPTIONS for b, p in SETTINGS)]
        if not todo:
            continue
        layers = calibrated_layers(TASKS / spec, given.store / f"{network}.npz")
        for name in todo:
            layer, weight, hessian = layers[name]
            problem = Ordered(name, layer.stored_shape, weight, hessian)
            with single_threaded():
                problem.trace()
                for order, paths in SETTINGS:
                    for option, error, size, seconds in measured(problem, order, paths):
                        row = {"network": network, "layer": name, "option": option, "order": order, "paths": paths}
                        row |= {"shape": "x".join(map(str, layer.matrix_shape)), "error": f"{error:.6g}"}
                        row |= {"bytes": size, "seconds": f"{seconds:.4f}"}
                        keep_row(given.results, row | environment(), KEYS)
            print(network, name, flush=True)


if __name__ == "__main__":
    main()
