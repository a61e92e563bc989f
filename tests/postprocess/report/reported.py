"""Run folders for the tests of the report, as training leaves them, written row by row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from preprocess.core.files import sha256, write_json
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking import metrics

TWO = VERDICTS[:2]


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
        of = [{"model_a": p * (1 - self.tie), "model_b": (1 - p) * (1 - self.tie), "tie": self.tie} for p in self.orders]
        return [[one[verdict] for verdict in verdicts] for one in of]

    @property
    def orders(self) -> tuple[float, float]:
        return self.given, self.swapped


# Right, wrong and flipped, right, wrong: the four rows that the tests compute by hand.
FOUR = (
    Row(0.92, 0.72, "model_a", a="a long answer", b="short", group=1),
    Row(0.62, 0.20, "model_a", a="short", b="a long answer", group=1, language="German"),
    Row(0.28, 0.10, "model_b", a="short", b="a long answer", group=2),
    Row(0.82, 0.62, "model_b", a="a long answer", b="short", group=2),
)


def pairs_file(path: Path, rows) -> pl.DataFrame:
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
        **{f"p_{verdict}": [float(row.winner == verdict) for row in rows] for verdict in VERDICTS},
    }
    frame = pl.DataFrame(columns)
    frame.write_parquet(path)
    return frame


def run(folder: Path, rows=FOUR, verdicts=TWO, pairs: Path | None = None, **changed) -> Path:
    """Fill `folder` with the run that made these rows; `changed` are keys of metrics.json. Its pairs stand beside it."""
    folder.mkdir(parents=True)
    pairs = pairs or folder.parent / "pairs.parquet"
    frame = pairs_file(pairs, rows) if not pairs.exists() else pl.read_parquet(pairs)
    fold = changed.get("fold")
    chosen = [number for number, row in enumerate(rows) if fold is None or row.fold == fold]
    both = np.array([rows[number].probabilities(verdicts) for number in chosen])
    table = metrics.predictions([f"row{number}" for number in chosen], both, verdicts, frame)
    table.write_parquet(folder / "predictions.parquet")
    told = {"rows": len(chosen), "training_rows": 1590, "fold": 0, "rows_were_trained_on": False, "steps": 60}
    write_json(folder / "metrics.json", told | {"accuracy": 0.5, "log_loss": 0.6, "pairs_sha256": sha256(pairs)} | changed)
    write_json(folder / "run.json", {"block": {"pairs": str(pairs)}})
    write_json(folder / "history.json", [{"loss": 0.7 - step / 100, "learning_rate": 1e-4, "step": step} for step in (1, 2, 3)])
    recorded = {"recipe": "tiny.yml", "git_commit": "0123456789abcdef-dirty", "versions": {"torch": "2.13.0", "peft": "absent"}}
    contract = {"head": "score", "verdicts": list(verdicts), "budget_tokens": 256, "base_model": "some/base", "revision": None}
    write_json(folder / "contract.json", contract | {"recorded": recorded | {"created": "2026-11-25T09:43:39+00:00"}})
    return folder
