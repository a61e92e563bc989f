"""Draw and render the page: the results of a run put into page.html.jinja.

This is the last of the report's three steps, after `run_data` and `results`. The page is one file:
page.css and page.js stand inside it. Everything is escaped but our own SVG, style and script. A
content security policy lets the page load nothing and run no script but page.js, whatever the
texts in it say.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup, escape

from postprocess.report import svg
from postprocess.report.head_facts import collect_facts
from postprocess.report.learning_curves import LearningChart
from postprocess.report.metrics import Estimate, ScoredRows, TableRow
from postprocess.report.position_bias import find_flips
from postprocess.report.results import Results
from postprocess.report.run_data import Agreement, RunData
from postprocess.report.worst_rows import show_controls

PAGE_FOLDER = Path(__file__).parent
MAX_DOTS = 600  # of a scatter plot, evenly spaced among the rows
LETTERS = {"model_a": "A", "model_b": "B", "tie": "tie"}
NO_NUMBER = "–"
MINUS = "−"
NO_BREAK_SPACE = "\u00a0"


def render_page(run: RunData, results: Results) -> str:
    """Render the page of a run.

    Args:
        run: The run's files, for the head of the page and for what is missing.
        results: The numbers, of which this function draws the pictures.

    Returns:
        The page as HTML. The same run gives the same page.
    """
    # The policy names the script by its hash, so that no other script runs.
    style = (PAGE_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (PAGE_FOLDER / "page.js").read_text(encoding="utf-8")
    script_hash = hashlib.sha256(script.encode()).digest()

    template = make_environment().get_template("page.html.jinja")
    return template.render(
        run=run,
        missing=run.missing,
        facts=collect_facts(run),
        is_out_of_fold=run.predictions is not None and run.predictions.is_out_of_fold,
        measured=results.measurements,
        learning_charts=results.learning_charts,
        agreement=run.agreement.report if run.agreement else None,
        pictures=draw_pictures(run, results),
        letters=LETTERS,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(script_hash).decode(),
    )


def make_environment() -> jinja2.Environment:
    """Make the template's environment: escaping, the filters, and the functions that draw."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not an empty text
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["decimal"] = format_decimal
    environment.filters["signed"] = format_signed
    environment.filters["percent"] = format_percent
    environment.filters["interval"] = format_interval
    environment.filters["with_code"] = mark_code
    environment.filters["show_controls"] = show_controls
    environment.globals["draw_table"] = draw_table
    environment.globals["draw_share_bar"] = svg.draw_share_bar
    environment.globals["draw_learning_chart"] = draw_learning_chart
    return environment


# Pictures


def draw_pictures(run: RunData, results: Results) -> dict[str, Markup | None]:
    """Draw the pictures that a page has once: reliability, orders, agreement; None for none."""
    pictures: dict[str, Markup | None] = {"reliability": None, "orders": None, "agreement": None}

    measurements = results.measurements
    if measurements is not None:
        calibration = measurements.calibration
        if calibration is not None:
            pictures["reliability"] = svg.draw_reliability(
                calibration.bins, calibration.lowest_confidence
            )
        if measurements.position_bias is not None:
            pictures["orders"] = draw_orders(measurements.scored)

    if run.agreement is not None:
        pictures["agreement"] = draw_agreement(run.agreement)
    return pictures


@dataclass(frozen=True)
class TablePictures:
    """The pictures of a table with the columns accuracy and log_loss.

    Attributes:
        axes: The axis of each column, by its name.
        strips: For each table row, the strip by the column's name; None where there is no number.
    """

    axes: dict[str, Markup]
    strips: list[dict[str, Markup | None]]


def draw_table(table_rows: Sequence[TableRow], reference: TableRow) -> TablePictures:
    """Draw the pictures of a table.

    Args:
        table_rows: The rows of the table.
        reference: The model on all data; a dashed line marks it in every strip.
    """
    axes = {}
    strips: list[dict[str, Markup | None]] = [{} for _ in table_rows]
    for column in ("accuracy", "log_loss"):
        estimates = [getattr(table_row, column) for table_row in table_rows]
        reference_estimate = getattr(reference, column)
        reference_value = reference_estimate.value if reference_estimate else None

        # The rows share a column's scale.
        scale = svg.make_strip_scale([*estimates, reference_estimate])
        axes[column] = svg.draw_strip_axis(scale)
        for row_strips, estimate in zip(strips, estimates, strict=True):
            row_strips[column] = None
            if estimate is not None:
                row_strips[column] = svg.draw_strip(estimate, scale, reference_value)
    return TablePictures(axes, strips)


def draw_learning_chart(chart: LearningChart) -> Markup:
    """Draw a chart over the steps of the training."""
    return svg.draw_curves(chart.series, chart.axis, f"{chart.title} by step")


def draw_orders(scored: ScoredRows) -> Markup:
    """Draw P(A) of each row in the order as given and swapped; rows that flip stand out."""
    place_of_a = scored.verdicts.index("model_a")
    as_given_r = scored.probabilities_rov[:, 0, place_of_a]
    swapped_r = scored.probabilities_rov[:, 1, place_of_a]
    return svg.draw_scatter(
        choose_dots(as_given_r, swapped_r, find_flips(scored)),
        axis_names=("P(A), order as given", "P(A), order swapped"),
        label="The probability of answer A in both orders, a dot a row",
        has_middle_lines=len(scored.verdicts) == 2,
    )


def draw_agreement(agreement: Agreement) -> Markup | None:
    """Draw P(A) of each row as trained and as packaged; rows whose verdict changed stand out.

    Returns:
        The chart, or None if agreement.parquet is missing or does not have both models.
    """
    # The packaged model is merged, quantised, or one of several quantised ones.
    packaged = agreement.report.get("packaged")
    rows = agreement.rows
    if rows is None:
        return None
    if not {"trained_p_model_a", f"{packaged}_p_model_a"} <= set(rows.columns):
        return None

    # Each pair has two rows, one for each order: compare their means.
    verdicts = [verdict for verdict in LETTERS if f"trained_p_{verdict}" in rows.columns]
    trained_columns = [f"trained_p_{verdict}" for verdict in verdicts]
    packaged_columns = [f"{packaged}_p_{verdict}" for verdict in verdicts]
    columns = pl.col(trained_columns + packaged_columns)
    means = rows.group_by("id", maintain_order=True).agg(columns.mean())
    trained_rv = means.select(trained_columns).to_numpy()
    packaged_rv = means.select(packaged_columns).to_numpy()

    is_changed_r = trained_rv.argmax(axis=1) != packaged_rv.argmax(axis=1)
    return svg.draw_scatter(
        choose_dots(trained_rv[:, 0], packaged_rv[:, 0], is_changed_r),
        axis_names=("P(A), trained", f"P(A), {packaged}"),
        label=f"The probability of answer A as trained and as {packaged}, a dot a row",
        has_middle_lines=len(verdicts) == 2,
    )


def choose_dots(x_r: np.ndarray, y_r: np.ndarray, is_marked_r: np.ndarray) -> list[svg.ScatterRow]:
    """Choose at most MAX_DOTS rows for a scatter plot, evenly spaced, the same every time."""
    # Thousands of dots would hide one another and make the page slow.
    row_count = len(x_r)
    places = np.linspace(0, row_count - 1, min(row_count, MAX_DOTS)).round().astype(int)
    return [svg.ScatterRow(x_r[row], y_r[row], is_marked_r[row]) for row in np.unique(places)]


# Numbers and text


def format_decimal(value: float | None, decimals: int = 3) -> str:
    """Write a number, or a dash if there is none: 0.598."""
    if value is None or not math.isfinite(value):
        return NO_NUMBER
    return f"{value:.{decimals}f}".replace("-", MINUS)


def format_signed(value: float | None, decimals: int = 3) -> str:
    """Write a difference with its sign: +0.012, −0.012."""
    if value is None:
        return NO_NUMBER
    # A small negative number rounds to -0.0, and adding zero makes 0.0 of it.
    rounded = round(value, decimals) + 0.0
    return f"{rounded:+.{decimals}f}".replace("-", MINUS)


def format_percent(share: float | None, decimals: int = 1) -> str:
    """Write a share as 61.8 %, with a space that does not break."""
    if share is None:
        return NO_NUMBER
    return f"{100 * share:.{decimals}f}{NO_BREAK_SPACE}%"


def format_interval(interval: Estimate | Sequence[float] | None, decimals: int = 3) -> str:
    """Write an interval as [0.598, 0.712].

    Args:
        interval: An estimate with its interval, or [low, high] as in agreement.json.
        decimals: Of both ends.
    """
    if interval is None:
        low = None
        high = None
    elif isinstance(interval, Estimate):
        low = interval.low
        high = interval.high
    else:
        low, high = interval
    low_text = format_decimal(low, decimals)
    high_text = format_decimal(high, decimals)
    return f"[{low_text},{NO_BREAK_SPACE}{high_text}]"


def mark_code(text: str) -> Markup:
    """Escape a text and mark as code what stands between backticks."""
    parts = []
    is_code = False
    for part in text.split("`"):
        if is_code:
            parts.append(Markup("<code>{}</code>").format(part))
        else:
            parts.append(escape(part))
        is_code = not is_code
    return Markup("").join(parts)
