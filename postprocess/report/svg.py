"""Draw the report's pictures as inline SVG: numbers in, markup out.

`page` and its template call the functions that start with `draw_`. Colours are classes of page.css,
so that they follow light, dark and print. A strip is as wide as its table cell: its coordinates are
percentages, and nothing in it is stretched. A chart is drawn on CHART_WIDTH by CHART_HEIGHT units
and scales as a whole. Numbers and labels are the only text in a picture; labels are escaped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import nonsingular

from postprocess.agreement.statistics import Estimate
from postprocess.report.calibration import Calibration
from postprocess.report.learning_curves import LearningChart, thin_out

# A chart, and the margins around its axes.
CHART_WIDTH = 360
CHART_HEIGHT = 250
LEFT_MARGIN = 52
RIGHT_MARGIN = 12
TOP_MARGIN = 12
BOTTOM_MARGIN = 40
PLOT_WIDTH = CHART_WIDTH - LEFT_MARGIN - RIGHT_MARGIN
PLOT_HEIGHT = CHART_HEIGHT - TOP_MARGIN - BOTTOM_MARGIN
PLOT_RIGHT = CHART_WIDTH - RIGHT_MARGIN
PLOT_BOTTOM = CHART_HEIGHT - BOTTOM_MARGIN

# Ticks and scales.
ROUND_STEPS = [1, 2, 2.5, 5, 10]  # between two ticks, times a power of ten
TIGHT_MARGIN = 0.04  # of the range, on either side of a tight scale
EDGE = 0.06  # of a strip, in which a centred number would stand out of the cell

MAX_CURVE_POINTS = 400
MAX_DOTS = 600  # of a scatter plot
SMALLEST_DOT = 2.5  # radius in the reliability diagram
LARGEST_DOT = 7.5


# Scales and axes


@dataclass(frozen=True)
class Scale:
    """The range of an axis and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def fraction(self, value: float) -> float:
        """Return the position of a value between both ends, from 0 to 1, clipped at the ends."""
        fraction = (value - self.low) / (self.high - self.low)
        return min(max(fraction, 0), 1)

    def tick_labels(self) -> list[str]:
        """Write the ticks: 0.25, 1,000, 5e-05."""
        return [f"{tick:,g}" for tick in self.ticks]


PROBABILITY_SCALE = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def make_scale(values: Iterable[float], is_tight: bool = False) -> Scale:
    """Make a scale over all finite values, with about four ticks.

    A tight scale ends a little beyond the values, not at the next tick.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        finite = [0.0, 1.0]

    # Values that are equal but for rounding need a range too: half of the value on either side.
    low, high = nonsingular(min(finite), max(finite), expander=0.5, tiny=1e-12)

    # Matplotlib's ticks lie on round numbers and enclose the values.
    locator = MaxNLocator(nbins=4, steps=ROUND_STEPS)
    ticks = [float(tick) for tick in locator.tick_values(low, high)]
    if not is_tight:
        return Scale(ticks[0], ticks[-1], tuple(ticks))

    # A tight scale leaves out the ticks that are outside.
    margin = TIGHT_MARGIN * (high - low)
    low -= margin
    high += margin
    return Scale(low, high, tuple(tick for tick in ticks if low <= tick <= high))


@dataclass(frozen=True)
class Axes:
    """The axes of a chart: they place values in it."""

    x: Scale
    y: Scale
    x_name: str
    y_name: str

    def place_x(self, value: float) -> float:
        """Return where a value of the horizontal axis is, in units from the left."""
        return LEFT_MARGIN + PLOT_WIDTH * self.x.fraction(value)

    def place_y(self, value: float) -> float:
        """Return where a value of the vertical axis is, in units from the top."""
        return TOP_MARGIN + PLOT_HEIGHT * (1 - self.y.fraction(value))

    def draw(self) -> list[str]:
        """Draw the grid, the ticks' numbers and the names of the axes."""
        # The numbers below the horizontal axis.
        parts = []
        number_y = PLOT_BOTTOM + 16
        for tick, label in zip(self.x.ticks, self.x.tick_labels(), strict=True):
            x = self.place_x(tick)
            parts.append(f'<text x="{x:.1f}" y="{number_y}" text-anchor="middle">{label}</text>')

        # The numbers left of the vertical axis, each with its line of the grid.
        number_x = LEFT_MARGIN - 6
        for tick, label in zip(self.y.ticks, self.y.tick_labels(), strict=True):
            y = self.place_y(tick)
            parts.append(draw_line("grid", (LEFT_MARGIN, PLOT_RIGHT), (f"{y:.1f}", f"{y:.1f}")))
            parts.append(f'<text x="{number_x}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        parts.append(draw_line("base", (LEFT_MARGIN, PLOT_RIGHT), (PLOT_BOTTOM, PLOT_BOTTOM)))

        # The names of both axes. The vertical one is turned: its x runs from the bottom to the top.
        x_middle = LEFT_MARGIN + PLOT_WIDTH / 2
        y_middle = TOP_MARGIN + PLOT_HEIGHT / 2
        parts.append(
            f'<text class="name" x="{x_middle:.1f}" y="{CHART_HEIGHT - 4}" text-anchor="middle">'
            f"{escape(self.x_name)}</text>"
        )
        parts.append(
            f'<text class="name" x="{-y_middle:.1f}" y="10" transform="rotate(-90)" '
            f'text-anchor="middle">{escape(self.y_name)}</text>'
        )
        return parts

    def draw_diagonal(self) -> str:
        """Draw the line on which both axes are equal, up to 1."""
        low = max(self.x.low, self.y.low)
        return (
            f'<line class="reference" x1="{self.place_x(low):.1f}" y1="{self.place_y(low):.1f}" '
            f'x2="{self.place_x(1):.1f}" y2="{self.place_y(1):.1f}"/>'
        )


def draw_line(css_class: str, ends_x: tuple, ends_y: tuple) -> str:
    """Draw a line between two points, given their formatted coordinates."""
    x1, x2 = ends_x
    y1, y2 = ends_y
    return f'<line class="{css_class}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


# Strips: pictures in a table's cells


def draw_strip(estimate: Estimate, scale: Scale, reference: float | None = None) -> Markup:
    """Draw an estimate as a dot with its interval as a whisker, and a dashed reference line."""

    def place(value: float) -> str:
        return f"{100 * scale.fraction(value):.2f}%"

    # What is drawn later lies on top: grid, reference, whisker, dot.
    parts = []
    for tick in scale.ticks:
        parts.append(draw_line("grid", (place(tick), place(tick)), (0, 20)))
    if reference is not None:
        parts.append(draw_line("reference", (place(reference), place(reference)), (0, 20)))
    parts.append(draw_line("whisker", (place(estimate.low), place(estimate.high)), (10, 10)))
    parts.append(f'<circle class="dot" cx="{place(estimate.value)}" cy="10" r="4"/>')
    return Markup(f'<svg class="strip" aria-hidden="true" height="20">{"".join(parts)}</svg>')


def draw_strip_axis(scale: Scale) -> Markup:
    """Draw the ticks' numbers, which stand above a column of strips."""
    parts = []
    for tick, label in zip(scale.ticks, scale.tick_labels(), strict=True):
        fraction = scale.fraction(tick)
        anchor = "middle"
        if fraction < EDGE:
            anchor = "start"
        elif fraction > 1 - EDGE:
            anchor = "end"
        x = 100 * fraction
        parts.append(f'<text x="{x:.2f}%" y="12" text-anchor="{anchor}">{label}</text>')
    return Markup(f'<svg class="strip axis" aria-hidden="true" height="16">{"".join(parts)}</svg>')


def draw_share_bar(shares: Iterable[tuple[str, float]]) -> Markup:
    """Draw a row's probabilities side by side, each in the colour of its verdict."""
    parts = []
    start = 0.0
    # Each box begins where the one before it ends.
    for verdict, share in shares:
        x = f"{100 * start:.2f}%"
        parts.append(f'<rect class="{verdict}" x="{x}" width="{100 * share:.2f}%" height="10"/>')
        start += share
    return Markup(f'<svg class="shares" aria-hidden="true" height="10">{"".join(parts)}</svg>')


# Charts


def draw_chart(parts: Iterable[str], label: str) -> Markup:
    """Put a chart together; `label` says what it shows for those who cannot see it."""
    return Markup(
        f'<svg class="chart" viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def draw_reliability(calibration: Calibration) -> Markup:
    """Draw a reliability diagram: confidence against accuracy.

    Each bin is a dot, its area by the number of rows, its whisker the interval of its accuracy. A
    calibrated model has its dots on the diagonal.
    """
    # The axis of confidence begins at the lowest one possible, and has a tick at every tenth.
    bins = calibration.bins
    lowest_confidence = calibration.lowest_confidence
    first_tenth = math.ceil(round(lowest_confidence * 10, 6))  # 4, where the lowest is 1/3
    ticks = tuple(tenth / 10 for tenth in range(first_tenth, 11))
    confidence_scale = Scale(lowest_confidence, 1.0, ticks)
    axes = Axes(
        confidence_scale, PROBABILITY_SCALE, "probability of the verdict", "share that is right"
    )
    parts = [*axes.draw(), axes.draw_diagonal()]

    most_rows = max(filled_bin.row_count for filled_bin in bins)
    for filled_bin in bins:
        accuracy = filled_bin.accuracy
        x = f"{axes.place_x(filled_bin.confidence):.1f}"
        y = f"{axes.place_y(accuracy.value):.1f}"
        low_y = f"{axes.place_y(accuracy.low):.1f}"
        high_y = f"{axes.place_y(accuracy.high):.1f}"
        parts.append(draw_line("whisker", (x, x), (low_y, high_y)))

        # The radius grows with the root of the number of rows, since the eye compares areas. The numbers
        # appear while the mouse is over the dot.
        size = math.sqrt(filled_bin.row_count / most_rows)
        radius = SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * size
        numbers = (
            f"{filled_bin.row_count:,} rows: {filled_bin.confidence:.3f} sure, "
            f"{accuracy.value:.3f} right"
        )
        dot = f'<circle class="dot" cx="{x}" cy="{y}" r="{radius:.1f}">'
        parts.append(f"{dot}<title>{numbers}</title></circle>")

    label = f"Reliability diagram of {len(bins)} bins; the table beside it has its numbers"
    return draw_chart(parts, label)


def draw_scatter(
    x_r: np.ndarray,
    y_r: np.ndarray,
    is_marked_r: np.ndarray,
    axis_names: tuple[str, str],
    label: str,
    has_middle_lines: bool,
) -> Markup:
    """Draw a mark a row on two axes from 0 to 1: a dot, or a cross for the rows that stand out.

    Args:
        x_r: A probability of each row.
        y_r: The other one.
        is_marked_r: The rows that get a cross.
        axis_names: Of the horizontal and the vertical axis.
        label: What the chart shows.
        has_middle_lines: Draw lines at one half, where the verdict changes if there are only two.
    """
    axes = Axes(PROBABILITY_SCALE, PROBABILITY_SCALE, *axis_names)
    parts = [*axes.draw(), axes.draw_diagonal()]

    if has_middle_lines:
        x = f"{axes.place_x(0.5):.1f}"
        y = f"{axes.place_y(0.5):.1f}"
        parts.append(draw_line("grid strong", (x, x), (TOP_MARGIN, PLOT_BOTTOM)))
        parts.append(draw_line("grid strong", (LEFT_MARGIN, PLOT_RIGHT), (y, y)))

    # Thousands of dots would hide one another and make the page slow: evenly spaced rows.
    last_row = len(x_r) - 1
    rows = np.linspace(0, last_row, min(len(x_r), MAX_DOTS)).round().astype(int)

    # Two groups, so that the crosses lie on top and a group has one class.
    dots = []
    crosses = []
    for row in np.unique(rows):
        x = axes.place_x(x_r[row])
        y = axes.place_y(y_r[row])
        if is_marked_r[row]:
            crosses.append(f'<path d="M{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6"/>')
        else:
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')

    parts.append(f'<g class="row">{"".join(dots)}</g>')
    parts.append(f'<g class="row marked">{"".join(crosses)}</g>')
    return draw_chart(parts, label)


def draw_learning_chart(chart: LearningChart) -> Markup:
    """Draw curves over the steps of the training."""
    # All curves share the axes.
    steps = []
    values = []
    for series in chart.series:
        for step, value in series.curve:
            steps.append(step)
            values.append(value)
    last_step = max(steps)
    step_ticks = MaxNLocator(nbins=4, integer=True).tick_values(0, last_step)
    step_scale = Scale(0, last_step, tuple(tick for tick in step_ticks if tick <= last_step))
    axes = Axes(step_scale, make_scale(values), "step", chart.axis)
    parts = axes.draw()

    for series in chart.series:
        # The line has fewer points than a long training has steps.
        points = []
        for step, value in thin_out(series.curve, MAX_CURVE_POINTS):
            points.append(f"{axes.place_x(step):.1f},{axes.place_y(value):.1f}")
        parts.append(f'<polyline class="curve {series.kind}" points="{" ".join(points)}"/>')

        # A line of one point cannot be seen, and validations are few: both get dots.
        if series.kind == "validation" or len(series.curve) == 1:
            for step, value in series.curve:
                x = axes.place_x(step)
                y = axes.place_y(value)
                dot = f'<circle class="curve {series.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                parts.append(f"{dot}<title>step {step}: {value:.4f}</title></circle>")
    return draw_chart(parts, f"{chart.title} by step")
