"""The report's pictures as inline SVG: numbers in, markup out, no text of the data in it.

Colours are the page's classes, so that they follow light, dark and print. A strip is as wide as its table cell: its
places are percentages, and nothing in it is stretched. A chart is drawn on WIDE by HIGH units and scales.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from postprocess.report.metrics import Bin, Figure

WIDE, HIGH = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
MOST_POINTS = 400  # of a curve


@dataclass(frozen=True)
class Scale:
    """The range of an axis and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where a value is between both ends, from 0 to 1."""
        return min(max((value - self.low) / (self.high - self.low), 0), 1)

    def texts(self) -> list[str]:
        """The ticks in words, with as many decimals as tell them apart."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1
        if 0 < step < 1e-3:
            return [f"{tick:.1e}".replace("e-0", "e-").replace(".0e", "e") if tick else "0" for tick in self.ticks]
        places = next((n for n in range(9) if all(abs(round(tick, n) - tick) < 1e-9 for tick in self.ticks)), 9)
        return [f"{tick:,.{places}f}" for tick in self.ticks]


def scale(values: Iterable[float], ticks: int = 4, tight: bool = False) -> Scale:
    """A scale over all finite values, ending at ticks; with `tight`, at the values, by a little margin."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    found = [float(tick) for tick in MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    if not tight:
        return Scale(found[0], found[-1], tuple(found))
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    return Scale(low, high, tuple(tick for tick in found if low <= tick <= high))


def strip_scale(figures: Iterable[Figure | None]) -> Scale:
    """The scale that the strips of one column share."""
    return scale((value for one in figures if one for value in (one.low, one.high, one.value)), tight=True)


def strip(one: Figure, on: Scale, reference: float | None = None) -> Markup:
    """A dot with its whisker, and a line at `reference`; the numbers stand beside it."""
    parts = [line_at(on, tick, "grid") for tick in on.ticks]
    if reference is not None:
        parts.append(line_at(on, reference, "reference"))
    low, high, at = (100 * on.share(value) for value in (one.low, one.high, one.value))
    parts.append(Markup('<line class="whisker" x1="{:.2f}%" x2="{:.2f}%" y1="10" y2="10"/>').format(low, high))
    parts.append(Markup('<circle class="dot" cx="{:.2f}%" cy="10" r="4"/>').format(at))
    return Markup('<svg class="strip" aria-hidden="true" height="20">{}</svg>').format(Markup("").join(parts))


def line_at(on: Scale, value: float, kind: str) -> Markup:
    """A vertical line of a strip."""
    at = 100 * on.share(value)
    return Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="20"/>').format(kind, at, at)


def strip_axis(on: Scale) -> Markup:
    """The ticks' numbers, above a column of strips."""
    parts = []
    for tick, text in zip(on.ticks, on.texts(), strict=True):
        at = on.share(tick)
        anchor = "start" if at < 0.06 else "end" if at > 0.94 else "middle"
        parts.append(Markup('<text x="{:.2f}%" y="12" text-anchor="{}">{}</text>').format(100 * at, anchor, text))
    return Markup('<svg class="strip axis" aria-hidden="true" height="16">{}</svg>').format(Markup("").join(parts))


def share_bar(parts: Iterable[tuple[str, float]]) -> Markup:
    """A row's probabilities side by side, each with its class; the numbers stand beside it."""
    drawn, at = [], 0.0
    for name, value in parts:
        box = '<rect class="{}" x="{:.2f}%" width="{:.2f}%" height="10"/>'
        drawn.append(Markup(box).format(name, 100 * at, 100 * value))
        at += value
    return Markup('<svg class="shares" aria-hidden="true" height="10">{}</svg>').format(Markup("").join(drawn))


Place = Callable[[float], float]


def frame(x: Scale, y: Scale, x_name: str, y_name: str) -> tuple[Markup, Place, Place]:
    """A chart's grid, numbers and names of axes; and where a value is, along and up."""
    across, up = WIDE - LEFT - RIGHT, HIGH - TOP - BOTTOM

    def along(value: float) -> float:
        return LEFT + across * x.share(value)

    def height(value: float) -> float:
        return TOP + up * (1 - y.share(value))

    parts = []
    for tick, text in zip(x.ticks, x.texts(), strict=True):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(along(tick), HIGH - BOTTOM + 16, text)
        )
    for tick, text in zip(y.ticks, y.texts(), strict=True):
        at = height(tick)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDE - RIGHT, at, at))
        parts.append(Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, at + 4, text))
    base = HIGH - BOTTOM
    parts.append(Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDE - RIGHT, base, base))
    middle = Markup('<text class="name" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    parts.append(middle.format(LEFT + across / 2, HIGH - 4, x_name))
    turned = Markup('<text class="name" x="{:.1f}" y="10" transform="rotate(-90)" text-anchor="middle">{}</text>')
    parts.append(turned.format(-(TOP + up / 2), y_name))
    return Markup("").join(parts), along, height


def chart(parts: Iterable[Markup], label: str) -> Markup:
    """A whole picture, with what it shows for those who cannot see it."""
    inside = Markup("").join(parts)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDE, HIGH, label, inside
    )


def diagonal(along: Place, height: Place, low: float) -> Markup:
    """The line on which both axes are equal."""
    line = '<line class="reference" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    return Markup(line).format(along(low), height(low), along(1), height(1))


def reliability(bins: Sequence[Bin], lowest: float) -> Markup:
    """Confidence against accuracy: a dot a bin, its area by rows, its whisker the interval; the diagonal is as it should be."""
    x = Scale(lowest, 1.0, tuple(tick / 10 for tick in range(math.ceil(lowest * 10 - 1e-9), 11)))
    y = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    grid, along, height = frame(x, y, "probability of the verdict", "share that is right")
    most = max(one.rows for one in bins)
    parts = [grid, diagonal(along, height, lowest)]
    for one in bins:
        at, told = along(one.confidence), f"{one.rows:,} rows: {one.confidence:.3f} sure, {one.accuracy.value:.3f} right"
        low, high, middle = (height(value) for value in (one.accuracy.low, one.accuracy.high, one.accuracy.value))
        parts.append(
            Markup('<line class="whisker" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(at, low, high)
        )
        dot = '<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>'
        parts.append(Markup(dot).format(at, middle, 2.5 + 5 * math.sqrt(one.rows / most), told))
    return chart(parts, f"Reliability diagram of {len(bins)} bins; the table beside it has its numbers")


def scatter(
    x_r: Sequence[float], y_r: Sequence[float], marked_r: Sequence[bool], names: tuple[str, str], label: str, middle: bool
) -> Markup:
    """A dot a row on two axes from 0 to 1, those that are marked in another colour; with `middle`, lines at one half."""
    axis = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    grid, along, height = frame(axis, axis, *names)
    parts = [grid, diagonal(along, height, 0.0)]
    if middle:
        across = '<line class="grid strong" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
        parts.append(Markup(across).format(along(0.5), TOP, HIGH - BOTTOM))
        up = '<line class="grid strong" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        parts.append(Markup(up).format(LEFT, WIDE - RIGHT, height(0.5)))
    for wanted, name in ((False, "row"), (True, "row marked")):
        dots = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
        chosen = [(x, y) for x, y, marked in zip(x_r, y_r, marked_r, strict=True) if bool(marked) == wanted]
        drawn = Markup("").join(dots.format(along(x), height(y)) for x, y in chosen)
        parts.append(Markup('<g class="{}">{}</g>').format(name, drawn))
    return chart(parts, label)


Curve = Sequence[tuple[int, float]]


def curves(series: Sequence[tuple[str, Curve]], name: str, label: str) -> Markup:
    """Lines over steps, each with its class (`training`, `validation`); a short one has dots too."""
    points = [point for _, curve in series for point in curve]
    steps = [step for step, _ in points]
    x = scale([0, *steps], tight=True)
    x = Scale(0, max(steps), tuple(tick for tick in x.ticks if 0 <= tick <= max(steps) and tick == round(tick)))
    grid, along, height = frame(x, scale(value for _, value in points), "step", name)
    parts = [grid]
    for kind, curve in series:
        drawn = " ".join(f"{along(step):.1f},{height(value):.1f}" for step, value in thinned(curve))
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(kind, drawn))
        if kind == "validation" or len(curve) == 1:
            dot = Markup('<circle class="curve {}" cx="{:.1f}" cy="{:.1f}" r="3"><title>step {}: {:.4f}</title></circle>')
            parts += [dot.format(kind, along(step), height(value), step, value) for step, value in curve]
    return chart(parts, label)


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points: the means of as many stretches of equal length."""
    if len(curve) <= MOST_POINTS:
        return curve
    size = math.ceil(len(curve) / MOST_POINTS)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(round(sum(step for step, _ in part) / len(part)), sum(value for _, value in part) / len(part)) for part in parts]
