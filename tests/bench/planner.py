"""What the clock's planner is worth: accuracy against the cost of a second order, by which rows get it.

`python -m tests.bench.planner train --pairs data/pairs.parquet` trains a linear model on all folds but one, every pair as it is
given, so that it learns something and has a position bias, and scores the fold that is left in both orders.
`python -m tests.bench.planner curve PREDICTIONS --pairs FILE` reads these, or the predictions.parquet of any run, and tells
what each choice has reached at each share of the second order's cost. A row's cost is its length in characters.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import polars as pl
import scipy.sparse
import scipy.stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from kaggle_kernels.runtime.scheduling.plan import CHANGE_OF_ORDER, expected_gain, measured_change
from postprocess.agreement.statistics import Resamples, resample
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, write_json
from recipes.pairwise.data.datasets import read_pairs, split, winners
from recipes.pairwise.tracking.metrics import predictions

VERDICTS = ("model_a", "model_b")
OUT = Path("outputs/bench/planner.parquet")
FOLD = 0
DROPPED = 0.3  # share of B's wins left out of the training, for a bias towards A
VOCABULARY = 16_384
REGULARISATION = 0.3
SHARES = (0.0, 0.1, 0.2, 1 / 3, 0.5, 0.75, 1.0)
TEXTS = ("prompt", "response_a", "response_b")
SHUFFLES = 20
CHOICES = {
    "random": "random rows",
    "uncertain": "the least certain first",
    "planned": "gain per second, s as guessed",
    "measured": "gain per second, s as measured",
    "directed": "gain per second, s and the mean change as measured on the first rows",
}
PILOT_ROWS = 150


@click.group()
def main() -> None:
    """The worth of choosing which rows get a second order."""


@main.command()
@click.option("--pairs", type=click.Path(path_type=Path), required=True, help="Written by python -m preprocess.")
@exits_with_2
def train(pairs: Path) -> None:
    """Write outputs/bench/planner.parquet."""
    train_rows, held_out = split(read_pairs(pairs), FOLD, pairs)
    is_kept = np.random.default_rng(1).random(len(train_rows)) >= DROPPED
    train_rows = train_rows.filter((pl.col("winner") != "model_b") | is_kept)
    both_rov = fit_and_score(train_rows, held_out)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(OUT) as temporary:
        predictions(held_out["id"].to_list(), both_rov, VERDICTS, held_out).write_parquet(temporary)
    print(f"trained on {len(train_rows)} pairs; wrote {OUT}: {len(held_out)} pairs in both orders")


def fit_and_score(train_rows: pl.DataFrame, rows: pl.DataFrame) -> np.ndarray:
    """Probabilities (rows, orders, verdicts) by logistic regression on the characters of both responses.

    It is trained on every pair as it is given and nothing in it is symmetrical, so that it has a position bias, as a language
    model has that saw each pair in one order.
    """
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), max_features=VOCABULARY, sublinear_tf=True)
    vectorizer.fit(train_rows["response_a"].list.join("\n"))

    def features(frame: pl.DataFrame, first: str, second: str):
        texts = [frame[f"response_{side}"].list.join("\n") for side in (first, second)]
        lengths = np.log1p(np.stack([text.str.len_chars() for text in texts], axis=1))
        return scipy.sparse.hstack([*map(vectorizer.transform, texts), lengths], format="csr")

    model = LogisticRegression(C=REGULARISATION, max_iter=1000)
    decided = train_rows.filter(pl.col("winner").is_in(VERDICTS))
    model.fit(features(decided, "a", "b"), decided["winner"])
    first = model.predict_proba(features(rows, "a", "b"))
    second = model.predict_proba(features(rows, "b", "a"))
    return np.stack([first, second[:, ::-1]], axis=1)


@dataclass(frozen=True)
class Scored:
    """Rows scored in both orders, of shape (rows, verdicts), with each row's cost, its winner's place, and draws of groups."""

    first: np.ndarray
    second: np.ndarray
    cost: np.ndarray
    winners: np.ndarray
    resamples: Resamples


@main.command()
@click.argument("file", type=click.Path(path_type=Path), default=OUT)
@click.option("--pairs", type=click.Path(path_type=Path), required=True, help="The pairs that were scored.")
@exits_with_2
def curve(file: Path, pairs: Path) -> None:
    """Accuracy and log loss at each share of the second order's cost; FILE is a run's predictions.parquet."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; `python -m tests.bench.planner train` writes {OUT}")
    table = pl.read_parquet(file).join(read_pairs(pairs).drop("fold", "winner"), on="id", how="inner", maintain_order="left")
    table = table.filter(pl.col("winner").is_in(VERDICTS))
    first, second = (table.select(f"p_{name}_{order}" for name in VERDICTS).to_numpy() for order in ("as_given", "swapped"))
    characters = pl.sum_horizontal(pl.col(name).list.join("").str.len_chars() for name in TEXTS)
    cost = table.select(characters.cast(pl.Float64) + 1).to_series().to_numpy()
    scored = Scored(first, second, cost, winners(table, VERDICTS), resample(table["group"].to_numpy()))
    change = measured_change(dict(enumerate(first.tolist())), dict(enumerate(((first + second) / 2).tolist())))

    facts = {"rows": len(table), "groups": table["group"].n_unique(), "change": change, "guess": CHANGE_OF_ORDER}
    choices = {name: reached(orders_of_rows(name, scored, change), scored) for name in CHOICES}
    write_json(OUT.with_suffix(".json"), {**facts, "choices": choices})
    print(json.dumps(facts))
    for name, points in choices.items():
        print(f"\n{CHOICES[name]}")
        print(f"{'cost':>6}{'accuracy':>10}{'log loss':>10}{'of the gain in accuracy':>30}{'in log loss':>26}")
        for point in points:
            line = f"{point['share']:>6.2f}{point['accuracy']:>10.4f}{point['log_loss']:>10.4f}"
            for gain in (point["of_gain"], point["of_log_loss"]):
                line += f"{gain['mean']:>14.2f} ({gain['low']:.2f} to {gain['high']:.2f})"
            print(line)


def orders_of_rows(name: str, scored: Scored, change: float) -> list[np.ndarray]:
    """The rows in the order in which they get a second score; several orders where it is drawn.

    `directed` scores some rows at random, and learns from them what a second order changes on average, for a position bias is
    the same for all rows: those that the bias may have decided gain most.
    """
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(len(scored.cost)) for _ in range(SHUFFLES)]
    if name == "random":
        return shuffled
    if name == "directed":
        return [directed(order[:PILOT_ROWS], scored) for order in shuffled]
    if name == "uncertain":
        return [np.argsort(np.abs(scored.first[:, 0] - scored.first[:, 1]), kind="stable")]
    spread = CHANGE_OF_ORDER if name == "planned" else change
    gain = np.array([expected_gain(values, spread, by_log_loss=False) for values in scored.first.tolist()])
    return [np.argsort(-gain / scored.cost, kind="stable")]


def directed(pilot: np.ndarray, scored: Scored) -> np.ndarray:
    """The pilot's rows, then the others by E|m + D| - sign(m) E(m + D) per second, with D of the pilot's mean and sd.

    Here m is the first probability less a half; D is what the mean of both orders changes in it.
    """
    changes = (scored.second - scored.first)[pilot, 0] / 2
    spread = max(float(changes.std()), 1e-6)
    lead = scored.first[:, 0] - 0.5
    mean_after = lead + changes.mean()
    mean_distance_after = scipy.stats.foldnorm.mean(np.abs(mean_after) / spread, scale=spread)
    gain = mean_distance_after - np.sign(lead) * mean_after
    others = np.setdiff1d(np.arange(len(lead)), pilot)
    return np.concatenate([pilot, others[np.argsort(-gain[others] / scored.cost[others], kind="stable")]])


def reached(orders: list[np.ndarray], scored: Scored) -> list[dict]:
    """At each of SHARES the accuracy and log loss, and which part of the whole second order's gain that is, with intervals."""
    none = outcomes(orders[0], 0.0, scored)
    whole = outcomes(orders[0], 1.0, scored)
    points = []
    for share in SHARES:
        partly = np.mean([outcomes(order, share, scored) for order in orders], axis=0)
        accuracy, log_loss = partly.mean(axis=1)
        point = {"share": share, "accuracy": accuracy, "log_loss": log_loss}
        for position, name in enumerate(("of_gain", "of_log_loss")):
            gains = partly[position] - none[position]
            whole_gains = whole[position] - none[position]
            point[name] = part_of_gain(gains, whole_gains, scored.resamples)
        points.append(point)
    return points


def outcomes(order: np.ndarray, share: float, scored: Scored) -> np.ndarray:
    """Whether each row is right, and its log loss, where the first rows of `order` have got a share of the second order."""
    is_affordable = np.cumsum(scored.cost[order]) <= share * scored.cost.sum() * (1 + 1e-9)
    mean = scored.first.copy()
    rescored = order[is_affordable]
    mean[rescored] = (scored.first + scored.second)[rescored] / 2
    of_winner = mean[np.arange(len(mean)), scored.winners]
    return np.stack([mean.argmax(axis=1) == scored.winners, -np.log(np.clip(of_winner, 1e-6, None))])


def part_of_gain(gains_r: np.ndarray, whole_gains_r: np.ndarray, resamples: Resamples) -> dict[str, float]:
    """The part of the rows' whole gain that was got, with the middle 95 % over draws of groups; NaN where there is none."""
    gains_g = np.bincount(resamples.group_r, weights=gains_r)
    whole_gains_g = np.bincount(resamples.group_r, weights=whole_gains_r)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = gains_g.sum() / whole_gains_g.sum()
        parts = resamples.counts_sg @ gains_g / (resamples.counts_sg @ whole_gains_g)
    low, high = np.nanpercentile(parts, [2.5, 97.5])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.planner")
