"""The page: one self-contained HTML file that says what was asked, what was delivered, and how good that is.

No script, no network: it opens from a disk, prints, reads aloud, and follows the reader's light or dark preference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from autocompress.profiling import Profile
from autocompress.reporting.charts import allocation_chart, bytes_bar, error_curve
from autocompress.reporting.rows import FilePart, LayerRow, amount, cost_rows, file_parts, layer_rows, ratio_text
from autocompress.reporting.style import CSS
from autocompress.storage import read
from autocompress.types import Plan

__all__ = ["render_report"]

# What `auto` notes of each plan that it measured.
TRIAL = re.compile(r"(?P<name>.+): KL (?P<all>\S+) on all calibration data, (?P<held>\S+) on the held-out slice")


def render_report(plan: Plan, profile: Profile, metrics: Mapping[str, Any], file: Path) -> str:
    """The report of a finished result. file: its model.acz. Raises FormatError, MismatchError for what does not fit."""
    with read(file) as archive:
        parts = file_parts(archive)
    profile = profile.with_realised(plan)
    rows = layer_rows(plan, profile)
    asked = metrics.get("asked", {})
    title = str(asked.get("task") or "A network")
    body = [
        _cards(plan, metrics),
        _asked(plan, metrics, asked),
        _allocation(plan, profile, rows),
        _judged(plan, metrics),
        _bytes(parts),
        _reproduce(plan, profile, metrics, asked),
    ]
    size = f"{metrics['bytes']:,} of {metrics['budget_bytes']:,} bytes"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: {size}</title><style>{CSS}</style></head><body>"
        '<a class="skip" href="#main">Skip to the report</a>'
        f'<header><h1>{escape(title)}</h1><p class="soft">Compressed by autocompress into {size}.</p></header>'
        f'<main id="main">{"".join(body)}</main>'
        "<footer><p>Made by autocompress. This page is one file: nothing is loaded from anywhere.</p></footer>"
        "</body></html>\n"
    )


def _cards(plan: Plan, metrics: Mapping[str, Any]) -> str:
    used = metrics["bytes"] / metrics["budget_bytes"]
    cards = [
        ("File on disk", f"{metrics['bytes']:,} B", f"{100 * used:.2f} % of the budget"),
        ("Smaller than fp32", ratio_text(metrics["ratio"]), f"fp32: {metrics['original_bytes']:,} B"),
    ]
    if metrics["metric"] is not None:
        change = metrics["metric"] - metrics["baseline_metric"]
        cards.append(("Metric", f"{metrics['metric']:g}", f"{metrics['baseline_metric']:g} before, {change:+.3g}"))
    proven = math.isfinite(plan.gap)
    cards.append(
        (
            "Gap to the best allocation",
            _percent(plan.gap) if proven else "no guarantee",
            "proven" if proven else "no bound",
        )
    )
    if "kl" in plan.measured:
        single = plan.measured.get("single_option_kl")
        more = "measured on held-out data" if single is None else f"best single option: {single:.3g}"
        cards.append(("KL to the dense model", f"{plan.measured['kl']:.3g}", more))
    items = "".join(
        f'<li><span class="name">{escape(n)}</span><span class="value">{escape(v)}</span>'
        f'<span class="more">{escape(m)}</span></li>'
        for n, v, m in cards
    )
    return f'<ul class="cards">{items}</ul>'


def _asked(plan: Plan, metrics: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    metric = "the task defines no evaluate()"
    if metrics["metric"] is not None:
        metric = (
            f"{metrics['baseline_metric']:g} before, {metrics['metric']:g} after, on the model read back from the file"
        )
    facts = {
        "Asked": f"budget {plan.budget}: at most {amount(plan.budget_bytes)}",
        "Delivered": f"{amount(metrics['bytes'])}, exactly as long as predicted, read back and verified after writing",
        "Original": f"{amount(metrics['original_bytes'])} as fp32 in safetensors",
        "Metric": f"{metric}; no choice depends on it",
        **cost_rows(metrics.get("costs", {})),
        "Strategy": f"{plan.strategy}"
        + (f" (asked: {asked['strategy']}, effort {asked['effort']})" if "strategy" in asked else ""),
    }
    return _section("Asked and delivered", _facts(facts))


def _allocation(plan: Plan, profile: Profile, rows: Sequence[LayerRow]) -> str:
    text = (
        "<p>Every column is a layer: as wide as its part of the weights, as high as the bits that each of its weights "
        "costs. So its area is its bytes. The dashed line is the mean; a dot marks a column that is cut off.</p>"
    )
    caption = "<figcaption>Bits per weight, layers in the order of the model</figcaption>"
    picture = f'<div class="wide">{allocation_chart(rows)}</div>'
    chart = f"<figure>{_scrolling(picture, 'Bits per weight of every layer')}{caption}</figure>"
    peak_bits = max(row.bits_per_weight for row in rows)
    peak_bytes = max(row.bytes for row in rows)
    body = []
    for row in rows:
        error = "not reached" if row.error is None else f"{row.error:.2e}"
        body.append(
            _row(
                row.name,
                [
                    f"<code>{escape(row.option)}</code>",
                    _number(f"{row.weights:,}"),
                    _number(f"{row.bits_per_weight:.2f}", _bar(row.bits_per_weight / peak_bits)),
                    _number(f"{row.bytes:,}", _bar(row.bytes / peak_bytes, "b")),
                    _number(error),
                    _number(f"{100 * row.share:.1f} %"),
                    _cell(error_curve(profile.layers[row.name], plan.layers[row.name])),
                ],
            )
        )
    weights, payload = sum(row.weights for row in rows), sum(row.bytes for row in rows)
    foot = _row(
        "All layers",
        [
            "<td></td>",
            _number(f"{weights:,}"),
            _number(f"{8 * payload / weights:.2f}"),
            _number(f"{payload:,}"),
            "<td></td>",
            _number("100 %"),
            "<td></td>",
        ],
    )
    head = ["layer", "option", "#weights", "#bits/weight", "#bytes", "#relative error", "#share", "error over bytes"]
    note = "Relative error: of the layer's output, 1 for losing the layer. Share: of the sum of all relative errors."
    table = _table(head, body, foot, "Options of the layers", note)
    left = [f"{name}: {why}" for name, why in profile.skipped.items()]
    unreached = "calibration never reached it, so it has only options that need no data"
    left += [f"{row.name}: {unreached}" for row in rows if row.error is None]
    extra = f"<p>Left alone: {escape('; '.join(left))}.</p>" if left else ""
    return _section("What every layer became", text + chart + table + extra)


def _judged(plan: Plan, metrics: Mapping[str, Any]) -> str:
    if math.isfinite(plan.gap) and math.isfinite(plan.bound):
        words = (
            f"The allocation's predicted loss is {plan.predicted_loss:.6g}. It is proven that no other choice of these "
            f"options within the same bytes has one below {plan.bound:.6g}: the gap is {_percent(plan.gap)}. The proof "
            "is about the predicted loss, the sum of the layers' errors as the strategy weighs them; what the whole "
            "network makes of it is measured below."
        )
    else:
        words = (
            "There is no guarantee: no bound is known for this choice, so nothing is said about how much better "
            "another one could be."
        )
    if plan.realised:
        words += (
            " All of that is about the plan as it was chosen. Every layer was then compressed anew, within its bytes, "
            "on what the compressed layers before it put out; options, bytes and errors above are what came of it."
        )
    text = f"<p>{words}</p>"
    measured = plan.measured
    if "kl" not in measured:
        return _section(
            "How good it is", f"{text}<p>Nothing was measured on the model: the plan is predicted only.</p>"
        )
    single = measured.get("single_option_kl")
    samples = int(measured.get("samples", 0))
    text += (
        f"<p>Measured on {samples:,} calibration samples that the Hessians never saw: how far the outputs are from the "
        "dense model's (mean KL divergence per sample, lower is better).</p>"
    )
    found: list[tuple[str, float | None, float]] = [("this plan", measured.get("kl_all"), measured["kl"])]
    if single is not None:
        found.append(("best single option for all layers", None, single))
    trials = [match for note in plan.notes if (match := TRIAL.fullmatch(note))]
    found += [(f"tried: {m['name']}", float(m["all"]), float(m["held"])) for m in trials]
    peak = max((held for _, _, held in found if math.isfinite(held)), default=0.0) or 1.0
    body = [
        _row(
            name,
            [
                _number("" if overall is None else f"{overall:.4g}"),
                _number(f"{held:.4g}"),
                _cell(_bar(min(held / peak, 1.0), "b")),
            ],
        )
        for name, overall, held in found
    ]
    note = "Tried: exact solves of the relative errors (energy), of a fit of the measured KL (kl), and of mixtures."
    head = ["plan", "#KL, all calibration data", "#KL, held out", ""]
    text += _table(head, body, "", "Measured plans", note if trials else "")
    if single is not None:
        text += (
            "<p>A plan is never handed out if the best fitting one with the same option for every layer measures "
            "better: then that one is.</p>"
        )
    others = [note for note in plan.notes if not TRIAL.fullmatch(note)]
    return _section("How good it is", text + "".join(f"<p>{escape(note)}</p>" for note in others))


def _bytes(parts: Sequence[FilePart]) -> str:
    total = sum(part.bytes for part in parts)
    key = "".join(
        f'<span class="key" style="background: var(--{colour})"></span>{text}'
        for colour, text in (("a", "weights"), ("b", "norms, biases, other tensors"), ("c", "header and checksums"))
    )
    body = []
    for part in parts:
        option = f"<code>{escape(part.option)}</code> " if part.option else ""
        bits = "" if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}"
        body.append(
            _row(
                part.name,
                [
                    f"<td>{option}</td>",
                    f"<td>{escape(part.codec)}</td>",
                    f"<td>{escape('x'.join(map(str, part.shape)) if part.shape is not None else '')}</td>",
                    _number(bits),
                    _number(f"{part.bytes:,}"),
                    _number(f"{100 * part.bytes / total:.2f} %"),
                ],
            )
        )
    foot = _row("The whole file", ["<td></td>"] * 4 + [_number(f"{total:,}"), _number("100 %")])
    head = ["part", "option", "stored as", "shape", "#bits/value", "#bytes", "#of the file"]
    table = _table(head, body, foot, "Parts of the file", "")
    figure = f"<figure>{bytes_bar(parts)}<figcaption>{key}</figcaption></figure>"
    return _section("Where every byte goes", figure + table)


def _reproduce(plan: Plan, profile: Profile, metrics: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    if asked.get("task"):
        words = ["autocompress", "compress", str(asked["task"]), "--budget", f'"{plan.budget}"']
        words += ["--strategy", str(asked["strategy"]), "--effort", str(asked["effort"])]
        if asked.get("sequential") is not None:
            words.append("--sequential" if asked["sequential"] else "--no-sequential")
        command = " ".join([*words, "--seed", str(plan.seed), "--out", "DIR"])
        how = "<p>The same command with the same seed makes the same plan and the same bytes on the same machine:</p>"
    else:
        command = f'autocompress.compress(model, batches, "{plan.budget}", seed={plan.seed}, ...)'
        how = "<p>From Python, with the same model and batches:</p>"
    how += f'<pre tabindex="0"><code>{escape(command)}</code></pre>'
    environment, stats = metrics.get("environment", {}), profile.statistics
    options = sum(len(layer.rows) for layer in profile.layers.values())
    facts = {
        "Profile": f"{profile.fingerprint}: {len(profile.layers)} layers, {options:,} options",
        "Calibration": f"{stats.samples:,} samples in the Hessians, damping {stats.damping:g}",
        "Environment": ", ".join(f"{name} {value}" for name, value in environment.items()) or "not recorded",
        "Verification": "autocompress verify DIR checks budget, checksums, options and figures again",
    }
    if "seconds" in metrics:
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in metrics.get("stage_seconds", {}).items())
        facts["Time"] = f"{metrics['seconds']:.1f} s" + (f" ({stages})" if stages else "")
    return _section("How to get the same again", how + _facts(facts))


def _section(title: str, body: str) -> str:
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>'


def _facts(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts.items()) + "</dl>"


def _table(head: Sequence[str], body: Iterable[str], foot: str, label: str, note: str) -> str:
    """A table that scrolls by itself, by keyboard too; a heading that starts with # is one of numbers."""
    cells = "".join(
        f'<th scope="col" class="n">{escape(h[1:])}</th>'
        if h.startswith("#")
        else (f'<th scope="col">{escape(h)}</th>' if h else "<td></td>")
        for h in head
    )
    caption = f"<caption>{escape(note)}</caption>" if note else ""
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    head_and_body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody>"
    return _scrolling(f"<table>{caption}{head_and_body}{foot}</table>", label)


def _scrolling(content: str, label: str) -> str:
    """Content that may be wider than the page, and is scrolled by itself, with arrow keys too."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'


def _row(name: str, cells: Sequence[str]) -> str:
    done = "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{done}</tr>'


def _cell(content: str) -> str:
    return f"<td>{content}</td>"


def _number(text: str, bar: str = "") -> str:
    return f'<td class="n">{escape(text)}{bar}</td>'


def _bar(part: float, kind: str = "") -> str:
    return f'<span class="bar {kind}" aria-hidden="true"><i style="width: {100 * part:.1f}%"></i></span>'


def _percent(gap: float) -> str:
    return "0 %" if gap <= 1e-9 else f"{100 * gap:.2g} %"
