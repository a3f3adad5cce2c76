"""Comparison: strategies x budgets x seeds on one profile, row by row, as a table.

Store:  rows/<key>.json      one file per finished row, named by the digest of all that the row depends on
        extra/<name>.json    what strategies measured on the model; extra/<name>.runs.json how often that ran it
        compare.csv          the table of the last call, up to date after every row
        plans.jsonl          its plans, a line per row: {strategy, budget, seed, layers: {layer: [option, bytes]}, plan}
Every file is renamed into its place, and a row's name says what is in it, so several processes may fill one store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from autocompress import __version__
from autocompress.compressors import Measured
from autocompress.engines import WorkerError, run_tasks
from autocompress.errors import AutocompressError, MismatchError, StoreError
from autocompress.files import atomic_path
from autocompress.measuring import Context
from autocompress.planning import budget_bytes, within
from autocompress.profiling import Profile, Store
from autocompress.strategies import STRATEGIES, Strategy, StrategyError, needs_of
from autocompress.strategies import plan as never_worse_plan
from autocompress.strategies.auto import Auto
from autocompress.tasks import Task, load_task
from autocompress.types import Budget, Plan

__all__ = ["COLUMNS", "CompareWarning", "compare", "load_comparison", "spending", "task_context"]

COMPARE_VERSION = 1
COLUMNS = (
    "strategy",
    "budget",
    "seed",
    "budget_bytes",
    "bytes",
    "paper_bytes",
    "predicted_loss",
    "bound",
    "gap",
    "kl",
    "metric",
    "seconds",
    "evaluations",
    "plan",
    "error",
)
KEYS = ("strategy", "budget", "seed")
log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


class CompareWarning(UserWarning):
    """Rows are computed in another way than asked, and the table is the same."""


def compare(
    profile: Profile,
    budgets: Sequence[Budget | str | int],
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy] | None = None,
    context: Context | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    seeds: Sequence[int] = (0,),
    store: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    task: Task | None = None,
) -> pd.DataFrame:
    """One row per (strategy, budget, seed): what its plan promises, what it measures, what it took.

    Columns: strategy, budget, seed, budget_bytes; bytes (of the file, exact); paper_bytes (as papers count: codes of
    the weights that are not zero, ceil(sum of nonzero * width / 8), without positions, scales, norms and biases);
    predicted_loss, bound and gap (of the strategy's own objective: not comparable between strategies); kl (measured, to
    the dense model, on the calibration slice that the Hessians never saw); metric (what evaluate says of the
    model); seconds (of planning alone; later rows find weights made by earlier ones); evaluations (model runs that the
    plan rests on, those that an earlier row made and kept too); plan (the plan's own name); error (why there is no
    plan: the other columns of such a row are empty); layers (JSON: layer -> [option, bytes]; see `spending`).

    Every strategy's own plan is compared, not replaced where a single option measures better, but for `auto`, which
    goes through `strategies.plan` as users get it. All plans are made the same way: weights as profiled, statistics
    corrected, neither sequential mode nor tuning.

    strategies: names, callables of their protocol, or {name: either}; None takes all that need nothing that is not
    given. context: without one nothing is measured. evaluate (higher is better) only reports. seeds: each seeds the
    searches; the split of the calibration data stays that of the context. store: a folder where finished rows are kept
    and found again if they depend on the same profile, data, strategy, budget, seed, effort, versions and name of
    evaluate; your own callables have no version and are run again, unless they have an attribute `version`.
    workers: processes. Every row runs on one thread, so that the table, but for `seconds`, does not depend on how many
    there are; what cannot be pickled runs in this process, with a CompareWarning. task: where context and evaluate come
    from (`task_context`, `task.evaluate`), which lets workers load it anew instead of unpickling them.
    progress: called with ("compare", rows done, rows in all).

    Raises StrategyError for an unknown name, BudgetError for a budget that is not one, MismatchError for a context of
    another model or data, StoreError for a store that cannot be used, and whatever evaluate raises.
    """
    chosen = _named(strategies, context)
    wanted = list(dict.fromkeys(str(Budget.of(budget)) for budget in budgets))
    if context is not None:
        context.check(profile)
    elif evaluate is not None:
        raise MismatchError("evaluate needs a compressed model, and there is no context to make one with: give one")
    # By budget first: plans of one budget share more options than plans of one strategy.
    asked = [(name, budget, seed) for seed in dict.fromkeys(seeds) for budget in wanted for name in chosen]
    tell = progress or (lambda stage, done, total: None)
    with _folder(store) as place:
        bench = _Bench(profile, context, evaluate, chosen, place, None if task is None else task.source)
        book = _Book(place, store is not None, asked, {at: bench.key(*at) for at in asked})
        tell("compare", len(book.rows), len(asked))
        for row in _made(bench, book.missing(), workers):
            book.add(row)
            tell("compare", len(book.rows), len(asked))
        return book.table()


def spending(table: pd.DataFrame) -> pd.DataFrame:
    """Who spends the bytes where: one row per (strategy, budget, seed, layer): option, bytes, share (of the file).

    table: what `compare` or `load_comparison` gave, or rows of it; rows without a plan are left out.
    """
    records = [
        {
            **{key: row[key] for key in KEYS},
            "layer": layer,
            "option": option,
            "bytes": size,
            "share": size / row["bytes"],
        }
        for row in table.to_dict("records")
        if row["layers"]
        for layer, (option, size) in json.loads(row["layers"]).items()
    ]
    return pd.DataFrame.from_records(records, columns=[*KEYS, "layer", "option", "bytes", "share"])


def load_comparison(folder: str | Path) -> pd.DataFrame:
    """The table that `compare` left in its store, or `autocompress compare` in its folder, `layers` included.

    Raises StoreError where there is none.
    """
    path = Path(folder)
    try:
        lines = [json.loads(line) for line in (path / "plans.jsonl").read_text().splitlines()]
        table = pd.read_csv(path / "compare.csv", dtype={"strategy": str, "budget": str, "plan": str, "error": str})
    except FileNotFoundError as error:
        raise StoreError(f"there is no comparison in {path}; run `autocompress compare TASK --out {path}`") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"the comparison in {path} cannot be read: {error}; remove it to make it again") from error
    layers = {tuple(line[key] for key in KEYS): json.dumps(line["layers"]) for line in lines}
    table[["plan", "error"]] = table[["plan", "error"]].fillna("")
    return _typed(table.assign(layers=[layers.get((r.strategy, r.budget, r.seed), "") for r in table.itertuples()]))


def write_comparison(folder: Path, table: pd.DataFrame, plans: Iterable[str]) -> None:
    """compare.csv and plans.jsonl of a table. plans: the lines of the latter."""
    with atomic_path(folder / "compare.csv") as scratch:
        table.drop(columns="layers").to_csv(scratch, index=False, lineterminator="\n")
    with atomic_path(folder / "plans.jsonl") as scratch:
        scratch.write_text("".join(f"{line}\n" for line in plans))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the same types whatever is missing in it."""
    whole = dict.fromkeys(("bytes", "paper_bytes", "evaluations"), "Int64")
    real = dict.fromkeys(("predicted_loss", "bound", "gap", "kl", "metric", "seconds"), "float64")
    return table.astype({"seed": "int64", "budget_bytes": "int64", **whole, **real})


class _Training:
    """A task's labelled batches, from the first one again whenever they are iterated."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __iter__(self) -> Iterator[Any]:
        return self.task.training_batches(self.seed)


def task_context(task: Task, seed: int = 0, effort: str = "normal") -> Context:
    """The context of a task: its model, its calibration batches of a seed, its loss and labelled batches, if any."""
    training = None if task.training is None else _Training(task, seed)
    return Context(task.build_model(), task.calibration_batches(seed), task.loss, seed, effort, training)


def _named(
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy] | None, context: Context | None
) -> dict[str, Strategy]:
    """Strategies by name. Raises StrategyError for an unknown name, and for one name of two."""
    if strategies is None:
        return {name: s for name, s in STRATEGIES.items() if context is not None or needs_of(s) == "curves"}
    if isinstance(strategies, str) or callable(strategies):
        strategies = [strategies]
    pairs = strategies.items() if isinstance(strategies, Mapping) else [(_name_of(s), s) for s in strategies]
    found: dict[str, Strategy] = {}
    for name, strategy in pairs:
        if isinstance(strategy, str):
            if strategy not in STRATEGIES:
                raise StrategyError(f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
            strategy = STRATEGIES[strategy]
        if found.get(name, strategy) is not strategy:
            raise StrategyError(f"two strategies are called {name!r}; give them as {{name: strategy}}")
        found[name] = strategy
    return found


def _name_of(strategy: str | Strategy) -> str:
    return strategy if isinstance(strategy, str) else getattr(strategy, "__name__", type(strategy).__name__)


@dataclass(frozen=True)
class _Row:
    """One row of the table with its plan, as JSON; `failure`: what is no row, but for whoever asked to raise."""

    values: Mapping[str, Any]
    layers: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    plan: str = ""
    failure: AutocompressError | None = None

    @property
    def at(self) -> tuple[str, str, int]:
        return self.values["strategy"], self.values["budget"], self.values["seed"]

    def record(self) -> dict[str, Any]:
        return {**self.values, "layers": json.dumps(self.layers) if self.layers else ""}

    @functools.cached_property
    def line(self) -> str:
        """The row's line of plans.jsonl."""
        return json.dumps(
            {**dict(zip(KEYS, self.at, strict=True)), "layers": self.layers, "plan": json.loads(self.plan)}
        )

    def to_json(self) -> str:
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.values.items()}
        return json.dumps({"row": values, "layers": self.layers, "plan": self.plan}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> _Row:
        """Inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        body = json.loads(text)
        values = dict(body["row"])
        for name in ("predicted_loss", "bound", "gap", "kl", "metric", "seconds"):
            values[name] = None if values[name] is None else float(values[name])
        layers = {name: (str(option), int(size)) for name, (option, size) in body["layers"].items()}
        return cls({name: values[name] for name in COLUMNS}, layers, body["plan"])


@dataclass
class _Bench:
    """What rows are computed from. `measured`: (kl, metric) of plans that were measured, as strategies often agree."""

    profile: Profile
    context: Context | None
    evaluate: Callable[[nn.Module], float] | None
    strategies: Mapping[str, Strategy]
    place: Path
    task: str | None
    measured: dict[tuple[Any, ...], tuple[float, float | None]] = field(default_factory=dict)

    def key(self, name: str, budget: str, seed: int) -> str | None:
        """Digest of all that a row depends on; None for a strategy whose code nothing names."""
        strategy = self.strategies[name]
        registered = [known for known, other in STRATEGIES.items() if other is strategy]
        if not registered and not hasattr(strategy, "version"):
            return None
        evaluate = self.evaluate
        depends = {
            "versions": [COMPARE_VERSION, __version__, torch.__version__, getattr(strategy, "version", 1)],
            "profile": self.profile.fingerprint,
            "vectors": self.profile.template.bits,
            "latency": None if self.profile.latency is None else repr(self.profile.latency),
            "data": None if self.context is None else self.context.data_digest,
            "effort": None if self.context is None else self.context.effort,
            "loss": self.context is not None and self.context.loss is not None,
            "strategy": [name, *registered],
            "at": [budget, seed],
            "evaluate": evaluate
            and [getattr(evaluate, k, type(evaluate).__name__) for k in ("__module__", "__qualname__")],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def row(self, name: str, budget: str, seed: int) -> _Row:
        """Plan, measure, evaluate, on one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._row(name, budget, seed)
        finally:
            torch.set_num_threads(threads)

    def _row(self, name: str, text: str, seed: int) -> _Row:
        strategy, budget = self.strategies[name], Budget.parse(text)
        context = None if self.context is None else self.context.seeded(seed)
        extra = _Extra(self.place, context)
        profile = dataclasses.replace(self.profile, store=extra)
        profile.__dict__["fingerprint"] = self.profile.fingerprint
        limit = budget_bytes(budget, profile)
        values: dict[str, Any] = {**dict.fromkeys(COLUMNS), "strategy": name, "budget": text, "seed": seed}
        values |= {"budget_bytes": limit, "plan": "", "error": ""}
        began = time.perf_counter()
        try:
            if isinstance(strategy, Auto):
                plan = never_worse_plan(profile, budget, strategy, context)
            else:
                plan = strategy(within(profile, limit), budget, context)
            rows = _checked(profile, plan, limit)
        except (StoreError, WorkerError):
            raise
        except AutocompressError as error:
            values["seconds"] = time.perf_counter() - began
            return _Row({**values, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        plan = plan.replace(seed=seed)
        values |= {
            "bytes": plan.predicted_bytes,
            "paper_bytes": math.ceil(sum(row.nonzero * row.width for row in rows.values()) / 8),
            "predicted_loss": plan.predicted_loss,
            "bound": plan.bound,
            "gap": plan.gap,
            "seconds": time.perf_counter() - began,
            "evaluations": 0 if context is None else context.evaluations + extra.runs,
            "plan": plan.strategy,
        }
        if context is not None:
            try:
                values["kl"], values["metric"] = self._measured(profile, plan, context)
            except AutocompressError as error:
                return _Row(values, failure=error)
        return _Row(values, {n: (str(row.option), row.bytes) for n, row in rows.items()}, plan.to_json())

    def _measured(self, profile: Profile, plan: Plan, context: Context) -> tuple[float, float | None]:
        at = (plan.vector_bits, *map(str, plan.layers.values()))
        if at not in self.measured:
            small = context.build(profile.with_vectors(plan.vector_bits), plan.layers)
            kl = context.divergence_of(small) if context.held else math.nan
            self.measured[at] = kl, None if self.evaluate is None else float(self.evaluate(small))
        return self.measured[at]


def _checked(profile: Profile, plan: Plan, limit: int) -> dict[str, Measured]:
    """The rows of a plan. Raises MismatchError unless it is one of the profile and its file is within the budget."""
    if list(plan.layers) != list(profile.layers) or plan.fingerprint != profile.fingerprint:
        raise MismatchError("the strategy's plan is of another profile")
    rows = {n: profile.layers[n].row(option) for n, option in plan.layers.items()}
    size = profile.with_vectors(plan.vector_bits).template.file_bytes(rows)
    if size != plan.predicted_bytes or size > limit:
        raise MismatchError(
            f"the plan makes a file of {size:,} bytes and says {plan.predicted_bytes:,}; the budget is {limit:,}"
        )
    return rows


class _Extra(Store):
    """Where strategies keep what they measured on the model, for the rows after them. Another writer is waited for.

    `runs`: how often the model ran for what was found here. It counts as if this row had measured it: what a row says
    must not depend on the rows before it.
    """

    def __init__(self, path: Path, context: Context | None) -> None:
        self.path, self.context, self.runs = path, context, 0
        self._missed: dict[str, int] = {}

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        import fcntl

        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _ran(self) -> int:
        return 0 if self.context is None else self.context.evaluations

    def read_json(self, name: str) -> Any | None:
        found, runs = super().read_json(name), super().read_json(_runs_name(name))
        if found is None or runs is None:
            self._missed[name] = self._ran()
            return None
        self.runs += runs
        return found

    def write_json(self, name: str, value: Any) -> None:
        super().write_json(name, value)
        super().write_json(_runs_name(name), self._ran() - self._missed.get(name, 0))


def _runs_name(name: str) -> str:
    return f"{name.removesuffix('.json')}.runs.json"


@dataclass
class _Book:
    """The rows of a call, in the order of the table, and the store that they are kept in."""

    place: Path
    keep: bool
    asked: Sequence[tuple[str, str, int]]
    keys: Mapping[tuple[str, str, int], str | None]
    rows: dict[tuple[str, str, int], _Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for at, key in self.keys.items():
            path = self._path(key)
            if key is None or not path.is_file():
                continue
            try:
                self.rows[at] = _Row.from_json(path.read_text())
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path} cannot be read: {error}; remove it to make it again") from error
        log.info("%d of %d rows are in the store already", len(self.rows), len(self.asked))
        self._write()

    def _path(self, key: str | None) -> Path:
        return self.place / "rows" / f"{key}.json"

    def missing(self) -> list[tuple[str, str, int]]:
        return [at for at in self.asked if at not in self.rows]

    def add(self, row: _Row) -> None:
        key = self.keys[row.at]
        if self.keep and key is not None:
            with atomic_path(self._path(key)) as scratch:
                scratch.write_text(row.to_json())
        self.rows[row.at] = row
        self._write()

    def _write(self) -> None:
        if self.keep:
            rows = [self.rows[at] for at in self.asked if at in self.rows]
            write_comparison(self.place, self.table(), [row.line for row in rows if row.plan])

    def table(self) -> pd.DataFrame:
        known = [self.rows[at].record() for at in self.asked if at in self.rows]
        return _typed(pd.DataFrame.from_records(known, columns=[*COLUMNS, "layers"]))


@contextlib.contextmanager
def _folder(store: str | Path | None) -> Iterator[Path]:
    """The store's folder, or one for the time of the block."""
    if store is None:
        with tempfile.TemporaryDirectory(prefix="autocompress-compare-") as scratch:
            yield Path(scratch)
        return
    path = Path(store)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the comparison's store {path}: {error.strerror or error}") from error
    yield path


def _made(bench: _Bench, todo: list[tuple[str, str, int]], workers: int) -> Iterator[_Row]:
    """The rows, as they come. Raises what is no row."""
    made = _made_by_workers(bench, todo, workers) if workers > 1 and len(todo) > 1 else None
    for found in made or (bench.row(*at) for at in todo):
        if isinstance(found, str):
            text = f"rows are computed in this process, one after another; workers cannot load what they need: {found}"
            warnings.warn(text, CompareWarning, stacklevel=3)
            yield from _made(bench, todo, 1)
            return
        if found.failure is not None:
            raise found.failure
        yield found


def _made_by_workers(bench: _Bench, todo: list[tuple[str, str, int]], workers: int) -> Iterator[_Row | str]:
    """The rows, as they come; or, before any of them, why a worker cannot compute them."""
    try:
        data = _pickled(bench)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        yield f"{type(error).__name__}: {error}"
        return
    with tempfile.TemporaryDirectory(prefix="autocompress-compare-") as scratch:
        path = Path(scratch) / "bench"
        path.write_bytes(data)
        for _, found in run_tasks(_row_in_worker, [(str(path), *at) for at in todo], workers):
            yield found


def _pickled(bench: _Bench) -> bytes:
    """A bench as bytes. With a task, its model and functions are left out: workers load it again."""
    again = None
    if bench.task is not None and bench.context is not None:
        again = bench.context.seed, bench.context.effort, bench.context.data_digest, bench.evaluate is not None
        bench = dataclasses.replace(bench, context=None, evaluate=None)
    return pickle.dumps((dataclasses.replace(bench, profile=dataclasses.replace(bench.profile, store=None)), again))


@functools.lru_cache(maxsize=1)  # the rows of a worker share one context, and what it measured
def _unpickled(path: str) -> _Bench | str:
    """What `_pickled` made, or why it cannot be loaded in this process."""
    try:
        bench, again = pickle.loads(Path(path).read_bytes())
    except (pickle.UnpicklingError, ImportError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if again is not None:
        seed, effort, digest, evaluates = again
        task = load_task(bench.task)
        bench.context, bench.evaluate = task_context(task, seed, effort), task.evaluate if evaluates else None
        if bench.context.data_digest != digest:
            raise MismatchError(
                f"field 'data': calibration() of task {bench.task} gives other batches when it is called again; "
                "with several workers it must repeat itself"
            )
        bench.context.check(bench.profile)
    return bench


def _row_in_worker(path: str, name: str, budget: str, seed: int) -> _Row | str:
    try:
        bench = _unpickled(path)
        return bench if isinstance(bench, str) else bench.row(name, budget, seed)
    except AutocompressError as error:
        return _Row({}, failure=error)
