"""What the planner is worth: accuracy where a third of the second order's cost is spent, by which rows get it.

`python -m tests.bench.planner FILE` trains a linear model on all folds of a pairs file but one, every pair as it is given,
so that it learns something and has a position bias, and scores the fold that is left in both orders. A row's cost is its
length in characters. `make bench-kernel` runs it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import polars as pl
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from kaggle_kernels.runtime.scheduling.plan import CHANGE_OF_ORDER, expected_gain
from postprocess.agreement.statistics import Resamples, resample
from preprocess.core.errors import exits_with_2
from recipes.pairwise.data.datasets import read_pairs, split, winners

VERDICTS = ("model_a", "model_b")
FOLD = 0
DROPPED = 0.3  # share of B's wins left out of the training, for a bias towards A
VOCABULARY = 16_384
REGULARISATION = 0.3
SHARE = 1 / 3  # of the second order's cost
TEXTS = ("prompt", "response_a", "response_b")
SHUFFLES = 20


@dataclass(frozen=True)
class Scored:
    """Rows scored in both orders, of shape (rows, verdicts), with each row's cost, its winner's place, and draws of groups."""

    first: np.ndarray
    second: np.ndarray
    cost: np.ndarray
    winners: np.ndarray
    resamples: Resamples


@click.command()
@click.argument("pairs", type=click.Path(path_type=Path))
@exits_with_2
def main(pairs: Path) -> None:
    """Print accuracy, log loss and the share of the second order's gain for each choice of rows."""
    train_rows, rows = split(read_pairs(pairs), FOLD, pairs)
    is_kept = np.random.default_rng(1).random(len(train_rows)) >= DROPPED
    train_rows = train_rows.filter((pl.col("winner") != "model_b") | is_kept)
    rows = rows.filter(pl.col("winner").is_in(VERDICTS))
    scored = score_rows(train_rows, rows)

    nobody = np.empty(0, dtype=int)
    everybody = np.arange(len(rows))
    print(f"trained on {len(train_rows)} pairs; {len(rows)} pairs of {rows['group'].n_unique()} groups in both orders")
    for name, row_orders in {"one order": [nobody], "both orders": [everybody], **choose_rows(scored)}.items():
        print(json.dumps({"rows": name, **measure_choice(row_orders, scored)}))


def score_rows(train_rows: pl.DataFrame, rows: pl.DataFrame) -> Scored:
    """Score rows by logistic regression on the characters of both responses.

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
    second = model.predict_proba(features(rows, "b", "a"))[:, ::-1]

    characters = pl.sum_horizontal(pl.col(name).list.join("").str.len_chars() for name in TEXTS)
    cost = rows.select(characters.cast(pl.Float64) + 1).to_series().to_numpy()
    return Scored(first, second, cost, winners(rows, VERDICTS), resample(rows["group"].to_numpy()))


def choose_rows(scored: Scored) -> dict[str, list[np.ndarray]]:
    """The rows that get the second order, by the choice; several draws where it is random."""
    rng = np.random.default_rng(0)
    random_orders = [rng.permutation(len(scored.cost)) for _ in range(SHUFFLES)]
    by_certainty = np.argsort(np.abs(scored.first[:, 0] - scored.first[:, 1]), kind="stable")

    # As the kernel does.
    gain = np.array([expected_gain(values, CHANGE_OF_ORDER, metric="accuracy") for values in scored.first.tolist()])
    by_gain_per_second = np.argsort(-gain / scored.cost, kind="stable")

    choices = {"random": random_orders, "the least certain": [by_certainty], "by gain per second": [by_gain_per_second]}
    affordable = {}
    for name, row_orders in choices.items():
        affordable[name] = [take_affordable(order, scored.cost) for order in row_orders]
    return affordable


def take_affordable(order: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The first rows of `order` that cost SHARE of all together."""
    return order[np.cumsum(cost[order]) <= SHARE * cost.sum()]


def measure_choice(chosen_rows: list[np.ndarray], scored: Scored) -> dict:
    """Accuracy and log loss, and which part of the whole second order's gain in each that is, with its interval."""
    none = measure_rows(np.empty(0, dtype=int), scored)
    whole = measure_rows(np.arange(len(scored.cost)), scored)
    partly = np.mean([measure_rows(rows, scored) for rows in chosen_rows], axis=0)
    accuracy, log_loss = partly.mean(axis=1)
    parts = [part_of_gain(partly[place] - none[place], whole[place] - none[place], scored.resamples) for place in (0, 1)]
    return {"accuracy": accuracy, "log_loss": log_loss, "of_gain": parts[0], "of_log_loss": parts[1]}


def measure_rows(rescored: np.ndarray, scored: Scored) -> np.ndarray:
    """Whether each row is right, and its log loss, where some rows have got the second order."""
    mean = scored.first.copy()
    mean[rescored] = (scored.first + scored.second)[rescored] / 2
    of_winner = mean[np.arange(len(mean)), scored.winners]
    return np.stack([mean.argmax(axis=1) == scored.winners, -np.log(np.clip(of_winner, 1e-6, None))])


def part_of_gain(gains_r: np.ndarray, whole_gains_r: np.ndarray, resamples: Resamples) -> list[float]:
    """The part of the rows' whole gain that was got, and the middle 95 % over draws of groups; NaN where there is none."""
    gains_g = np.bincount(resamples.group_r, weights=gains_r)
    whole_gains_g = np.bincount(resamples.group_r, weights=whole_gains_r)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = gains_g.sum() / whole_gains_g.sum()
        parts = resamples.counts_sg @ gains_g / (resamples.counts_sg @ whole_gains_g)
    low, high = np.nanpercentile(parts, [2.5, 97.5])
    return [float(mean), float(low), float(high)]


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.planner")
