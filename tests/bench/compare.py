"""`make compare PAIRS=…`: every approach that a laptop can train, on one fold of one pairs file, in one table.

A method is trained where outputs/METHOD/fold-K holds no run of these pairs since its recipe last changed, so that an
interrupted comparison goes on where it stopped. All are scored here on the same rows, from their predictions.parquet, as
tracking.metrics scores: rows without a winner do not count for accuracy.
The interval of an accuracy is a bootstrap over groups of prompts, since rows that share a prompt are no independent evidence.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import polars as pl
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from postprocess.agreement.statistics import interval, resample
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, read_json, sha256, write_json
from recipes.pairwise.data.datasets import read_pairs, split, targets, winners
from recipes.pairwise.tracking import metrics
from tests.bench.processes import run_command

ROOT = Path(__file__).parents[2]
KERAS = ROOT / ".venv-keras" / "bin" / "python"
OUTPUTS = Path("outputs")
VERDICTS = ("model_a", "model_b")
METHODS = {  # name: what the table calls it, the file that says how it is trained
    "longer": ("the longer response", "tests/bench/compare.py"),
    "tfidf": ("TF-IDF, logistic regression", "tests/bench/compare.py"),
    "siamese": ("Siamese LSTMs (recipes/siamese.py)", "recipes/siamese.py"),
    "minilm_cls": ("MiniLM, classification head (recipes/minilm_cls.yml)", "recipes/minilm_cls.yml"),
    "minilm_reward": ("MiniLM, reward head (recipes/minilm_reward.yml)", "recipes/minilm_reward.yml"),
}


@dataclass(frozen=True)
class Fold:
    """One fold of one pairs file: the rows that are trained on and the rows that are measured."""

    pairs: Path
    number: int
    pairs_sha256: str
    train: pl.DataFrame
    held_out: pl.DataFrame


@click.command()
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--fold", default=0, show_default=True, help="The fold that is held out and measured.")
@click.option("--only", help="Train only these, separated by commas; others are shown where they are up to date.")
@click.option("--base", envvar="BASE", type=click.Path(path_type=Path), help="MiniLM's folder, on a machine without network.")
@exits_with_2
def main(pairs: Path, fold: int, only: str | None, base: Path | None) -> None:
    """Train what is not up to date on PAIRS and write outputs/compare/compare.json."""
    wanted = list(METHODS) if only is None else only.split(",")
    if not set(wanted) <= METHODS.keys():
        raise UserError(f"--only {only}: expected some of {', '.join(METHODS)}")
    if base is not None and not (base / "config.json").is_file():
        raise UserError(f"--base {base}: no config.json there; give the folder of a model")
    rows_of_fold = read_fold(pairs, fold)

    rows = []
    for name, (title, _) in METHODS.items():
        run = find_run(name, rows_of_fold)
        if run is None and name in wanted:
            print(f"{name}: training on {len(rows_of_fold.train)} pairs", flush=True)
            train(name, rows_of_fold, base)
            run = find_run(name, rows_of_fold)
            if run is None:
                raise UserError(f"{name}: it ended without predictions of fold {fold} of {pairs}")
        print(f"{name}: {f'up to date in {run}' if run else 'not there, left out'}", flush=True)
        if run:
            rows.append({"method": title, "run": str(run), **score(run, rows_of_fold)})
    write_results(rows, rows_of_fold)


def read_fold(pairs: Path, number: int) -> Fold:
    """The fold of a pairs file, its rows in the order of their ids."""
    frame = read_pairs(pairs)
    if "group" not in frame.columns:
        raise UserError(f"{pairs}: no column group; it was not written by python -m preprocess")
    train_rows, held_out = split(frame, number, pairs)
    return Fold(pairs, number, sha256(pairs), train_rows.sort("id"), held_out.sort("id"))


def run_folder(name: str, fold: Fold) -> Path:
    """Where a method's run of a fold is written."""
    return OUTPUTS / name / f"fold-{fold.number}"


def find_run(name: str, fold: Fold) -> Path | None:
    """The folder of a method's run on these pairs and this fold since its recipe last changed, if there is one."""
    folder = run_folder(name, fold)
    metrics_file = folder / "metrics.json"
    if not metrics_file.is_file() or not (folder / "predictions.parquet").is_file():
        return None

    is_of_these_pairs = read_json(metrics_file).get("pairs_sha256") == fold.pairs_sha256
    recipe_changed = (ROOT / METHODS[name][1]).stat().st_mtime
    is_current = is_of_these_pairs and metrics_file.stat().st_mtime >= recipe_changed
    return folder if is_current else None


def train(name: str, fold: Fold, base: Path | None) -> None:
    """Train a method on the fold's training rows; its run folder then holds predictions.parquet and metrics.json."""
    out = run_folder(name, fold)
    if name in ("longer", "tfidf"):
        started = time.monotonic()
        predict = longer if name == "longer" else tfidf
        p_a = predict(fold.train, fold.held_out)
        write_run(out, p_a, fold, time.monotonic() - started)
        return

    if name == "siamese":
        if not KERAS.is_file():
            raise UserError(f"{KERAS}: absent; `make setup` makes the environment that has Keras")
        options = ["--pairs", str(fold.pairs), "--fold", str(fold.number), "--out", str(out)]
        run_command(str(KERAS), str(ROOT / "recipes" / "siamese.py"), *options)
    else:
        options = ["--base-model", str(base)] if base else []
        variables = {"PAIRWISE_PAIRS": str(fold.pairs), "PAIRWISE_FOLD": str(fold.number)}
        run_command("axolotl", "train", f"recipes/{name}.yml", *options, **variables)


def longer(train_rows: pl.DataFrame, rows: pl.DataFrame) -> np.ndarray:
    """p(A) by length in characters alone: how often the longer response wins among the training rows; equal: A is taken."""

    def a_is_longer(frame: pl.DataFrame) -> np.ndarray:
        length_a, length_b = (frame[f"response_{side}"].list.join("").str.len_chars() for side in "ab")
        return (length_a >= length_b).to_numpy()

    wins_a = targets(train_rows, VERDICTS)[:, 0]
    share = np.where(a_is_longer(train_rows), wins_a, 1 - wins_a).mean()
    return np.where(a_is_longer(rows), share, 1 - share)


def tfidf(train_rows: pl.DataFrame, rows: pl.DataFrame) -> np.ndarray:
    """p(A) by logistic regression on the difference of two responses' TF-IDF over 1 to 3 characters, every script alike.

    Every pair is trained on in both orders, and nothing is added that is the same for both: the swapped pair has 1 - p.
    """

    def texts(frame: pl.DataFrame, side: str) -> list[str]:
        return frame[f"response_{side}"].list.join("\n").fill_null("").to_list()

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=3, sublinear_tf=True, dtype=np.float32)
    both = vectorizer.fit_transform(texts(train_rows, "a") + texts(train_rows, "b"))
    difference = both[: len(train_rows)] - both[len(train_rows) :]
    shares = targets(train_rows, VERDICTS)
    weights = train_rows["weight"].to_numpy()[:, None] * shares
    # A pair counts for A by A's share, for B by B's, and likewise with its sides exchanged: four rows.
    features = scipy.sparse.vstack([difference, difference, -difference, -difference])
    labels = np.repeat([1, 0, 0, 1], len(train_rows))
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(features, labels, sample_weight=np.concatenate([weights[:, 0], weights[:, 1]] * 2))
    return model.predict_proba(vectorizer.transform(texts(rows, "a")) - vectorizer.transform(texts(rows, "b")))[:, 1]


def write_run(folder: Path, p_a: np.ndarray, fold: Fold, seconds: float) -> None:
    """predictions.parquet and metrics.json as other runs have them, for a method without a second order."""
    both = np.stack([np.stack([p_a, 1 - p_a], axis=1)] * 2, axis=1)
    table = metrics.predictions(fold.held_out["id"].to_list(), both, VERDICTS, fold.held_out)
    with atomic_file(folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)
    values = {"rows": len(table), "training_rows": len(fold.train), "seconds_training": round(seconds, 1)}
    write_json(folder / "metrics.json", {**values, "fold": fold.number, "pairs_sha256": fold.pairs_sha256})


def score(run: Path, fold: Fold) -> dict[str, float]:
    """A run's accuracy with its interval, log loss, rows and seconds, on all the fold's rows, by the mean of both orders."""
    table = pl.read_parquet(run / "predictions.parquet").sort("id")
    if table["id"].to_list() != fold.held_out["id"].to_list():
        raise UserError(f"{run / 'predictions.parquet'}: not the rows of fold {fold.number}; remove the folder to train again")
    labels = targets(fold.held_out, VERDICTS)
    mean = table.select("p_model_a", "p_model_b").to_numpy()
    winners_r = winners(fold.held_out, VERDICTS)
    is_decided_r = winners_r >= 0
    values = metrics.scores(np.stack([mean, mean], axis=1), labels, winners_r)
    is_right_r = mean.argmax(axis=1) == winners_r
    low, high = interval(is_right_r, is_decided_r, resample(fold.held_out["group"].to_numpy()))
    recorded = read_json(run / "metrics.json")
    return {
        "accuracy": values["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": values["log_loss"],
        "rows": len(table),
        "rows_with_a_winner": int(is_decided_r.sum()),
        "seconds": round(recorded.get("seconds_training", 0) + recorded.get("seconds_predicting", 0), 1),
    }


def write_results(rows: list[dict], fold: Fold) -> None:
    """Write outputs/compare/compare.json, and print it as a table for Markdown."""
    facts = {"pairs": str(fold.pairs), "pairs_sha256": fold.pairs_sha256, "fold": fold.number}
    facts |= {"groups": fold.held_out["group"].n_unique(), "training_rows": len(fold.train)}
    write_json(OUTPUTS / "compare" / "compare.json", {**facts, "methods": rows})

    print(f"\nfold {fold.number} of {fold.pairs}: {len(fold.train)} pairs for training, {facts['groups']} groups held out\n")
    print("| method | accuracy | 95 % interval | log loss | rows | seconds |\n|---|---|---|---|---|---|")
    for row in rows:
        between = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        figures = f"{row['accuracy']:.3f} | {between} | {row['log_loss']:.3f} | {row['rows']} | {row['seconds']:.0f}"
        print(f"| {row['method']} | {figures} |")


if __name__ == "__main__":
    sys.exit(main())
