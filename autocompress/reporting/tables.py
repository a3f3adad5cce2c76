"""Tables for the terminal, made with rich; the page shows the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from autocompress.costs import Cell
from autocompress.planning import cost_facts
from autocompress.reporting.rows import FilePart, LayerRow, amount, cost_rows, ratio_text

if TYPE_CHECKING:
    import pandas as pd

    from autocompress.profiling import Profile
    from autocompress.types import Plan

__all__ = [
    "comparison_table",
    "fact_text",
    "facts_table",
    "file_table",
    "gap_text",
    "measured_text",
    "no_plans",
    "plan_facts",
    "plan_table",
    "result_facts",
    "times_table",
]

SHOWN_FACTS = ("processor", "threads", "onnxruntime")  # of what a table of times was measured with


def _table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """A plain table; the first `left` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return table


def plan_table(rows: Sequence[LayerRow], fixed_bytes: int) -> Table:
    """Layer, option, bits per weight, bytes, share of the error; then what no choice changes, and the sum."""
    table = _table("layer", "option", "bits/weight", "bytes", "share of error", left=2)
    for row in rows:
        share = f"{100 * row.share:.1f} %" if row.error is not None else "not reached"
        table.add_row(escape(row.name), escape(row.option), f"{row.bits_per_weight:.2f}", f"{row.bytes:,}", share)
    table.add_row("header, norms, biases", "", "", f"{fixed_bytes:,}", "", style="dim")
    total = sum(row.bytes for row in rows) + fixed_bytes
    weights = sum(row.weights for row in rows)
    table.add_row("whole file", "", f"{8 * total / weights:.2f}", f"{total:,}", "", style="bold")
    return table


def file_table(parts: Sequence[FilePart]) -> Table:
    """Where every byte of a file goes; the last row is the file's length."""
    table = _table("part", "option", "stored as", "shape", "bytes", "of the file", "bits/weight", left=4)
    total = sum(part.bytes for part in parts)
    for part in parts:
        table.add_row(
            escape(part.name),
            escape(part.option),
            part.codec,
            "" if part.shape is None else "x".join(map(str, part.shape)) or "scalar",
            f"{part.bytes:,}",
            f"{100 * part.bytes / total:.1f} %",
            f"{part.bits_per_weight:.2f}" if part.kind == "layer" and part.bits_per_weight is not None else "",
            style="dim" if part.kind == "file" else "",
        )
    table.add_row("the whole file", "", "", "", f"{total:,}", "100 %", "", style="bold")
    return table


def comparison_table(rows: pd.DataFrame) -> Table:
    """What `comparing.summary` gives, budget by budget, the best strategy of each in bold and with a star."""
    seeds = int(rows["seeds"].max()) if len(rows) else 0
    title = f"means of {seeds} seeds, ± their standard deviation" if seeds > 1 else None
    names = ("budget", "strategy", "bytes", "as papers count", "gap", "KL", "metric", "model runs", "seconds")
    table = _table(*names, left=2, title=title)
    last = None
    for row in rows.to_dict("records"):
        if last not in (None, row["budget"]):
            table.add_section()
        spread = seeds > 1
        table.add_row(
            row["budget"] if row["budget"] != last else "",
            escape(row["strategy"]) + (" *" if row["best"] else ""),
            f"{row['bytes']:,.0f}",
            f"{row['paper_bytes']:,.0f}",
            f"{100 * row['gap']:.2f} %" if math.isfinite(row["gap"]) else "no bound",
            _mean(row["kl"], row["kl_std"] if spread else None, ".5f"),
            _mean(row["metric"], row["metric_std"] if spread else None, ".2f"),
            f"{row['evaluations']:,.0f}",
            f"{row['seconds']:.1f}",
            style="bold" if row["best"] else "",
        )
        last = row["budget"]
    return table


def _mean(value: float, std: float | None, form: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:{form}}" + ("" if std is None or math.isnan(std) else f" ± {std:{form}}")


def no_plans(table: pd.DataFrame) -> list[str]:
    """A line for each (strategy, error) of a comparison's rows without a plan, with the budgets that have it."""
    failed = table[table["error"] != ""]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in failed.to_dict("records"):
        budgets = groups.setdefault((row["strategy"], row["error"]), [])
        if row["budget"] not in budgets:
            budgets.append(row["budget"])
    return [f"no plan: {name} at {', '.join(budgets)}: {error}" for (name, error), budgets in groups.items()]


def times_table(dense_ms: float, cells: Sequence[Cell], macs: Mapping[str, int], facts: Mapping[str, str]) -> Table:
    """What each form of each layer shape adds to the dense model's milliseconds, one line for each."""
    table = _table("layer shape, of input", "layers", "MACs, each", "held as", "us more, each", left=1)
    for cell in cells:
        many = f"{len(cell.layers)}"
        table.add_row(cell.shape, many, f"{macs[cell.layers[0]]:,}", cell.form, f"{1e3 * cell.extra_ms:+.1f}")
    where = ", ".join(f"{facts[key]}" if key == "processor" else f"{key} {facts[key]}" for key in SHOWN_FACTS)
    table.add_row(f"the dense model: {dense_ms:.3f} ms", "", f"{sum(macs.values()):,}", where, "", style="bold")
    return table


def facts_table(facts: Mapping[str, str], title: str | None = None) -> Table:
    """Names on the left, what is known on the right."""
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table


def gap_text(gap: float | None, bound: float | None) -> str:
    """How far the allocation is from the best possible one, in words that promise no more than is proven."""
    if gap is None or bound is None or not math.isfinite(gap) or not math.isfinite(bound):
        return "no guarantee: no bound is known for this plan"
    if gap <= 1e-9:
        return "0 %: proven optimal for these error curves and this many bytes"
    return f"{100 * gap:.3g} % at most above the best possible allocation, proven for these error curves"


def bound_text(bound: float) -> str:
    """The proven lower bound of the predicted loss."""
    return f"{bound:.6g} is the proven lower bound" if math.isfinite(bound) else "no lower bound is known"


def result_facts(plan: Plan, metrics: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """The account of a result in a few lines: bytes, metric, gap, what was measured. where: on what the metric is."""
    size, limit = metrics["bytes"], metrics["budget_bytes"]
    facts = {
        "promised": f"at most {amount(limit)}, from the budget {plan.budget}",
        "on disk": f"{amount(size)}, {ratio_text(metrics['ratio'])} less than {amount(metrics['original_bytes'])}",
    }
    if metrics.get("metric") is not None:
        facts["metric"] = f"{metrics['baseline_metric']:g} before, {metrics['metric']:g} after {where}".rstrip()
    facts |= cost_rows(metrics.get("costs", {}))
    facts |= {"gap": gap_text(plan.gap, plan.bound), "measured": measured_text(plan)}
    facts["strategy"] = plan.strategy + (f", {metrics['seconds']:.1f} s" if "seconds" in metrics else "")
    if limit >= metrics["original_bytes"]:
        facts["note"] = "the budget has room for the network as it is; compression begins below that"
    return facts


def plan_facts(plan: Plan, profile: Profile) -> dict[str, str]:
    """The same of a plan that has not been applied."""
    size = plan.predicted_bytes
    return {
        "budget": f"{amount(plan.budget_bytes)}, from the budget {plan.budget}",
        "file": f"{amount(size)}, {ratio_text(profile.template.dense_bytes / size)} less than dense",
        **cost_rows(cost_facts(profile, plan.budget, plan.layers)),
        "loss": f"{plan.predicted_loss:.6g} predicted, {bound_text(plan.bound)}",
        "gap": gap_text(plan.gap, plan.bound),
        "measured": measured_text(plan),
        "strategy": plan.strategy,
    }


def measured_text(plan: Plan) -> str:
    """How far the plan's outputs are from the dense model's, beside the best single option for all layers."""
    if "kl" not in plan.measured:
        return "no: the model was not run, so the plan is predicted only"
    text = f"KL to the dense model {plan.measured['kl']:.3g}, on calibration data that the Hessians never saw"
    if "single_option_kl" in plan.measured:
        text += f" (best single option for all layers: {plan.measured['single_option_kl']:.3g})"
    return text


def fact_text(name: str, value: Any) -> str:
    """One fact as text: bytes with their unit, lists joined."""
    if isinstance(value, int) and name.endswith("bytes"):
        return amount(value)
    if isinstance(value, dict):
        return "; ".join(f"{k}: {v}" for k, v in value.items()) or "nothing"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
