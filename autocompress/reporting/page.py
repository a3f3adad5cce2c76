"""The page: one self-contained HTML file that says what was asked, what was delivered, and how good that is.

No script, no network: it opens from a disk, prints, reads aloud, and follows the reader's light or dark preference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from autocompress.profiling import Profile
from autocompress.reporting.charts import (
    allocation_chart,
    bytes_bar,
    curve_chart,
    family_key,
    key,
    sizes_chart,
)
from autocompress.reporting.curves import family_of, layer_curves
from autocompress.reporting.html import (
    anchor,
    bar,
    cards,
    cell,
    details,
    document,
    facts,
    figure,
    number,
    row,
    scrolling,
    table,
)
from autocompress.reporting.judging import compared_section, frontier_section, measured_section
from autocompress.reporting.rows import (
    FilePart,
    LayerRow,
    amount,
    byte_groups,
    cost_rows,
    file_parts,
    layer_rows,
    percent,
    ratio_text,
)
from autocompress.storage import read
from autocompress.types import Plan

__all__ = ["render_report"]

PANELS = 12  # error curves that are open from the start, those of the largest errors first
GROUP_COLOURS = {"weights": "a", "biases": "d", "norms, other tensors": "b", "header": "c", "checksums": "e"}


def render_report(plan: Plan, profile: Profile, metrics: Mapping[str, Any], file: Path) -> str:
    """The report of a finished result. file: its model.acz. Raises FormatError, MismatchError for what does not fit."""
    with read(file) as archive:
        parts = file_parts(archive)
    rows = layer_rows(plan, profile)
    asked = metrics.get("asked", {})
    title = str(asked.get("task") or "A network")
    size = f"{metrics['bytes']:,} of {metrics['budget_bytes']:,} bytes"
    lead = f'<p class="soft">Compressed by autocompress into {size}.</p>{_cards(plan, metrics)}'
    sections = [
        ("Asked and delivered", _asked(plan, metrics, asked)),
        ("What every layer became", _allocation(plan, profile, rows)),
        ("Error curves", _curves(plan, profile, rows)),
        ("The frontier", frontier_section(plan, profile, metrics, rows)),
        ("Predicted and measured", measured_section(plan, profile, metrics, rows)),
        ("Strategies compared", compared_section(plan, metrics, rows)),
        ("Where every byte goes", _bytes(parts)),
        ("How to get the same again", _reproduce(plan, profile, metrics, asked)),
    ]
    return document(title, f"{title}: {size}", lead, [(name, body) for name, body in sections if body])


def _cards(plan: Plan, metrics: Mapping[str, Any]) -> str:
    used = metrics["bytes"] / metrics["budget_bytes"]
    found = [
        ("bytes", "File on disk", f"{metrics['bytes']:,} B", f"{100 * used:.2f} % of the budget"),
        ("ratio", "Smaller than fp32", ratio_text(metrics["ratio"]), f"fp32: {metrics['original_bytes']:,} B"),
    ]
    if metrics["metric"] is not None:
        change = metrics["metric"] - metrics["baseline_metric"]
        before = f"{metrics['baseline_metric']:g} before, {change:+.3g}"
        found.append(("metric", "Metric", f"{metrics['metric']:g}", before))
    proven = math.isfinite(plan.gap)
    gap = percent(plan.gap) if proven else "no guarantee"
    found.append(("gap", "Gap to the best plan", gap, "proven" if proven else "no bound"))
    if "kl" in plan.measured:
        single = plan.measured.get("single_option_kl")
        more = "measured on held-out data" if single is None else f"best single option: {single:.3g}"
        found.append(("kl", "KL to the dense model", f"{plan.measured['kl']:.3g}", more))
    return cards(found)


def _asked(plan: Plan, metrics: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    metric = "the task defines no evaluate()"
    if metrics["metric"] is not None:
        metric = (
            f"{metrics['baseline_metric']:g} before, {metrics['metric']:g} after, on the model read back from the file"
        )
    found = {
        "Asked": f"budget {plan.budget}: at most {amount(plan.budget_bytes)}",
        "Delivered": f"{amount(metrics['bytes'])}, exactly as long as predicted, read back and verified after writing",
        "Original": f"{amount(metrics['original_bytes'])} as fp32 in safetensors",
        "Metric": f"{metric}; no choice depends on it",
        **cost_rows(metrics.get("costs", {})),
        "Strategy": f"{plan.strategy}"
        + (f" (asked: {asked['strategy']}, effort {asked['effort']})" if "strategy" in asked else ""),
    }
    sizes = [
        ("fp32", metrics["original_bytes"], "c"),
        ("asked", plan.budget_bytes, "b"),
        ("file", metrics["bytes"], "a"),
    ]
    return sizes_chart(sizes) + facts(found)


def _allocation(plan: Plan, profile: Profile, rows: Sequence[LayerRow]) -> str:
    text = (
        "<p>Every column is a layer: as wide as its part of the weights, as high as the bits that each of its weights "
        "costs. So its area is its bytes. Below it is what the layer loses of its output, on a logarithmic scale. A "
        "triangle marks a column that is cut off.</p>"
    )
    families = [family_of(option) for option in plan.layers.values()]
    picture = scrolling(f'<div class="wide">{allocation_chart(rows)}</div>', "Bits per weight and error of every layer")
    chart = figure(picture, f"Layers in the order of the model. {family_key(families)}")
    peak_bits = max(row.bits_per_weight for row in rows)
    peak_bytes = max(row.bytes for row in rows)
    peak_share = max(row.share for row in rows) or 1.0
    drawn = {curve.name for curve in layer_curves(plan, profile)}
    body = [
        row(
            layer.name,
            [
                cell(f"<code>{escape(layer.option)}</code>"),
                number(f"{layer.weights:,}"),
                number(f"{layer.bits_per_weight:.2f}", bar(layer.bits_per_weight / peak_bits)),
                number(f"{layer.bytes:,}", bar(layer.bytes / peak_bytes, "b")),
                number("not reached" if layer.error is None else f"{layer.error:.2e}"),
                number(f"{100 * layer.share:.1f} %", bar(layer.share / peak_share, "d")),
            ],
            link=anchor(layer.name, "curve-") if layer.name in drawn else "",
            name_id=anchor(layer.name, "row-"),
        )
        for layer in rows
    ]
    weights, payload = sum(row.weights for row in rows), sum(row.bytes for row in rows)
    foot = row(
        "All layers",
        [
            cell(""),
            number(f"{weights:,}"),
            number(f"{8 * payload / weights:.2f}"),
            number(f"{payload:,}"),
            cell(""),
            number("100 %"),
        ],
    )
    head = ["layer", "option", "#weights", "#bits/weight", "#bytes", "#relative error", "#share"]
    note = "Relative error: of the layer's output, 1 for losing the layer. Share: of the sum of all relative errors."
    shown = table(head, body, foot, "Options of the layers", note)
    left = [f"{name}: {why}" for name, why in profile.skipped.items()]
    unreached = "calibration never reached it, so it has only options that need no data"
    left += [f"{row.name}: {unreached}" for row in rows if row.error is None]
    extra = f"<p>Left alone: {escape('; '.join(left))}.</p>" if left else ""
    return text + chart + shown + extra


def _curves(plan: Plan, profile: Profile, rows: Sequence[LayerRow]) -> str:
    curves = {curve.name: curve for curve in layer_curves(plan, profile)}
    if not curves:
        return ""
    reached = [row for row in rows if row.name in curves]
    # One scale for all: from a tenth of the smallest chosen error to the loss of the whole layer, and in bits from
    # half the smallest chosen width to binary16.
    errors = [row.error for row in reached if row.error]
    lowest = max(min(errors, default=1e-3) / 10, 1e-9), 1.0
    widths = [row.bits_per_weight for row in reached if row.bytes]
    bits = min(min(widths, default=1.0) / 2, 0.25), 16.0
    order = sorted(reached, key=lambda row: -row.share)
    panels = []
    for layer in order:
        curve = curves[layer.name]
        chosen = f"<code>{escape(layer.option)}</code><br>{layer.bytes:,} B, {layer.bits_per_weight:.2f} bits each"
        panels.append(
            f'<li id="{anchor(layer.name, "curve-")}"><h3>{escape(layer.name)}</h3>{curve_chart(curve, lowest, bits)}'
            f"<p>{chosen}<br>{100 * layer.share:.1f} % of the error</p></li>"
        )
    families = {family for curve in curves.values() for family in curve.fronts}
    shown = (
        "<p>For every layer, what an option costs and what it loses: relative error of the layer's output over the "
        "bytes of its weights, both logarithmic, on one scale for all layers (from left to right "
        f"{bits[0]:.2g} to {bits[1]:g} bits per weight). A line joins the options of one family that no other of it "
        "beats; the ring is what was chosen. Layers with the largest share of the error come first.</p>"
        f'<p>{family_key(list(families))}</p><ul class="panels">{"".join(panels[:PANELS])}</ul>'
    )
    rest = panels[PANELS:]
    if rest:
        shown += details(f"{len(rest)} more layers, with smaller errors", f'<ul class="panels">{"".join(rest)}</ul>')
    return shown


def _bytes(parts: Sequence[FilePart]) -> str:
    total = sum(part.bytes for part in parts)
    groups = byte_groups(parts)
    coloured = [(name, GROUP_COLOURS[name], group) for name, group in groups.items()]
    legend = key([(colour, name) for name, colour, _ in coloured])
    sums = [
        row(
            name,
            [
                number(f"{len(group)}"),
                number(f"{sum(part.bytes for part in group):,}"),
                number(f"{100 * sum(part.bytes for part in group) / total:.2f} %"),
            ],
        )
        for name, group in groups.items()
    ]
    whole = row("The whole file", [number(f"{len(parts)}"), number(f"{total:,}"), number("100 %")])
    summary = table(["what", "#parts", "#bytes", "#of the file"], sums, whole, "The file in groups")
    body = []
    for part in parts:
        option = f"<code>{escape(part.option)}</code> " if part.option else ""
        bits = "" if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}"
        body.append(
            row(
                part.name,
                [
                    cell(option),
                    cell(escape(part.codec)),
                    cell(escape("x".join(map(str, part.shape)) if part.shape is not None else "")),
                    number(bits),
                    number(f"{part.bytes:,}"),
                    number(f"{100 * part.bytes / total:.2f} %"),
                ],
            )
        )
    foot = row("The whole file", [cell("")] * 4 + [number(f"{total:,}"), number("100 %")])
    head = ["part", "option", "stored as", "shape", "#bits/value", "#bytes", "#of the file"]
    every = details(f"All {len(parts)} parts, in the order of the file", table(head, body, foot, "Parts of the file"))
    return figure(bytes_bar(coloured), f"Every piece is a part of the file. {legend}") + summary + every


def _reproduce(plan: Plan, profile: Profile, metrics: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    if asked.get("task"):
        words = ["autocompress", "compress", str(asked["task"]), "--budget", f'"{plan.budget}"']
        words += ["--strategy", str(asked["strategy"]), "--effort", str(asked["effort"])]
        if asked.get("sequential") is not None:
            words.append("--sequential" if asked["sequential"] else "--no-sequential")
        if asked.get("options"):
            words += ["--options", f'"{",".join(asked["options"])}"']
        command = " ".join([*words, "--seed", str(plan.seed), "--out", "DIR"])
        how = "<p>The same command with the same seed makes the same plan and the same bytes on the same machine:</p>"
    else:
        command = f'autocompress.compress(model, batches, "{plan.budget}", seed={plan.seed}, ...)'
        how = "<p>From Python, with the same model and batches:</p>"
    how += f'<pre tabindex="0"><code>{escape(command)}</code></pre>'
    environment, stats = metrics.get("environment", {}), profile.statistics
    options = sum(len(layer.rows) for layer in profile.layers.values())
    found = {
        "Verification": "autocompress verify DIR checks budget, checksums, options and figures again",
        "Seed": f"{plan.seed}",
        "Calibration": f"{stats.samples:,} samples in the Hessians, damping {stats.damping:g}",
        "Profile": f"{len(profile.layers)} layers, {options:,} options",
        "Environment": ", ".join(f"{name} {value}" for name, value in environment.items()) or "not recorded",
    }
    if "seconds" in metrics:
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in metrics.get("stage_seconds", {}).items())
        found["Time"] = f"{metrics['seconds']:.1f} s" + (f" ({stages})" if stages else "")
    prints = {"Of the profile": profile.fingerprint}
    prints |= {
        f"Of the {name}": profile.fields[name] for name in ("model", "data", "options") if name in profile.fields
    }
    return how + facts(found) + details("Fingerprints (SHA-256)", facts(prints))
