"""The page's pictures as inline SVG: plain shapes with titles, coloured by the style sheet, no scripts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from autocompress.reporting.curves import FAMILIES, LayerCurve, family_of
from autocompress.reporting.html import anchor
from autocompress.reporting.rows import FilePart, LayerRow
from autocompress.reporting.svg import Axis, Plot, nice_steps, picture, power, short_bytes
from autocompress.reporting.tradeoff import Tradeoff, TradeoffPoint
from autocompress.types import Option

__all__ = [
    "Series",
    "allocation_chart",
    "bytes_bar",
    "curve_chart",
    "family_key",
    "frontier_chart",
    "key",
    "layers_chart",
    "plans_chart",
    "sizes_chart",
    "strategies_chart",
]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 360, 44, 905, 24, 26
ERRORS = 84  # height of the strip of errors below the columns
SMALL = (236, 168)
MIDDLE = (460, 340)


def allocation_chart(rows: Sequence[LayerRow]) -> str:
    """One column per layer: as wide as its share of the weights, as high as its bits per weight: its area is its bytes.

    A dashed line marks the mean of all weights. Below every column is the layer's relative error, on a logarithmic
    scale.
    """
    weights = sum(row.weights for row in rows)
    mean = 8 * sum(row.bytes for row in rows) / weights
    peak = max(max(row.bits_per_weight for row in rows), 1e-9)
    # A column that is nearly as wide as nothing must not set the scale: cut above four times the mean, and say so.
    top = min(peak, max(4 * mean, sorted(row.bits_per_weight for row in rows)[len(rows) // 2]))
    foot = HEIGHT - BOTTOM - ERRORS - 30
    across, up = Axis(0, weights, LEFT, RIGHT, log=False), Axis(0, top, foot, TOP, log=False)
    plot = Plot(across, up, (WIDTH, HEIGHT), "Bits per weight and error of every layer; the table holds the same")
    plot.axes(str, "{:g}".format, ("", "bits per weight"), ((), nice_steps(top)))
    errors = [row.error for row in rows if row.error]
    down = Axis.around(errors or [1.0], HEIGHT - BOTTOM, HEIGHT - BOTTOM - ERRORS, 2.0)
    strip = Plot(across, down, (WIDTH, HEIGHT), "")
    strip.axes(str, power, ("", "relative error"), ((), down.ticks(4)))
    before = 0
    for row in rows:
        x, wide = across(before), across(row.weights) - LEFT
        text = f"{row.name}: {row.option}, {row.bits_per_weight:.2f} bits per weight, {row.bytes:,} bytes"
        text += "" if row.error is None else f", relative error {row.error:.2g}"
        high = foot - up(row.bits_per_weight)
        colour = f"{_family(row)} gap" if wide > 4 else _family(row)  # a gap would hide a thin column
        plot.parts.append(
            f'<a href="#{anchor(row.name, "row-")}" tabindex="-1"><rect class="{colour}" x="{x:.2f}" '
            f'y="{foot - high:.2f}" width="{max(wide, 0.5):.2f}" height="{high:.2f}">'
            f"<title>{escape(text)}</title></rect></a>"
        )
        if row.bits_per_weight > top:
            plot.parts.append(f'<path class="cut" d="M{x + wide / 2:.1f} {TOP - 9}l5 8h-10z"/>')
        if row.error:
            strip.line([(before, row.error), (before + row.weights, row.error)], f"level {_family(row)}", text)
        before += row.weights
    for name, start, many in _labels(rows, (RIGHT - LEFT) / weights):
        room = int((across(many) - LEFT - 8) / 7)
        if room >= 5:
            name = name if len(name) <= room else "…" + name[-(room - 1) :].lstrip(".")
            plot.text(across(start + many / 2), HEIGHT - 8, name, "middle")
        if start:
            plot.parts.append(f'<path class="frame" d="M{across(start):.1f} {HEIGHT - BOTTOM + 5}v6"/>')
    y = up(min(mean, top))
    plot.parts.append(f'<path class="mean" d="M{LEFT} {y:.1f}H{RIGHT + 4}"/>')
    plot.text(RIGHT + 8, y, "mean", kind="strong")
    plot.text(RIGHT + 8, y + 14, f"{mean:.2f}", kind="strong")
    plot.parts += strip.parts
    return plot.svg


def _labels(rows: Sequence[LayerRow], scale: float) -> list[tuple[str, int, int]]:
    """What stands below the columns, as (name, weights before, weights): layers, or, where most of these are too
    narrow for a name, runs of layers whose names begin alike. scale: units per weight.
    """
    named = [(row.name, row.weights) for row in rows]
    if 2 * sum(scale * size < 8 + 5 * 7 for _, size in named) > len(named):
        runs: list[tuple[str, int]] = []
        for name, size in ((name.partition(".")[0], size) for name, size in named):
            if runs and runs[-1][0] == name:
                runs[-1] = name, runs[-1][1] + size
            else:
                runs.append((name, size))
        named = runs
    starts = itertools.accumulate((size for _, size in named), initial=0)
    return [(name, start, size) for (name, size), start in zip(named, starts, strict=False)]


def sizes_chart(sizes: Sequence[tuple[str, int, str]]) -> str:
    """Bars of bytes to one scale: (name, bytes, colour)."""
    scale = Axis(0, max(size for _, size, _ in sizes), 0, 100, log=False)
    return (
        '<div class="sizes">'
        + "".join(
            f'<span>{escape(name)}</span><span class="track" aria-hidden="true">'
            f'<i class="{colour}" style="width: {scale(size):.2f}%"></i></span><span class="n">{size:,} B</span>'
            for name, size, colour in sizes
        )
        + "</div>"
    )


def curve_chart(curve: LayerCurve, errors: tuple[float, float], bits: tuple[float, float]) -> str:
    """A layer's error over its bytes, both logarithmic, a line for every family of options, the chosen point marked.

    errors, bits: the scales, relative error and bits per weight, the same for all layers so that panels compare.
    """
    wide, high = SMALL
    x = Axis(bits[0] * curve.weights / 8, bits[1] * curve.weights / 8, 40, wide - 6)
    y = Axis(errors[0], errors[1], high - 24, 8)
    title = f"{curve.name}: error over bytes. Chosen: {curve.chosen}, {curve.bytes:,} bytes, error {curve.error:.2g}"
    plot = Plot(x, y, SMALL, title)
    sizes = [curve.weights / 8 * width for width in (0.5, 2, 8) if bits[0] <= width <= bits[1]]
    plot.axes(short_bytes, power, ticks=(sizes, y.ticks(4)))
    for family, front in curve.fronts.items():
        shown = [(size, error) for size, error in front if x.holds(size) and y.holds(error)]
        if len(shown) > 1:
            plot.line(shown, family)
        if shown:
            plot.dots(shown, family)
    if curve.bytes > 0 and curve.error > 0.0:
        plot.mark(curve.bytes, curve.error, "chosen", title)
    return plot.svg


def frontier_chart(line: Tradeoff, chosen: TradeoffPoint, limit: int, others: Sequence[Mapping[str, Any]]) -> str:
    """The least sum of relative errors over the file's bytes, with bars from what is proven to what is there.

    chosen: the result. others: measured plans, each with a bar down to the least of its bytes.
    """
    points = [p for p in line.points if p.loss > 0.0]
    losses = [p.loss for p in points]
    # Beyond the last tenth of a percent of an error everything is dense: not what a budget is about.
    shown = [p for p in points if p.loss >= min(max(losses) * 1e-7, chosen.loss / 100)]
    wide, high = MIDDLE
    x = Axis.around([*(p.bytes for p in shown), chosen.bytes], 52, wide - 10, 1.05)
    y = Axis.around([*(p.loss for p in shown), chosen.loss], high - 44, 24, 1.5)
    plot = Plot(x, y, MIDDLE, "Least sum of relative errors over the file's bytes; the table holds the same budgets")
    plot.axes(short_bytes, power, ("bytes of the file", "sum of relative errors"), (x.ticks(6), y.ticks(7)))
    place = x(limit)
    plot.parts.append(f'<path class="mean" d="M{place:.1f} {y.start}V{y.end}"/>')
    plot.text(place + 4, y.end + 10, f"budget {short_bytes(limit)}", kind="strong")
    plot.line([(p.bytes, p.loss) for p in shown], "hull", "no choice is below this line")
    for other in others:
        if other["bytes"] and other["relative_error"] > 0.0 and (below := line.at(other["bytes"])) is not None:
            text = f"{other['name']}: {other['bytes']:,} bytes, {other['relative_error']:.3g}"
            plot.upright(other["bytes"], below.bound, other["relative_error"], "faint", text)
            plot.mark(other["bytes"], other["relative_error"], "other", text, 3)
    for ratio, point in line.budgets():
        if y.holds(point.loss) and x.holds(point.bytes):
            text = f"{ratio}x: {point.bytes:,} bytes, {point.loss:.3g}, gap {100 * point.gap:.2g} %"
            plot.upright(point.bytes, point.bound, point.loss, "gapbar", text)
            plot.mark(point.bytes, point.loss, "known", text, 3)
    if chosen.loss > 0.0:
        plot.upright(chosen.bytes, min(chosen.bound, chosen.loss), chosen.loss, "strongbar")
        plot.mark(chosen.bytes, chosen.loss, "chosen", f"this result: {chosen.bytes:,} bytes, {chosen.loss:.3g}", 5.5)
    return plot.svg


def plans_chart(plans: Sequence[tuple[str, float, float]], chosen: tuple[float, float]) -> str:
    """Measured KL over the predicted sum of relative errors, both logarithmic: (name, predicted, measured)."""
    wide, high = MIDDLE
    x = Axis.around([chosen[0], *(p for _, p, _ in plans)], 58, wide - 10, 1.3)
    y = Axis.around([chosen[1], *(m for *_, m in plans)], high - 44, 24, 1.5)
    plot = Plot(x, y, MIDDLE, "Measured KL over predicted error of every measured plan; the table holds the same")
    plot.axes(power, power, ("sum of relative errors, predicted", "KL to the dense model, measured"))
    for name, predicted, measured in plans:
        kind = "single" if name.startswith("single ") else "other"
        plot.mark(predicted, measured, kind, f"{name}: predicted {predicted:.3g}, measured {measured:.3g}")
    plot.mark(*chosen, "chosen", f"this result: {chosen[0]:.3g}, measured {chosen[1]:.3g}", 5.5)
    return plot.svg


def layers_chart(points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Measured KL over relative error of layers compressed alone, a line for each layer; the steepest are named."""
    wide, high = MIDDLE
    x = Axis.around([e for ps in points.values() for e, _ in ps], 58, wide - 102, 1.2)
    y = Axis.around([k for ps in points.values() for _, k in ps], high - 44, 24, 1.5)
    plot = Plot(x, y, MIDDLE, "Measured KL over relative error of layers that were compressed alone")
    plot.axes(power, power, ("relative error of the layer", "rise of the KL, measured"))
    last = {name: max(ps) for name, ps in points.items()}
    steep = sorted(last, key=lambda name: -last[name][1] / last[name][0])
    named = steep if len(steep) <= 6 else [*steep[:3], *steep[-2:]]
    taken: list[float] = []
    for name, ps in points.items():
        kind = "hull" if name in named[:3] else "pale"
        plot.line(sorted(ps), kind, f"{name}: " + ", ".join(f"{e:.2g} → {k:.2g}" for e, k in sorted(ps)))
        plot.dots(ps, kind)
    for name in sorted(named, key=lambda n: -last[n][1]):
        at = y(last[name][1]) + 4
        while any(abs(at - other) < 13 for other in taken):
            at += 1
        taken.append(at)
        short = name if len(name) <= 14 else "…" + name[-13:].lstrip(".")
        plot.text(x(last[name][0]) + 6, at, short)
    return plot.svg


@dataclass(frozen=True)
class Series:
    """A strategy in a chart: its name, its colour, and its points (bytes, mean, least, greatest)."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]


def strategies_chart(series: Sequence[Series], words: str, log: bool) -> str:
    """A figure over the bytes for every strategy, with the spread of its seeds; those in colour are named."""
    wide, high = MIDDLE
    every = [point for one in series for point in one.points]
    x = Axis.around([p[0] for p in every], 58, wide - 76, 1.08)
    low, top = min(p[2] for p in every), max(p[3] for p in every)
    room = (top - low) * 0.08 or 1.0
    up = Axis.around([low, top], high - 44, 24, 1.3) if log else Axis(low - room, top + room, high - 44, 24, log=False)
    plot = Plot(x, up, MIDDLE, f"{words} over the bytes of the file; the tables hold the same numbers")
    plot.axes(short_bytes, power if log else "{:g}".format, ("bytes of the file", words), (x.ticks(5), None))
    taken: list[float] = []
    for one in series:
        text = f"{one.name}: " + ", ".join(f"{p[0]:,.0f} B {p[1]:.4g}" for p in one.points)
        plot.line([p[:2] for p in one.points], one.colour, text)
        for size, _, least, most in one.points:
            if most > least and one.colour != "pale":
                plot.upright(size, least, most, f"whisker {one.colour}")
        plot.dots([p[:2] for p in one.points], one.colour)
        if one.colour != "pale":
            size, mean, *_ = one.points[-1]
            at = up(mean) + 4
            while any(abs(at - other) < 13 for other in taken):
                at -= 1
            taken.append(at)
            plot.text(x(size) + 6, at, one.name if len(one.name) <= 12 else one.name[:11] + "…")
    return plot.svg


def bytes_bar(groups: Sequence[tuple[str, str, Sequence[FilePart]]]) -> str:
    """The whole file as one bar: (name, colour, parts), every part a piece with its title."""
    total = sum(part.bytes for *_, parts in groups for part in parts)
    pieces, x = [], 0.0
    for _, colour, parts in groups:
        for part in parts:
            wide = 1000 * part.bytes / total
            text = f"{part.name}: {part.bytes:,} bytes, {wide / 10:.1f} %"
            kind = f"{colour} gap" if wide > 4 else colour  # a gap would hide a thin piece
            pieces.append(
                f'<rect class="{kind}" x="{x:.2f}" y="0" width="{wide:.2f}" height="30">'
                f"<title>{escape(text)}</title></rect>"
            )
            x += wide
    stretched = ' preserveAspectRatio="none" class="strip"'
    return picture((1000, 30), "Parts of the file; the table below holds the same numbers", "".join(pieces), stretched)


def key(entries: Sequence[tuple[str, str]]) -> str:
    """A legend: (colour, text)."""
    return (
        '<span class="legend">'
        + "".join(
            f'<span><i class="key {colour}" aria-hidden="true"></i>{escape(text)}</span>' for colour, text in entries
        )
        + "</span>"
    )


def family_key(found: Sequence[str]) -> str:
    """The legend of those families of options that there are."""
    return key([(family, FAMILIES[family]) for family in FAMILIES if family in found])


def _family(row: LayerRow) -> str:
    return family_of(Option.parse(row.option))
