"""The page of a comparison: which strategy wins where, by how much, and at what price."""

from __future__ import annotations

import math
from html import escape

import pandas as pd

from autocompress.comparing import summary
from autocompress.reporting.charts import Series, key, strategies_chart
from autocompress.reporting.html import cell, details, document, figure, number, row, spot, table
from autocompress.reporting.rows import percent
from autocompress.reporting.tables import no_plans

__all__ = ["render_comparison"]

COLOURS = ("trellis", "pruned", "rd", "widths")  # of the strategies that are drawn in colour
BASELINE = "uniform"


def render_comparison(compared: pd.DataFrame, title: str = "Strategies compared") -> str:
    """The page of a table that `compare` or `comparing.load_comparison` gave. title: what was compressed."""
    means = summary(compared)
    seeds = sorted(int(seed) for seed in compared["seed"].unique())
    budgets = list(dict.fromkeys(compared["budget"]))
    count = len(dict.fromkeys(compared["strategy"]))
    lead = (
        f'<p class="soft">{count} strategies at {len(budgets)} budgets, '
        f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}.</p>"
    )
    sections = [("Strategies and budgets", _matrix(means, budgets)), ("Over the bytes", _charts(compared, means))]
    sections += [("Every budget", _budgets(means, budgets)), ("What has no plan", _failures(compared))]
    tab = f"{title}: {count} strategies"
    return document(title, tab, lead, [(name, body) for name, body in sections if body])


def _ranking(means: pd.DataFrame) -> list[str]:
    """Strategies by the mean of their ranks over the budgets, best first; those without a plan somewhere rank last
    there.
    """
    places: dict[str, list[int]] = {}
    for _, group in means.groupby("budget", sort=False):
        for place, name in enumerate(group["strategy"]):
            places.setdefault(name, []).append(place)
    budgets = means["budget"].nunique()
    worst = means["strategy"].nunique()
    return sorted(places, key=lambda name: (sum(places[name]) + worst * (budgets - len(places[name])), name))


def _measure(means: pd.DataFrame) -> str:
    """What strategies are ranked by: the metric where there is one, else the KL."""
    return "metric" if means["metric"].notna().any() else "kl"


def _text(value: float, spread: float, measure: str) -> str:
    if math.isnan(value):
        return ""
    form = ".2f" if measure == "metric" else ".3g"
    return f"{value:{form}}" + ("" if math.isnan(spread) else f" ± {spread:{form}}")


def _matrix(means: pd.DataFrame, budgets: list[str]) -> str:
    if means.empty:
        return "<p>No strategy has a plan at any of the budgets.</p>"
    measure = _measure(means)
    name = "the metric, higher is better" if measure == "metric" else "the KL to the dense model, lower is better"
    found = {(r["strategy"], r["budget"]): r for r in means.to_dict("records")}
    best = {r["budget"]: r["strategy"] for r in means.to_dict("records") if r["best"]}
    wins = "; ".join(
        f"{escape(budget)}: <strong>{escape(best[budget])}</strong>" for budget in budgets if budget in best
    )
    shades = {at: shade for _, group in means.groupby("budget", sort=False) for at, shade in _shades(group, measure)}
    body = []
    for strategy in _ranking(means):
        cells = []
        for budget in budgets:
            r = found.get((strategy, budget))
            if r is None:
                cells.append(number("no plan"))
                continue
            first = _text(r[measure], r[f"{measure}_std"], measure)
            second = f"<small>{_text(r['kl'], math.nan, 'kl')}</small>" if measure == "metric" else ""
            shade = shades[strategy, budget]
            kind = "n heat best" if r["best"] else "n heat"
            cells.append(f'<td class="{kind}" style="--heat: {26 * shade:.0f}%">{escape(first)}{second}</td>')
        body.append(row(strategy, cells))
    below = "; below it the KL" if measure == "metric" else ""
    note = f"Means over the seeds of {name}{below}; ± is the seeds' standard deviation. The more colour, the better."
    shown = table(["strategy", *(f"#{budget}" for budget in budgets)], body, "", "Strategies and budgets", note)
    return f"<p>The best at every budget: {wins}.</p>{shown}"


def _shades(group: pd.DataFrame, measure: str) -> list[tuple[tuple[str, str], float]]:
    """How good each strategy of one budget is, from 0, the worst, to 1, the best; KLs by their logarithms."""
    values = [v if measure == "metric" else -math.log(max(v, 1e-300)) for v in group[measure]]
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, room = min(finite), max(finite) - min(finite)
    shades = [(v - low) / room if room > 0.0 and math.isfinite(v) else 0.0 for v in values]
    return list(zip(zip(group["strategy"], group["budget"], strict=True), shades, strict=True))


def _charts(compared: pd.DataFrame, means: pd.DataFrame) -> str:
    """KL and metric over the file's bytes; the first three of the ranking and the baseline in colour."""
    done = compared[compared["error"] == ""]
    ranking = _ranking(means)
    shown = ranking[:3] + ([BASELINE] if BASELINE in ranking[3:] else ranking[3:4])
    colours = dict(zip(shown, COLOURS, strict=False))
    pictures = []
    for measure, words in (("kl", "KL to the dense model"), ("metric", "metric")):
        series = []
        for name in [n for n in ranking if n not in colours][::-1] + shown[::-1]:
            rows = done[(done["strategy"] == name) & done[measure].map(math.isfinite)]
            rows = rows[rows[measure] > 0.0] if measure == "kl" else rows
            points = [
                (float(group["bytes"].astype(float).mean()), *_spread([float(v) for v in group[measure]]))
                for _, group in rows.groupby("budget", sort=False)
            ]
            if points:
                series.append(Series(name, colours.get(name, "pale"), sorted(points)))
        if sum(len(s.points) for s in series) > 1:
            legend = key([*((colours[n], n) for n in shown), *([("pale", "the others")] if len(ranking) > 4 else [])])
            picture = strategies_chart(series, words, log=measure == "kl")
            pictures.append(figure(picture, f"Mean over the seeds, bars from the least to the greatest.<br>{legend}"))
    return f'<div class="pair">{"".join(pictures)}</div>' if pictures else ""


def _spread(values: list[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def _budgets(means: pd.DataFrame, budgets: list[str]) -> str:
    """A table per budget, the first of them open."""
    head = ["strategy", "#bytes", "#as papers count", "#gap", "#KL", "", "#metric", "#model runs", "#seconds"]
    shown = []
    for budget in budgets:
        group = means[means["budget"] == budget].to_dict("records")
        positive = [r["kl"] for r in group if r["kl"] > 0.0 and math.isfinite(r["kl"])]
        low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 1.0)
        body = [
            row(
                r["strategy"],
                [
                    number(f"{r['bytes']:,.0f}"),
                    number("" if math.isnan(r["paper_bytes"]) else f"{r['paper_bytes']:,.0f}"),
                    number(percent(r["gap"]) if math.isfinite(r["gap"]) else "no bound"),
                    number(_text(r["kl"], r["kl_std"], "kl")),
                    cell(spot((math.log(r["kl"]) - low) / ((high - low) or 1.0)) if r["kl"] in positive else ""),
                    number(_text(r["metric"], r["metric_std"], "metric")),
                    number(f"{r['evaluations']:,.0f}"),
                    number(f"{r['seconds']:.1f}"),
                ],
                marked=bool(r["best"]),
            )
            for r in group
        ]
        if body:
            shown.append(details(f"{budget}: {len(body)} strategies", table(head, body, "", f"Strategies at {budget}")))
    if not shown:
        return ""
    shown[0] = shown[0].replace("<details>", "<details open>", 1)
    words = (
        "<p>Best first. Gap: how far the plan is, at most, from the best possible one of its own objective. As papers "
        "count: only the bits of the codes that are not zero, no positions, scales, norms or header. The dots are the "
        "KL on a logarithmic scale.</p>"
    )
    return words + "".join(shown)


def _failures(compared: pd.DataFrame) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in no_plans(compared))
    return f"<ul>{lines}</ul>" if lines else ""
