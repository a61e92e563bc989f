"""A comparison as what the user looks at: the printed table, and the probabilities of every row as a table on disk."""

import math
from collections.abc import Mapping, Sequence

import polars as pl

from postprocess.agreement.comparison import find_nearest
from postprocess.agreement.conditions import HOLDS
from postprocess.agreement.statistics import FEW_GROUPS, Column
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking.metrics import ORDERS

# The heading of the printed table, whose columns describe_model fills.
HEAD = (
    f"  {'model':<12} {'precision':<10} {'accuracy':>18} {'log loss':>21} {'largest diff':>12} "
    f"{'mean diff':>9} {'KL':>9}  verdicts changed"
)


def probability_table(
    rows: pl.DataFrame, columns: Sequence[Column], verdicts: Sequence[str]
) -> pl.DataFrame:
    """Make the table of all probabilities: two rows a pair, one for each order, sorted by id.

    Returns:
        id, fold, winner, order, and for each model one column a verdict, such as trained_p_model_a. In
        both orders, model_a stands for the response that the pairs file calls response_a.
    """
    # The table has the verdicts in the order that users know. The arrays have them in the contract's.
    shown_verdicts = [verdict for verdict in VERDICTS if verdict in verdicts]
    tables = []
    for order_index, order in enumerate(ORDERS):
        table = rows.select("id", "fold", "winner").with_columns(pl.lit(order).alias("order"))
        for column in columns:
            for verdict in shown_verdicts:
                verdict_index = verdicts.index(verdict)
                probabilities_r = column.probabilities_rov[:, order_index, verdict_index]
                name = f"{column.name}_p_{verdict}"
                table = table.with_columns(pl.Series(name, probabilities_r))
        tables.append(table)
    return pl.concat(tables).sort("id", "order")


def table_lines(report: dict) -> list[str]:
    """Write the comparison as lines for the terminal, from the content of agreement.json.

    A heading and a line for each model come first. Then follow which model is packaged, what that costs,
    which conditions hold, and what to know before reading the numbers.
    """
    groups = f"{report['groups']} group" if report["groups"] == 1 else f"{report['groups']} groups"
    lines = [
        f"  {report['rows']} validation rows in both orders; differences and KL (nats) are from the "
        "model as trained",
        f"  brackets: 95 % of {report['resamples']:,} resamples of the {groups} of prompts",
        HEAD,
    ]
    for model in report["models"]:
        lines.append(describe_model(model))

    lines += describe_candidates(report["packaged"], report["candidates"])
    lines.append(describe_cost(report))
    if "repeats" in report:
        lines.append(describe_repeats(report["repeats"]))
    lines += describe_conditions(report["conditions"])
    lines += list_caveats(report)
    return lines


def describe_model(model: dict) -> str:
    """Write one model's line, in the columns of HEAD."""
    against = model["against_trained"]
    accuracy = with_interval(model["accuracy"], model["accuracy_interval"])
    log_loss = with_interval(model["log_loss"], model["log_loss_interval"])
    return (
        f"  {model['model']:<12} {model['precision']:<10} {accuracy:>18} {log_loss:>21} "
        f"{against['largest']:12.5f} {against['mean']:9.5f} {against['kl_divergence']:9.6f}  "
        f"{against['verdicts_changed']:16d}"
    )


def with_interval(value: float, interval: Sequence[float]) -> str:
    """Write a value with its interval, as in 0.840 [0.81, 0.87]."""
    low, high = interval
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def describe_candidates(packaged: str, mean_differences: Mapping[str, float]) -> list[str]:
    """Say which of several candidates is packaged, and which was the next best; nothing where there is one."""
    other_differences = dict(mean_differences)
    packaged_difference = other_differences.pop(packaged)
    if not other_differences:
        return []

    # How much nearer the packaged one is tells how sure the choice was.
    next_best = find_nearest(other_differences)
    return [
        f"  packaged: {packaged}, {packaged_difference:.5f} from the model as trained on average "
        f"(next best {next_best}: {other_differences[next_best]:.5f})"
    ]


def describe_cost(report: dict) -> str:
    """Say what packaging costs, on the same rows."""
    parts = []
    for metric, cost in report["packaged_minus_trained"].items():
        low, high = cost["interval"]
        metric_words = metric.replace("_", " ")
        parts.append(f"{metric_words} {signed(cost['difference'])} [{signed(low)}, {signed(high)}]")
    return f"  {report['packaged']} less trained, row by row: {', '.join(parts)}"


def signed(value: float) -> str:
    """Write +0.0012, without a minus before a zero."""
    # Adding 0.0 turns a negative zero into a positive one.
    return f"{round(value, 4) + 0.0:+.4f}"


def describe_repeats(repeats: dict) -> str:
    """Say how far quantising again, with another seed, moves the figures."""
    mean_differences = describe_spread(repeats["mean_difference"], decimals=5)
    accuracies = describe_spread(repeats["accuracy"], decimals=4)
    count = len(repeats["models"])
    return f"  quantised {count} times: mean difference {mean_differences}; accuracy {accuracies}"


def describe_spread(spread: Mapping[str, float], decimals: int) -> str:
    """Write the least and the largest of several values and their standard deviation (sd)."""
    low = f"{spread['min']:.{decimals}f}"
    high = f"{spread['max']:.{decimals}f}"
    return f"{low} to {high}, sd {spread['standard_deviation']:.{decimals}f}"


def describe_conditions(conditions: Sequence[dict]) -> list[str]:
    """Say how many conditions hold, and of each that does not, what was measured."""
    lines = []
    for condition in conditions:
        if condition["verdict"] == HOLDS:
            continue

        # Where the upper end of an interval decides, it is shown too.
        figure = f"{condition['value']:.4f}"
        if condition["high"] is not None:
            figure = f"{figure}, at most {condition['high']:.4f}"
        lines.append(
            f"  {condition['verdict']}: {condition['name']}: {figure}, bound {condition['bound']:g}"
        )

    held_count = len(conditions) - len(lines)
    return [f"  {held_count} of {len(conditions)} conditions hold", *lines]


def list_caveats(report: dict) -> list[str]:
    """List what a reader of the table must know, a line each."""
    lines = []
    precisions = {model["model"]: model["precision"] for model in report["models"]}
    if "recorded" not in precisions:
        lines.append(
            "  no record of training to compare with: this is a mean of runs, which was not trained itself"
        )

    if report.get("rows_were_trained_on"):
        lines.append(
            "  the model was trained on these rows: accuracy and log loss are no estimate for other rows, "
            "but the differences between models are"
        )
    if report["groups"] < FEW_GROUPS:
        lines.append(
            f"  fewer than {FEW_GROUPS} groups of prompts: the brackets are narrower than they should be"
        )

    # At least one of these two models is there, and both compute in the same precision.
    precision = precisions.get("merged", precisions.get("unmerged"))
    if precision == "float32":
        lines.append(
            "  no GPU here: float16 weights with float32 activations; the kernel computes in float16"
        )
    return lines


def without_nan(value: object) -> object:
    """Replace every NaN and infinity by None, as JSON has no word for them."""
    if isinstance(value, dict):
        return {key: without_nan(element) for key, element in value.items()}
    if isinstance(value, list):
        return [without_nan(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
