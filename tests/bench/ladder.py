"""`make ladder PAIRS=… BASE=…`: what teachers, a pool and extra rows add to votes, measured on one lockbox.

A rung is a recipe, outputs/ladder/RUNG.yml: minilm_reward, or another, with some keys of its own, trained on every row with
votes. The teacher is the first rung, by its runs of all folds. What is up to date is not made again, so that an interrupted
ladder goes on where it was. All rungs are scored on the lockbox, by the code of `pairwise labels` and of the report.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import polars as pl
import yaml

from postprocess.labels.score_rows import score_rows
from postprocess.report import metrics
from postprocess.report.predictions import Predictions, join_pairs
from postprocess.run_folder import read_run
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, read_json, read_yaml, sha256, write_json
from recipes.pairwise.config.recipe_files import find_recipe
from recipes.pairwise.config.schema import Recipe, read_recipe
from recipes.pairwise.cv import is_complete
from recipes.pairwise.data.datasets import list_folds, read_pairs
from recipes.pairwise.data.teacher_labels import LABELS
from tests.bench.processes import run_command

FOLDER = Path("outputs/ladder")
TEACHER = "votes"
STUDENT = "t5"
# These would change the fold or the pairs of every rung alike.
OVERRIDES = ("PAIRWISE_FOLD", "PAIRWISE_PAIRS")
COLUMNS = ("method", "accuracy", "change", "log loss", "change", "Brier score", "seconds")


@dataclass(frozen=True)
class Rung:
    """One way to train.

    Attributes:
        name: The stem of its recipe.
        title: What the table calls it.
        block: Its keys of the `pairwise:` block.
        role: The role of rows that it cannot do without, beside train and test.
    """

    name: str
    title: str
    block: dict = field(default_factory=dict)
    role: str = "train"


def distilled(weight: float, temperature: float, pool: bool = False) -> dict:
    """Return the keys of a student of the first rung."""
    teachers = [str(FOLDER / TEACHER)]
    settings = {"teachers": teachers, "weight": weight, "temperature": temperature, "pool": pool}
    return {"distill": settings}


RUNGS = (
    Rung(TEACHER, "votes"),
    Rung("smoothing", "votes, label smoothing 0.1", {"label_smoothing": 0.1}),
    Rung("t1", "self-distilled, T 1, w 0.5", distilled(0.5, 1.0)),
    Rung(STUDENT, "self-distilled, T 5, w 0.9", distilled(0.9, 5.0)),
    Rung("pool", "T 5, w 0.9, with the pool", distilled(0.9, 5.0, pool=True), role="pool"),
    Rung("extra", "votes, with extra rows", role="extra"),
)


@dataclass(frozen=True)
class Result:
    """A way to train, its scores of the lockbox rows, and the seconds of its training."""

    title: str
    scored: metrics.ScoredRows
    seconds: float


@click.command()
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--recipe", default="minilm_reward", show_default=True, help="The recipe whose keys the rungs change.")
@click.option("--base", envvar="BASE", type=click.Path(path_type=Path), help="The base model's folder, without a network.")
@click.option(
    "--without",
    multiple=True,
    metavar="SOURCE",
    help="A source whose lockbox rows are not measured, e.g. one of few prompts. What is trained stays the same.",
)
@click.option(
    "--held-out",
    is_flag=True,
    help="Cross-validate the student with T 5 too, and compare it with the votes on the held-out folds.",
)
@exits_with_2
def main(pairs: Path, recipe: str, base: Path | None, without: tuple[str, ...], held_out: bool) -> None:
    """Train all rungs on PAIRS, which has lockbox rows, and write outputs/ladder/ladder.json."""
    for name in OVERRIDES:
        if name in os.environ:
            raise UserError(f"{name} is set; unset it, every rung has its own fold and pairs")
    table = read_pairs(pairs)
    roles = set(table["role"])
    if "test" not in roles:
        raise UserError(f"{pairs}: no lockbox rows; make them with pairwise preprocess … --test 0.2")

    # All rungs but the one with extra rows train on the same rows.
    FOLDER.mkdir(parents=True, exist_ok=True)
    with atomic_file(FOLDER / "pairs.parquet") as temporary:
        table.filter(pl.col("role") != "extra").write_parquet(temporary)

    results = []
    for rung in RUNGS:
        if rung.role not in roles:
            print(f"{rung.title}: left out, {pairs} has no rows of role {rung.role}", flush=True)
            continue
        rung_recipe = read_recipe(write_recipe(rung, find_recipe(recipe), pairs, base))

        train(rung_recipe)
        results.append(measure_run(rung.title, rung_recipe, without))
        # Its labels are what the students after it read.
        if rung.name == TEACHER:
            teach(rung_recipe)

    results.append(measure_folds(read_recipe(FOLDER / f"{TEACHER}.yml"), without))
    write_results(compare_with_first(results), pairs)
    if held_out:
        print_table(compare_on_held_out_folds(without))


def write_recipe(rung: Rung, recipe: Path, pairs: Path, base: Path | None) -> Path:
    """Write a rung's recipe, unless it stands there already: a newer file would be trained again.

    Args:
        rung: The way to train.
        recipe: The recipe whose keys it changes.
        pairs: The pairs with all their roles, which only a rung with extra rows trains on.
        base: The base model's folder; None for the recipe's own base model.
    """
    values = read_yaml(recipe)
    if base is not None:
        values["base_model"] = str(base)
    values["output_dir"] = str(FOLDER / rung.name)

    # The lockbox is held out for all rungs, so that none needs to hold out a fold.
    block = values["pairwise"]
    block["fold"] = "all"
    block["pairs"] = str(FOLDER / "pairs.parquet")
    if rung.role == "extra":
        block["pairs"] = str(pairs)
    block.update(rung.block)

    file = FOLDER / f"{rung.name}.yml"
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file


def train(recipe: Recipe) -> None:
    """Train a rung on all its rows, unless its run is up to date."""
    if is_complete(recipe.run_folder, recipe, recipe.axolotl["base_model"]):
        print(f"{recipe.path}: up to date in {recipe.run_folder}", flush=True)
        return
    run_command("axolotl", "train", str(recipe.path))


def teach(recipe: Recipe) -> None:
    """Train the teacher's folds, and label all rows with them."""
    run_command(sys.executable, "-m", "recipes.pairwise.cv", str(recipe.path))
    run_command(sys.executable, "-m", "postprocess.labels", str(recipe.path))


def measure_run(title: str, recipe: Recipe, without: Sequence[str]) -> Result:
    """Score the lockbox with a rung's run, and measure its rows but for those of some sources."""
    lockbox = read_pairs(recipe.pairwise.pairs).filter(role="test")
    run = read_run(recipe)

    # Scores that were kept are of no use for a run that was trained again, or for other rows.
    key = {"contract_sha256": sha256(run.folder / "contract.json"), "pairs_sha256": sha256(recipe.pairwise.pairs)}
    rows = score_rows(run, lockbox, key, run.folder / "lockbox")

    seconds = read_json(run.folder / "metrics.json")["seconds_training"]
    measured = lockbox.filter(~pl.col("source").is_in(without))
    return measure(title, rows, measured, recipe, seconds)


def measure_folds(recipe: Recipe, without: Sequence[str]) -> Result:
    """Measure the mean of the teacher's folds on the lockbox, which its labels are."""
    pairs = read_pairs(recipe.pairwise.pairs)
    lockbox = pairs.filter(role="test").filter(~pl.col("source").is_in(without))
    labels = pl.read_parquet(recipe.run_folder / LABELS)
    rows = lockbox.select("id", "fold", "winner").join(labels, on="id", maintain_order="left")

    seconds = 0.0
    for fold in list_folds(pairs):
        fold_metrics = read_json(recipe.run_folder / f"fold-{fold}" / "metrics.json")
        seconds += fold_metrics["seconds_training"]
    return measure("votes, mean of the folds' models", rows, lockbox, recipe, seconds)


def compare_on_held_out_folds(without: Sequence[str]) -> list[dict]:
    """Cross-validate the student, and compare it with its teacher on the rows that each fold held out."""
    run_command(sys.executable, "-m", "recipes.pairwise.cv", str(FOLDER / f"{STUDENT}.yml"))
    results = []
    for rung in RUNGS:
        if rung.name not in (TEACHER, STUDENT):
            continue
        recipe = read_recipe(FOLDER / f"{rung.name}.yml")
        pairs = read_pairs(recipe.pairwise.pairs).filter(role="train")
        measured = pairs.filter(~pl.col("source").is_in(without))

        rows = pl.read_parquet(recipe.run_folder / "oof.parquet")
        seconds = read_json(recipe.run_folder / "metrics.json")["seconds_training"]
        title = f"held-out folds: {rung.title}"
        results.append(measure(title, rows, measured, recipe, seconds))
    return compare_with_first(results)


def measure(title: str, rows: pl.DataFrame, lockbox: pl.DataFrame, recipe: Recipe, seconds: float) -> Result:
    """Measure predictions of the lockbox's rows; `rows`, with the columns of predictions.parquet, may have more."""
    measured_rows = rows.join(lockbox, on="id", how="semi")
    rows_with_labels = join_pairs(measured_rows.sort("id"), lockbox)
    predictions = Predictions(recipe.run_folder, rows_with_labels)
    return Result(title, metrics.score_rows(predictions, recipe.pairwise.verdicts), seconds)


def compare_with_first(results: list[Result]) -> list[dict]:
    """Make the table's rows; changes are from the first one, on the same rows and the same resamples."""
    first = results[0].scored
    lines = []
    for result in results:
        scored = result.scored
        gain = scored.estimate_gain(first.is_right_r, first.losses_r)
        estimates = {
            "accuracy": scored.estimate(scored.is_right_r, scored.is_decided_r),
            "accuracy_change": gain.accuracy,
            "log_loss": scored.estimate(scored.losses_r),
            "log_loss_change": gain.log_loss,
            "brier_score": metrics.estimate_brier_score(scored),
        }
        figures = {name: asdict(estimate) for name, estimate in estimates.items()}
        lines.append({"method": result.title, **figures, "seconds": result.seconds})
    return lines


def write_results(lines: list[dict], pairs: Path) -> None:
    """Write outputs/ladder/ladder.json, and print it as a table."""
    values = {"pairs": str(pairs), "pairs_sha256": sha256(pairs), "methods": lines}
    write_json(FOLDER / "ladder.json", values)
    print_table(lines)


def print_table(lines: list[dict]) -> None:
    """Print the table for Markdown."""
    print()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for line in lines:
        cells = (
            line["method"],
            f"{line['accuracy']['value']:.3f}",
            format_change(line["accuracy_change"]),
            f"{line['log_loss']['value']:.3f}",
            format_change(line["log_loss_change"]),
            f"{line['brier_score']['value']:.3f}",
            f"{line['seconds']:.0f}",
        )
        print("| " + " | ".join(cells) + " |")


def format_change(change: dict[str, float]) -> str:
    """Format a change with its sign and its 95 % interval."""
    return f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"


if __name__ == "__main__":
    sys.exit(main())
