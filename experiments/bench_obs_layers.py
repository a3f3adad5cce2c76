"""Tables of the engine on layers of real shapes and real weights; each section keeps its rows as they come.

    python experiments/bench_obs_layers.py resnet50     # every layer shape of ResNet-50 traced, random weights: minutes
    python experiments/bench_obs_layers.py surface      # ResNet-20: 31 sparsities x 7 widths of every layer
    python experiments/bench_obs_layers.py hessians     # accumulation of Hessians of convolutions
    python experiments/bench_obs_layers.py orders       # ResNet-20: error by order of quantisation
    python experiments/bench_obs_layers.py counts       # ResNet-20: how a layer's sparsity is shared out to its rows

`--part N` does the next N rows of `resnet50` that are missing. Rates compare with a float32 product of two 2048 x 2048
matrices on the same threads, timed in the same process.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_obs import THREADS, correlated_layer, cpu_seconds, matmul_cpu_gflops, matmul_gflops, seconds
from common import RESULTS, ROOT, done_keys, environment, keep_row
from numpy.typing import NDArray
from torch import nn

from autocompress import calibrate, obs
from autocompress.grams import input_products, positions_in_flight
from autocompress.layers import find_layers
from autocompress.tasks import load_task
from autocompress.threads import single_threaded

app = typer.Typer(add_completion=False, no_args_is_help=True)
Matrix = NDArray[np.float64]

#: (name, rows, d, how often ResNet-50 has it); torchvision's network, the classifier included.
RESNET50 = (
    ("conv1", 64, 147, 1),
    ("layer1 1x1 first", 64, 64, 1),
    ("layer1 3x3", 64, 576, 3),
    ("layer1 1x1 out and shortcut", 256, 64, 4),
    ("layer1 1x1 in", 64, 256, 2),
    ("layer2 1x1 first", 128, 256, 1),
    ("layer2 3x3", 128, 1152, 4),
    ("layer2 1x1 out", 512, 128, 4),
    ("layer2 shortcut", 512, 256, 1),
    ("layer2 1x1 in", 128, 512, 3),
    ("layer3 1x1 first", 256, 512, 1),
    ("layer3 3x3", 256, 2304, 6),
    ("layer3 1x1 out", 1024, 256, 6),
    ("layer3 shortcut", 1024, 512, 1),
    ("layer3 1x1 in", 256, 1024, 5),
    ("layer4 1x1 first", 512, 1024, 1),
    ("layer4 3x3", 512, 4608, 3),
    ("layer4 1x1 out", 2048, 512, 3),
    ("layer4 shortcut", 2048, 1024, 1),
    ("layer4 1x1 in", 512, 2048, 2),
    ("fc", 1000, 2048, 1),
)


def start() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def where() -> dict[str, Any]:
    return {"threads": THREADS, "load": f"{os.getloadavg()[0]:.3g}", **environment()}


@app.command()
def resnet50(
    part: Annotated[int, typer.Option(help="Stop after this many rows of the table.")] = 99,
    most: Annotated[int, typer.Option(help="Trace this many rows of a layer at most, and multiply.")] = 1 << 20,
) -> None:
    """Trace every layer shape of ResNet-50 once and multiply by how often the network has it.

    `traced_rows` says how many rows were traced; where they are fewer than `rows`, all seconds are those of the traced
    ones times rows / traced_rows, the inverse of the Hessian among them.
    """
    start()
    path = RESULTS / "bench_obs_resnet50.csv"
    known = done_keys(path, ["layer"])
    matmul = matmul_gflops()
    cheapest_first = sorted(RESNET50, key=lambda row: row[1] * row[2] ** 3)
    for name, rows, d, count in [row for row in cheapest_first if (row[0],) not in known][:part]:
        W, H = correlated_layer(min(rows, most), d, seed=0)
        scale = rows / len(W)
        obs.prune_trace(W[:1], H, threads=THREADS)  # the compiled code is loaded
        began, cpu = time.perf_counter(), time.process_time()
        _, losses = obs.prune_trace(W, H, threads=THREADS)
        taken, cpu = time.perf_counter() - began, time.process_time() - cpu
        # Every loss is paid by somebody: all of them together are the energy of the layer.
        energy = obs.layer_error(W, np.zeros_like(W), H)
        rate = len(W) * d**3 / 3e9 / taken
        row = {
            "layer": name,
            "rows": rows,
            "traced_rows": len(W),
            "d": d,
            "count": count,
            "seconds": f"{scale * taken:.4g}",
            "total_seconds": f"{count * scale * taken:.4g}",
            "total_cpu_seconds": f"{count * scale * cpu:.4g}",
            "gflops": f"{rate:.4g}",
            "share_of_matmul": f"{rate / matmul:.3g}",
            "losses_over_energy_minus_1": f"{losses.sum() / energy - 1:.2g}",
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **where(),
        }
        keep_row(path, row, ["d", "rows", "layer"])
        typer.echo(f"{name}: {taken:.1f} s, {rate:.0f} GFLOP/s")


def resnet20(seed: int = 0) -> dict[str, tuple[Matrix, Matrix]]:
    """(weight, Hessian) of every layer of ResNet-20, calibrated on its 1,024 images."""
    task = load_task(ROOT / "experiments" / "tasks" / "resnet20_cifar10.py")
    model = task.model()
    stats = calibrate(model, task.calibration(seed), seed=seed, holdout=0.0)
    found = {}
    for layer in find_layers(model):
        owner: Any = model.get_submodule(layer.name)
        found[layer.name] = (layer.matrix(owner.weight), stats.layers[layer.name].hessian)
    return found


@app.command()
def surface() -> None:
    """31 sparsities (density .9^k) x 7 widths (2 ... 8 bits) of every layer of ResNet-20, two layers at a time.

    220 such cells took a prototype with explicit triangular inverses 97 s on two cores; `speedup_by_cpu` compares that
    with half of the CPU time, which holds where the machine does other work too. With one path, as the prototype, and
    with as many as options are made with.
    """
    start()
    layers = resnet20()
    for paths in (1, obs.PATHS):
        _surface(layers, paths)


def _surface(layers: dict[str, tuple[Matrix, Matrix]], paths: int) -> None:
    sparsities, widths = [1 - 0.9**k for k in range(31)], range(2, 9)

    def one(item: tuple[str, tuple[Matrix, Matrix]]) -> tuple[str, float, float, int]:
        name, (W, H) = item
        began = time.thread_time()
        order, losses = obs.prune_trace(W, H, threads=1)
        traced = time.thread_time()
        worst = 0.0
        for sparsity in sparsities:
            counts = obs.pruned_counts(losses, sparsity)
            pruned = obs.prune(W, H, order, counts, threads=1)
            cells = [
                obs.Cell(
                    obs.search_scale(pruned, bits).astype(np.float32),
                    np.full(counts.shape, -(2 ** (bits - 1))),
                    np.full(counts.shape, 2 ** (bits - 1) - 1),
                )
                for bits in widths
            ]
            codes, _ = obs.salient_cells(W, H, order, counts, cells, threads=1, paths=paths)
            for cell, q in zip(cells, codes, strict=True):
                worst = max(worst, obs.layer_error(W, q * cell.step[..., None], H))
        return name, traced - began, time.thread_time() - traced, W.size

    with single_threaded(), ThreadPoolExecutor(THREADS) as pool:
        biggest = sorted(layers.items(), key=lambda item: -item[1][0].size)
        small = biggest[-1]
        one(small)  # the compiled code is loaded
        began = time.perf_counter()
        rows = list(pool.map(one, biggest))
        total = time.perf_counter() - began
    row = {
        "network": "ResNet-20",
        "paths": paths,
        "layers": len(rows),
        "sparsities": len(sparsities),
        "widths": len(widths),
        "seconds": f"{total:.4g}",
        "trace_cpu_seconds": f"{sum(r[1] for r in rows):.4g}",
        "surface_cpu_seconds": f"{sum(r[2] for r in rows):.4g}",
        "prototype_seconds": 97,
        "speedup": f"{97 / total:.4g}",
        "speedup_by_cpu": f"{97 * THREADS / sum(r[1] + r[2] for r in rows):.4g}",
        **where(),
    }
    keep_row(RESULTS / "bench_obs_surface.csv", row, ["network", "paths"])
    typer.echo(str(row))


@app.command()
def hessians() -> None:
    """Rate of Hessian accumulation: positions x d^2 operations, the symmetric half of a product."""
    start()
    path = RESULTS / "bench_obs_hessians.csv"
    #: input channels, output size, kernel, stride, images
    cases = (
        (16, 32, 3, 1, 128),
        (32, 16, 3, 1, 128),
        (64, 8, 3, 1, 128),
        (64, 56, 3, 1, 16),
        (128, 28, 3, 1, 16),
        (256, 14, 3, 1, 64),
        (512, 7, 3, 1, 128),
        (256, 56, 1, 1, 16),
        (3, 112, 7, 2, 16),
    )
    for channels, size, kernel, stride, images in cases:
        conv = nn.Conv2d(channels, 8, kernel, stride=stride, padding=kernel // 2)
        x = torch.randn(images, channels, size * stride, size * stride)
        with single_threaded(), torch.no_grad():
            input_products(conv, x)
            before = matmul_gflops()
            taken = statistics.median(seconds(partial(input_products, conv, x), 7))
            cpu = min(cpu_seconds(partial(input_products, conv, x), 5))
        with torch.no_grad():
            matmul = max(before, matmul_gflops())
        d, positions = channels * kernel**2, images * size**2
        rate = 1e-9 * positions * d**2 / taken
        row = {
            "layer": f"{channels} channels, {kernel}x{kernel}, stride {stride}, {size}x{size}, {images} images",
            "d": d,
            "positions": positions,
            "positions_in_flight_per_core": max(1, positions_in_flight(d, d) // size**2) * size**2,
            "seconds": f"{taken:.4g}",
            "gflops": f"{rate:.4g}",
            "matmul_gflops": f"{matmul:.4g}",
            "share_of_matmul": f"{rate / matmul:.3g}",
            "cpu_share_of_matmul": f"{1e-9 * positions * d**2 / cpu / matmul_cpu_gflops():.3g}",
            **where(),
        }
        keep_row(path, row, ["d", "layer"])
        typer.echo(f"{row['layer']}: {row['share_of_matmul']}, by CPU time {row['cpu_share_of_matmul']}")


@app.command()
def orders() -> None:
    """Error of every order at 2, 3 and 4 bits, symmetric grid per row, relative to the energy of the layer."""
    start()
    path = RESULTS / "bench_obs_orders.csv"
    sums: dict[int, dict[str, list[float]]] = {}
    for name, (W, H) in resnet20().items():
        energy = obs.layer_error(W, np.zeros_like(W), H)
        trace, _ = obs.prune_trace(W, H)
        for bits in (2, 3, 4):
            high = 2 ** (bits - 1) - 1
            step = obs.search_scale(W, bits)
            found = {"nearest": np.clip(np.rint(W / step[..., None]), -high - 1, high)}
            for order in obs.ORDERS:
                found[order] = obs.quantise(W, H, step, -high - 1, high, order, trace)
            errors = {k: obs.layer_error(W, q * step[..., None], H) / energy for k, q in found.items()}
            for k, e in errors.items():
                sums.setdefault(bits, {}).setdefault(k, []).append(e)
            row = {"layer": name, "d": W.shape[-1], "bits": bits, **{k: f"{e:.5g}" for k, e in errors.items()}}
            keep_row(path, {**row, **where()}, ["bits", "layer"])
    for bits, lists in sums.items():
        means = {k: f"{math.exp(statistics.mean(math.log(e) for e in v)):.5g}" for k, v in lists.items()}
        keep_row(path, {"layer": "~ geometric mean", "d": "", "bits": bits, **means, **where()}, ["bits", "layer"])
        typer.echo(f"{bits} bits: {means}")


def flat_counts(losses: Matrix, sparsity: float) -> NDArray[np.int64]:
    """The published code's rule: sort all losses whatever their order in a row, and count the smallest per row."""
    d = losses.shape[-1]
    first = np.argsort(losses.ravel(), kind="stable")[: math.ceil(losses.size * sparsity - 1e-9)]
    return np.bincount(first // d, minlength=losses.size // d).reshape(losses.shape[:-1])


def best_counts(losses: Matrix, sparsity: float) -> tuple[NDArray[np.int64], float]:
    """Counts by the rows' convex hulls, and a lower bound of the error of any counts of the same sum.

    The cumulated losses of a row over its count have a lower hull; taking the hulls' segments by their slopes solves
    the relaxed problem exactly (the bound); the one segment that must be cut stays cut in the counts.
    """
    rows = losses.reshape(-1, losses.shape[-1])
    slopes = np.empty_like(rows)
    for i, row in enumerate(rows):
        blocks: list[list[float]] = []  # pool adjacent violators: mean and length of each segment of the hull
        for loss in row:
            blocks.append([loss, 1])
            while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
                mean, length = blocks.pop()
                blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * length) / (blocks[-1][1] + length),
                              blocks[-1][1] + length]  # fmt: skip
        slopes[i] = np.repeat([b[0] for b in blocks], [int(b[1]) for b in blocks])
    total = math.ceil(rows.size * sparsity - 1e-9)
    first = np.argsort(slopes, axis=None, kind="stable")[:total]
    counts = np.bincount(first // rows.shape[1], minlength=len(rows)).reshape(losses.shape[:-1])
    return counts, float(slopes.ravel()[first].sum())


@app.command()
def counts() -> None:
    """Error at 50, 75 and 90% of layer-wide sparsity: flat sort, heap rule, the rows' hulls, and the lower bound."""
    start()
    path = RESULTS / "bench_obs_counts.csv"
    for name, (W, H) in resnet20().items():
        _, losses = obs.prune_trace(W, H)
        energy = obs.layer_error(W, np.zeros_like(W), H)
        cumulated = np.concatenate([np.zeros((*losses.shape[:-1], 1)), np.cumsum(losses, axis=-1)], axis=-1)

        def error(n: NDArray[np.int64], cumulated: Matrix = cumulated) -> float:
            return float(np.take_along_axis(cumulated, n[..., None], -1).sum())

        for percent in (50, 75, 90):
            best, bound = best_counts(losses, percent / 100)
            flat, heap = flat_counts(losses, percent / 100), obs.pruned_counts(losses, percent / 100)
            row = {
                "layer": name,
                "percent": percent,
                "flat": f"{error(flat) / energy:.6g}",
                "heap": f"{error(heap) / energy:.6g}",
                "hulls": f"{error(best) / energy:.6g}",
                "bound": f"{bound / energy:.6g}",
                "flat_over_bound": f"{error(flat) / bound:.5f}",
                "heap_over_bound": f"{error(heap) / bound:.5f}",
                "hulls_over_bound": f"{error(best) / bound:.5f}",
                **where(),
            }
            keep_row(path, row, ["percent", "layer"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    app()
