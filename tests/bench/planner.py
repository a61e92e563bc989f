"""What the clock's planner is worth: accuracy against the cost of a second order, for three ways to choose its rows.

`python -m tests.bench.planner train --pairs data/pairs.parquet` trains a bag of words in a minute on all folds but one, every
pair as it is given, so that it learns something and has a position bias, and scores the fold that is left in both orders.
`python -m tests.bench.planner curve PREDICTIONS --pairs FILE` reads these, or the predictions.parquet of any run, and tells
what each choice has reached at each share of the second order's cost. A row's cost is its length in characters.
"""

import json
import math
import tempfile
from pathlib import Path

import click
import numpy as np
import polars as pl
from tokenizers import Tokenizer

from kaggle_kernels.runtime.scheduling.plan import CHANGE_OF_ORDER, expected_gain, measured_change
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, write_json
from recipes.pairwise.data.datasets import read_pairs, split, targets, winners
from recipes.pairwise.tracking.metrics import predictions
from tests import tiny

VERDICTS = ("model_a", "model_b")
OUT = Path("outputs/bench/planner.parquet")
SHARES = (0.0, 0.1, 0.2, 1 / 3, 0.5, 0.75, 1.0)
TEXTS = ("prompt", "response_a", "response_b")
VOCABULARY, WIDTH = 16_384, 64
SHUFFLES = 20
RESAMPLES = 2000
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
@click.option("--fold", default=0, show_default=True, help="The fold that is scored.")
@click.option("--epochs", default=2, show_default=True)
@click.option("--dropped", default=0.3, show_default=True, help="Share of B's wins left out of the training: a bias towards A.")
@exits_with_2
def train(pairs: Path, fold: int, epochs: int, dropped: float) -> None:
    """Write outputs/bench/planner.parquet."""
    import torch

    torch.manual_seed(0)
    train_rows, held_out = split(read_pairs(pairs), fold, pairs)
    train_rows = train_rows.filter(
        (pl.col("winner") != "model_b") | (np.random.default_rng(1).random(len(train_rows)) >= dropped)
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = (text for column in TEXTS for text in train_rows[column].list.join("\n"))
        tiny.bpe_tokenizer(Path(folder), vocabulary_size=VOCABULARY, texts=texts)
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    model = fit(texts_ids(train_rows, tokenizer), targets(train_rows, VERDICTS), epochs)
    prompt, a, b = texts_ids(held_out, tokenizer)
    with torch.inference_mode():
        first, second = (model(*texts).softmax(-1).numpy() for texts in ((prompt, a, b), (prompt, b, a)))
    both_rov = np.stack([first, second[:, ::-1]], axis=1)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(OUT) as temporary:
        predictions(held_out["id"].to_list(), both_rov, VERDICTS, held_out).write_parquet(temporary)
    print(f"trained on {len(train_rows)} pairs; wrote {OUT}: {len(held_out)} pairs in both orders")


def texts_ids(rows: pl.DataFrame, tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Token ids of the prompts, of the first responses, of the second ones."""
    columns = (rows[column].list.join("\n").to_list() for column in TEXTS)
    return [[found.ids or [0] for found in tokenizer.encode_batch_fast(texts)] for texts in columns]


def fit(texts: list[list[list[int]]], wanted: np.ndarray, epochs: int, batch_size: int = 64):
    """A classifier of the mean embeddings and the lengths of prompt and responses, trained on every pair as it is given.

    Nothing in it is symmetrical, so that it has a position bias, as a language model has that saw each pair in one order.
    """
    import torch

    class Bags(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(VOCABULARY, WIDTH)
            self.head = torch.nn.Sequential(
                torch.nn.Linear(3 * WIDTH + 3, 128), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(128, 2)
            )

        def forward(self, *texts):
            parts = [torch.log(torch.tensor([[len(ids) for ids in text] for text in texts]).float()).T / 5]
            for text in texts:
                starts = torch.tensor([0, *map(len, text[:-1])]).cumsum(0)
                parts.append(self.bag(torch.tensor([token for ids in text for token in ids]), starts))
            return self.head(torch.cat(parts, dim=1))

    model, rng, targets_rv = Bags(), np.random.default_rng(0), torch.from_numpy(wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(wanted)), len(wanted) // batch_size):
            logits = model(*([text[row] for row in rows] for text in texts))
            loss = torch.nn.functional.cross_entropy(logits, targets_rv[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


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
    first, second = (table.select(f"p_model_a_{order}", f"p_model_b_{order}").to_numpy() for order in ("as_given", "swapped"))
    texts = [pl.col(name).list.join("").str.len_chars() for name in ("prompt", "response_a", "response_b")]
    cost = table.select(pl.sum_horizontal(texts)).to_series().to_numpy().astype(float) + 1
    known = dict(zip(table["id"], first.tolist(), strict=True))
    after = dict(zip(table["id"], ((first + second) / 2).tolist(), strict=True))
    change = measured_change(known, after)
    found = {
        name: reached(
            orders_of_rows(name, first, second, cost, change), first, second, cost, winners(table, VERDICTS), table["group"]
        )
        for name in CHOICES
    }
    facts = {"rows": len(table), "groups": table["group"].n_unique(), "change": change, "guess": CHANGE_OF_ORDER}
    write_json(OUT.with_suffix(".json"), {**facts, "choices": found})
    print(json.dumps(facts))
    for name, points in found.items():
        print(
            f"\n{CHOICES[name]}\n{'cost':>6}{'accuracy':>10}{'log loss':>10}{'of the gain in accuracy':>30}{'in log loss':>26}"
        )
        for point in points:
            gains = "".join(
                f"{g['mean']:>14.2f} ({g['low']:.2f} to {g['high']:.2f})" for g in (point["of_gain"], point["of_log_loss"])
            )
            print(f"{point['share']:>6.2f}{point['accuracy']:>10.4f}{point['log_loss']:>10.4f}{gains}")


def orders_of_rows(name: str, first: np.ndarray, second: np.ndarray, cost: np.ndarray, change: float) -> list[np.ndarray]:
    """The rows in the order in which they get a second score; several orders where it is drawn.

    `directed` scores some rows at random, and learns from them what a second order changes on average, for a position bias is
    the same for all rows: those that the bias may have decided gain most.
    """
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(len(first)) for _ in range(SHUFFLES)]
    if name == "random":
        return shuffled
    if name == "uncertain":
        return [np.argsort(np.abs(first[:, 0] - first[:, 1]), kind="stable")]
    if name == "directed":
        return [directed(pilot[:PILOT_ROWS], first, second, cost) for pilot in shuffled]
    spread = CHANGE_OF_ORDER if name == "planned" else change
    gain = np.array([expected_gain(values, spread, by_log_loss=False) for values in first.tolist()])
    return [np.argsort(-gain / cost, kind="stable")]


def directed(pilot: np.ndarray, first: np.ndarray, second: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The pilot's rows, then the others by E|m + D| - sign(m) E(m + D) per second, with D of the pilot's mean and sd.

    Here m is the first probability less a half; D is what the mean of both orders changes in it.
    """
    changes = (second - first)[pilot, 0] / 2
    spread, lead = max(float(changes.std()), 1e-6), first[:, 0] - 0.5
    after = lead + changes.mean()
    cumulated = np.array([math.erf(value / spread / math.sqrt(2)) / 2 for value in after])
    gain = (
        2 * (spread * np.exp(-((after / spread) ** 2) / 2) / math.sqrt(2 * math.pi) + after * cumulated) - np.sign(lead) * after
    )
    others = np.setdiff1d(np.arange(len(first)), pilot)
    return np.concatenate([pilot, others[np.argsort(-gain[others] / cost[others], kind="stable")]])


def reached(
    orders: list[np.ndarray], first: np.ndarray, second: np.ndarray, cost: np.ndarray, places: np.ndarray, groups: pl.Series
) -> list[dict]:
    """At each of SHARES the accuracy and log loss, and which part of the whole second order's gain that is, with intervals."""
    _, group = np.unique(groups.to_numpy(), return_inverse=True)
    rows = np.arange(len(first))
    draws = resampled(group)

    def values(order: np.ndarray, share: float) -> np.ndarray:
        chosen = np.zeros(len(first), dtype=bool)
        chosen[order[np.cumsum(cost[order]) <= share * cost.sum() * (1 + 1e-9)]] = True
        mean = np.where(chosen[:, None], (first + second) / 2, first)
        return np.stack([mean.argmax(axis=1) == places, -np.log(np.clip(mean[rows, places], 1e-6, None))])

    def part(now: np.ndarray, what: int) -> dict[str, float]:
        parts = [ratio(now[what], none[what], both[what], weights) for weights in [np.ones(len(rows)), *draws]]
        low, high = np.nanpercentile(parts[1:], [2.5, 97.5])
        return {"mean": parts[0], "low": float(low), "high": float(high)}

    none, both = values(orders[0], 0.0), values(orders[0], 1.0)
    points = []
    for share in SHARES:
        now = np.mean([values(order, share) for order in orders], axis=0)
        accuracy, log_loss = now.mean(axis=1)
        facts = {"share": share, "accuracy": float(accuracy), "log_loss": float(log_loss)}
        points.append({**facts, "of_gain": part(now, 0), "of_log_loss": part(now, 1)})
    return points


def resampled(group: np.ndarray) -> list[np.ndarray]:
    """How often each row counts, in RESAMPLES draws of whole groups with replacement."""
    rng, groups = np.random.default_rng(0), int(group.max()) + 1
    return [np.bincount(rng.integers(groups, size=groups), minlength=groups)[group] for _ in range(RESAMPLES)]


def ratio(now: np.ndarray, none: np.ndarray, both: np.ndarray, weights: np.ndarray) -> float:
    """The part of the gain from `none` to `both` that `now` has; NaN where there is no gain."""
    gain = float(weights @ (both - none))
    return float(weights @ (now - none)) / gain if gain else float("nan")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.planner")
