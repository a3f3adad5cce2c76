"""The page's pictures as inline SVG: plain shapes with titles, coloured by the style sheet, no scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from autocompress.profiling import LayerProfile
from autocompress.reporting.rows import FilePart, LayerRow
from autocompress.types import Option

__all__ = ["allocation_chart", "bytes_bar", "error_curve", "nice_steps"]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 960, 260, 36, 10, 26
CURVE_WIDTH, CURVE_HEIGHT = 110, 30


def allocation_chart(rows: Sequence[LayerRow]) -> str:
    """One column per layer: as wide as its share of the weights, as high as its bits per weight: its area is its bytes.

    A dashed line marks the mean of all weights.
    """
    weights = sum(row.weights for row in rows)
    mean = 8 * sum(row.bytes for row in rows) / weights
    peak = max(max(row.bits_per_weight for row in rows), 1e-9)
    # A column that is nearly as wide as nothing must not set the scale: cut above four times the mean, and say so.
    top = min(peak, max(4 * mean, sorted(row.bits_per_weight for row in rows)[len(rows) // 2]))
    inner, height = WIDTH - LEFT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="allocation-title">',
        '<title id="allocation-title">Bits per weight of every layer; the table below holds the same numbers</title>',
    ]
    for value in nice_steps(top):
        y = TOP + height * (1 - value / top)
        parts.append(f'<path class="frame" d="M{LEFT} {y:.1f}H{WIDTH}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    x = float(LEFT)
    for row in rows:
        wide, high = inner * row.weights / weights, height * min(row.bits_per_weight, top) / top
        text = f"{row.name}: {row.option}, {row.bits_per_weight:.2f} bits per weight, {row.bytes:,} bytes"
        parts.append(
            f'<rect class="a gap" x="{x:.2f}" y="{TOP + height - high:.2f}" width="{max(wide, 0.5):.2f}" '
            f'height="{high:.2f}"><title>{escape(text)}</title></rect>'
        )
        if row.bits_per_weight > top:
            parts.append(f'<circle class="dot" cx="{x + wide / 2:.2f}" cy="{TOP}" r="3"/>')
        room = int((wide - 8) / 7)  # characters of 12 px text
        if room >= 3:
            name = row.name if len(row.name) <= room else "…" + row.name[-(room - 1) :]
            at = f'x="{x + wide / 2:.1f}" y="{HEIGHT - 8}"'
            parts.append(f'<text {at} text-anchor="middle" aria-hidden="true">{escape(name)}</text>')
        x += wide
    y = TOP + height * (1 - min(mean, top) / top)
    parts.append(f'<path class="mean" d="M{LEFT} {y:.1f}H{WIDTH}"><title>mean: {mean:.2f}</title></path></svg>')
    return "".join(parts)


def nice_steps(top: float, count: int = 4) -> list[float]:
    """Round values from 0 to at most `top`, about `count` of them.

    >>> nice_steps(10.6)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    raw = top / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * min((m for m in (1, 2, 5, 10) if m * unit >= raw * 0.75), default=10)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def error_curve(layer: LayerProfile, chosen: Option) -> str:
    """Error (log) over bytes of a layer's undominated options, with the chosen one marked."""
    points = sorted((row.bytes, row.error / layer.energy) for row in layer.rows if row.error > 0 < layer.energy)
    front: list[tuple[int, float]] = []
    for size, error in points:
        if not front or error < front[-1][1]:
            front.append((size, error))
    if len(front) < 2:
        return ""
    row = layer.row(chosen)
    here = max(row.error / layer.energy, front[-1][1])
    low, high = math.log10(front[-1][1]), math.log10(front[0][1])
    wide = front[-1][0]

    def place(size: float, error: float) -> tuple[float, float]:
        across = min(size / wide, 1.0)
        up = (math.log10(error) - low) / (high - low or 1.0)
        return 3 + across * (CURVE_WIDTH - 6), 3 + (1 - min(up, 1.0)) * (CURVE_HEIGHT - 6)

    path = "M" + "L".join("{:.1f} {:.1f}".format(*place(size, error)) for size, error in front)
    x, y = place(row.bytes, here)
    text = f"error against bytes; chosen: {chosen}, {row.bytes:,} bytes, relative error {row.error / layer.energy:.3g}"
    return (
        f'<svg width="{CURVE_WIDTH}" height="{CURVE_HEIGHT}" role="img"><title>{escape(text)}</title>'
        f'<path class="curve" d="{path}"/><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/></svg>'
    )


def bytes_bar(parts: Sequence[FilePart]) -> str:
    """The whole file as one bar: weights, other tensors, the file's own."""
    total = sum(part.bytes for part in parts)
    pieces, x = [], 0.0
    for kind, colour, text in (("layer", "a", "weights"), ("tensor", "b", "norms, biases"), ("file", "c", "header")):
        size = sum(part.bytes for part in parts if part.kind == kind)
        wide = 100 * size / total
        pieces.append(
            f'<rect class="{colour}" x="{x:.3f}" y="0" width="{wide:.3f}" height="6">'
            f"<title>{text}: {size:,} bytes, {wide:.1f} %</title></rect>"
        )
        x += wide
    return (
        '<svg viewBox="0 0 100 6" preserveAspectRatio="none" width="100%" height="26" role="img" '
        f'aria-label="Parts of the file; the table below holds the same numbers">{"".join(pieces)}</svg>'
    )
