"""Draw the report's pictures as inline SVG: numbers in, markup out.

`page` and its template call the functions that start with `draw_`. Colours are classes of page.css,
so that they follow light, dark and print. A strip is as wide as its table cell: its coordinates are
percentages, and nothing in it is stretched. A chart is drawn on CHART_WIDTH by CHART_HEIGHT units
and scales as a whole. Numbers and our own labels are the only text in a picture; `Markup.format`
escapes them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from postprocess.report.calibration import Bin
from postprocess.report.learning_curves import Curve, Series
from postprocess.report.metrics import Estimate

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
MAX_DECIMALS = 9
ROUNDING_ERROR = 1e-9  # a tick of 0.3 may be 0.30000000000000004
TIGHT_MARGIN = 0.04  # of the range, on either side of a tight scale
EDGE = 0.06  # of a strip, in which a centred number would stand out of the cell

MAX_CURVE_POINTS = 400
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
        """Write the ticks with as many decimals as tell them apart."""
        step = 1.0
        if len(self.ticks) > 1:
            step = self.ticks[1] - self.ticks[0]

        # Small learning rates have too many zeros.
        if 0 < step < 1e-3:
            return [scientific(tick) for tick in self.ticks]

        decimals = 0
        while decimals < MAX_DECIMALS and not self.ticks_have_decimals(decimals):
            decimals += 1
        return [f"{tick:,.{decimals}f}" for tick in self.ticks]

    def ticks_have_decimals(self, decimals: int) -> bool:
        """Return whether rounding to so many decimals changes no tick."""
        return all(abs(round(tick, decimals) - tick) < ROUNDING_ERROR for tick in self.ticks)


PROBABILITY_SCALE = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def scientific(value: float) -> str:
    """Write a small number short: 2.5e-5, 3e-5, 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    mantissa = mantissa.removesuffix(".0")
    return f"{mantissa}e{int(exponent)}"


def make_scale(values: Iterable[float], is_tight: bool = False) -> Scale:
    """Make a scale over all finite values, with about four ticks.

    Args:
        values: Everything that is drawn on the axis.
        is_tight: End a little beyond the values, not at the next tick.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        finite = [0.0, 1.0]
    low = min(finite)
    high = max(finite)

    # Equal values need a range too: half of the value on either side.
    if high - low < 1e-12:
        half_range = 0.5
        if low != 0:
            half_range = 0.5 * abs(low)
        low -= half_range
        high += half_range

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

    def draw(self) -> Markup:
        """Draw the grid, the ticks' numbers and the names of the axes."""
        # The numbers below the horizontal axis.
        parts = []
        number = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        for tick, label in zip(self.x.ticks, self.x.tick_labels(), strict=True):
            parts.append(number.format(self.place_x(tick), PLOT_BOTTOM + 16, label))

        # The numbers left of the vertical axis, each with its line of the grid.
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        number = Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>')
        for tick, label in zip(self.y.ticks, self.y.tick_labels(), strict=True):
            y = self.place_y(tick)
            parts.append(line.format(LEFT_MARGIN, PLOT_RIGHT, y, y))
            parts.append(number.format(LEFT_MARGIN - 6, y + 4, label))

        base_line = Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(base_line.format(LEFT_MARGIN, PLOT_RIGHT, PLOT_BOTTOM, PLOT_BOTTOM))

        # The names of both axes. The vertical one is turned: its x runs from the bottom to the top.
        x_name = Markup('<text class="name" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        x_middle = LEFT_MARGIN + PLOT_WIDTH / 2
        parts.append(x_name.format(x_middle, CHART_HEIGHT - 4, self.x_name))

        y_name = Markup(
            '<text class="name" x="{:.1f}" y="10" transform="rotate(-90)" text-anchor="middle">'
            "{}</text>"
        )
        y_middle = TOP_MARGIN + PLOT_HEIGHT / 2
        parts.append(y_name.format(-y_middle, self.y_name))
        return join(parts)

    def draw_diagonal(self) -> Markup:
        """Draw the line on which both axes are equal, up to 1."""
        low = max(self.x.low, self.y.low)
        line = Markup('<line class="reference" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
        return line.format(self.place_x(low), self.place_y(low), self.place_x(1), self.place_y(1))


def join(parts: Iterable[Markup]) -> Markup:
    """Join pieces of markup."""
    return Markup("").join(parts)


# Strips: pictures in a table's cells


def make_strip_scale(estimates: Iterable[Estimate | None]) -> Scale:
    """Make the scale that the strips of one column share."""
    values = []
    for estimate in estimates:
        if estimate is not None:
            values += [estimate.low, estimate.high, estimate.value]
    return make_scale(values, is_tight=True)


def draw_strip(estimate: Estimate, scale: Scale, reference: float | None = None) -> Markup:
    """Draw an estimate as a dot with its interval as a whisker.

    Args:
        estimate: What to draw. Its numbers stand beside the strip.
        scale: The column's scale.
        reference: Where a dashed line goes through the column.
    """
    # What is drawn later lies on top: grid, reference, whisker, dot.
    parts = [draw_strip_line(scale, tick, "grid") for tick in scale.ticks]
    if reference is not None:
        parts.append(draw_strip_line(scale, reference, "reference"))

    whisker = Markup('<line class="whisker" x1="{:.2f}%" x2="{:.2f}%" y1="10" y2="10"/>')
    low = 100 * scale.fraction(estimate.low)
    high = 100 * scale.fraction(estimate.high)
    parts.append(whisker.format(low, high))

    dot = Markup('<circle class="dot" cx="{:.2f}%" cy="10" r="4"/>')
    parts.append(dot.format(100 * scale.fraction(estimate.value)))

    strip = Markup('<svg class="strip" aria-hidden="true" height="20">{}</svg>')
    return strip.format(join(parts))


def draw_strip_line(scale: Scale, value: float, css_class: str) -> Markup:
    """Draw a vertical line through a strip."""
    x = 100 * scale.fraction(value)
    line = Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="20"/>')
    return line.format(css_class, x, x)


def draw_strip_axis(scale: Scale) -> Markup:
    """Draw the ticks' numbers, which stand above a column of strips."""
    parts = []
    number = Markup('<text x="{:.2f}%" y="12" text-anchor="{}">{}</text>')
    for tick, label in zip(scale.ticks, scale.tick_labels(), strict=True):
        fraction = scale.fraction(tick)
        anchor = "middle"
        if fraction < EDGE:
            anchor = "start"
        elif fraction > 1 - EDGE:
            anchor = "end"
        parts.append(number.format(100 * fraction, anchor, label))

    axis = Markup('<svg class="strip axis" aria-hidden="true" height="16">{}</svg>')
    return axis.format(join(parts))


def draw_share_bar(shares: Iterable[tuple[str, float]]) -> Markup:
    """Draw a row's probabilities side by side, each in the colour of its verdict."""
    parts = []
    box = Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" height="10"/>')
    start = 0.0
    # Each box begins where the one before it ends.
    for verdict, share in shares:
        parts.append(box.format(verdict, 100 * start, 100 * share))
        start += share

    bar = Markup('<svg class="shares" aria-hidden="true" height="10">{}</svg>')
    return bar.format(join(parts))


# Charts


def draw_chart(parts: Iterable[Markup], label: str) -> Markup:
    """Put a chart together; `label` says what it shows for those who cannot see it."""
    chart = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return chart.format(CHART_WIDTH, CHART_HEIGHT, label, join(parts))


def draw_reliability(bins: Sequence[Bin], lowest_confidence: float) -> Markup:
    """Draw a reliability diagram: confidence against accuracy.

    Each bin is a dot, its area by the number of rows, its whisker the interval of its accuracy. A
    calibrated model has its dots on the diagonal.

    Args:
        bins: The bins that have rows.
        lowest_confidence: Where the horizontal axis begins.
    """
    # A tick at every tenth, from the lowest confidence on.
    first_tenth = math.ceil(lowest_confidence * 10 - ROUNDING_ERROR)
    ticks = tuple(tenth / 10 for tenth in range(first_tenth, 11))
    confidence_scale = Scale(lowest_confidence, 1.0, ticks)
    axes = Axes(
        confidence_scale, PROBABILITY_SCALE, "probability of the verdict", "share that is right"
    )
    parts = [axes.draw(), axes.draw_diagonal()]

    whisker = Markup('<line class="whisker" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>')
    dot = Markup(
        '<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>'
    )
    most_rows = max(filled_bin.row_count for filled_bin in bins)
    for filled_bin in bins:
        accuracy = filled_bin.accuracy
        x = axes.place_x(filled_bin.confidence)
        parts.append(whisker.format(x, axes.place_y(accuracy.low), axes.place_y(accuracy.high)))

        # The root, since the eye compares areas. The numbers show when the mouse is over the dot.
        size = math.sqrt(filled_bin.row_count / most_rows)
        radius = SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * size
        numbers = (
            f"{filled_bin.row_count:,} rows: {filled_bin.confidence:.3f} sure, "
            f"{accuracy.value:.3f} right"
        )
        parts.append(dot.format(x, axes.place_y(accuracy.value), radius, numbers))

    label = f"Reliability diagram of {len(bins)} bins; the table beside it has its numbers"
    return draw_chart(parts, label)


@dataclass(frozen=True)
class ScatterRow:
    """A row of the data as a dot: two probabilities, and whether its colour stands out."""

    x: float
    y: float
    is_marked: bool


def draw_scatter(
    rows: Sequence[ScatterRow], axis_names: tuple[str, str], label: str, has_middle_lines: bool
) -> Markup:
    """Draw a dot a row on two axes from 0 to 1.

    Args:
        rows: The dots. Those that are marked lie on top.
        axis_names: Of the horizontal and the vertical axis.
        label: What the chart shows.
        has_middle_lines: Draw lines at one half, where the verdict changes if there are only two.
    """
    axes = Axes(PROBABILITY_SCALE, PROBABILITY_SCALE, *axis_names)
    parts = [axes.draw(), axes.draw_diagonal()]

    if has_middle_lines:
        vertical = Markup('<line class="grid strong" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
        parts.append(vertical.format(axes.place_x(0.5), TOP_MARGIN, PLOT_BOTTOM))
        horizontal = Markup(
            '<line class="grid strong" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        )
        parts.append(horizontal.format(LEFT_MARGIN, PLOT_RIGHT, axes.place_y(0.5)))

    # Two groups, so that the marked dots lie on top and a group has one class.
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
    plain_dots = []
    marked_dots = []
    for row in rows:
        dots = marked_dots if row.is_marked else plain_dots
        dots.append(dot.format(axes.place_x(row.x), axes.place_y(row.y)))

    parts.append(Markup('<g class="row">{}</g>').format(join(plain_dots)))
    parts.append(Markup('<g class="row marked">{}</g>').format(join(marked_dots)))
    return draw_chart(parts, label)


def draw_curves(all_series: Sequence[Series], axis_name: str, label: str) -> Markup:
    """Draw curves over the steps of the training.

    Args:
        all_series: The curves. Those of the validation have dots too, and so have single points.
        axis_name: Of the vertical axis.
        label: What the chart shows.
    """
    # All curves share the axes.
    steps = []
    values = []
    for series in all_series:
        for step, value in series.curve:
            steps.append(step)
            values.append(value)
    axes = Axes(make_step_scale(max(steps)), make_scale(values), "step", axis_name)
    parts = [axes.draw()]

    line = Markup('<polyline class="curve {}" points="{}"/>')
    dot = Markup(
        '<circle class="curve {}" cx="{:.1f}" cy="{:.1f}" r="3"><title>step {}: {:.4f}</title>'
        "</circle>"
    )
    for series in all_series:
        # The line has fewer points than a long training has steps.
        points = []
        for step, value in thin_out(series.curve):
            points.append(f"{axes.place_x(step):.1f},{axes.place_y(value):.1f}")
        parts.append(line.format(series.kind, " ".join(points)))

        # A line of one point cannot be seen, and validations are few: both get dots.
        if series.kind == "validation" or len(series.curve) == 1:
            for step, value in series.curve:
                x = axes.place_x(step)
                y = axes.place_y(value)
                parts.append(dot.format(series.kind, x, y, step, value))
    return draw_chart(parts, label)


def make_step_scale(last_step: int) -> Scale:
    """Make a scale from 0 to the last step that has whole numbers as ticks."""
    ticks = make_scale([0, last_step], is_tight=True).ticks
    whole_ticks = [tick for tick in ticks if tick == round(tick)]
    return Scale(0, last_step, tuple(tick for tick in whole_ticks if 0 <= tick <= last_step))


def thin_out(curve: Curve) -> Curve:
    """Reduce a curve to MAX_CURVE_POINTS at most: the means of stretches of equal length."""
    if len(curve) <= MAX_CURVE_POINTS:
        return curve

    stretch_length = math.ceil(len(curve) / MAX_CURVE_POINTS)
    points = []
    for start in range(0, len(curve), stretch_length):
        stretch = curve[start : start + stretch_length]
        mean_step = sum(step for step, _ in stretch) / len(stretch)
        mean_value = sum(value for _, value in stretch) / len(stretch)
        points.append((round(mean_step), mean_value))
    return points
