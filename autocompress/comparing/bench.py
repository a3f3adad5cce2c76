"""Rows of a comparison: plan, measure, evaluate; in this process or in workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import solvers
from autocompress import __version__
from autocompress.batches import batch_digest
from autocompress.comparing.table import COLUMNS, Book, Row
from autocompress.compressors import Measured
from autocompress.engines import WorkerError, run_tasks
from autocompress.errors import AutocompressError, MismatchError, StoreError
from autocompress.measuring import Context
from autocompress.planning import budget_bytes, paper_bytes
from autocompress.profiling import Profile, Store
from autocompress.strategies import STRATEGIES, Strategy, StrategyError, needs_of, offered_to
from autocompress.strategies import plan as never_worse_plan
from autocompress.strategies.auto import Auto
from autocompress.tasks import Task
from autocompress.types import Budget, Plan

__all__ = ["CompareWarning", "compare", "task_context"]

COMPARE_VERSION = 2
# Everything that a row is computed by. Both are folders of Python files, however they are installed.
PACKAGES = (Path(__file__).parents[1], Path(solvers.__file__).parent)
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
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """One row per (strategy, budget, seed): what its plan promises, what it measures, what it took.

    Columns: strategy, budget, seed, budget_bytes; bytes (of the file, exact); paper_bytes (as papers count: codes
    without positions, scales, norms and biases, see `planning.paper_bytes`);
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
    and found again if they depend on the same profile, data, loss, strategy, budget, seed, effort, code and name of
    evaluate, with its attribute `version` if it has one. The code is all files of `autocompress` and `solvers`; your
    own strategies are run again, unless they have an attribute `version`.
    workers: processes. Every row runs on one thread, so that the table, but for `seconds`, does not depend on how many
    there are; what cannot be pickled runs in this process, with a CompareWarning. task: where context and evaluate come
    from (`task_context`, `task.evaluate`), which lets workers make it anew (`task.recipe`) instead of unpickling them.
    progress: called with ("compare", rows done, rows in all). on_row: called with every row, {column: value}, as soon
    as it is known; those of the store first.

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
        bench = _Bench(profile, context, evaluate, chosen, place, None if task is None else task.recipe)
        book = Book(place, store is not None, asked, {at: bench.key(*at) for at in asked})
        tell("compare", len(book.rows), len(asked))
        hand = on_row or (lambda row: None)
        for row in list(book.rows.values()):
            hand(row.record())
        for row in _made(bench, book.missing(), workers):
            book.add(row)
            hand(row.record())
            tell("compare", len(book.rows), len(asked))
        return book.table()


def task_context(task: Task, seed: int = 0, effort: str = "normal") -> Context:
    """The context of a task: its model, its calibration batches of a seed, its loss and labelled batches, if any."""
    model, data, training = task.build_model(), task.calibration_batches(seed), task.labelled_batches(seed)
    return Context(model, data, task.loss, seed, effort, training, task.embedding)


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


@dataclass
class _Bench:
    """What rows are computed from. `measured`: (kl, metric) of plans that were measured, as strategies often agree."""

    profile: Profile
    context: Context | None
    evaluate: Callable[[nn.Module], float] | None
    strategies: Mapping[str, Strategy]
    place: Path
    recipe: Callable[[], Task] | None
    measured: dict[tuple[Any, ...], tuple[float, float | None]] = field(default_factory=dict)

    def key(self, name: str, budget: str, seed: int) -> str | None:
        """Digest of all that a row depends on; None for a strategy whose code nothing names."""
        strategy = self.strategies[name]
        registered = [known for known, other in STRATEGIES.items() if other is strategy]
        if not registered and not hasattr(strategy, "version"):
            return None
        evaluate = self.evaluate
        depends = {
            "versions": [COMPARE_VERSION, __version__, torch.__version__, getattr(strategy, "version", None)],
            "code": source_digest(*PACKAGES),
            "profile": self.profile.key,
            "vectors": self.profile.template.bits,
            "latency": None if self.profile.latency is None else repr(self.profile.latency),
            "data": None if self.context is None else self.context.data_digest,
            "effort": None if self.context is None else self.context.effort,
            "loss": self._loss_key if needs_of(strategy) in ("gradients", "evaluations") else None,
            "strategy": [name, *registered],
            "at": [budget, seed],
            "evaluate": evaluate
            and [
                *(getattr(evaluate, k, type(evaluate).__name__) for k in ("__module__", "__qualname__")),
                getattr(evaluate, "version", None),
            ],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _loss_key(self) -> list[str] | None:
        """What tells the task's loss on its labelled batches from another."""
        if self.context is None or self.context.loss is None:
            return None
        with _one_thread():
            labelled = self.context.labelled(1)
            return [*map(batch_digest, labelled), *self.context.loss_key(labelled)]

    def row(self, name: str, budget: str, seed: int) -> Row:
        """Plan, measure, evaluate, on one thread."""
        with _one_thread():
            return self._row(name, budget, seed)

    def _row(self, name: str, text: str, seed: int) -> Row:
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
                plan = strategy(offered_to(strategy, profile, budget), budget, context)
            rows = _checked(profile, plan, limit)
        except (StoreError, WorkerError):
            raise
        except AutocompressError as error:
            values["seconds"] = time.perf_counter() - began
            return Row({**values, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        plan = plan.replace(seed=seed)
        values |= {
            "bytes": plan.predicted_bytes,
            "paper_bytes": paper_bytes(profile, plan),
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
                return Row(values, failure=error)
        return Row(values, {n: (str(row.option), row.bytes) for n, row in rows.items()}, plan.to_json())

    def _measured(self, profile: Profile, plan: Plan, context: Context) -> tuple[float, float | None]:
        at = (plan.vector_bits, *map(str, plan.layers.values()))
        if at not in self.measured:
            small = context.build(profile.with_vectors(plan.vector_bits), plan.layers)
            kl = context.divergence_of(small) if context.held else math.nan
            self.measured[at] = kl, None if self.evaluate is None else float(self.evaluate(small))
        return self.measured[at]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache
def source_digest(*folders: Path) -> str:
    """SHA-256 of all Python files of some folders and of their places: what a strategy is made of stands in more files
    than its own.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()} {own}\n".encode())
    return digest.hexdigest()


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
        self._before: dict[str, int] = {}

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
        runs = super().read_json(_runs_name(name))
        found = None if runs is None else super().read_json(name)
        known = 0 if found is None else int(runs or 0)
        self._before[name] = self._ran() - known
        self.runs += known
        return found

    def write_json(self, name: str, value: Any) -> None:
        super().write_json(_runs_name(name), self._ran() - self._before.get(name, 0))
        super().write_json(name, value)


def _runs_name(name: str) -> str:
    return f"{name.removesuffix('.json')}.runs.json"


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


def _made(bench: _Bench, todo: list[tuple[str, str, int]], workers: int) -> Iterator[Row]:
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


def _made_by_workers(bench: _Bench, todo: list[tuple[str, str, int]], workers: int) -> Iterator[Row | str]:
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
    given = None
    if bench.recipe is not None and bench.context is not None:
        given = bench.context.seed, bench.context.effort, bench.context.data_digest, bench.evaluate is not None
        bench = dataclasses.replace(bench, context=None, evaluate=None)
    return pickle.dumps((dataclasses.replace(bench, profile=dataclasses.replace(bench.profile, store=None)), given))


@functools.lru_cache(maxsize=1)  # the rows of a worker share one context, and what it measured
def _unpickled(path: str) -> _Bench | str:
    """What `_pickled` made, or why it cannot be loaded in this process."""
    try:
        bench, given = pickle.loads(Path(path).read_bytes())
    except (pickle.UnpicklingError, ImportError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if given is not None:
        seed, effort, digest, evaluates = given
        task = bench.recipe()
        bench.context, bench.evaluate = task_context(task, seed, effort), task.evaluate if evaluates else None
        if bench.context.data_digest != digest:
            raise MismatchError(
                f"field 'data': calibration() of task {task.source} gives other batches when it is called again; "
                "with several workers it must repeat itself"
            )
        bench.context.check(bench.profile)
    return bench


def _row_in_worker(path: str, name: str, budget: str, seed: int) -> Row | str:
    try:
        bench = _unpickled(path)
        return bench if isinstance(bench, str) else bench.row(name, budget, seed)
    except AutocompressError as error:
        return Row({}, failure=error)
