"""Minutes, memory and disk of a run, predicted before anything starts: counted work times rates measured here.

    calibrate   seconds of all that is done once, + batches · those of a batch + samples · those of a sample: what fits
                three short calibrations of the task's own model best (`pass_seconds`); for shapes, positions ·
                (weights + Σ d²/2 of the inputs) multiply-adds at the rate of a product. Over the cores of this
                machine: it is the calling process that calibrates
    profile     Σ over layers of Σ over kinds of operations · rate (`workloads`), dealt to the workers largest first
    memory      of the calling process: libraries, with transformers where the model is of it, + 4 bytes per parameter,
                8 per weight of a layer (order, loss) + calibration data + Hessians; of a worker: libraries + its
                largest task (`task_bytes`)
    disk        8 bytes per entry of each different Hessian, 8 per weight of a layer with an order (index and loss)

A block is what a transformer repeats: held alone with its Hessians, as streaming does, it is all of the model that is
in memory (`streaming_bytes`). Rates are those of one thread, measured in processor time, so that a busy machine does
not change them; the minutes are those of a machine that is not. More threads would count the time that they spin while
they wait for each other, which on a busy machine is most of it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.compressors import LayerProblem, default_options, named_options, profile_layer
from autocompress.errors import AutocompressError
from autocompress.obs import EXACT_LIMIT, exact_operations
from autocompress.threads import default_workers, single_threaded
from autocompress.types import DENSE, Option
from autocompress.workloads import KINDS, START_SECONDS, counts, needs_order, schedule, seconds

__all__ = [
    "Estimate",
    "EstimateError",
    "Network",
    "Unit",
    "bench_layer",
    "compressing_bytes",
    "estimate",
    "families",
    "llama",
    "measured_rates",
    "network_of",
    "streaming_bytes",
]

LIBRARIES = 400 << 20  # of a process with torch and the compiled kernels; see results/engines_estimates.csv
TRANSFORMERS = 100 << 20  # of transformers beside them
BUFFERS = 16 << 20  # of files that numpy writes
CODES_HELD = 1 << 28  # bytes of codes that a task holds at once (compressors.base), made and copied
SAMPLED = 64  # samples of the batches that are timed, at most


class EstimateError(AutocompressError):
    """A description of a network that lacks something."""


@dataclass(frozen=True)
class Unit:
    """A layer as the estimate sees it: matrix (groups, rows, d), the input that it shares with others by name, and how
    many positions of a sample it multiplies; table: rows that are only looked up; reached: whether calibration uses it.
    """

    name: str
    shape: tuple[int, int, int]
    input: str
    positions: float
    table: bool = False
    reached: bool = True

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def macs(self) -> float:
        """For one sample."""
        return 0.0 if self.table else self.weights * self.positions


@dataclass(frozen=True)
class Network:
    """What the estimate needs of a network and its data. block: names of the layers of the largest block, whose
    statistics streaming holds at once; outside: of those in no block, which it holds at another time; batches, and
    batch_samples of the largest; pass_seconds: processor seconds of a calibration, of each batch, of each sample, where
    measured; transformers: whether the model is of that library.
    """

    units: tuple[Unit, ...]
    samples: int
    parameters: int
    data_bytes: int
    block: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    batch_samples: int = 1
    batches: int = 1
    pass_seconds: tuple[float, float, float] | None = None
    transformers: bool = False

    def hessian_bytes(self, names: Iterable[str] | None = None) -> int:
        """Of the different inputs of all layers, or of those named, once each; float64."""
        chosen = None if names is None else set(names)
        held = [u for u in self.units if not u.table and (chosen is None or u.name in chosen)]
        return 8 * sum({u.input: u.shape[0] * u.shape[2] ** 2 for u in held}.values())


@dataclass(frozen=True)
class Estimate:
    """Seconds are of an idle machine; calibrate_cpu_seconds: of all processors together. tasks: seconds of every
    layer's, largest first. memory_bytes: of the calling process, where everything is computed in it, or of it alone;
    worker_bytes: of each worker beside it, 0 without any. streaming_bytes: see the function of that name, None where
    the blocks are not known.
    """

    calibrate_cpu_seconds: float
    profile_seconds: float
    tasks: tuple[float, ...]
    workers: int
    memory_bytes: int
    worker_bytes: int
    streaming_bytes: int | None
    disk_bytes: int

    @property
    def calibrate_seconds(self) -> float:
        return self.calibrate_cpu_seconds / default_workers()

    @property
    def minutes(self) -> float:
        return (self.calibrate_seconds + self.profile_seconds) / 60.0


def estimate(
    network: Network,
    rates: Mapping[str, float],
    workers: int | None = None,
    options: Sequence[Option | str] | None = None,
    exact_limit: float = EXACT_LIMIT,
) -> Estimate:
    """What calibrating and profiling that network takes; see the module for the formula."""
    workers = default_workers() if workers is None else workers
    offered = list(dict.fromkeys([DENSE, *named_options(["default"] if options is None else options)]))
    tasks = sorted(
        (seconds(counts(u.shape, offered, u.table, exact_limit), rates) for u in network.units), reverse=True
    )
    whole = sum(tasks)
    alone = workers <= 1 or len(tasks) <= 1 or whole <= START_SECONDS + schedule(tasks, workers)
    used = 1 if alone else workers
    profile = whole if alone else START_SECONDS + schedule(tasks, used)
    if network.pass_seconds is None:
        products = {u.input: u.shape[0] * u.shape[2] ** 2 / 2 * u.positions for u in network.units if not u.table}
        each = (sum(u.macs for u in network.units) + sum(products.values())) * rates["product"]
        calibrating = network.samples * each
    else:
        once, batch, sample = network.pass_seconds
        calibrating = once + network.batches * batch + network.samples * sample
    held = 4 * network.parameters + network.data_bytes + 8 * sum(u.weights for u in network.units)
    largest = max((task_bytes(u, offered, exact_limit) for u in network.units), default=0)
    libraries = LIBRARIES + (TRANSFORMERS if network.transformers else 0)
    memory = libraries + held + network.hessian_bytes() + (largest if alone else 0)
    streaming = streaming_bytes(network, offered if alone else None, exact_limit) if network.block else None
    ordered = sum(u.weights for u in network.units if u.reached and needs_order(u.shape, offered, u.table, exact_limit))
    return Estimate(
        calibrating,
        profile,
        tuple(tasks),
        used,
        memory,
        0 if alone else LIBRARIES + largest,
        streaming,
        network.hessian_bytes() + 8 * ordered,
    )


def streaming_bytes(network: Network, options: Sequence[Option] | None = None, exact_limit: float = EXACT_LIMIT) -> int:
    """Peak memory of a profile that streams a network: the most of three moments, plus libraries, data and buffers.

    A part is the largest block, or all that is outside of blocks. While it is calibrated: 4 bytes per weight; 8 per
    entry of the Hessian of every input, and 4 for a product on its way into it; 4 per value of each input and of the
    widest output for one batch. While it is read: 4 per weight, and 10 per weight of its largest layer (the file's
    pages, and the search for values that are not finite). While a layer is profiled: `task_bytes` (options; None: it is
    sent to a worker, and 16 per weight and entry of its Hessian are here, for the problem and its pickle).
    """
    moments = [0]
    for names in (network.block, network.outside):
        part = [u for u in network.units if u.name in names]
        weights = sum(u.weights for u in part)
        inputs = {u.input: u.shape[0] * u.shape[2] * u.positions for u in part if not u.table}
        values = sum(inputs.values()) + max((u.shape[0] * u.shape[1] * u.positions for u in part), default=0.0)
        held = network.hessian_bytes(names)
        moments.append(4 * weights + held + held // 2 + round(4 * network.batch_samples * values))
        moments.append(4 * weights + 10 * max((u.weights for u in part), default=0))
    for u in network.units:
        problem = 8 * (u.weights + (0 if u.table else u.shape[0] * u.shape[2] ** 2))
        moments.append(2 * problem if options is None else task_bytes(u, options, exact_limit, sent=False))
    return _fixed_bytes(network) + max(moments)


def compressing_bytes(
    network: Network,
    file_bytes: int,
    options: Sequence[Option] | None = None,
    exact_limit: float = EXACT_LIMIT,
    sequential: bool = True,
) -> int:
    """Peak memory of `compress` of a streamed network into a file of so many bytes: twice the file, for its records and
    the plan that is measured or the result that is checked beside them, and the most of five moments.

    The profile (`streaming_bytes`, options as there). A layer's weight is made: `task_bytes`. A pass over at most
    `CORRECTION_TOKENS` tokens: 24 per weight of the largest layer, for codes, the weight, and what either is made from;
    4 per token and value of a block's inputs and its widest output, twice. A pass that is compared, of `PASS_TOKENS`
    tokens: 8 per score, and the dense ones that are kept. One step of sequential mode: 40 per weight of the layers
    that read one input, and `task_bytes` of the largest of them.
    """
    from autocompress.applying import CORRECTION_TOKENS
    from autocompress.measuring import OUTPUT_BYTES, PASS_TOKENS, SCORES_AT_ONCE

    made = [DENSE] if options is None else list(options)[:1]
    largest = max(u.weights for u in network.units)
    block = [u for u in network.units if u.name in network.block]
    values = sum({u.input: u.shape[0] * u.shape[2] for u in block}.values())
    widest = max((u.shape[0] * u.shape[1] for u in block), default=0)
    tokens = round(network.samples * max(u.positions for u in network.units))
    scores = min(tokens, PASS_TOKENS) * max((u.shape[1] for u in network.units if u.name in network.outside), default=0)
    moments = [
        streaming_bytes(network, options, exact_limit) - _fixed_bytes(network),
        max(task_bytes(u, made, exact_limit, sent=False) for u in network.units),
        24 * largest + 8 * min(tokens, CORRECTION_TOKENS) * (values + widest),
        24 * largest + 8 * scores + min(OUTPUT_BYTES, 4 * scores) + 32 * min(scores, SCORES_AT_ONCE),
    ]
    steps: dict[str, list[Unit]] = {}
    for unit in network.units if sequential else ():
        if not unit.table:
            steps.setdefault(unit.input, []).append(unit)
    for step in steps.values():
        work = max(task_bytes(u, made, exact_limit, sent=False) for u in step)
        moments.append(40 * sum(u.weights for u in step) + work)
    return _fixed_bytes(network) + 2 * file_bytes + max(moments)


def _fixed_bytes(network: Network) -> int:
    """What a process that streams a network holds all the time."""
    return LIBRARIES + TRANSFORMERS + BUFFERS + network.data_bytes


def task_bytes(unit: Unit, options: Sequence[Option], exact_limit: float = EXACT_LIMIT, sent: bool = True) -> int:
    """What a worker holds beside its libraries: the problem, factors in both precisions, and codes.

    8 (weights + d² groups) for the problem, as much again while it is sent to a worker; 8 · 3 d² of factors and
    inverses (12 · d² where rows share one); 12 per weight of order, losses and refits; 4 per weight and option, twice,
    up to a limit.
    """
    groups, _, d = unit.shape
    square = 0 if unit.table else d * d
    factors = (24 if exact_operations(unit.shape) <= exact_limit else 12) * square
    codes = min(8 * unit.weights * len(options), max(2 * CODES_HELD, 8 * unit.weights))
    return (16 if sent else 8) * (unit.weights + groups * square) + factors + 12 * unit.weights + codes


def llama(config: str | Path | Mapping[str, Any], samples: int = 128, tokens: int = 2048) -> Network:
    """A causal language model by its shapes alone: what `config.json` of a Llama-like model says.

    Reads hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size and
    tie_word_embeddings. Raises EstimateError, naming what is missing.
    """
    from autocompress.hf import batch_rows

    if isinstance(config, Mapping):
        found: Any = config
    else:
        try:
            found = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise EstimateError(f"{config} is not the description of a network: {error}") from error
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not isinstance(found, Mapping) or (missing := [name for name in needed if not isinstance(found.get(name), int)]):
        what = ", ".join(missing) if isinstance(found, Mapping) else "names and values"
        raise EstimateError(f"the description of a network lacks {what}; needed is what config.json says of a Llama")
    width, hidden, blocks, heads, vocab = (int(found[name]) for name in needed)
    kv = width // heads * int(found.get("num_key_value_heads") or heads)
    inside = {"q": (width, width, "x"), "k": (kv, width, "x"), "v": (kv, width, "x"), "o": (width, width, "a")}
    inside |= {"gate": (hidden, width, "y"), "up": (hidden, width, "y"), "down": (width, hidden, "z")}
    units = [
        Unit(f"{block}.{name}", (1, rows, d), f"{block}.{read}", float(tokens))
        for block in range(blocks)
        for name, (rows, d, read) in inside.items()
    ]
    tied = bool(found.get("tie_word_embeddings", False))
    units.append(Unit("embedding", (1, vocab, width), "head", float(tokens), table=not tied))
    if not tied:
        units.append(Unit("head", (1, vocab, width), "head", float(tokens)))
    parameters = sum(u.weights for u in units) + (2 * blocks + 1) * width
    return Network(
        tuple(units),
        samples,
        parameters,
        8 * samples * tokens,
        tuple(f"0.{name}" for name in inside),
        tuple(u.name for u in units if "." not in u.name),
        min(samples, batch_rows(tokens)),
        transformers=True,
    )


def network_of(model: Any, data: Sequence[Any]) -> Network:
    """A task's model, run on a few samples: which layers read one input, at how many positions, in what time."""
    from autocompress.batches import batch_samples, join_batches, split_batches
    from autocompress.calibration import calibrate
    from autocompress.layers import find_layers

    fit = split_batches(list(data))[0]
    batch = join_batches([max(fit, key=batch_samples)], SAMPLED)
    stats = calibrate(model, [batch], holdout=0.0)  # and what only the first pass does
    units = []
    for layer in find_layers(model):
        found = stats.layers.get(layer.name)
        reads = layer.name if found is None else str(id(found.hessian))
        table = found is None or (found.row_weights is not None and not len(found.hessian))
        positions = 0.0 if found is None else found.positions / stats.samples
        units.append(Unit(layer.name, layer.matrix_shape, reads, positions, table, found is not None))
    tensors = {t.data_ptr(): t.numel() for t in (*model.parameters(), *model.buffers())}
    kept = [t for batch in data for t in _tensors(batch)]
    return Network(
        tuple(units),
        sum(map(batch_samples, fit)),
        sum(tensors.values()),
        sum(t.numel() * t.element_size() for t in kept),
        batch_samples=max(map(batch_samples, fit)),
        batches=len(fit),
        pass_seconds=pass_seconds(model, batch),
        transformers=any(type(m).__module__.startswith("transformers.") for m in model.modules()),
    )


def pass_seconds(model: Any, batch: Any) -> tuple[float, float, float]:
    """Processor seconds of a calibration, of each of its batches, and of each sample, on one thread: none negative, and
    of least squared relative error for three calibrations: of a batch, of its first half, and of that half twice.
    """
    import torch

    from autocompress.batches import batch_samples, join_batches
    from autocompress.calibration import calibrate

    half = join_batches([batch], max(1, batch_samples(batch) // 2))
    runs = ([half], [half, half], [batch])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [_least(lambda r=r: calibrate(model, r, holdout=0.0), time.process_time) for r in runs]
    finally:
        torch.set_num_threads(threads)
    counted = [{"run": 1, "batch": len(run), "sample": sum(map(batch_samples, run))} for run in runs]
    found = fit(counted, times, {}, ("run", "batch", "sample"))
    return found["run"], found["batch"], found["sample"]


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inside for tensor in _tensors(part)]


def measured_rates() -> dict[str, float]:
    """Seconds per operation of every kind on one thread of this machine, in some ten seconds.

    Products, factors and traces are timed by themselves, at a size where their own rate shows; the other kinds are what
    fits the times of small layers best: non-negative least squares of relative errors (`fit`).
    """
    problems = [(shape, options, limit) for shape, limit in BENCHES for options in families(shape)]
    for limit in (EXACT_LIMIT, 0.0):
        profile_layer(bench_layer((1, 2, 8), limit), default_options())  # compiles, or loads what is compiled
    times = [_least(lambda s=s, o=o, m=m: profile_layer(bench_layer(s, m), o)) for s, o, m in problems]
    return fit([counts(s, o, exact_limit=m) for s, o, m in problems], times, basic_rates())


# Small layers of every kind of work; with fewer rows than the networks have, as rows only repeat it.
BENCHES = (
    ((1, 16, 27), EXACT_LIMIT),
    ((1, 16, 144), EXACT_LIMIT),
    ((1, 8, 288), EXACT_LIMIT),
    ((1, 64, 64), EXACT_LIMIT),
    ((1, 64, 256), 0.0),
)


def families(shape: Sequence[int]) -> list[list[Option]]:
    """The default options by what realises them; the trellis, which is slow, on the smaller layers only."""
    found = default_options()
    grids, steps = [o for o in found if o.bits], [o for o in found if o.step is not None and not o.trellis]
    return [grids, steps] + ([[o for o in found if o.trellis]] if math.prod(shape) <= 2400 else [])


def fit(
    counted: Sequence[Mapping[str, float]],
    times: Sequence[float],
    known: Mapping[str, float],
    kinds: Sequence[str] = KINDS,
) -> dict[str, float]:
    """Rates of the kinds that are not known, from counted work and its seconds: min Σ (predicted / measured - 1)²."""
    from scipy.optimize import nnls

    free = [kind for kind in kinds if kind not in known]
    measured = np.asarray(times)
    fixed = np.array([sum(c[kind] * rate for kind, rate in known.items()) for c in counted])
    matrix = np.array([[c[kind] for kind in free] for c in counted], float) / measured[:, None]
    found = nnls(matrix, np.maximum(measured - fixed, 0.0) / measured)[0]
    return {**known, **dict(zip(free, found.tolist(), strict=True))}


def basic_rates() -> dict[str, float]:
    """Seconds per multiply-add of a float32 product, of a float32 Cholesky factor, and of a greedy trace."""
    from autocompress import obs
    from autocompress.obs import blas

    n = 1024
    generator = np.random.default_rng(0)
    X = generator.standard_normal((n, n)).astype(np.float32)
    H = (X @ X.T / n + np.eye(n, dtype=np.float32)).astype(np.float32)
    few, d = generator.standard_normal((4, n // 2)), n // 2
    small = np.asarray(H[:d, :d], np.float64)
    with single_threaded():
        return {
            "product": _least(lambda: X @ X) / n**3,
            "factor": _least(lambda: blas.in_place(blas.POTRF, H.copy(), n)) / (n**3 / 3),
            "trace": _least(lambda: obs.prune_trace(few, small, threads=1)) / exact_operations(few.shape),
        }


def _least(run: Any, clock: Callable[[], float] = time.thread_time) -> float:
    """Processor seconds of this thread, or by that clock: the least of three runs, or of fewer once they take long."""
    best, began = math.inf, clock()
    for _ in range(3):
        start = clock()
        run()
        best = min(best, clock() - start)
        if clock() - began > 1.0:
            break
    return best


def bench_layer(shape: tuple[int, int, int], exact_limit: float) -> LayerProblem:
    """A layer whose inputs have some structure, as a trained network's have."""
    groups, rows, d = shape
    generator = np.random.default_rng(0)
    W = generator.standard_normal(shape) / math.sqrt(d)
    X = generator.standard_normal((d, 2 * d)) * np.exp(generator.standard_normal((d, 1)))
    H = X @ X.T / d
    H += 0.01 * np.diag(H).mean() * np.eye(d)
    return LayerProblem("bench", (groups * rows, d), W, np.repeat(H[None], groups, 0), exact_limit=exact_limit)
