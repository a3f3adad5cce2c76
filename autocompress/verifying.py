"""Verification of a result folder: does the file keep its promise, and do plan, file and figures agree?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.costs import FLOAT_BITS, bops, code_bits, macs, row_bits
from autocompress.errors import AutocompressError, MismatchError
from autocompress.storage import Archive, Entry, FormatError, read
from autocompress.types import RUNNING_COSTS, Option, Plan

if TYPE_CHECKING:
    from autocompress.tasks import Task

__all__ = ["Check", "Verification", "VerificationError", "read_metrics", "read_plan", "verify"]


class VerificationError(AutocompressError):
    """A result does not hold what it says; the message is the first check that failed."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it holds, and what was found."""

    name: str
    good: bool
    found: str


@dataclass(frozen=True)
class Verification:
    """Everything that was looked at in a folder."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def good(self) -> bool:
        return all(check.good for check in self.checks)

    def require(self) -> None:
        """Raise VerificationError with the first check that failed."""
        for check in self.checks:
            if not check.good:
                raise VerificationError(f"{self.folder}: {check.name}: {check.found}")


def verify(folder: str | Path, task: Task | None = None) -> Verification:
    """Check a folder that `compress` wrote. Without a task nothing of anybody's is imported or run.

    The file is within the budget and as long as predicted; its checksums hold and every tensor decodes, weights to
    finite values; its layers have the options of plan.json; metrics.json says the same. MACs and BOPs, where they are
    limited, are counted again from the file's codes; milliseconds were predicted, and the prediction is within the
    limit. With a task: the file fits its
    model, every decoded weight arrives in it, and where the task has `evaluate`, the metric is the one of metrics.json.
    Raises MismatchError or FormatError where plan.json, metrics.json or model.acz is missing or cannot be read at all.
    """
    place = Path(folder)
    plan, metrics = read_plan(place), read_metrics(place)
    path = place / "model.acz"
    if not path.is_file():
        raise MismatchError(f"{place} has no model.acz; needed a folder that `autocompress compress` wrote")
    with read(path) as archive:
        checks = [
            *_size_checks(archive, plan),
            *_content_checks(archive, plan),
            *_metrics_checks(archive, plan, metrics),
            *_cost_checks(archive, plan, metrics),
        ]
    if task is not None and all(check.good for check in checks):
        checks += _task_checks(path, metrics, task)
    return Verification(place, tuple(checks))


def read_plan(folder: Path) -> Plan:
    """plan.json of a folder, or the file itself. Raises MismatchError."""
    path = folder / "plan.json" if folder.is_dir() or not folder.exists() else folder
    text = _read_text(path)
    try:
        return Plan.from_json(text)
    except MismatchError as error:
        raise MismatchError(f"{path}: {error}") from error


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a folder. Raises MismatchError."""
    path = folder / "metrics.json"
    try:
        found = json.loads(_read_text(path))
    except ValueError as error:
        raise MismatchError(f"{path} is not JSON: {error}") from error
    needed = {
        "bytes",
        "budget_bytes",
        "original_bytes",
        "ratio",
        "metric",
        "baseline_metric",
        "gap",
        "bound",
        "strategy",
    }
    missing = sorted(needed - set(found)) if isinstance(found, dict) else sorted(needed)
    if missing:
        raise MismatchError(f"{path} lacks {', '.join(missing)}")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise MismatchError(
            f"{path} cannot be read ({reason}); needed a folder that `autocompress compress` wrote"
        ) from error


def _size_checks(archive: Archive, plan: Plan) -> list[Check]:
    size = archive.bytes
    return [
        Check("budget", size <= plan.budget_bytes, f"{size:,} bytes on disk, at most {plan.budget_bytes:,} promised"),
        Check(
            "prediction", size == plan.predicted_bytes, f"{size:,} bytes on disk, {plan.predicted_bytes:,} predicted"
        ),
    ]


def _content_checks(archive: Archive, plan: Plan) -> list[Check]:
    options: dict[str, str] = {}
    sizes: dict[str, int] = {}
    values = 0
    try:
        for name in archive.names:
            entry = archive[name]
            tensor = entry.dequantise()
            values += tensor.size
            if "option" in entry.params:  # any other tensor, a mask say, may well hold infinities
                if not np.isfinite(tensor).all():
                    return [Check("contents", False, f"{name} holds weights that are NaN or infinite")]
                layer = _layer_of(entry)
                options[layer], sizes[layer] = str(entry.params["option"]), sizes.get(layer, 0) + entry.bytes
    except FormatError as error:
        return [Check("contents", False, str(error))]
    wanted = {name: str(option) for name, option in plan.layers.items()}
    differ = [
        f"{name}: {options.get(name, 'nothing')} in the file, {wanted.get(name, 'nothing')} in plan.json"
        for name in sorted(set(options) | set(wanted))
        if options.get(name) != wanted.get(name)
    ]
    differ += [
        f"{name}: {sizes.get(name, 0):,} bytes in the file, {made['bytes']:,} in plan.json"
        for name, made in sorted(plan.realised.items())
        if sizes.get(name) != made["bytes"]
    ]
    return [
        Check("contents", True, f"checksums hold; {len(archive)} tensors decode to {values:,} values"),
        Check("options", not differ, differ[0] if differ else f"{len(wanted)} layers as in plan.json"),
    ]


def _metrics_checks(archive: Archive, plan: Plan, metrics: dict[str, Any]) -> list[Check]:
    def same(name: str, wanted: Any) -> str | None:
        found = metrics[name]
        numbers = isinstance(found, int | float) and isinstance(wanted, int | float)
        equal = math.isclose(found, wanted, rel_tol=1e-9) if numbers else found == wanted
        return None if equal else f"{name} is {found}, the other files say {wanted}"

    expected = {
        "bytes": archive.bytes,
        "budget_bytes": plan.budget_bytes,
        "strategy": plan.strategy,
        "gap": plan.gap if math.isfinite(plan.gap) else None,
        "bound": plan.bound if math.isfinite(plan.bound) else None,
        "ratio": metrics["original_bytes"] / archive.bytes,
    }
    differ = [text for name, value in expected.items() if (text := same(name, value)) is not None]
    return [Check("metrics", not differ, differ[0] if differ else "metrics.json agrees with plan.json and the file")]


def _cost_checks(archive: Archive, plan: Plan, metrics: dict[str, Any]) -> list[Check]:
    """Whether the costs of a forward pass that the budget limits are within it."""
    checks = []
    for name in RUNNING_COSTS:
        if getattr(plan.budget, name) is None:
            continue
        try:
            cost, layer_macs, positions = metrics["costs"][name], metrics["layer_macs"], metrics.get("positions", {})
            taken, limit = float(cost["predicted"]), plan.budget.limit(name, float(cost["dense"]))
            counted = taken
            if name != "latency_ms":
                weights: dict[str, list[Entry]] = {layer: [] for layer in plan.layers}
                for entry in archive.values():
                    if "option" in entry.params:
                        weights[_layer_of(entry)].append(entry)
                each = {n: _macs(entries, layer_macs[n], positions.get(n)) for n, entries in weights.items()}
                counted = sum(each[n] if name == "macs" else _bops(weights[n], each[n]) for n in each)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, FormatError, MismatchError) as error:
            checks.append(Check(name, False, f"metrics.json and the file do not give {name}: {error}"))
            continue
        assert limit is not None
        good = counted == taken <= limit
        again = "" if name == "latency_ms" else f"{counted:,} counted, "
        checks.append(Check(name, good, f"{again}{taken:,} predicted, at most {limit:,} allowed"))
    return checks


def _layer_of(entry: Entry) -> str:
    """The layer that a weight is of, whole or as one of its factors."""
    owner, _, field = entry.name.rpartition(".")
    owner = owner if field == "weight" else entry.name
    return owner.rpartition(".")[0] if "factor" in entry.params else owner


def _macs(entries: Sequence[Entry], layer_macs: int, positions: Sequence[int] | None) -> int:
    """MACs of a layer, from what the file holds of it and how often calibration used it (positions, samples)."""
    if "factor" not in entries[0].params and Option.parse(str(entries[0].params["option"])).width is None:
        return layer_macs
    if positions is None:
        raise MismatchError("metrics.json does not say how often the layer is used")
    return macs(sum(entry.numel for entry in entries), *positions)


def _bops(entries: Sequence[Entry], layer_macs: int) -> int:
    """BOPs of a layer, from what the file holds of it."""
    option = Option.parse(str(entries[0].params["option"]))
    weights = sum(entry.numel for entry in entries)
    if option.mix is not None:
        return bops(layer_macs, 1, sum(row_bits(entry.codes()) for entry in entries), weights)
    nonzero = [int(np.count_nonzero(entry.dequantise())) for entry in entries]
    if option.residual is not None:
        return bops(layer_macs, 1, sum(n * _width(entry) for n, entry in zip(nonzero, entries, strict=True)), weights)
    return bops(layer_macs, max(map(_width, entries)), sum(nonzero), weights)


def _width(entry: Entry) -> int:
    return (16 if entry.codec == "fp16" else FLOAT_BITS) if entry.step == "none" else code_bits(entry.codes())


def _task_checks(path: Path, metrics: dict[str, Any], task: Task) -> list[Check]:
    from autocompress.offloading import is_streamed
    from autocompress.saving import check_unchanged, load

    fresh = task.build_model()
    model = load(path, fresh, packed=is_streamed(fresh))
    wrong = ""
    try:
        with read(path) as archive:
            check_unchanged(model, archive.values())
    except MismatchError as error:
        wrong = str(error)
    checks = [Check("loading", not wrong, wrong or f"every tensor arrives in {type(model).__name__}")]
    recorded = metrics["metric"]
    if task.evaluate is None:
        checks.append(Check("metric", True, "the task defines no evaluate(), so there is none to compare"))
    elif recorded is None:
        checks.append(Check("metric", True, f"{task.evaluate(model):g} now; metrics.json records none"))
    else:
        value = task.evaluate(model)
        good = math.isclose(value, recorded, rel_tol=1e-6, abs_tol=1e-9)
        checks.append(Check("metric", good, f"{value:g} now, {recorded:g} in metrics.json"))
    return checks
