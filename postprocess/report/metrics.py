"""Compute accuracy and log loss with confidence intervals: of all rows, of slices, of baselines.

`results.measure_run` calls this module. It has plain functions of arrays and tables and reads no
file. A row is "decided" if its winner is one of the model's verdicts: a tie is not decided for a
model that only tells A from B. Shape letters: see docs/style.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from postprocess.agreement.slices import TEXTS, count_characters, groups_of
from postprocess.agreement.statistics import (
    FEW_GROUPS,
    Estimate,
    Resamples,
    interval,
    resample,
    stack_orders,
)
from postprocess.report.predictions import Predictions
from preprocess.model_input import VERDICTS
from recipes.pairwise.data.datasets import targets, winners
from recipes.pairwise.tracking.metrics import row_brier_scores, row_losses, rows_are_right

LENGTH_SLICES = 4
MAX_NAMES = 12  # rows of a table by language or source; the rarest names share the last one


@dataclass(frozen=True)
class TableRow:
    """Accuracy and log loss of some rows of the data, as one row of a table."""

    name: str  # what the rows have in common, or whose verdicts they are
    row_count: int
    group_count: int  # groups of rows with nearly the same prompt
    accuracy: Estimate | None  # of the decided rows; None if no row is decided
    log_loss: Estimate  # of all rows, in nats

    @property
    def has_few_groups(self) -> bool:
        """Whether there are so few groups that the interval is too narrow."""
        return self.group_count < FEW_GROUPS


@dataclass(frozen=True)
class Gain:
    """The model's accuracy and log loss less those of another one, row by row.

    Accuracy is None if no row is decided. A log loss below zero says that the model is better.
    """

    accuracy: Estimate | None
    log_loss: Estimate


@dataclass(frozen=True)
class Baseline:
    """A guess that reads no text, on the same rows, and the model's gain over it."""

    table_row: TableRow
    gain: Gain


@dataclass(frozen=True)
class ScoredRows:
    """The measured rows as arrays."""

    probabilities_rov: np.ndarray  # in both orders, float64
    mean_rv: np.ndarray  # the mean of both orders, by which a run is judged
    labels_rv: np.ndarray  # target probabilities
    winners_r: np.ndarray  # the winner's place among the verdicts; -1 if it is none of them
    is_decided_r: np.ndarray  # whether the winner is one of the verdicts
    is_right_r: np.ndarray  # whether the likeliest verdict is the winner
    losses_r: np.ndarray  # log loss in nats
    resamples: Resamples  # the bootstrap's draws of groups of rows
    verdicts: tuple[str, ...]  # in the order of the last axis

    def estimate(self, values_r: np.ndarray, mask_r: np.ndarray | None = None) -> Estimate | None:
        """Compute the mean of some rows' values and its 95 % confidence interval.

        The interval is a percentile bootstrap over groups of rows (Davison and Hinkley 1997,
        section 3.8).

        Args:
            values_r: A number for each row.
            mask_r: The rows that count; None for all. If there are none, there is no estimate.
        """
        if mask_r is None:
            mask_r = np.full(len(values_r), True)
        if not mask_r.any():
            return None

        low, high = interval(values_r, mask_r, self.resamples)
        values = np.asarray(values_r, np.float64)[mask_r]
        return Estimate(float(values.mean()), low, high)

    def estimate_gain(self, is_right_r: np.ndarray, losses_r: np.ndarray) -> Gain:
        """Compute the model's gain over other verdicts, with their log losses, on the same rows."""
        # Numpy subtracts no bool from a bool: one of them becomes a number.
        accuracy_gain_r = self.is_right_r.astype(np.float64) - is_right_r
        return Gain(
            accuracy=self.estimate(accuracy_gain_r, self.is_decided_r),
            log_loss=self.estimate(self.losses_r - losses_r),
        )


def score_rows(predictions: Predictions, verdicts: tuple[str, ...]) -> ScoredRows:
    """Turn the table of predictions into arrays, and draw the resamples of the confidence intervals."""
    rows = predictions.rows
    probabilities_rov = stack_orders(rows, verdicts)
    mean_rv = probabilities_rov.mean(axis=1)

    # Labels are the same as in training. For a model without the verdict tie, `targets` counts a tie as
    # half a vote for each response.
    labels_rv = targets(select_labels(predictions), verdicts).astype(np.float64)
    winners_r = winners(rows, verdicts)

    # Every estimate multiplies these counts by float64 numbers: converting them once saves time.
    draws = resample(groups_of(rows))
    resamples = Resamples(draws.group_r, draws.counts_sg.astype(np.float64))

    return ScoredRows(
        probabilities_rov=probabilities_rov,
        mean_rv=mean_rv,
        labels_rv=labels_rv,
        winners_r=winners_r,
        is_decided_r=winners_r >= 0,
        is_right_r=rows_are_right(mean_rv, winners_r),
        losses_r=row_losses(mean_rv, labels_rv),
        resamples=resamples,
        verdicts=verdicts,
    )


def select_labels(predictions: Predictions) -> pl.DataFrame:
    """Select the rows' soft labels as p_VERDICT; without the pairs file, the winner alone is the label."""
    labels = []
    for verdict in VERDICTS:
        label = (pl.col("winner") == verdict).cast(pl.Float64)
        if predictions.has_pairs:
            label = pl.col(f"label_{verdict}")
        labels.append(label.alias(f"p_{verdict}"))
    return predictions.rows.select(labels)


def make_table_row(
    name: str,
    scored: ScoredRows,
    is_right_r: np.ndarray,
    losses_r: np.ndarray,
    mask_r: np.ndarray | None = None,
) -> TableRow:
    """Compute a table row on the page, from the verdicts and losses of the model or a baseline.

    `mask_r` says which pairs count, such as those of one language; None for all.
    """
    if mask_r is None:
        mask_r = np.full(len(losses_r), True)
    return TableRow(
        name=name,
        row_count=int(mask_r.sum()),
        group_count=len(np.unique(scored.resamples.group_r[mask_r])),
        accuracy=scored.estimate(is_right_r, mask_r & scored.is_decided_r),
        log_loss=scored.estimate(losses_r, mask_r),
    )


def model_row(
    scored: ScoredRows, name: str = "this model", mask_r: np.ndarray | None = None
) -> TableRow:
    """Compute the model's table row, on all rows of the data or on those of `mask_r`."""
    return make_table_row(name, scored, scored.is_right_r, scored.losses_r, mask_r)


def estimate_brier_score(scored: ScoredRows) -> Estimate:
    """Compute the mean Brier score of the rows."""
    return scored.estimate(row_brier_scores(scored.mean_rv, scored.labels_rv))


# Lengths and baselines


@dataclass(frozen=True)
class Lengths:
    """The length of each row's texts in characters, summed over the turns."""

    prompt_r: np.ndarray
    response_a_r: np.ndarray
    response_b_r: np.ndarray


def measure_lengths(rows: pl.DataFrame) -> Lengths:
    """Count the characters of each row's prompt and answers."""
    return Lengths(*(count_characters(rows, column) for column in TEXTS))


def make_baselines(scored: ScoredRows, lengths: Lengths | None) -> list[Baseline]:
    """Compute the baselines: the longer answer, if the lengths are known, and a constant verdict.

    Both take their shares of right answers from these very rows, which favours them.
    """
    baselines = []
    if lengths is not None:
        baselines.append(longer_answer_baseline(scored, lengths))
    baselines.append(constant_baseline(scored))
    return baselines


def make_baseline(
    name: str, scored: ScoredRows, is_right_r: np.ndarray, losses_r: np.ndarray
) -> Baseline:
    """Compare the model with a guess, of which these are the verdicts and losses."""
    table_row = make_table_row(name, scored, is_right_r, losses_r)
    return Baseline(table_row, scored.estimate_gain(is_right_r, losses_r))


def constant_baseline(scored: ScoredRows) -> Baseline:
    """Predict the commonest verdict for every row, with the verdicts' shares as probabilities."""
    shares = scored.labels_rv.mean(axis=0)
    is_right_r = scored.winners_r == shares.argmax()
    losses_r = row_losses(shares, scored.labels_rv)
    return make_baseline("one constant verdict", scored, is_right_r, losses_r)


def longer_answer_baseline(scored: ScoredRows, lengths: Lengths) -> Baseline:
    """Measure the guess that the longer answer wins.

    Its probabilities are shares of these rows: if the longer answer wins 60 % of them, it says 0.6 each time.
    """
    # For each row, the index of the verdict that says that the longer answer wins. Of two equally long
    # answers, A counts as the longer one, as in metrics.json.
    place_of_a = scored.verdicts.index("model_a")
    place_of_b = scored.verdicts.index("model_b")
    longer_is_a_r = lengths.response_a_r >= lengths.response_b_r
    longer_r = np.where(longer_is_a_r, place_of_a, place_of_b)
    shorter_r = np.where(longer_is_a_r, place_of_b, place_of_a)

    # All verdicts get their shares in these rows. Then the shares of the longer and the shorter answer replace
    # those of A and B; a tie, where the model has this verdict, keeps its own.
    row_count = len(longer_r)
    rows = np.arange(row_count)
    probabilities_rv = np.tile(scored.labels_rv.mean(axis=0), (row_count, 1))
    probabilities_rv[rows, longer_r] = scored.labels_rv[rows, longer_r].mean()
    probabilities_rv[rows, shorter_r] = scored.labels_rv[rows, shorter_r].mean()

    is_right_r = scored.winners_r == longer_r
    losses_r = row_losses(probabilities_rv, scored.labels_rv)
    return make_baseline("the longer answer", scored, is_right_r, losses_r)


# Slices


def slice_by_name(scored: ScoredRows, names: pl.Series, plural: str) -> list[TableRow]:
    """Compute a table row for each name, such as a language, the commonest name first.

    Args:
        scored: The measured rows.
        names: The name of each row. Where there are more than MAX_NAMES, the rarest share a table row.
        plural: What the names are, e.g. languages.
    """
    # Equally common names are in alphabetical order.
    names = names.cast(pl.String).fill_null("unknown").replace("", "unknown")
    counts = names.value_counts().sort(["count", names.name], descending=[True, False])
    ranked = counts[names.name].to_list()

    single_names = ranked
    shared_names = []
    if len(ranked) > MAX_NAMES:
        single_names = ranked[: MAX_NAMES - 1]
        shared_names = ranked[MAX_NAMES - 1 :]

    table_rows = []
    for name in single_names:
        table_rows.append(model_row(scored, name, (names == name).to_numpy()))
    if shared_names:
        mask_r = names.is_in(shared_names).to_numpy()
        table_rows.append(model_row(scored, f"{len(shared_names)} other {plural}", mask_r))
    return table_rows


def slice_by_length(scored: ScoredRows, lengths_r: np.ndarray) -> list[TableRow]:
    """Compute a table row for each quarter of the data by length, the shortest texts first."""
    # Where each quarter ends: the length of its longest text. Quarters with the same end become one.
    quantiles = np.linspace(0, 1, LENGTH_SLICES + 1)[1:]
    longest_of_slices = np.unique(np.quantile(lengths_r, quantiles, method="lower"))

    table_rows = []
    shortest = 0
    for longest in longest_of_slices:
        mask_r = (lengths_r >= shortest) & (lengths_r <= longest)
        name = f"{shortest:,.0f} to {longest:,.0f}"
        if not table_rows:
            name = f"up to {longest:,.0f} characters"
        table_rows.append(model_row(scored, name, mask_r))
        shortest = longest + 1
    return table_rows


def slice_by_longer_answer(scored: ScoredRows, lengths: Lengths) -> list[TableRow]:
    """Compute a table row each for: the longer answer won, the shorter answer won, a tie.

    Pairs with equally long answers are in neither of the first two.
    """
    a_won_r = scored.winners_r == scored.verdicts.index("model_a")
    b_won_r = scored.winners_r == scored.verdicts.index("model_b")
    a_is_longer_r = lengths.response_a_r > lengths.response_b_r
    b_is_longer_r = lengths.response_a_r < lengths.response_b_r
    masks = {
        "the longer answer won": (a_won_r & a_is_longer_r) | (b_won_r & b_is_longer_r),
        "the shorter answer won": (a_won_r & b_is_longer_r) | (b_won_r & a_is_longer_r),
        "a tie": ~a_won_r & ~b_won_r,
    }

    table_rows = []
    for name, mask_r in masks.items():
        if mask_r.any():
            table_rows.append(model_row(scored, name, mask_r))
    return table_rows


def make_slices(
    rows: pl.DataFrame, scored: ScoredRows, lengths: Lengths | None
) -> list[tuple[str, Sequence[TableRow]]]:
    """Compute the tables by language, length, source, winner and fold.

    Returns:
        Title and rows of each table that has more than one row.
    """
    tables = []
    if "language" in rows.columns:
        tables.append(("By language", slice_by_name(scored, rows["language"], "languages")))
    if lengths is not None:
        total_r = lengths.prompt_r + lengths.response_a_r + lengths.response_b_r
        by_length = slice_by_length(scored, total_r)
        tables.append(("By length of prompt and answers", by_length))
    if "source" in rows.columns:
        tables.append(("By source", slice_by_name(scored, rows["source"], "sources")))
    if lengths is not None:
        tables.append(("By which answer won", slice_by_longer_answer(scored, lengths)))

    if rows["fold"].n_unique() > 1:
        fold_names = "fold " + rows["fold"].cast(pl.String)
        by_fold = slice_by_name(scored, fold_names, "folds")
        by_fold.sort(key=lambda row: (len(row.name), row.name))  # fold 10 comes after fold 9
        tables.append(("By fold", by_fold))

    # A single row would only repeat the model's result on all data.
    return [(title, table_rows) for title, table_rows in tables if len(table_rows) > 1]
