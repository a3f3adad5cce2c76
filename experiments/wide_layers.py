"""What one order and one factor for all rows lose against exact work on every row: real layers, option by option.

    python experiments/wide_layers.py                      # results/wide_layers.csv; some 20 minutes of a core
    python experiments/wide_layers.py --network minilm
    python experiments/wide_layers.py --time               # results/wide_layers_time.csv; minutes

The widest convolutions of ResNet-20 and ResNet-56 (576 columns) and linear layers of all-MiniLM-L6-v2 (384 and 1,536),
spread over the depth, each as an exact problem (no limit) and as one too wide for it (`exact_limit` 0). Hessians are of
the task's calibration data, seed 0. `rows`: of layers with 1,536 columns every third row, of all others all.

error_*: ½ tr(ΔW H ΔWᵀ) over the layer's energy at the same option, `ratio` shared over exact, `ratio_first` the same
where weights are pruned by their first scores alone, without rounds. Bytes differ, so `error_ratio` is that of errors
at the bytes of the exact option, and `bytes_ratio` that of bytes at its error: the log of the error is linear in bytes
between options of its kind (CURVES); blank where those of the other do not reach. `tcq` is the same for both, so there
these two say what a shared layer would lose without: they compare with its `rd` without pruning. seconds_*: processor
time of one thread for the option, its share of what it has in common with others of its structure included;
trace_seconds_*: for the trace, once for all options; shared ones need none where nothing is pruned. The machine was
busy with other work.

--time: processor seconds on random layers of 64 rows, by columns.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress import obs
from autocompress.compressors import LayerProblem, Measured, compressor_of, measure
from autocompress.layers import find_layers
from autocompress.tasks import load_task
from autocompress.threads import single_threaded
from autocompress.types import Option

TASKS = ROOT / "experiments" / "tasks"
KEYS = ("network", "layer", "option")
NETWORKS: dict[str, tuple[Path, tuple[str, ...]]] = {
    "resnet20": (TASKS / "resnet20_cifar10.py", ("layer3.0.conv2", "layer3.1.conv1", "layer3.2.conv2")),
    "resnet56": (TASKS / "resnet56_cifar10.py", ("layer3.1.conv1", "layer3.5.conv1", "layer3.8.conv2")),
    "minilm": (
        TASKS / "minilm_stsb.py",
        tuple(
            f"encoder.layer.{i}.{part}"
            for part, depths in (
                ("attention.self.query", (0, 3, 5)),
                ("attention.output.dense", (1, 4)),
                ("intermediate.dense", (0, 3, 5)),
                ("output.dense", (0, 3, 5)),
            )
            for i in depths
        ),
    ),
}
STEPS = [round(0.05 * 2 ** (k / 2), 3) for k in range(13)]
# Kinds of options, each with points enough to go between, and those that get a row.
CURVES: dict[str, tuple[list[str], list[str]]] = {
    "s": ([f"s{p}" for p in (15, 30, 40, 50, 60, 75, 82, 90, 95, 98)], ["s50", "s75", "s90"]),
    "sw4": ([f"s{p}w4" for p in (15, 30, 40, 50, 60, 75, 82, 90, 95, 98)], ["s50w4", "s75w4", "s90w4"]),
    "w": ([f"w{b}" for b in range(2, 7)], ["w2", "w3", "w4"]),
    "rd": ([f"rd({t},0.1)" for t in STEPS], ["rd(0.1,0.1)", "rd(0.283,0.1)", "rd(0.8,0.1)", "rd(1.6,0.1)"]),
    "rds60": ([f"rd({t},0.1)s60" for t in STEPS], ["rd(0.1,0.1)s60", "rd(0.4,0.1)s60", "rd(1.131,0.1)s60"]),
    "wg128": ([f"w{b}g128" for b in range(2, 7)], ["w2g128", "w3g128", "w4g128"]),
    "tcq": (["tcq(0.17,0.4)", "tcq(0.48,0.4)", "tcq(0.96,0.4)"], ["tcq(0.17,0.4)", "tcq(0.48,0.4)", "tcq(0.96,0.4)"]),
}
WIDE_ROWS = 3  # of layers with more than 1,000 columns, one row in so many
ALL = [name for names, _ in CURVES.values() for name in names]
TIMED = ["s50", "s50w4", "w4", "w4g128", "rd(0.283,0.1)", "tcq(0.48,0.4)"]
TIMED_COLUMNS = (512, 1024, 2048, 4096)
TIMED_ROWS = 64
Found = dict[str, tuple[Measured, float]]


def measured(problem: LayerProblem, names: list[str] = ALL) -> tuple[Found, float]:
    """Options by name, each with its processor seconds, and those of the trace."""
    with single_threaded():
        began = time.process_time()
        problem.trace()
        trace_seconds = time.process_time() - began
        found: Found = {}
        options = [Option.parse(name) for name in names]
        for structure in dict.fromkeys((compressor_of(o)[0], o.structure) for o in options):
            group = [o for o in options if (compressor_of(o)[0], o.structure) == structure]
            began = time.process_time()
            rows = measure(compressor_of(group[0])[1], problem, group)
            each = (time.process_time() - began) / len(group)
            found |= {str(row.option): (row, each) for row in rows}
    return found, trace_seconds


def curve(found: Found, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, rising, and log error, falling, of the options of a kind that none with fewer bytes is as good as."""
    points: list[tuple[float, float]] = []
    for size, error in sorted((row.bytes, row.error) for o in CURVES[kind][0] if o in found for row, _ in [found[o]]):
        if not points or math.log(error) < points[-1][1]:
            points.append((size, math.log(error)))
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def between(at: float, x: np.ndarray, y: np.ndarray) -> float:
    """y at `at` on a line through the points, x rising; nan beyond them."""
    return float(np.interp(at, x, y, math.nan, math.nan))


def problem_of(layer: ac.Layer, weight: np.ndarray, hessian: np.ndarray, exact_limit: float) -> LayerProblem:
    """The layer, or of a very wide one every third row."""
    rows = np.arange(0, weight.shape[1], WIDE_ROWS if weight.shape[2] > 1000 else 1)
    shape = (len(rows), *layer.stored_shape[1:])
    return LayerProblem(layer.name, shape, weight[:, rows], hessian, exact_limit=exact_limit)


def times(given: argparse.Namespace) -> None:
    path = given.results.with_name("wide_layers_time.csv")
    for d in TIMED_COLUMNS:
        if (str(d), "trace") in done_keys(path, ("columns", "what")):
            continue
        rng = np.random.default_rng(d)
        X, W = rng.standard_normal((d, 2 * d)), rng.standard_normal((1, TIMED_ROWS, d))
        H = (X @ X.T / d + 0.01 * np.eye(d))[None]
        found = [measured(LayerProblem("random", W.shape[1:], W, H, exact_limit=x), TIMED) for x in (math.inf, 0.0)]
        (exact, exact_trace), (shared, shared_trace) = found
        rows = [(name, exact[name][1], shared[name][1]) for name in TIMED]
        for what, mine, theirs in [*rows, ("trace", exact_trace, shared_trace)]:
            row = {"columns": d, "what": what, "rows": TIMED_ROWS}
            row |= {"seconds_exact": f"{mine:.3f}", "seconds_shared": f"{theirs:.3f}"}
            keep_row(path, row | environment(), ("columns", "what"))
        print("timed", d, flush=True)


def calibrated_layers(spec: Path, kept: Path) -> dict[str, tuple[ac.Layer, np.ndarray, np.ndarray]]:
    """Every layer of a task that has a Hessian, with its weight and that; statistics of seed 0 are kept in a file."""
    task = load_task(spec)
    model = task.build_model()
    if not kept.exists():
        ac.calibrate(model, task.calibration_batches(0), seed=0).save(kept)
    stats = ac.Statistics.load(kept)
    found = {}
    for layer in find_layers(model):
        hessian = stats.layers[layer.name].hessian if layer.name in stats.layers else None
        if hessian is not None:
            found[layer.name] = layer, layer.matrix(model.get_parameter(layer.key)), hessian
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "wide")
    parser.add_argument("--results", type=Path, default=RESULTS / "wide_layers.csv")
    given = parser.parse_args()
    given.store.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(0).normal(size=(1, 8, 16))
    for limit in (math.inf, 0.0):  # compiles what is timed below
        measured(LayerProblem("small", (8, 16), small, np.eye(16)[None], exact_limit=limit))
    if given.time:
        times(given)
        return
    for network, (spec, names) in NETWORKS.items():
        done = done_keys(given.results, KEYS)
        todo = [n for n in names if any((network, n, o) not in done for _, kept in CURVES.values() for o in kept)]
        if not todo or given.network not in (None, network):
            continue
        layers = calibrated_layers(spec, given.store / f"{network}.npz")
        for name in todo:
            weight, hessian = layers[name][1:]
            exact, shared = (problem_of(layers[name][0], weight, hessian, limit) for limit in (math.inf, 0.0))
            (mine, exact_trace), (theirs, shared_trace) = measured(exact), measured(shared)
            first = problem_of(layers[name][0], weight, hessian, 0.0)
            first.order, first.losses = obs.shared_trace(first.weight, hessian, threads=1, rounds=0)
            pruned, _ = measured(first, [name for name in ALL if Option.parse(name).sparsity])
            for kind, (_, options) in CURVES.items():
                x, y = curve(theirs, "rd" if kind == "tcq" else kind)
                for option in options:
                    row, seconds = mine[option]
                    other, other_seconds = theirs[option]
                    log_error = math.log(row.error)
                    error_ratio = math.exp(between(row.bytes, x, y) - log_error)
                    bytes_ratio = between(log_error, y[::-1], x[::-1]) / row.bytes
                    figures = {
                        "network": network,
                        "layer": name,
                        "option": option,
                        "shape": "x".join(map(str, layers[name][0].matrix_shape)),
                        "rows": exact.weight.shape[1],
                        "kind": kind,
                        "error_exact": f"{row.error / exact.energy:.5g}",
                        "error_shared": f"{other.error / exact.energy:.5g}",
                        "ratio": f"{other.error / row.error:.4f}",
                        "ratio_first": f"{pruned[option][0].error / row.error:.4f}" if option in pruned else "",
                        "bytes_exact": row.bytes,
                        "bytes_shared": other.bytes,
                        "error_ratio": "" if math.isnan(error_ratio) else f"{error_ratio:.4f}",
                        "bytes_ratio": "" if math.isnan(bytes_ratio) else f"{bytes_ratio:.4f}",
                        "seconds_exact": f"{seconds:.2f}",
                        "seconds_shared": f"{other_seconds:.2f}",
                        "trace_seconds_exact": f"{exact_trace:.2f}",
                        "trace_seconds_shared": f"{shared_trace:.2f}",
                    }
                    keep_row(given.results, figures | environment(), KEYS)
            print(network, name, flush=True)


if __name__ == "__main__":
    main()
