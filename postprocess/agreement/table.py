"""A comparison as what the user looks at: the printed table, and the probabilities of every row as a table on disk."""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from postprocess.agreement.statistics import Column
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking.metrics import ORDERS

FEW_GROUPS = 20
HEAD = (
    f"  {'model':<12} {'precision':<10} {'accuracy':>18} {'log loss':>21} {'largest diff':>12} {'mean diff':>9} "
    f"{'KL':>9}  verdicts changed"
)


def probability_table(rows: pl.DataFrame, columns: Sequence[Column], verdicts: Sequence[str]) -> pl.DataFrame:
    """Two rows a pair, one for each order: id, fold, winner, order, and for each column its p_model_a, p_model_b[, p_tie].

    `rows`: the pairs, as `validation_rows.validation_rows` gives them. In both orders p_model_a is the probability of the
    answer that the pairs file calls response_a. Sorted by id.
    """
    parts = []
    for place, order in enumerate(ORDERS):
        found = {
            f"{column.name}_p_{verdict}": column.probabilities_rov[:, place, verdicts.index(verdict)]
            for column in columns
            for verdict in VERDICTS
            if verdict in verdicts
        }
        parts.append(rows.select("id", "fold", "winner").with_columns(pl.lit(order).alias("order")).hstack(pl.DataFrame(found)))
    return pl.concat(parts).sort("id", "order")


def groups_of(rows: pl.DataFrame) -> np.ndarray:
    """The number of each row's group of prompts, (rows,); a row without one is a group of its own."""
    if "group" not in rows.columns:
        return np.arange(len(rows))
    group = pl.col("group")
    alone = pl.concat_str(pl.lit("row "), "id")
    key = pl.when(group.is_null()).then(alone).otherwise(pl.concat_str(pl.lit("group "), group.cast(pl.String)))
    return rows.select(key.rank("dense")).to_series().to_numpy()


def table_lines(report: dict) -> list[str]:
    """The report as lines of at most 128 characters: one a model, then what was chosen and how sure the figures are."""
    groups = report["groups"]
    lines = [
        f"  {report['rows']} validation rows in both orders; differences and KL (nats) are from the model as trained",
        f"  brackets: 95 % of {report['resamples']:,} resamples of the {groups} group{'s' * (groups != 1)} of prompts",
        HEAD,
        *(model_text(line) for line in report["models"]),
        *candidates_text(report),
        paired_text(report),
        *repeats_text(report),
    ]
    if report.get("rows_were_trained_on"):
        lines.append("  the model was trained on these rows: accuracy and log loss say nothing of others, the differences do")
    if groups < FEW_GROUPS:
        lines.append(f"  fewer than {FEW_GROUPS} groups of prompts: the brackets are narrower than they should be")
    if any(line["model"] in ("merged", "unmerged") and line["precision"] == "float32" for line in report["models"]):
        lines.append("  no GPU here: float16 weights with float32 activations; the kernel computes in float16")
    return lines


def model_text(line: dict) -> str:
    """One model's line."""
    against = line["against_trained"]
    accuracy, log_loss = (bracketed(line[name], line[f"{name}_interval"]) for name in ("accuracy", "log_loss"))
    return (
        f"  {line['model']:<12} {line['precision']:<10} {accuracy:>18} {log_loss:>21} {against['largest']:12.5f} "
        f"{against['mean']:9.5f} {against['kl_divergence']:9.6f}  {against['verdicts_changed']:16d}"
    )


def bracketed(value: float, interval: Sequence[float]) -> str:
    """Return a value with its interval, as in 0.840 [0.81, 0.87]."""
    return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def candidates_text(report: dict) -> list[str]:
    """Which of several candidates is packaged, and the next best."""
    found, packaged = report["candidates"], report["packaged"]
    others = {name: mean for name, mean in found.items() if name != packaged}
    if not others:
        return []
    other = min(others, key=lambda name: others[name] if math.isfinite(others[name]) else math.inf)
    told = f"  packaged: {packaged}, {found[packaged]:.5f} from the model as trained on average"
    return [f"{told} (next best {other}: {others[other]:.5f})"]


def paired_text(report: dict) -> str:
    """What packaging costs, on the same rows."""
    parts = []
    for what, found in report["packaged_minus_trained"].items():
        low, high = found["interval"]
        parts.append(f"{what.replace('_', ' ')} {signed(found['difference'])} [{signed(low)}, {signed(high)}]")
    return f"  {report['packaged']} less trained, row by row: {', '.join(parts)}"


def signed(value: float) -> str:
    """+0.0012, without a minus before a zero."""
    return f"{round(value, 4) + 0.0:+.4f}"


def repeats_text(report: dict) -> list[str]:
    """How far quantising again, with another seed, moves the figures; sd: standard deviation."""
    if "repeats" not in report:
        return []
    parts = []
    for what, places in (("mean_difference", 5), ("accuracy", 4)):
        low, high, deviation = (f"{report['repeats'][what][key]:.{places}f}" for key in ("min", "max", "standard_deviation"))
        parts.append(f"{what.replace('_', ' ')} {low} to {high}, sd {deviation}")
    return [f"  quantised {len(report['repeats']['models'])} times: {'; '.join(parts)}"]


def without_nan(value: object) -> object:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
