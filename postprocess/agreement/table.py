"""A comparison as what the user looks at: the printed table, and the probabilities of every row as a table on disk."""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from postprocess.agreement.conditions import HOLDS
from postprocess.agreement.statistics import Column
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking.metrics import ORDERS

FEW_GROUPS = 20
HEAD = (
    f"  {'model':<12} {'precision':<10} {'accuracy':>18} {'log loss':>21} {'largest diff':>12} "
    f"{'mean diff':>9} {'KL':>9}  verdicts changed"
)


def probability_table(
    rows: pl.DataFrame, columns: Sequence[Column], verdicts: Sequence[str]
) -> pl.DataFrame:
    """Make the table of all probabilities: two rows a pair, one for each order, sorted by id.

    Args:
        rows: The pairs, as `validation_rows` gives them.
        columns: The models' probabilities of them.
        verdicts: The verdicts in the columns' order.

    Returns:
        id, fold, winner, order, and for each column its p_model_a, p_model_b[, p_tie]. In both orders
        p_model_a is the probability of the answer that the pairs file calls response_a.
    """
    parts = []
    for place, order in enumerate(ORDERS):
        probabilities = {}
        for column in columns:
            for verdict in VERDICTS:
                if verdict in verdicts:
                    values_r = column.probabilities_rov[:, place, verdicts.index(verdict)]
                    probabilities[f"{column.name}_p_{verdict}"] = values_r

        part = rows.select("id", "fold", "winner").with_columns(pl.lit(order).alias("order"))
        parts.append(part.hstack(pl.DataFrame(probabilities)))
    return pl.concat(parts).sort("id", "order")


def groups_of(rows: pl.DataFrame) -> np.ndarray:
    """Give the number of each row's group of prompts, (rows,); a row without one is a group of its own."""
    if "group" not in rows.columns:
        return np.arange(len(rows))
    group = pl.col("group")
    id_as_group = pl.concat_str(pl.lit("row "), "id")
    number_as_group = pl.concat_str(pl.lit("group "), group.cast(pl.String))
    name = pl.when(group.is_null()).then(id_as_group).otherwise(number_as_group)
    return rows.select(name.rank("dense")).to_series().to_numpy()


def table_lines(report: dict) -> list[str]:
    """Write the report as lines: one a model, then what was chosen, what decided, and what to know of it."""
    groups = report["groups"]
    lines = [
        f"  {report['rows']} validation rows in both orders; differences and KL (nats) are from the "
        "model as trained",
        f"  brackets: 95 % of {report['resamples']:,} resamples of the {groups} "
        f"group{'s' * (groups != 1)} of prompts",
        HEAD,
    ]
    for model in report["models"]:
        lines.append(describe_model(model))
    lines += describe_candidates(report)
    lines.append(describe_cost(report))
    lines += describe_repeats(report)
    lines += describe_conditions(report["conditions"])
    return lines + list_caveats(report)


def describe_model(model: dict) -> str:
    """Write one model's line."""
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
    return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def describe_candidates(report: dict) -> list[str]:
    """Say which of several candidates is packaged, and the next best."""
    packaged = report["packaged"]
    means = report["candidates"]
    other_means = {name: mean for name, mean in means.items() if name != packaged}
    if not other_means:
        return []

    # A model that gave a NaN is the last.
    finite_means = {name: mean for name, mean in other_means.items() if math.isfinite(mean)}
    next_best = min(finite_means or other_means, key=other_means.get)
    return [
        f"  packaged: {packaged}, {means[packaged]:.5f} from the model as trained on average "
        f"(next best {next_best}: {other_means[next_best]:.5f})"
    ]


def describe_cost(report: dict) -> str:
    """Say what packaging costs, on the same rows."""
    parts = []
    for metric, cost in report["packaged_minus_trained"].items():
        low, high = cost["interval"]
        name = metric.replace("_", " ")
        parts.append(f"{name} {signed(cost['difference'])} [{signed(low)}, {signed(high)}]")
    return f"  {report['packaged']} less trained, row by row: {', '.join(parts)}"


def signed(value: float) -> str:
    """Write +0.0012, without a minus before a zero."""
    return f"{round(value, 4) + 0.0:+.4f}"


def describe_repeats(report: dict) -> list[str]:
    """Say how far quantising again, with another seed, moves the figures; sd: standard deviation."""
    if "repeats" not in report:
        return []

    repeats = report["repeats"]
    parts = []
    for metric, places in (("mean_difference", 5), ("accuracy", 4)):
        low = f"{repeats[metric]['min']:.{places}f}"
        high = f"{repeats[metric]['max']:.{places}f}"
        deviation = f"{repeats[metric]['standard_deviation']:.{places}f}"
        parts.append(f"{metric.replace('_', ' ')} {low} to {high}, sd {deviation}")
    return [f"  quantised {len(repeats['models'])} times: {'; '.join(parts)}"]


def describe_conditions(conditions: Sequence[dict]) -> list[str]:
    """Say how many conditions hold, and of each other one what was measured."""
    lines = []
    for condition in conditions:
        if condition["verdict"] == HOLDS:
            continue
        upper_end = ""
        if condition["high"] is not None:
            upper_end = f", at most {condition['high']:.4f}"
        lines.append(
            f"  {condition['verdict']}: {condition['name']}: {condition['value']:.4f}{upper_end}, "
            f"bound {condition['bound']:g}"
        )

    held_count = len(conditions) - len(lines)
    return [f"  {held_count} of {len(conditions)} conditions hold", *lines]


def list_caveats(report: dict) -> list[str]:
    """List what a reader of the table must know."""
    lines = []
    model_names = [model["model"] for model in report["models"]]
    if "recorded" not in model_names:
        lines.append("  no record: a mean of runs was not trained as such")
    if report.get("rows_were_trained_on"):
        lines.append(
            "  the model was trained on these rows: accuracy and log loss say nothing of others, the "
            "differences do"
        )
    if report["groups"] < FEW_GROUPS:
        lines.append(
            f"  fewer than {FEW_GROUPS} groups of prompts: the brackets are narrower than they should be"
        )
    for model in report["models"]:
        if model["model"] in ("merged", "unmerged") and model["precision"] == "float32":
            lines.append(
                "  no GPU here: float16 weights with float32 activations; the kernel computes in float16"
            )
            break
    return lines


def without_nan(value: object) -> object:
    """Replace every number that JSON has no word for by None."""
    if isinstance(value, dict):
        return {key: without_nan(element) for key, element in value.items()}
    if isinstance(value, list):
        return [without_nan(element) for element in value]
    is_unwritable = isinstance(value, float) and not math.isfinite(value)
    return None if is_unwritable else value
