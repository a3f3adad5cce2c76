"""Drawing: scales, ticks, and figures with axes as inline SVG, coloured by the style sheet. No scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Plot", "nice_steps", "picture", "power", "short_bytes"]


def nice_steps(top: float, count: int = 4) -> list[float]:
    """Round values from 0 to at most `top`, about `count` of them.

    >>> nice_steps(10.6)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    raw = top / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * min((m for m in (1, 2, 5, 10) if m * unit >= raw * 0.75), default=10)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def short_bytes(count: float) -> str:
    """Bytes with three digits at most, decimal units.

    >>> short_bytes(15_737), short_bytes(512), short_bytes(1_092_520)
    ('15.7 kB', '512 B', '1.09 MB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g} {unit}"
    return f"{count:.0f} B"


def power(value: float) -> str:
    """A tick of a logarithmic axis: 1, 0.1, 0.01, and then 1e-3."""
    return f"{value:g}" if 1e-2 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


@dataclass(frozen=True)
class Axis:
    """A scale from [low, high] to [start, end] in the units of the drawing, logarithmic or linear; values beyond its
    ends are drawn at them.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, room: float = 1.15) -> Axis:
        """A logarithmic scale with some room at both ends of positive values."""
        found = list(values)
        low, high = min(found) / room, max(found) * room
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        low, high, here = self.low, self.high, min(max(value, self.low), self.high)
        part = math.log(here / low) / math.log(high / low) if self.log else (here - low) / (high - low)
        return self.start + part * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int = 7) -> list[float]:
        """Round values on the scale, at most so many: decades where it spans three, else 1, 2, 5 of each as well."""
        if not self.log:
            step = nice_steps(self.high - self.low)[1]
            return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in parts if self.holds(m * 10.0**d)]
            if 2 <= len(found) <= most:
                return found
            if len(found) < 2:
                break
        if len(found) < 2:  # less than a factor of two: round steps do
            return Axis(self.low, self.high, self.start, self.end, log=False).ticks(most)
        every = math.ceil(len(found) / most)
        return [value for i, value in enumerate(reversed(found)) if i % every == 0][::-1]


class Plot:
    """A figure with two axes: draw into it by values, then take its `svg`."""

    def __init__(self, x: Axis, y: Axis, size: tuple[int, int], title: str) -> None:
        self.x, self.y, self.size, self.title = x, y, size, title
        self.parts: list[str] = []

    def axes(
        self,
        of_x: Callable[[float], str],
        of_y: Callable[[float], str],
        labels: tuple[str, str] = ("", ""),
        ticks: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None),
    ) -> Plot:
        """Grid lines with their values, and what the axes are."""
        x, y, high = self.x, self.y, self.size[1]
        for value in y.ticks() if ticks[1] is None else ticks[1]:
            self.parts.append(f'<path class="frame" d="M{x.start} {y(value):.1f}H{x.end}"/>')
            self.text(x.start - 6, y(value) + 4, of_y(value), "end")
        for value in x.ticks() if ticks[0] is None else ticks[0]:
            self.parts.append(f'<path class="frame" d="M{x(value):.1f} {y.start}V{y.end}"/>')
            # Half a label has 20 units: at the right edge it ends there.
            edge = x(value) > self.size[0] - 22
            self.text(self.size[0] - 3 if edge else x(value), y.start + 17, of_x(value), "end" if edge else "middle")
        if labels[0]:
            self.text((x.start + x.end) / 2, high - 4, labels[0], "middle")
        if labels[1]:
            self.text(8, y.end - 8, labels[1], "start")
        return self

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> None:
        """Words at a place of the drawing, not of the scales."""
        style = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str, title: str = "") -> None:
        places = [f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in points]
        self.parts.append(f'<path class="line {kind}" d="M{"L".join(places)}">{_title(title)}</path>')

    def dots(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Many small dots in one path: round or square by the style's line cap."""
        path = "".join(f"M{self.x(a):.1f} {self.y(b):.1f}h0" for a, b in points)
        self.parts.append(f'<path class="dots {kind}" d="{path}"/>')

    def mark(self, x: float, y: float, kind: str, title: str = "", radius: float = 4.5) -> None:
        at = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius:g}"'
        self.parts.append(f'<circle class="{kind}" {at}>{_title(title)}</circle>')

    def upright(self, x: float, low: float, high: float, kind: str, title: str = "") -> None:
        """A bar from one value to another, with ends."""
        a, top, foot = self.x(x), self.y(high), self.y(low)
        ends = f"M{a - 4:.1f} {top:.1f}h8M{a - 4:.1f} {foot:.1f}h8M{a:.1f} {top:.1f}V{foot:.1f}"
        self.parts.append(f'<path class="line {kind}" d="{ends}">{_title(title)}</path>')

    @property
    def svg(self) -> str:
        return picture(self.size, self.title, "".join(self.parts))


def picture(size: tuple[int, int], title: str, body: str, more: str = "") -> str:
    """An SVG of that many units that is as wide as its place; the title is what a screen reader says."""
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}"{more}>{body}</svg>'


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""
