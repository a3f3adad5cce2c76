"""The whole way: model + calibration + budget in, a verified file with its account out."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autocompress.applying import apply
from autocompress.batches import Batch, materialise
from autocompress.calibration import calibrate
from autocompress.errors import TaskError
from autocompress.files import atomic_path
from autocompress.measuring import Context
from autocompress.planning import budget_bytes
from autocompress.profiling import Profile, profile
from autocompress.saving import OutputError, SaveInfo, load, save
from autocompress.strategies import STRATEGIES, Strategy, StrategyError, plan
from autocompress.types import Budget, Option, Plan

__all__ = ["EFFORTS", "Result", "compress", "write_result"]

EFFORTS = ("fast", "normal", "max")


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
    loss: Callable[[nn.Module, Batch], Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Calibrate, profile, plan, apply, save, verify. Writes model.acz, plan.json, metrics.json and report.html to
    `out`.

    evaluate (higher is better) only reports: it is called on the dense model and on the one read back from the file,
    never for a choice. effort "fast" is one exact solve of the relative error; "normal" and "max" measure a portfolio.
    store: where the profile is kept (default: out/profile), so that the next budget finds it. progress: called with
    (stage, done, total). Raises the errors of the stages; whatever was in `out` stays until the new results are
    complete.
    """
    began = time.perf_counter()
    say = progress or (lambda stage, done, total: None)
    wanted = Budget.of(budget)
    if effort not in EFFORTS:
        raise StrategyError(f"effort is {effort!r}; it is one of {', '.join(EFFORTS)}")
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise StrategyError(f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    folder = Path(out)
    check_writable(folder)
    data = materialise(batches)
    say("calibrate", 0, 1)
    stats = calibrate(model, data, seed=seed)
    say("calibrate", 1, 1)
    found = profile(
        model,
        stats,
        store=store or folder / "profile",
        options=options,
        workers=workers,
        progress=lambda d, n, _: say("profile", d, n),
    )
    limit = budget_bytes(wanted, found)
    say("plan", 0, 1)
    context = Context(model, data, loss=loss, seed=seed)
    if effort == "fast" and strategy == "auto":
        strategy = "exact"
    chosen = plan(found, wanted, strategy, context).replace(seed=seed)
    say("plan", 1, 1)
    say("apply", 0, 1)
    small = apply(model, chosen, found, data, seed=seed)
    say("apply", 1, 1)
    metric = baseline = None
    if evaluate is not None:
        say("evaluate", 0, 2)
        baseline = _score(evaluate, model)
        say("evaluate", 1, 2)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".result-") as scratch:
        info = save(small, chosen, Path(scratch) / "model.acz")
        restored = load(info.path, copy.deepcopy(model))
        if evaluate is not None:
            metric = _score(evaluate, restored)
            say("evaluate", 2, 2)
        metrics = {
            "bytes": info.bytes,
            "budget_bytes": limit,
            "original_bytes": found.template.dense_bytes,
            "ratio": found.template.dense_bytes / info.bytes,
            "metric": metric,
            "baseline_metric": baseline,
            "predicted_loss": chosen.predicted_loss,
            "bound": _json_number(chosen.bound),
            "gap": _json_number(chosen.gap),
            "strategy": chosen.strategy,
            "measured": dict(chosen.measured),
            "seed": seed,
            "seconds": time.perf_counter() - began,
        }
        result = Result(small, chosen, found, SaveInfo(folder / "model.acz", info.bytes, limit), metrics, folder)
        write_result(result, Path(scratch))
    return result


def write_result(result: Result, scratch: Path) -> None:
    """Put a finished result in its place: the page and the JSON first, the file last."""
    from autocompress.reporting import render_report

    folder = result.out
    try:
        with atomic_path(folder / "report.html") as path:
            path.write_text(
                render_report(result.plan, result.profile, result.metrics, scratch / "model.acz"), encoding="utf-8"
            )
        with atomic_path(folder / "plan.json") as path:
            path.write_text(result.plan.to_json())
        with atomic_path(folder / "metrics.json") as path:
            path.write_text(json.dumps(result.metrics, indent=2) + "\n")
        (scratch / "model.acz").replace(folder / "model.acz")
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Make the folder and prove that a file can be made in it, before hours of work. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in the output folder {folder}: {error.strerror or error}") from error


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TaskError(f"evaluate returned {type(value).__name__}; needed a number, higher is better") from None


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
