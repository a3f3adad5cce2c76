"""Times exact greedy pruning (`obs.prune_trace`) and greedy quantisation (`obs.obq`) against the published algorithm.

    python experiments/bench_obs.py            # minutes; layers that results/bench_obs.csv has already are skipped
    python experiments/bench_obs.py --quick    # seconds: small layers only, nothing is written

The baseline is the batched algorithm of OBC (arXiv 2208.11580) written again in plain torch: 32 rows at a time, each
with its own d x d inverse Hessian, and a rank-1 update of the whole inverse at every step. It is timed in two ways:
`published` forms the outer products and subtracts them, as the authors do; `in place` lets one `baddbmm_` do both, as
far as plain torch goes without changing the algorithm. Its other output, the weights after every step, is left out:
the engine does without it.

GFLOP/s of the engine count d^3 / 3 operations per row, the size of a Cholesky factorisation, and compare with a float32
product of two 2048 x 2048 matrices (2 * 2048^3 operations) on the same threads, timed before and after every layer; the
higher rate counts. What is timed is the whole call, the inverse of the Hessian included. On a machine that does other
work too, `load` is above `threads`, and wall times say little; `cpu_share_of_matmul` compares the same two by the CPU
time of all threads (the least of the runs each).

Both results are judged in float64: the order decision by decision (each pivot must be the best there was given those
before it, up to a near-tie), the losses against those of the same order. Of wide layers the first rows are judged.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.linalg
import torch
import typer
from common import RESULTS, done_keys, environment, keep_row
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from autocompress import obs
from autocompress.obs import prune_trace

THREADS = 2
BATCH_ROWS = 32
DAMPING = 1e-2
#: (rows, d, whether the baseline runs too: it would take a quarter of an hour and more on the wide ones)
SHAPES = (
    (16, 144, True),
    (32, 288, True),
    (64, 576, True),
    (128, 576, False),
    (128, 1152, False),
    (128, 2304, False),
    (64, 4608, False),
)
QUICK_SHAPES = ((16, 144, True), (32, 288, False))
#: Relative excess of a pivot's score over the best one alive that still passes for a near-tie.
TIE_TOLERANCE = 1e-3
#: Relative error of a loss that is counted as large. Both sides work in float32, so that the last losses of a row may
#: be off by a multiple of 6e-8 times the condition of H; more than ten times that is a bug.
LARGE_LOSS_ERROR = 1e-4
FLOAT32_EPSILON = 6e-8
JUDGED_WORK = 64 * 576**3  # rows x d^3 that are judged in float64: more takes minutes
QUICK_OBQ = (32, 144, 3)
KEYS = ["d", "rows", "layer"]
OBQ_SHAPE = (64, 576, 3)  # rows, d, bits

Trace = tuple[NDArray[np.int32], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured on one layer; None where the baseline did not run.

    Seconds are the median of `repeats` runs of the engine, and the best of three of the baseline (its first run, if
    that took over 10 s), so that a busy machine favours the baseline.
    `excess` is how much worse than the best alive the worst pivot was, relative to the score, judged in float64;
    `loss_error` the largest relative error of a recorded loss; `order_agrees` the share of equal entries in both
    orders; `loss_difference` the largest relative difference of the losses before the orders part; `large_errors` the
    number of losses off by more than 1e-4. `condition` is that of the damped Hessian; `load` the machine's load
    average: where it is above `threads`, something else was running too, and all times are long and uncertain.
    """

    layer: str
    rows: int
    d: int
    damping: float
    condition: float
    seed: int
    engine_s: float
    engine_min_s: float
    repeats: int
    published_s: float | None = None
    in_place_s: float | None = None
    speedup: float | None = None
    speedup_in_place: float | None = None
    engine_gflops: float
    matmul_gflops: float
    share_of_matmul: float
    engine_cpu_s: float
    cpu_share_of_matmul: float
    order_agrees: float | None = None
    loss_difference: float | None = None
    engine_excess: float
    engine_loss_error: float
    engine_large_errors: int
    published_excess: float | None = None
    published_loss_error: float | None = None
    published_large_errors: int | None = None
    judged_rows: int
    threads: int
    load: float | None
    commit: str
    cpu: str
    versions: str


def correlated_layer(rows: int, d: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Random weights, and a damped full-rank Hessian of rectified inputs whose neighbours correlate (0.9)."""
    generator = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
    X = np.maximum(np.linalg.cholesky(0.9**distance) @ generator.standard_normal((d, 4 * d)), 0.0)
    H = 2.0 * (X @ X.T) / X.shape[1]
    W = generator.standard_normal((rows, d))
    return W, H + DAMPING * np.mean(np.diag(H)) * np.eye(d)


def golden_layers() -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Real layers of ResNet-20 with their Hessians, where a machine has them beside its data."""
    layers = {}
    if "AUTOCOMPRESS_DATA" in os.environ:
        for path in sorted((Path(os.environ["AUTOCOMPRESS_DATA"]).parent / "golden").glob("obc_resnet20_*.npz")):
            with np.load(path) as file:
                H = file["hessian"]
                H = H + DAMPING * np.mean(np.diag(H)) * np.eye(len(H))
                layers[path.stem.removeprefix("obc_")] = (file["weight"].astype(np.float64), H)
    return layers


@torch.inference_mode()
def published_trace(W: NDArray[np.float64], H: NDArray[np.float64], in_place: bool) -> Trace:
    """Greedy OBS as published: every row carries its inverse Hessian, and each step updates all of it."""
    weight, hessian = torch.tensor(W, dtype=torch.float32), torch.tensor(H, dtype=torch.float32)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    rows, d = weight.shape
    order, losses = torch.empty(rows, d, dtype=torch.int64), torch.empty(rows, d)
    for start in range(0, rows, BATCH_ROWS):
        w = weight[start : start + BATCH_ROWS].clone()
        G = inverse.expand(len(w), d, d).clone()
        row, gone = torch.arange(len(w)), torch.zeros_like(w, dtype=torch.bool)
        for t in range(d):
            diagonal = G.diagonal(dim1=1, dim2=2)
            scores = (w**2 / diagonal).masked_fill_(gone, torch.inf)
            j = scores.argmin(dim=1)
            order[start : start + len(w), t], losses[start : start + len(w), t] = j, scores[row, j] / 2
            pivot, g = G[row, j], diagonal[row, j]
            w -= pivot * (w[row, j] / g)[:, None]
            gone[row, j] = True
            w[gone] = 0.0
            pivot = pivot / g.sqrt()[:, None]
            if in_place:
                G.baddbmm_(pivot[:, :, None], pivot[:, None, :], alpha=-1.0)
            else:
                G -= torch.bmm(pivot[:, :, None], pivot[:, None, :])
    return order.numpy().astype(np.int32), losses.numpy().astype(np.float64)


def judge(W: NDArray[np.float64], H: NDArray[np.float64], trace: Trace) -> tuple[float, float, int]:
    """Worst relative excess of a pivot's score, worst relative error of a loss, number of large ones; in float64.

    With G = H^-1 permuted to the row's order and G = L L^T, the weights before step t are w - L[:, :t] y[:t] with
    y = L^-1 w, and the diagonal of the inverse is the row sum of L[:, t:]^2: one factorisation gives all scores.
    """
    G = np.linalg.inv(H)
    worst_excess, worst_error, large = 0.0, 0.0, 0
    for w, order, losses in zip(W, *trace, strict=True):
        if not np.array_equal(np.sort(order), np.arange(len(w))):
            raise ValueError(f"an order is not a permutation of its {len(w)} columns")
        L = scipy.linalg.cholesky(G[np.ix_(order, order)], lower=True)
        y = scipy.linalg.solve_triangular(L, w[order], lower=True)
        weights = w[order][:, None] - np.cumsum(L * y, axis=1) + L * y
        diagonals = np.cumsum((L**2)[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(divide="ignore", invalid="ignore"):  # the finished half: above the diagonal L is zero
            scores = np.where(np.tri(len(w), dtype=bool), weights**2 / diagonals, np.inf)
        worst_excess = max(worst_excess, float(np.max(y**2 / scores.min(axis=0) - 1)))
        errors = np.abs(losses / (y**2 / 2) - 1)
        worst_error, large = max(worst_error, float(errors.max())), large + int((errors > LARGE_LOSS_ERROR).sum())
    return worst_excess, worst_error, large


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Wall time of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def cpu_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """CPU time, all threads together, of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return times


def best_seconds(function: Callable[[], object]) -> float:
    """Wall time of the fastest of three calls, or of the first if that took over ten seconds."""
    first = seconds(function, 1)[0]
    return first if first > 10.0 else min(first, *seconds(function, 2))


def matmul_cpu_gflops(n: int = 2048, repeats: int = 7) -> float:
    """Operations per CPU second of a float32 product of two n x n matrices on one thread: the best."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(n, n), torch.randn(n, n)
        return 2e-9 * n**3 / min(cpu_seconds(lambda: torch.mm(a, b), repeats))
    finally:
        torch.set_num_threads(threads)


def matmul_gflops(n: int = 2048, repeats: int = 15) -> float:
    """Rate of a float32 product of two n x n matrices: the median, after a warm-up."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    out = a @ b
    return 2e-9 * n**3 / statistics.median(seconds(lambda: torch.mm(a, b, out=out), repeats))


def measure(layer: str, W: NDArray[np.float64], H: NDArray[np.float64], seed: int, baseline: bool, repeats: int) -> Row:
    """Time one layer; raises RuntimeError if the engine's pivots or losses are not right."""
    matmul = matmul_gflops()
    prune_trace(W[:THREADS], H, threads=THREADS)  # the first call of a process loads the compiled code
    results: list[Trace] = []
    cpu_times: list[float] = []

    def timed() -> None:
        cpu_times.extend(cpu_seconds(lambda: results.append(prune_trace(W, H, threads=THREADS)), 1))

    times = seconds(timed, repeats)
    matmul = max(matmul, matmul_gflops())
    trace = results[0]
    engine_s = statistics.median(times)
    gflops = len(W) * len(H) ** 3 / 3e9 / engine_s
    judged = min(len(W), max(2, JUDGED_WORK // len(H) ** 3))
    excess, loss_error, large_errors = judge(W[:judged], H, (trace[0][:judged], trace[1][:judged]))
    eigenvalues = scipy.linalg.eigvalsh(H)
    condition = float(eigenvalues[-1] / eigenvalues[0])
    if excess > TIE_TOLERANCE or loss_error > max(LARGE_LOSS_ERROR, 10 * FLOAT32_EPSILON * condition):
        raise RuntimeError(f"{layer}: a pivot is {excess:.1e} worse than the best, a loss {loss_error:.1e} wrong")
    found = environment()
    row = Row(
        layer=layer,
        rows=len(W),
        d=len(H),
        damping=DAMPING,
        condition=condition,
        seed=seed,
        engine_s=engine_s,
        engine_min_s=min(times),
        repeats=repeats,
        engine_gflops=gflops,
        matmul_gflops=matmul,
        share_of_matmul=gflops / matmul,
        engine_cpu_s=min(cpu_times),
        cpu_share_of_matmul=len(W) * len(H) ** 3 / 3e9 / min(cpu_times) / matmul_cpu_gflops(),
        engine_excess=excess,
        engine_loss_error=loss_error,
        engine_large_errors=large_errors,
        judged_rows=judged,
        threads=THREADS,
        load=os.getloadavg()[0],
        commit=found["commit"],
        cpu=found["cpu"],
        versions=found["versions"],
    )
    if not baseline:
        return row
    theirs = published_trace(W, H, in_place=True)
    published_s, in_place_s = (best_seconds(partial(published_trace, W, H, in_place=way)) for way in (False, True))
    same = np.logical_and.accumulate(trace[0] == theirs[0], axis=1)  # after a swapped near-tie, steps do not correspond
    published_excess, published_loss_error, published_large_errors = judge(W, H, theirs)
    return replace(
        row,
        published_s=published_s,
        in_place_s=in_place_s,
        speedup=published_s / engine_s,
        speedup_in_place=in_place_s / engine_s,
        order_agrees=float(np.mean(trace[0] == theirs[0])),
        loss_difference=float(np.max(np.abs(trace[1] / theirs[1] - 1)[same], initial=0.0)),
        published_excess=published_excess,
        published_loss_error=published_loss_error,
        published_large_errors=published_large_errors,
    )


def show(results: list[Row]) -> None:
    """Print the figures that matter as a table."""
    table = Table(title="Exact greedy pruning: the engine against the published algorithm on the same cores")
    for heading in (
        "layer",
        "engine, s",
        "published, s",
        "ratio",
        "in place, s",
        "ratio",
        "GFLOP/s",
        "of matmul",
        "by CPU",
        "loss error",
        "published",
    ):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for r in results:
        table.add_row(
            r.layer,
            f"{r.engine_s:.4f}",
            "-" if r.published_s is None else f"{r.published_s:.2f}",
            "-" if r.speedup is None else f"{r.speedup:.0f}",
            "-" if r.in_place_s is None else f"{r.in_place_s:.2f}",
            "-" if r.speedup_in_place is None else f"{r.speedup_in_place:.0f}",
            f"{r.engine_gflops:.1f}",
            f"{r.share_of_matmul:.2f}",
            f"{r.cpu_share_of_matmul:.2f}",
            f"{r.engine_loss_error:.1e}",
            "-" if r.published_loss_error is None else f"{r.published_loss_error:.1e}",
        )
    Console().print(table)
    Console().print(
        "Ratios are to the engine; errors are the largest relative ones of a recorded loss, against float64."
    )


@torch.inference_mode()
def published_obq(W: NDArray[np.float64], H: NDArray[np.float64], step: NDArray[np.float64], bits: int) -> NDArray[Any]:
    """Greedy quantisation as published, symmetric grid: OBC's `quantize` for batches of rows, with its outlier rule."""
    weight, hessian = torch.tensor(W, dtype=torch.float32), torch.tensor(H, dtype=torch.float32)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    rows, d = weight.shape
    low, high, scales = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.tensor(step, dtype=torch.float32)
    codes = torch.empty(rows, d)
    for start in range(0, rows, BATCH_ROWS):
        w, scale = weight[start : start + BATCH_ROWS].clone(), scales[start : start + BATCH_ROWS, None]
        G = inverse.expand(len(w), d, d).clone()
        row, gone = torch.arange(len(w)), torch.zeros_like(w, dtype=torch.bool)
        for _ in range(d):
            level = (w / scale).round_().clamp_(low, high)
            away = (w - level * scale) ** 2
            diagonal = G.diagonal(dim1=1, dim2=2)
            scores = (away / diagonal).masked_fill_(gone, torch.inf)
            j = scores.argmin(dim=1)
            far = away.masked_fill(gone, 0.0)
            outlier = ((far > 0.25 * scale**2).sum(dim=1) > 0) & (w[row, j] != 0)
            j = torch.where(outlier, far.argmax(dim=1), j)
            codes[start + row, j] = level[row, j]
            pivot, g = G[row, j], diagonal[row, j]
            w -= pivot * ((w[row, j] - level[row, j] * scale[:, 0]) / g)[:, None]
            gone[row, j] = True
            pivot = pivot / g.sqrt()[:, None]
            G -= torch.bmm(pivot[:, :, None], pivot[:, None, :])
    return codes.numpy().astype(np.int32)


def measure_obq(rows: int, d: int, bits: int, seed: int, repeats: int) -> dict[str, Any]:
    """Time greedy quantisation of one layer against the published algorithm, and compare their codes and errors."""
    W, H = correlated_layer(rows, d, seed)
    step, high = obs.search_scale(W, bits), 2 ** (bits - 1) - 1
    results: list[NDArray[np.int32]] = [obs.obq(W, H, step, -high - 1, high, threads=THREADS)]
    times = seconds(lambda: results.append(obs.obq(W, H, step, -high - 1, high, threads=THREADS)), repeats)
    start = time.perf_counter()
    theirs = published_obq(W, H, step, bits)
    published_s = time.perf_counter() - start
    errors = [obs.layer_error(W, q * step[:, None], H) for q in (results[0], theirs)]
    return {
        "layer": f"random {rows} x {d}",
        "bits": bits,
        "seed": seed,
        "engine_s": f"{statistics.median(times):.6g}",
        "repeats": repeats,
        "published_s": f"{published_s:.6g}",
        "speedup": f"{published_s / statistics.median(times):.6g}",
        "codes_agree": f"{np.mean(results[0] == theirs):.6g}",
        "rows_agree": f"{np.mean((results[0] == theirs).all(axis=1)):.6g}",
        "error_ratio": f"{errors[0] / errors[1]:.6g}",
        "threads": THREADS,
        "load": f"{os.getloadavg()[0]:.3g}",
        **environment(),
    }


def main(
    quick: Annotated[bool, typer.Option(help="Small layers only; writes nothing.")] = False,
    only: Annotated[int | None, typer.Option(help="Only layers of this many columns; 0: only `obq`.")] = None,
    again: Annotated[bool, typer.Option(help="Measure layers that have a row already, and replace it.")] = False,
    seed: int = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of the engine per layer.")] = 9,
) -> None:
    """Time the engine, and the published algorithm on the layers where that takes minutes at most."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    path = RESULTS / "bench_obs.csv"
    known = set() if again or quick else {key[0] for key in done_keys(path, ["layer"])}
    makers: list[tuple[str, int, Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]]], bool]] = [
        (f"random {rows} x {d}", d, partial(correlated_layer, rows, d, seed), baseline)
        for rows, d, baseline in (QUICK_SHAPES if quick else SHAPES)
    ]
    for name, (W, H) in golden_layers().items():
        makers.append((f"{name} {W.shape[0]} x {W.shape[1]}", W.shape[1], partial(lambda *x: x, W, H), not quick))
    results = []
    for name, d, make, baseline in makers:
        if name in known or only not in (None, d):
            continue
        row = measure(name, *make(), seed, baseline, max(1, repeats if d < 2304 else repeats // 4))
        results.append(row)
        if not quick:
            keep_row(path, {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}, KEYS)
    show(results)
    if only in (None, 0):
        rows, d, bits = QUICK_OBQ if quick else OBQ_SHAPE
        found = measure_obq(rows, d, bits, seed, repeats)
        Console().print(found)
        if not quick:
            keep_row(RESULTS / "bench_obs_obq.csv", found, ["layer", "bits"])


if __name__ == "__main__":
    typer.run(main)
