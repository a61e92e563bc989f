"""Run folders for the tests of the report, as training leaves them, written row by row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from postprocess.report.metrics import ScoredRows, score_rows
from postprocess.report.page import render_page
from postprocess.report.results import measure_run
from postprocess.report.run_data import RunData, read_run
from preprocess.core.files import sha256, write_json
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking import metrics

TWO = VERDICTS[:2]
ALL_METRICS = dict.fromkeys(("accuracy", "log_loss", "flip_rate", "accuracy_of_longer"), 0.5)


@dataclass(frozen=True)
class Row:
    """A pair and what the model made of it: P(A) in the order as given and swapped, both as the pairs file names A."""

    given: float
    swapped: float
    winner: str = "model_a"
    prompt: str = "Which?"
    a: str = "This."
    b: str = "That."
    language: str | None = "English"
    source: str = "made"
    group: int | None = None
    fold: int = 0
    tie: float = 0.0

    def probabilities(self, verdicts) -> list[list[float]]:
        """Both orders' probabilities; a tie takes its share of both answers'."""
        orders = []
        for p in (self.given, self.swapped):
            shares = {"model_a": p * (1 - self.tie), "model_b": (1 - p) * (1 - self.tie), "tie": self.tie}
            orders.append([shares[verdict] for verdict in verdicts])
        return orders


# Right, wrong and flipped, right, wrong: the four rows that the tests compute by hand.
FOUR = (
    Row(0.92, 0.72, "model_a", a="a long answer", b="short", group=1),
    Row(0.62, 0.20, "model_a", a="short", b="a long answer", group=1, language="German"),
    Row(0.28, 0.10, "model_b", a="short", b="a long answer", group=2),
    Row(0.82, 0.62, "model_b", a="a long answer", b="short", group=2),
)


def write_pairs(path: Path, rows) -> pl.DataFrame:
    """Write a pairs.parquet with these rows, named row0, row1, …"""
    columns = {
        "id": [f"row{number}" for number in range(len(rows))],
        "prompt": [[row.prompt] for row in rows],
        "response_a": [[row.a] for row in rows],
        "response_b": [[row.b] for row in rows],
        "winner": [row.winner for row in rows],
        "language": [row.language for row in rows],
        "source": [row.source for row in rows],
        "group": [number if row.group is None else row.group for number, row in enumerate(rows)],
        "fold": pl.Series([row.fold for row in rows], dtype=pl.Int8),
        "weight": [1.0] * len(rows),
    }
    for verdict in VERDICTS:
        columns[f"p_{verdict}"] = [float(row.winner == verdict) for row in rows]
    frame = pl.DataFrame(columns)
    frame.write_parquet(path)
    return frame


def write_run(folder: Path, rows=FOUR, verdicts=TWO, pairs: Path | None = None, **changed) -> Path:
    """Fill `folder` with the run that made these rows; `changed` are keys of metrics.json. Its pairs stand beside it."""
    folder.mkdir(parents=True)
    pairs = pairs or folder.parent / "pairs.parquet"
    frame = write_pairs(pairs, rows) if not pairs.exists() else pl.read_parquet(pairs)
    fold = changed.get("fold")
    numbers = [number for number, row in enumerate(rows) if fold is None or row.fold == fold]
    probabilities_rov = np.array([rows[number].probabilities(verdicts) for number in numbers])
    ids = [f"row{number}" for number in numbers]
    metrics.predictions(ids, probabilities_rov, verdicts, frame).write_parquet(folder / "predictions.parquet")
    values = {"rows": len(numbers), "training_rows": 1590, "fold": 0, "rows_were_trained_on": False, "steps": 60}
    write_json(folder / "metrics.json", values | {"accuracy": 0.5, "log_loss": 0.6, "pairs_sha256": sha256(pairs)} | changed)
    write_json(folder / "run.json", {"block": {"pairs": str(pairs)}})
    write_json(folder / "history.json", [{"loss": 0.7 - step / 100, "learning_rate": 1e-4, "step": step} for step in (1, 2, 3)])
    recorded = {"recipe": "tiny.yml", "git_commit": "0123456789abcdef-dirty", "versions": {"torch": "2.13.0", "peft": "absent"}}
    contract = {"head": "score", "verdicts": list(verdicts), "budget_tokens": 256, "base_model": "some/base", "revision": None}
    write_json(folder / "contract.json", contract | {"recorded": recorded | {"created": "2026-11-25T09:43:39+00:00"}})
    return folder


def write_agreement(folder: Path, recorded: float | None = None) -> None:
    """Write what `python -m postprocess` leaves of a comparison, of the predictions in the folder or of others."""
    predictions, parts = pl.read_parquet(folder / "predictions.parquet"), []
    for order in ("as_given", "swapped"):
        own = {name: pl.col(f"p_{name}_{order}") if recorded is None else pl.lit(recorded) for name in TWO}
        columns = {f"{model}_p_{name}": column for model in ("recorded", "trained", "merged") for name, column in own.items()}
        parts.append(predictions.select("id", order=pl.lit(order), **columns))
    pl.concat(parts).write_parquet(folder / "agreement.parquet")
    difference = {"mean": 0.00012, "largest": 0.00114, "kl_divergence": None, "verdicts_changed": 3}
    model = {"model": "merged", "precision": "float16", "accuracy": 0.5, "log_loss": 0.643, "against_trained": difference}
    intervals = {"accuracy_interval": [0.4, 0.6], "log_loss_interval": [0.6, 0.7]}
    gains = {"accuracy": {"difference": 0.0, "interval": [0.0, 0.0]}}
    report = {"rows": 4, "tolerance": 0.05, "packaged": "merged", "mean_difference": 0.00012, "agrees": True}
    write_json(folder / "agreement.json", report | {"models": [model | intervals], "packaged_minus_trained": gains})


def read(folder: Path, rows=FOUR, verdicts=TWO) -> RunData:
    """The run that made these rows, read from the folder that it was written to."""
    return read_run(write_run(folder, rows, verdicts))


def score(folder: Path, rows=FOUR, verdicts=TWO) -> ScoredRows:
    """The measured rows of the run that made these rows."""
    return score_rows(read(folder, rows, verdicts).predictions, verdicts)


def render(folder: Path) -> str:
    """The page of a run folder."""
    run = read_run(folder)
    return render_page(run, measure_run(run))
