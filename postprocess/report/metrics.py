"""The report's numbers: accuracy, log loss, calibration and position bias, with bootstrap intervals over groups of prompts.

Plain functions of arrays and tables; no file is read. Shapes: r rows, o the two orders, v verdicts, g groups of prompts, b
resamples. "Decided" rows are those whose winner is one of the model's verdicts: of a model of two, a tie is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.optimize import minimize_scalar

from postprocess.agreement.statistics import Resamples, interval, resample
from postprocess.agreement.table import FEW_GROUPS, groups_of
from recipes.pairwise.data.datasets import targets, winners
from recipes.pairwise.tracking.metrics import ORDERS, SMALLEST, row_losses

BINS = 10
INVERSE_TEMPERATURES = (0.1, 20.0)  # temperatures of 10, the most that a spec takes, to 0.05
PARTS = 4  # quantiles of length
MOST_NAMES = 12  # languages or sources that have a line of their own


@dataclass(frozen=True)
class Figure:
    """A mean with the interval that 95 % of the resamples give."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One line of a table: what it is of, how many rows and groups of prompts it stands on, its two figures."""

    name: str
    rows: int
    groups: int
    accuracy: Figure | None
    log_loss: Figure

    @property
    def few(self) -> bool:
        """Whether there are too few groups for the interval to be as wide as it should."""
        return self.groups < FEW_GROUPS


@dataclass(frozen=True)
class Scored:
    """The rows that are measured: probabilities in both orders, labels, the winners' places (-1: undecided), resamples."""

    both_rov: np.ndarray
    labels_rv: np.ndarray
    winners_r: np.ndarray
    resamples: Resamples
    verdicts: tuple[str, ...]

    @property
    def mean_rv(self) -> np.ndarray:
        """The mean of both orders, which is what a run is judged by."""
        return self.both_rov.mean(axis=1)

    @property
    def decided_r(self) -> np.ndarray:
        """The rows that have a winner among the verdicts."""
        return self.winners_r >= 0


def scored(rows: pl.DataFrame, verdicts: tuple[str, ...]) -> Scored:
    """The arrays of a table as `Evidence.rows` has it. Without labels of a pairs file, the winner is the label."""
    per_order = [rows.select(f"p_{verdict}_{order}" for verdict in verdicts).to_numpy() for order in ORDERS]
    if "label_model_a" in rows.columns:
        labels = rows.select(pl.col(f"label_{verdict}").alias(f"p_{verdict}") for verdict in ("model_a", "model_b", "tie"))
    else:
        labels = rows.select(
            (pl.col("winner") == verdict).cast(pl.Float64).alias(f"p_{verdict}") for verdict in ("model_a", "model_b", "tie")
        )
    both = np.stack(per_order, axis=1).astype(np.float64)
    draws = resample(groups_of(rows))
    as_floats = Resamples(draws.group_r, draws.counts_bg.astype(np.float64))  # so that no product converts them again
    return Scored(both, targets(labels, verdicts).astype(np.float64), winners(rows, verdicts), as_floats, verdicts)


def figure(values_r: np.ndarray, counted_r: np.ndarray, resamples: Resamples) -> Figure | None:
    """The mean of the values that count, and its interval; None where none does."""
    if not counted_r.any():
        return None
    groups, group_r = np.unique(resamples.group_r[counted_r], return_inverse=True)
    drawn = Resamples(group_r, resamples.counts_bg[:, groups])
    values = np.asarray(values_r, np.float64)[counted_r]
    return Figure(float(values.mean()), *interval(values, np.full(len(values), True), drawn))


def line(name: str, data: Scored, chosen_r: np.ndarray, right_r: np.ndarray, loss_r: np.ndarray) -> Line:
    """A line of the rows `chosen_r`, of which `right_r` are right and `loss_r` their losses."""
    groups = len(np.unique(data.resamples.group_r[chosen_r]))
    accuracy = figure(right_r, chosen_r & data.decided_r, data.resamples)
    return Line(name, int(chosen_r.sum()), groups, accuracy, figure(loss_r, chosen_r, data.resamples))


def model_line(data: Scored, name: str = "this model", chosen_r: np.ndarray | None = None) -> Line:
    """The model on all rows, or on some of them, by the mean of both orders."""
    every = np.full(len(data.winners_r), True) if chosen_r is None else chosen_r
    return line(name, data, every, data.mean_rv.argmax(axis=1) == data.winners_r, row_losses(data.mean_rv, data.labels_rv))


@dataclass(frozen=True)
class Baseline:
    """A guess that reads nothing or only lengths, on the same rows; and the model less it, row by row."""

    line: Line
    gain_accuracy: Figure | None
    gain_log_loss: Figure


def baselines(data: Scored, longer_r: np.ndarray | None) -> list[Baseline]:
    """The longer answer (`longer_r`: whether that is A; None: unknown), and the same probabilities for every row.

    Both know how often they are right on these very rows, which favours them.
    """
    found = [constant(data, "always the same")]
    return ([longer_answer(data, longer_r)] if longer_r is not None else []) + found


def constant(data: Scored, name: str) -> Baseline:
    """The verdicts' shares in these rows as every row's probabilities; the commonest as every row's verdict."""
    shares = data.labels_rv.mean(axis=0)
    return baseline(data, name, data.winners_r == shares.argmax(), np.tile(shares, (len(data.labels_rv), 1)))


def longer_answer(data: Scored, longer_r: np.ndarray) -> Baseline:
    """The longer answer as every row's verdict, at the share in which it wins."""
    a, b = data.verdicts.index("model_a"), data.verdicts.index("model_b")
    longer_at, shorter_at = np.where(longer_r, a, b), np.where(longer_r, b, a)
    rows = np.arange(len(longer_r))
    shares = data.labels_rv.mean(axis=0)
    probabilities = np.tile(shares, (len(rows), 1))
    probabilities[rows, longer_at] = data.labels_rv[rows, longer_at].mean()
    probabilities[rows, shorter_at] = data.labels_rv[rows, shorter_at].mean()
    return baseline(data, "the longer answer", data.winners_r == longer_at, probabilities)


def baseline(data: Scored, name: str, right_r: np.ndarray, probabilities_rv: np.ndarray) -> Baseline:
    """A baseline with the model's gains over it."""
    every = np.full(len(data.winners_r), True)
    loss_r = row_losses(probabilities_rv, data.labels_rv)
    ours_r = (data.mean_rv.argmax(axis=1) == data.winners_r).astype(np.float64)
    return Baseline(
        line(name, data, every, right_r, loss_r),
        figure(ours_r - right_r, data.decided_r, data.resamples),
        figure(row_losses(data.mean_rv, data.labels_rv) - loss_r, every, data.resamples),
    )


def lengths(rows: pl.DataFrame) -> dict[str, np.ndarray]:
    """Characters of each row's prompt, response_a and response_b, turns added up."""
    texts = ("prompt", "response_a", "response_b")
    counted = rows.select(pl.col(text).list.eval(pl.element().str.len_chars()).list.sum().fill_null(0) for text in texts)
    return {text: counted[text].to_numpy() for text in texts}


def longer_is_a(length: dict[str, np.ndarray]) -> np.ndarray:
    """Whether A is each row's longer answer; of equal ones it is A, as in metrics.json."""
    return length["response_a"] >= length["response_b"]


def by_name(data: Scored, names: pl.Series, others: str) -> list[Line]:
    """A line for each name, most rows first, from the thirteenth on together, as `others`."""
    filled = names.cast(pl.String).fill_null("unknown").replace("", "unknown")
    ranked = filled.value_counts().sort(["count", names.name], descending=[True, False])[names.name].to_list()
    own = ranked if len(ranked) <= MOST_NAMES else ranked[: MOST_NAMES - 1]
    lines = [model_line(data, name, (filled == name).to_numpy()) for name in own]
    if rest := ranked[len(own) :]:
        lines.append(model_line(data, f"{len(rest)} other {others}", filled.is_in(rest).to_numpy()))
    return lines


def by_length(data: Scored, characters_r: np.ndarray) -> list[Line]:
    """A line for each quarter of the rows by length; fewer where many rows are equally long."""
    edges = np.unique(np.quantile(characters_r, np.linspace(0, 1, PARTS + 1)[1:], method="lower"))
    lines, above = [], -1
    for edge in edges:
        chosen = (characters_r > above) & (characters_r <= edge)
        name = f"up to {edge:,.0f} characters" if above < 0 else f"{above + 1:,.0f} to {edge:,.0f}"
        lines.append(model_line(data, name, chosen))
        above = edge
    return lines


def by_longer(data: Scored, length: dict[str, np.ndarray]) -> list[Line]:
    """Where the longer answer won, where the shorter one did, where neither did, each if it occurs."""
    difference = length["response_a"].astype(int) - length["response_b"].astype(int)
    a, b = (data.winners_r == data.verdicts.index(name) for name in ("model_a", "model_b"))
    won = {
        "the longer answer won": (a & (difference > 0)) | (b & (difference < 0)),
        "the shorter answer won": (a & (difference < 0)) | (b & (difference > 0)),
        "a tie": ~a & ~b,
    }
    return [model_line(data, name, chosen) for name, chosen in won.items() if chosen.any()]


@dataclass(frozen=True)
class Bin:
    """Rows whose likeliest verdict has a probability within the bin: how many, its mean, and how often it is right."""

    rows: int
    confidence: float
    accuracy: Figure


@dataclass(frozen=True)
class Calibration:
    """Is the model as sure as it should be? `error` is the expected calibration error (Guo et al. 2017).

    `temperature`: by which the mean probabilities' logits would be divided for the least log loss on these rows.
    """

    bins: tuple[Bin, ...]
    lowest: float
    error: float
    temperature: float
    log_loss: float
    log_loss_at_temperature: float


def calibration(data: Scored) -> Calibration | None:
    """Of the decided rows, in ten bins of equal width from the least possible confidence to 1; None where there are none."""
    decided = data.decided_r
    if not decided.any():
        return None
    confidence_r, right_r = data.mean_rv.max(axis=1), data.mean_rv.argmax(axis=1) == data.winners_r
    lowest = 1 / len(data.verdicts)
    place_r = np.clip(((confidence_r - lowest) / (1 - lowest) * BINS).astype(int), 0, BINS - 1)
    bins = []
    for place in range(BINS):
        chosen = decided & (place_r == place)
        if chosen.any():
            found = figure(right_r, chosen, data.resamples)
            bins.append(Bin(int(chosen.sum()), float(confidence_r[chosen].mean()), found))
    error = sum(one.rows * abs(one.accuracy.value - one.confidence) for one in bins) / decided.sum()
    temperature, at_temperature = best_temperature(data)
    plain = float(row_losses(data.mean_rv, data.labels_rv).mean())
    return Calibration(tuple(bins), lowest, float(error), temperature, plain, at_temperature)


def best_temperature(data: Scored) -> tuple[float, float]:
    """The temperature of the least log loss, and that log loss.

    Applied as the kernel does: powers of the mean, made to sum to 1. Log loss is convex in the inverse temperature, so that
    there is one minimum.
    """
    logarithms = np.log(np.clip(data.mean_rv, SMALLEST, 1))

    def log_loss(inverse: float) -> float:
        scaled = inverse * logarithms
        highest = scaled.max(axis=1)
        normaliser = highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1))
        return float((normaliser - (data.labels_rv * scaled).sum(axis=1)).mean())

    found = minimize_scalar(log_loss, bounds=INVERSE_TEMPERATURES, method="bounded", options={"xatol": 1e-6})
    return 1 / float(found.x), float(found.fun)


@dataclass(frozen=True)
class FirstAnswer:
    """What the answer that stands first gets, in the order as given, swapped, and over both."""

    name: str
    as_given: Figure
    swapped: Figure
    both: Figure


@dataclass(frozen=True)
class Positions:
    """Does the place of an answer count?

    Over both orders of the same rows either place has the better answer equally often, so that without bias `chosen` and
    `probability`, what the first answer gets less what the second gets, are 0. `flips`: the share of rows whose verdict
    changes with the order. `orders`: either order and their mean as one model each; `gain_*`: the mean less the order as given.
    """

    first: tuple[FirstAnswer, ...]
    chosen: Figure
    probability: Figure
    flips: Figure
    orders: tuple[Line, ...]
    gain_accuracy: Figure | None
    gain_log_loss: Figure


def positions(data: Scored) -> Positions:
    """The position bias of all rows."""
    every = np.full(len(data.winners_r), True)
    places = [data.verdicts.index("model_a"), data.verdicts.index("model_b")]

    def mean(values_r: np.ndarray) -> Figure:
        return figure(values_r, every, data.resamples)

    def first_answer(name: str, given_rv: np.ndarray, swapped_rv: np.ndarray) -> tuple[FirstAnswer, Figure]:
        """What the first answer gets, and that less what the second gets."""
        (given, second_given), (second_swapped, swapped) = given_rv[:, places].T, swapped_rv[:, places].T
        both, second = (given + swapped) / 2, (second_given + second_swapped) / 2
        return FirstAnswer(name, mean(given), mean(swapped), mean(both)), mean(both - second)

    given, swapped = data.both_rov[:, 0], data.both_rov[:, 1]
    choices = (np.eye(len(data.verdicts))[values.argmax(axis=1)] for values in (given, swapped))
    by_people, _ = first_answer("preferred by the labels", data.labels_rv, data.labels_rv)
    by_model, chosen = first_answer("chosen by the model", *choices)
    by_mean, probability = first_answer("mean probability", given, swapped)
    orders = {"order as given": given, "order swapped": swapped, "mean of both": data.mean_rv}
    right = {name: (values.argmax(axis=1) == data.winners_r).astype(np.float64) for name, values in orders.items()}
    loss = {name: row_losses(values, data.labels_rv) for name, values in orders.items()}
    return Positions(
        first=(by_people, by_model, by_mean),
        chosen=chosen,
        probability=probability,
        flips=mean(given.argmax(axis=1) != swapped.argmax(axis=1)),
        orders=tuple(line(name, data, every, right[name], loss[name]) for name in orders),
        gain_accuracy=figure(right["mean of both"] - right["order as given"], data.decided_r, data.resamples),
        gain_log_loss=mean(loss["mean of both"] - loss["order as given"]),
    )


def worst(data: Scored, count: int) -> list[int]:
    """The places of the rows with a wrong verdict, the least probable winner first."""
    wrong = np.flatnonzero(data.decided_r & (data.mean_rv.argmax(axis=1) != data.winners_r))
    of_winner = data.mean_rv[wrong, data.winners_r[wrong]]
    return wrong[np.argsort(of_winner, kind="stable")][:count].tolist()


def curve(records: Sequence[dict], name: str | None) -> list[tuple[int, float]]:
    """Step and value of every record that has `name`, by step; of a step that was logged twice, the later one."""
    return sorted(
        {record["step"]: float(record[name]) for record in records if isinstance(record.get(name), int | float)}.items()
    )


def smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The curve with each value as the mean of its neighbourhood, a tenth of the curve, shorter at both ends."""
    values, reach, found = np.array([value for _, value in curve]), len(curve) // 20, []
    for at, (step, _) in enumerate(curve):
        near = min(at, reach, len(curve) - 1 - at)
        found.append((step, float(values[at - near : at + near + 1].mean())))
    return found
