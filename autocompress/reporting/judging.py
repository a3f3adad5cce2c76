"""How good a result is: the certificate and the frontier, what was predicted beside what was measured, every plan
tried.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from autocompress.profiling import Profile
from autocompress.reporting.charts import frontier_chart, key, layers_chart, plans_chart
from autocompress.reporting.html import bar, cell, details, figure, number, row, spot, table
from autocompress.reporting.rows import LayerRow, percent
from autocompress.reporting.tradeoff import Tradeoff, TradeoffPoint
from autocompress.types import RUNNING_COSTS, Plan

__all__ = ["compared_section", "frontier_section", "measured_section"]

# What `auto` notes of each plan that it measured; the table of plans holds the same.
TRIAL = re.compile(r".+: KL \S+ on all calibration data, \S+ on the held-out slice(, merit \S+)?")
PLANS = 12  # rows of the table of plans that are open from the start


def frontier_section(plan: Plan, profile: Profile, metrics: Mapping[str, Any], rows: Sequence[LayerRow]) -> str:
    """The certificate in words, then every budget at once with what is proven of each."""
    text = f"<p>{_certificate(plan)}</p>"
    if not any(layer.reached and layer.energy > 0.0 for layer in profile.layers.values()):
        return text
    others = [other for other in metrics.get("measured_plans", []) if other["bytes"] <= plan.budget_bytes]
    at_widths = ""
    if profile.widths is not None:  # the line, and what is proven by it, is of networks as wide as this one
        profile, others = profile.at(profile.widths.structure_of(plan.layers)), []
        at_widths = " All of this holds for networks as wide as this result; others have a line of their own."
    line = Tradeoff(profile)
    loss = sum(row.error or 0.0 for row in rows)
    chosen = TradeoffPoint(metrics["bytes"], loss, line.below(sum(row.bytes for row in rows)))
    picture = frontier_chart(line, chosen, plan.budget_bytes, others)
    caption = (
        "One profile answers every budget. The line is the least possible sum of relative errors (each layer's error "
        "over that of losing it) for files of any length, by the curves above; a bar leads from what is proven to be "
        "the least to what is there, and the optimum is on it." + at_widths
    )
    entries = [("chosen", "this result"), ("known", "best known at round ratios")]
    legend = key([*entries, ("other", "other plans that were measured")] if others else entries)
    known = line.budgets()
    widest = max((point.gap for _, point in known), default=0.0) or 1.0
    budgets = [
        row(
            f"{ratio}x",
            [
                number(f"{point.bytes:,}"),
                number(f"{point.loss:.3g}"),
                number(f"{point.bound:.3g}"),
                number(percent(point.gap), bar(point.gap / widest)),
                number(f"{100 * line.more(point.bytes)[0]:.2g} %"),
            ],
        )
        for ratio, point in known
    ]
    head = ["budget", "#file, bytes", "#error", "#proven", "#gap", "#1 kB more"]
    shown = table(
        head,
        budgets,
        label="Budgets of the frontier",
        note="Proven: no choice of as many bytes is below. 1 kB more: the part of the error it takes away.",
    )
    if chosen.bound > 0.0:
        text += f"<p>{_place(plan, chosen)}</p>"
    part, names = line.more(metrics["bytes"])
    if names:
        most = ", ".join(f"<code>{escape(name)}</code>" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text += f"<p>From here, 1 kB more would take away {100 * part:.2g} % of the error, spent on {most}{more}.</p>"
    return text + f'<div class="pair">{figure(picture, f"{caption}<br>{legend}")}<div>{shown}</div></div>'


def _certificate(plan: Plan) -> str:
    if not (math.isfinite(plan.gap) and math.isfinite(plan.bound)):
        return (
            "There is no guarantee: no bound is known for this choice, so nothing is said about how much better "
            "another one could be."
        )
    words = (
        f"The allocation's predicted loss is {plan.predicted_loss:.6g}. It is proven that no other choice of these "
        f"options within the same bytes has one below {plan.bound:.6g}: the gap is {percent(plan.gap)}. The proof "
        "is about the predicted loss, the sum of the layers' errors as the strategy weighs them; what the whole "
        "network makes of it is measured below."
    )
    if plan.realised:
        words += (
            " All of that is about the plan as it was chosen. Every layer was then compressed anew, within its bytes, "
            "on what the compressed layers before it put out; options, bytes and errors above are what came of it."
        )
    return words


def _place(plan: Plan, chosen: TradeoffPoint) -> str:
    """Where the result lies beside the frontier, and why it need not be on it."""
    words = f"This result's relative errors sum to {chosen.loss:.3g}, "
    if abs(chosen.gap) <= 1e-9:
        return words + "the least that is proven possible for its bytes."
    words += f"{percent(chosen.gap)} above what the line proves for its bytes. "
    reasons = []
    if not math.isclose(chosen.loss, plan.predicted_loss, rel_tol=1e-6):
        reasons.append("its strategy weighs the layers differently")
    if plan.realised:
        reasons.append("its layers were compressed anew, on what the compressed ones before them put out")
    if any(getattr(plan.budget, name) is not None for name in RUNNING_COSTS):
        reasons.append("its budget limits more than bytes")
    if reasons:
        words += f"That is as it should be: {' and '.join(reasons)}."
    return words


def measured_section(plan: Plan, profile: Profile, metrics: Mapping[str, Any], rows: Sequence[LayerRow]) -> str:
    """Predicted errors beside measured divergences: plans, layers alone, and the table of every plan that was tried."""
    measured = plan.measured
    if "kl" not in measured:
        return "<p>Nothing was measured on the model: the plan is predicted only.</p>"
    samples = int(measured.get("samples", 0))
    text = (
        f"<p>Measured on {samples:,} calibration samples that the Hessians never saw: how far the outputs are from the "
        "dense model's (mean KL divergence per sample, lower is better).</p>"
    )
    loss = sum(row.error or 0.0 for row in rows)
    plans = _measured_plans(metrics)
    drawn = [(p["name"], p["relative_error"], p["kl"]) for p in plans if p["relative_error"] > 0.0 < p["kl"]]
    pictures = ""
    if len(drawn) > 2 and loss > 0.0 < measured["kl"]:
        caption = key([("chosen", "this result"), ("other", "plans"), ("single", "one option for all layers")])
        caption = f"<strong>Plans.</strong> {_agreement(drawn)} {caption}"
        pictures += figure(plans_chart(drawn, (loss, measured["kl"])), caption)
    alone = {
        name: [(error / profile.layers[name].energy, kl) for error, kl in points if error > 0.0 < kl]
        for name, points in metrics.get("measured_layers", {}).items()
        if name in profile.layers and profile.layers[name].energy > 0.0
    }
    if len(alone := {name: points for name, points in alone.items() if points}) > 1:
        caption = (
            "<strong>Layers alone.</strong> Each line is a layer that was compressed by itself, more and more: one "
            "that lies higher harms the network more for the same relative error. The three steepest are in colour."
        )
        pictures += figure(layers_chart(alone), caption)
    return text + (f'<div class="pair">{pictures}</div>' if pictures else "")


def compared_section(plan: Plan, metrics: Mapping[str, Any], rows: Sequence[LayerRow]) -> str:
    """Every plan that was measured on the way, and what was decided."""
    text = ""
    if "kl" in plan.measured:
        text = _plans_table(plan, metrics, sum(row.error or 0.0 for row in rows), _measured_plans(metrics))
    if "single_option_kl" in plan.measured:
        text += (
            "<p>A plan is never handed out if the best fitting one with the same option for every layer measures "
            "better: then that one is.</p>"
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in plan.notes if not TRIAL.fullmatch(note))
    return text + (f"<p>What was decided on the way:</p><ul>{notes}</ul>" if notes else "")


def _measured_plans(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The plans whose outputs were finite."""
    return [found for found in metrics.get("measured_plans", []) if found["kl"] is not None]


def _agreement(drawn: Sequence[tuple[str, float, float]]) -> str:
    """How well the prediction orders what was measured: Spearman's rank correlation."""
    from scipy.stats import spearmanr

    found = float(np.asarray(spearmanr([p for _, p, _ in drawn], [m for *_, m in drawn]).statistic))
    if not math.isfinite(found):
        return f"{len(drawn)} plans."
    return f"The predicted order of {len(drawn)} plans and the measured one have a rank correlation of {found:.2f}."


def _plans_table(plan: Plan, metrics: Mapping[str, Any], loss: float, plans: Sequence[Mapping[str, Any]]) -> str:
    """Every plan that was measured, the best first."""
    this = plan.measured["kl"]
    positive = [kl for kl in (this, *(p["kl"] for p in plans)) if kl > 0.0] or [1.0]
    low, high = math.log(min(positive)), math.log(max(positive))

    def line(name: str, size: int | None, error: float | None, everywhere: float | None, held: float) -> str:
        place = (math.log(held) - low) / ((high - low) or 1.0) if held > 0.0 else 0.0
        return row(
            name,
            [
                number("" if size is None else f"{size:,}"),
                number("" if error is None else f"{error:.3g}"),
                number("" if everywhere is None else f"{everywhere:.3g}"),
                number(f"{held:.3g}"),
                number(f"{held / this:.2f}x" if this > 0.0 else ""),
                cell(spot(place)),
            ],
            marked=name == "this result",
        )

    found = [line("this result", metrics["bytes"], loss, plan.measured.get("kl_all"), this)]
    found += [
        line(p["name"], p["bytes"], p["relative_error"], p["kl_all"], p["kl"])
        for p in sorted(plans, key=lambda p: (p["kl"], p["name"]))
    ]
    if not plans and "single_option_kl" in plan.measured:
        found.append(line("best single option for all layers", None, None, None, plan.measured["single_option_kl"]))
    head = [
        "plan",
        "#bytes",
        "#error, predicted",
        "#KL, all calibration data",
        "#KL, held out",
        "#times this",
        "logarithmic",
    ]
    note = "Every plan that was measured, by its KL on held-out data. Error: the sum of the layers' relative errors."
    if any(p["kl_all"] is not None for p in plans):
        note += " Plans whose KL on all calibration data is given were chosen between by that: more samples, less luck."
    shown = table(head, found[: PLANS + 1], label="Measured plans", note=note)
    if len(found) > PLANS + 1:
        rest = table(head, found[PLANS + 1 :], label="More measured plans")
        shown += details(f"{len(found) - PLANS - 1} more plans, further away", rest)
    return shown
