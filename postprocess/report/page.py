"""Draw and render the page: a run and its measurements put into page.html.jinja.

This is the last of the report's three steps, after `run_data` and `results`. The page is one file:
page.css stands inside it. Everything is escaped but our own SVG and style. A content security policy
lets the page load nothing and run no script, whatever the texts in it say.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import polars as pl
from markupsafe import Markup, escape

from postprocess.agreement.statistics import Estimate
from postprocess.report import svg
from postprocess.report.learning_curves import make_learning_charts
from postprocess.report.metrics import ScoredRows, TableRow
from postprocess.report.position_bias import find_flips
from postprocess.report.results import Measurements
from postprocess.report.run_data import Agreement, RunData, training_record
from postprocess.report.worst_rows import show_controls
from preprocess.core.durations import format_duration

PAGE_FOLDER = Path(__file__).parent
LETTERS = {"model_a": "A", "model_b": "B", "tie": "tie"}
NO_NUMBER = "–"
MINUS = "−"
NO_BREAK_SPACE = "\u00a0"
HASH_DIGITS = 12  # of a commit or a SHA-256, enough to tell them apart


def render_page(run: RunData, measurements: Measurements) -> str:
    """Render the page of a run.

    Returns:
        The page as HTML. The same run gives the same page.
    """
    style = (PAGE_FOLDER / "page.css").read_text(encoding="utf-8")
    facts = [*model_facts(run), *row_facts(run), *training_facts(run)]
    template = make_environment().get_template("page.html.jinja")
    return template.render(
        run=run,
        missing=run.missing,
        facts=[(name, value) for name, value in facts if value],
        is_out_of_fold=run.predictions.is_out_of_fold,
        measured=measurements,
        learning_charts=make_learning_charts(run),
        letters=LETTERS,
        style=Markup(style),
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
    environment.filters.update(
        decimal=format_decimal,
        signed=format_signed,
        percent=format_percent,
        interval=format_interval,
        with_code=mark_code,
        show_controls=show_controls,
    )
    environment.globals.update(
        svg=svg,
        make_strip_scale=make_strip_scale,
        draw_orders=draw_orders,
        draw_agreement=draw_agreement,
    )
    return environment


# Facts of contract.json and metrics.json in the head of the page


def model_facts(run: RunData) -> list[tuple[str, str]]:
    """List facts about the model for the head of the page.

    Returns:
        A name and a text for each fact; the text is empty where the fact is not known.
    """
    contract = run.first_fold.contract
    record = training_record(contract)

    # Only a base model from the hub has a revision, the commit of its repository.
    base_model = contract.get("base_model", "")
    revision = contract.get("revision")
    if revision:
        base_model = f"{base_model} at {revision[:HASH_DIGITS]}"

    # The commits of this project that the folds were trained with. Each is shortened to 12 digits and keeps
    # its ending -dirty, which stands for changes that were not committed.
    commits = set()
    for fold in run.folds.values():
        commit = training_record(fold.contract).get("git_commit")
        if commit:
            commits.add(re.sub(r"^(\w{12})\w+", r"\1", commit))

    # 2026-11-25T09:43:39+00:00 becomes 2026-11-25 09:43:39 UTC.
    created = record.get("created", "").replace("T", " ").replace("+00:00", " UTC")

    return [
        ("recipe", record.get("recipe", "")),
        ("base model", base_model),
        ("git commit", ", ".join(sorted(commits))),
        ("trained", created),
        ("head", f"{contract.get('head')}, {len(run.verdicts)} verdicts"),
        ("tokens", f"{contract.get('budget_tokens'):,} a row"),
    ]


def row_facts(run: RunData) -> list[tuple[str, str]]:
    """List facts about the rows, a name and a text each: held-out folds, rows measured, rows trained on."""
    folds = set()
    training_rows = set()
    for fold in run.folds.values():
        if "fold" in fold.metrics:
            folds.add(str(fold.metrics["fold"]))
        if fold.metrics.get("training_rows"):
            training_rows.add(fold.metrics["training_rows"])

    # The fold of a run that was trained on all rows is "all".
    fold_label = "fold held out" if len(folds) == 1 else "folds"
    fold_text = ", ".join(sorted(folds, key=lambda fold: (len(fold), fold)))  # 10 comes after 9
    if folds == {"all"}:
        fold_text = "none"

    # The folds of a cross-validation differ a little in their numbers of rows.
    trained_on = ""
    if training_rows:
        trained_on = f"{min(training_rows):,}"
    if len(training_rows) > 1:
        trained_on = f"{trained_on} to {max(training_rows):,}"

    return [
        (fold_label, fold_text),
        ("rows measured", f"{len(run.predictions.rows):,}"),
        ("rows trained on", trained_on),
    ]


def training_facts(run: RunData) -> list[tuple[str, str]]:
    """List facts about the training, a name and a text each: steps, time of all folds, data, libraries."""
    metrics = run.first_fold.metrics
    steps = metrics.get("steps", 0)
    seconds = sum(fold.metrics.get("seconds_training", 0) for fold in run.folds.values())

    # A library that was not installed at the training is recorded as absent.
    versions = training_record(run.first_fold.contract).get("versions", {})
    installed = [f"{name} {version}" for name, version in versions.items() if version != "absent"]

    return [
        ("steps", f"{steps:,}" if steps else ""),
        ("training took", format_duration(seconds) if seconds > 0 else ""),
        ("pairs", metrics.get("pairs_sha256", "")[:HASH_DIGITS]),
        ("versions", ", ".join(installed)),
    ]


# Pictures


def make_strip_scale(table_rows: Sequence[TableRow], column: str) -> svg.Scale:
    """Make the scale that the strips of one column share."""
    values = []
    for table_row in table_rows:
        estimate = getattr(table_row, column)
        if estimate is not None:
            values += [estimate.low, estimate.high, estimate.value]
    return svg.make_scale(values, is_tight=True)


def draw_orders(scored: ScoredRows) -> Markup:
    """Draw P(A) of each row in the order as given and swapped; rows that flip stand out."""
    # Of the axes (rows, orders, verdicts), order 0 is the one as given and order 1 the swapped one.
    place_of_a = scored.verdicts.index("model_a")
    as_given_r = scored.probabilities_rov[:, 0, place_of_a]
    swapped_r = scored.probabilities_rov[:, 1, place_of_a]
    return svg.draw_scatter(
        as_given_r,
        swapped_r,
        find_flips(scored),
        axis_names=("P(A), order as given", "P(A), order swapped"),
        label="The probability of answer A in both orders, a dot a row",
        has_middle_lines=len(scored.verdicts) == 2,
    )


def draw_agreement(agreement: Agreement) -> Markup:
    """Draw P(A) of each row as trained and as packaged; rows whose verdict changed stand out."""
    # The packaged model is merged, quantised, or one of several quantised ones.
    packaged = agreement.report["packaged"]
    rows = agreement.rows

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
        trained_rv[:, 0],
        packaged_rv[:, 0],
        is_changed_r,
        axis_names=("P(A), trained", f"P(A), {packaged}"),
        label=f"The probability of answer A as trained and as {packaged}, a dot a row",
        has_middle_lines=len(verdicts) == 2,
    )


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
    """Write the interval of an estimate, or [low, high] of agreement.json, as [0.598, 0.712]."""
    if isinstance(interval, Estimate):
        interval = (interval.low, interval.high)
    low, high = interval or (None, None)
    low_text = format_decimal(low, decimals)
    high_text = format_decimal(high, decimals)
    return f"[{low_text},{NO_BREAK_SPACE}{high_text}]"


def mark_code(text: str) -> Markup:
    """Escape a text and mark as code what stands between backticks."""
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(marked)
