"""The whole way: model + calibration + budget in, a verified file with its account out."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from autocompress.applying import apply, carrying, encoded_of
from autocompress.batches import Batch, batch_samples, feed, materialise
from autocompress.calibration import Statistics, calibrate
from autocompress.comparing import compare, task_context, write_comparison
from autocompress.compressors import default_options, named_options
from autocompress.doctor import environment, writable
from autocompress.engines import check_engine
from autocompress.errors import BudgetError, CalibrationError, InfeasibleError, TaskError
from autocompress.layers import find_layers
from autocompress.measuring import Context
from autocompress.obs import EXACT_LIMIT
from autocompress.offloading import is_streamed, reading
from autocompress.planning import (
    allocate,
    coarsest,
    cost_facts,
    energy_losses,
    least_bytes,
    limit_bytes,
    relative_error,
    within,
)
from autocompress.profiling import Profile, profile
from autocompress.records import Template, make_template
from autocompress.salience import widths
from autocompress.saving import OutputError, SaveInfo, load, load_carrying, save
from autocompress.sequential import apply_sequentially
from autocompress.strategies import STRATEGIES, Strategy, StrategyError, plan
from autocompress.streaming import calibrate_streamed
from autocompress.tasks import Task
from autocompress.threads import default_workers
from autocompress.timing import measured_ms, require_forms, require_runtime, timed
from autocompress.tuning import tune
from autocompress.types import RUNNING_COSTS, Budget, Option, Plan

__all__ = [
    "EFFORTS",
    "RESULTS",
    "Result",
    "check_request",
    "compare_seeds",
    "compress",
    "forecast",
    "profiled",
    "strategy_for",
    "write_results",
]

EFFORTS = ("fast", "normal", "max")
TUNING_STEPS = {"fast": 0, "normal": 120, "max": 600}
MADE = ("layers", "predicted_bytes", "fixed_bytes", "realised")  # what sequential mode changes of a plan
RESULTS = ("report.html", "metrics.json", "plan.json", "model.acz")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """What `compress` hands back: the compressed model, its plan, the profile that it was chosen from, the file, the
    figures.
    """

    model: nn.Module
    plan: Plan
    profile: Profile
    info: SaveInfo
    metrics: dict[str, Any]
    out: Path


def compress(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Budget | str | int,
    evaluate: Callable[[nn.Module], float] | None = None,
    strategy: str | Strategy = "auto",
    effort: str = "normal",
    seed: int = 0,
    out: str | Path = "runs/out",
    store: str | Path | None = None,
    options: list[Option | str] | None = None,
    workers: int | None = None,
    engine: str | None = None,
    loss: Callable[[nn.Module, Batch], Any] | None = None,
    progress: Progress | None = None,
    task: str | None = None,
    sequential: bool | None = None,
    example: Batch | None = None,
    training: Iterable[Batch] | None = None,
    embedding: Callable[[Any, Batch], torch.Tensor] | None = None,
    exact_limit: float | None = None,
) -> Result:
    """Calibrate, profile, plan, apply, save, verify. Writes model.acz, plan.json, metrics.json and report.html to
    `out`.

    evaluate (higher is better) only reports: it is called on a copy of the dense model and on the model read back from
    the file, never for a choice. effort "fast" is one exact solve of the relative error; "normal" and "max" measure a
    portfolio, compress the layers again one after another (`apply_sequentially`) and tune what costs no bytes (`tune`),
    each kept only if the held-out slice says better. Of a model from `streamed_model` no more than a layer is in memory
    at any time, beside what is compressed; what comes back decodes its weights layer by layer (`load` with packed), and
    it is not tuned. sequential: whether the first of these is tried; None leaves it to the effort. embedding: see
    `Context`. exact_limit: see `profile` (None: its default). store: where the profile is kept (default: out/profile),
    so that the next budget finds it. progress: called with (stage, done, total). task: what the report calls the model.
    example: a batch of which one sample is timed where the budget limits milliseconds (default: the first of
    `batches`); those are predicted from a measured table, and what the result takes stands beside it in metrics.json.
    loss(model, batch) and `training`, its labelled batches, are for strategies that go by the task's own loss or its
    gradients.
    Raises the errors of the stages; whatever was in `out` stays until the new results are complete.
    """
    began = time.perf_counter()
    wanted = check_request(budget, strategy, effort)
    check_engine(engine)
    if wanted.latency_ms is not None:
        if is_streamed(model):
            raise BudgetError("milliseconds are timed on the whole model; limit them with streaming off (--no-stream)")
        require_forms([option for option in named_options(options or []) if option.width is None])
    if sequential and (limits := _other_limits(wanted)):
        raise StrategyError(f"sequential mode keeps to a size only, and the budget limits {', '.join(limits)} too")
    say = _Clock(progress)
    folder = Path(out)
    with _result_folder(folder):
        data = materialise(batches)
        place, streamed = store or folder / "profile", is_streamed(model)
        stats = _calibrated(model, data, seed, wanted, options, workers, say, place)
        baseline = metric = None
        if evaluate is not None:
            # Now, so that an evaluate that fails does so before the work; on a copy, so that it changes no choice.
            with say.stage("evaluate the dense model"):
                baseline = _score(evaluate, copy.deepcopy(model))
        found = _profiled(model, data, stats, place, options, workers, say, engine, exact_limit)
        given = data[0] if example is None else example
        if wanted.latency_ms is not None:
            with say.stage("time layers"):
                found = timed(found, model, given, progress=lambda done, total: say("time layers", done, total))
        with say.stage("plan"):
            context = Context(model, data, loss, seed, effort, training, embedding)
            chosen = plan(found, wanted, strategy_for(strategy, effort), context).replace(seed=seed)
        small = _finished(model, chosen, found, data, context, effort, sequential, say)
        chosen = encoded_of(small).plan
        with tempfile.TemporaryDirectory(dir=folder, prefix=".result-") as scratch:
            with say.stage("save and verify"):
                info = save(small, chosen, Path(scratch) / "model.acz")
                if streamed:  # what comes back can run without the folder that it came from
                    del small  # its records are as large as the file
                    small = restored = load_carrying(info.path, copy.deepcopy(model), chosen)
                else:
                    restored = load(info.path, copy.deepcopy(model))
            if evaluate is not None:
                with say.stage("evaluate the file"):
                    metric = _score(evaluate, restored)
            costs = cost_facts(found.with_realised(chosen), wanted, chosen.layers)
            if "latency_ms" in costs:
                with say.stage("time the result"):
                    costs["latency_ms"]["measured"] = measured_ms(small, given)
            metrics = {
                "bytes": info.bytes,
                "budget_bytes": info.budget_bytes,
                "original_bytes": found.template.dense_bytes,
                "ratio": found.template.dense_bytes / info.bytes,
                "metric": metric,
                "baseline_metric": baseline,
                "predicted_loss": chosen.predicted_loss,
                "bound": _json_number(chosen.bound),
                "gap": _json_number(chosen.gap),
                "strategy": chosen.strategy,
                "costs": costs,
                "layer_macs": {name: found.macs(name) for name in found.layers},
                "positions": {name: [found.positions(name), found.statistics.samples] for name in found.layers},
                "measured": {name: _json_number(value) for name, value in chosen.measured.items()},
                "measured_plans": _measured_plans(context, found, chosen.budget_bytes),
                "measured_layers": {
                    name: [point for point in points if math.isfinite(point[1])]
                    for name, points in context.alone.items()
                },
                "seed": seed,
                "asked": {
                    "task": task,
                    "budget": str(wanted),
                    "strategy": strategy if isinstance(strategy, str) else type(strategy).__name__,
                    "effort": effort,
                    "sequential": sequential,
                    "options": None if options is None else [str(option) for option in options],
                },
                "seconds": time.perf_counter() - began,
                "stage_seconds": say.seconds,
                "environment": environment(),
            }
            final = SaveInfo(folder / "model.acz", info.bytes, info.budget_bytes)
            result = Result(small, chosen, found, final, metrics, folder)
            write_results(result, Path(scratch))
    return result


def _finished(
    model: nn.Module,
    chosen: Plan,
    profile: Profile,
    data: list[Batch],
    context: Context,
    effort: str,
    sequential: bool | None,
    say: _Clock,
) -> nn.Module:
    """The compressed model of a plan: applied, compressed again layer by layer, and tuned, as far as that measures
    better on the slice that none of it saw. The plan that it carries says so.

    Better is a smaller KL of softened outputs, as a handful of samples decide the KL itself, on which the plan was
    chosen too; that one may not pass what the best single option has.
    """
    with say.stage("apply"):
        small = apply(model, chosen, profile, data, seed=context.seed)
    if not context.held:
        return small
    trials: list[tuple[str, Callable[[Callable[[int, int], None]], nn.Module]]] = []
    if sequential or (sequential is None and effort != "fast" and not _other_limits(chosen.budget)):
        trials.append(
            ("sequential", lambda tell: apply_sequentially(model, chosen, profile, data, context.seed, tell)),
        )
    if TUNING_STEPS[effort]:
        trials.append(("tune", lambda tell: tune(model, small, context, TUNING_STEPS[effort], context.seed, tell)))
    plan, (kl, soft) = chosen, context.judge(small)
    limit = max(kl, chosen.measured.get("single_option_kl", kl))
    for name, attempt in trials:
        try:
            with say.stage(name) as advance:
                trial = attempt(advance)
                found, softened = context.judge(trial)
        except CalibrationError as error:
            if sequential and name == "sequential":
                raise
            plan = plan.replace(notes=(*plan.notes, f"{name}: not possible ({error})"))
            continue
        better = softened < soft and found <= limit
        note = (
            f"{name}: KL {found:.6g}, softened {softened:.6g}, on the held-out slice, {kl:.6g} and {soft:.6g} without: "
        )
        note += "kept" if better else "not used"
        if better:
            small, kl, soft = trial, found, softened
            made = encoded_of(small).plan
            plan = plan.replace(**{f: getattr(made, f) for f in MADE})
        plan = plan.replace(notes=(*plan.notes, note))
    measured = {**plan.measured, "kl": kl}
    if "kl_all" in measured:
        measured["kl_all"] = context.divergence_of(small, "all")
    return carrying(small, encoded_of(small).entries, plan.replace(measured=measured))


def _measured_plans(context: Context, profile: Profile, limit: int) -> list[dict[str, Any]]:
    """Every plan that was measured: its label, its file's length, the sum of its relative errors, and its KL on the
    held-out slice and, where it is known, on all of the data. Of equal plans the first stays.
    """
    profile = within(profile, limit)
    found: dict[str, dict[str, Any]] = {}
    for trial in context.log:
        rows = {name: profile.layers[name].row(option) for name, option in trial.layers.items()}
        found.setdefault(
            json.dumps({name: str(option) for name, option in trial.layers.items()}),
            {
                "name": trial.label,
                "bytes": profile.template.file_bytes(rows),
                "relative_error": relative_error(profile, trial.layers),
                "kl": _json_number(trial.kl),
                "kl_all": None if trial.kl_all is None else _json_number(trial.kl_all),
            },
        )
    return list(found.values())


def _other_limits(budget: Budget) -> list[str]:
    """What a budget limits beside the size: options that are near in bytes may be far in these."""
    return [name for name in RUNNING_COSTS if getattr(budget, name) is not None]


def check_request(budget: Budget | str | int, strategy: str | Strategy = "auto", effort: str = "normal") -> Budget:
    """The budget, once it, the strategy's name and the effort are ones. Raises BudgetError, StrategyError; ExportError
    where it limits milliseconds and onnxruntime is not installed.
    """
    wanted = Budget.of(budget)
    if wanted.latency_ms is not None:
        require_runtime()
    if effort not in EFFORTS:
        raise StrategyError(f"effort is {effort!r}; it is one of {', '.join(EFFORTS)}")
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise StrategyError(f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    return wanted


def strategy_for(strategy: str | Strategy, effort: str) -> str | Strategy:
    """The strategy at an effort: `auto` with "fast" is one exact solve."""
    return "exact" if strategy == "auto" and effort == "fast" else strategy


def profiled(
    model: nn.Module,
    data: list[Batch],
    seed: int = 0,
    store: str | Path | None = None,
    options: list[Option | str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    engine: str | None = None,
    exact_limit: float | None = None,
) -> Profile:
    """Calibrate and profile. Raises the errors of both."""
    check_engine(engine)
    say = _Clock(progress)
    stats = _calibrated(model, data, seed, None, options, workers, say, store)
    return _profiled(model, data, stats, store, options, workers, say, engine, exact_limit)


def compare_seeds(
    task: Task,
    budgets: Sequence[Budget | str | int],
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    effort: str = "normal",
    out: str | Path = "runs/compare",
    options: list[Option | str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """`compare` on a profile of its own for every seed, which draws the calibration sample and its split too.

    Writes out/compare.csv and out/plans.jsonl (`comparing.load_comparison` reads them) after every seed; out/seedN
    holds what a seed's rows come from: profile, rows, what strategies measured. What is there is taken up again. Raises
    the errors of the stages.
    """
    many = default_workers() if workers is None else workers
    latency = any(Budget.of(budget).latency_ms is not None for budget in budgets)
    tables, plans = [], []
    with _result_folder(Path(out)):
        for seed in dict.fromkeys(seeds):
            say = _Clock(None if progress is None else functools.partial(_named_stage, progress, f"seed {seed}: "))
            folder = Path(out) / f"seed{seed}"
            model, data = task.build_model(), task.calibration_batches(seed)
            stats = _calibrated(model, data, seed, None, options, workers, say, None)
            found = _profiled(model, data, stats, folder / "profile", options, workers, say)
            if latency:
                with say.stage("time layers"):
                    found = timed(found, model, data[0] if task.example_input is None else task.example_input())
            tables.append(
                compare(
                    found,
                    budgets,
                    strategies,
                    task_context(task, seed, effort),
                    task.evaluate,
                    (seed,),
                    folder,
                    many,
                    say.progress,
                    task,
                )
            )
            plans += (folder / "plans.jsonl").read_text().splitlines()
            table = pd.concat(tables, ignore_index=True)
            write_comparison(Path(out), table, plans)
    return table


def _named_stage(progress: Progress, prefix: str, stage: str, done: int, total: int) -> None:
    progress(prefix + stage, done, total)


def forecast(
    model: nn.Module,
    data: list[Batch],
    budget: Budget | None,
    out: str | Path | None,
    store: str | Path | None,
    options: Sequence[Option | str] = (),
) -> dict[str, Any]:
    """What a run would do, for `--dry-run`: everything that is quick is checked, nothing is written.

    Raises InfeasibleError where the budget is below what no choice changes, OutputError, and what `find_layers` raises.
    """
    layers = find_layers(model)
    template = make_template(model, layers)
    if not is_streamed(model):
        with torch.no_grad():
            feed(model, data[0])
    found: dict[str, Any] = {
        "layers": len(layers),
        "weights": sum(layer.size for layer in layers),
        "left_alone": layers.skipped,
        "options_per_layer": len(default_options()) + 1,
        "calibration_samples": sum(batch_samples(b) for b in data),
        "original_bytes": template.dense_bytes,
    }
    least = _floor(template, options)
    if budget is not None:
        limit = limit_bytes(budget, template)
        _check_least(limit, least)
        found |= {"budget_bytes": limit} if limit is not None else {}
    found |= {"no_file_below_bytes": least} if least else {}
    for name, folder in (("results", out), ("profile", store or (Path(out) / "profile" if out else None))):
        if folder is not None:
            good, text = writable(Path(folder), name)
            if not good:
                raise OutputError(text)
            found[name] = str(folder)
    return found


def _check_least(limit: int | None, least: int) -> None:
    if limit is not None and limit < least:
        raise InfeasibleError(
            f"no allocation fits in {limit:,} bytes: what no choice changes has {least:,} bytes by itself", least
        )


def _calibrated(
    model: nn.Module,
    data: list[Batch],
    seed: int,
    budget: Budget | None,
    options: list[Option | str] | None,
    workers: int | None,
    say: _Clock,
    store: str | Path | None,
) -> Statistics:
    """Calibrate; refuse a budget below what norms and biases alone need, before the long work of a profile.

    Raises InfeasibleError, with the smallest size that some file has.
    """
    template = make_template(model, find_layers(model))
    limit = None if budget is None else limit_bytes(budget, template)
    if is_streamed(model):
        _check_least(limit, least_bytes(template))
        if store is None:
            raise CalibrationError("a streamed model keeps its statistics in a store; name one (store=)")
        with say.stage("calibrate") as advance:
            return calibrate_streamed(model, data, store, seed, progress=advance)
    with say.stage("calibrate"):
        stats = calibrate(model, data, seed=seed)
    given = named_options(["default"] if options is None else options)
    if limit is not None and limit < _floor(template, given):
        small = profile(model, stats, options=coarsest(given), workers=workers)
        allocate(within(small, limit), limit, energy_losses(small))
    return stats


def _floor(template: Template, options: Sequence[Option | str]) -> int:
    """A size that no file can be below, known before the profile; 0 where layers may be narrower: none is then."""
    narrower = any(option.width is not None for option in named_options(options))
    return 0 if narrower else least_bytes(template)


def _profiled(
    model: nn.Module,
    data: list[Batch],
    stats: Statistics,
    store: str | Path | None,
    options: list[Option | str] | None,
    workers: int | None,
    say: _Clock,
    engine: str | None = None,
    exact_limit: float | None = None,
) -> Profile:
    channels = None
    if any(option.width is not None for option in named_options(options or [])):
        if is_streamed(model):
            raise CalibrationError("options with fewer channels need the whole model in memory; leave streaming off")
        with say.stage("channels"):
            channels = widths(model, data[0], stats)
    with say.stage("profile", len(stats.layers) + len(stats.unreached)) as advance:
        return profile(
            model,
            stats,
            store,
            options,
            workers,
            lambda done, *_: advance(done),
            EXACT_LIMIT if exact_limit is None else exact_limit,
            channels,
            engine,
        )


def write_results(result: Result, scratch: Path) -> None:
    """Put a finished result in its place: everything is written beside it first, and then renamed, the file last.

    scratch: a folder in `result.out` that holds model.acz. Raises OutputError, with the results that were there as they
    were.
    """
    from autocompress.reporting import render_report

    try:
        page = render_report(result.plan, result.profile, result.metrics, scratch / "model.acz")
        texts = {
            "report.html": page,
            "metrics.json": json.dumps(result.metrics, indent=2, allow_nan=False) + "\n",
            "plan.json": result.plan.to_json(),
        }
        for name, text in texts.items():
            with (scratch / name).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name in RESULTS:
            (scratch / name).replace(result.out / name)
    except OSError as error:
        raise OutputError(f"cannot write in {result.out}: {error.strerror or error}") from error


@contextlib.contextmanager
def _result_folder(folder: Path) -> Iterator[None]:
    """Make the folder and prove that a file can be made in it, before hours of work; leave no empty one behind.

    Raises OutputError.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in the output folder {folder}: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: a profile that the next run takes up
            for path in made:
                path.rmdir()
        raise


class _Clock:
    """Tells a progress callback about stages, and keeps how long each took."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress or (lambda stage, done, total: None)
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.progress(stage, done, total)

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[..., None]]:
        """What it yields is told how much is done, and where only the work itself knows, of how much."""
        began = time.perf_counter()
        self(name, 0, total)

        def advance(done: int, of: int | None = None) -> None:
            nonlocal total
            total = of or total
            self(name, done, total)

        yield advance
        self(name, total, total)
        self.seconds[name] = time.perf_counter() - began


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with reading(model):
        value = evaluate(model)
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise TaskError(f"evaluate returned {type(value).__name__}; needed a number, higher is better") from None
    if not math.isfinite(score):
        raise TaskError(f"evaluate returned {score}; needed a finite number, higher is better")
    return score


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
