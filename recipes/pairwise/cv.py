"""python -m recipes.pairwise.cv RECIPE: train every fold, then join their validation rows to outputs/R/oof.parquet.

A fold whose run is complete (same pairs, same model_input.py, recipe unchanged since) is not trained again, so that an
interrupted cross-validation goes on where it stopped. Out-of-fold rows are predicted by the model that never saw them.
"""

import os
import subprocess
from pathlib import Path

import click
import polars as pl

from preprocess import model_input
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, read_json, sha256, write_json
from recipes.pairwise.config.schema import Recipe, read_recipe
from recipes.pairwise.data.datasets import read_pairs

SHOWN = ("accuracy", "log_loss", "flip_rate", "accuracy_of_longer", "rows")


@click.command()
@click.argument("recipe")
@exits_with_2
def main(recipe: str) -> None:
    """Train all folds of RECIPE with axolotl and write outputs/R/oof.parquet and cv.json."""
    if "PAIRWISE_FOLD" in os.environ:
        raise UserError("PAIRWISE_FOLD is set; unset it, cross-validation trains every fold")
    checked = read_recipe(recipe)
    folds = fold_numbers(Path(checked.pairwise.pairs))
    for fold in folds:
        folder = checked.run_folder / f"fold-{fold}"
        if is_complete(folder, checked):
            print(f"fold {fold}: up to date in {folder}")
            continue
        print(f"fold {fold}: axolotl train {recipe} with PAIRWISE_FOLD={fold}", flush=True)
        environment = os.environ | {"PAIRWISE_FOLD": str(fold)}
        code = subprocess.run(["axolotl", "train", recipe], env=environment, check=False).returncode
        if code:
            raise UserError(f"fold {fold}: axolotl train ended with exit code {code}; run this again to go on from this fold")
    collect(checked.run_folder, folds, Path(checked.pairwise.pairs))


def fold_numbers(pairs: Path) -> list[int]:
    """The folds in a pairs.parquet."""
    return sorted(read_pairs(pairs)["fold"].unique())


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in `folder` has ended, on these pairs, with this model_input.py, since the recipe last changed."""
    contract = folder / "contract.json"
    if not contract.exists() or recipe.path.stat().st_mtime > contract.stat().st_mtime:
        return False
    same_pairs = read_json(folder / "metrics.json")["pairs_sha256"] == sha256(recipe.pairwise.pairs)
    return same_pairs and read_json(contract)["model_input_sha256"] == sha256(model_input.__file__)


def collect(run_folder: Path, folds: list[int], pairs: Path) -> None:
    """Join the folds' predictions to oof.parquet, their metrics to cv.json, and print both."""
    parts = [pl.read_parquet(run_folder / f"fold-{fold}" / "predictions.parquet") for fold in folds]
    joined = pl.concat(parts).sort("id")
    if joined["id"].to_list() != pl.read_parquet(pairs, columns=["id"])["id"].sort().to_list():
        raise UserError(f"{run_folder}: the folds' predictions are not of the rows in {pairs}; train all folds on it")
    metrics = {fold: read_json(run_folder / f"fold-{fold}" / "metrics.json") for fold in folds}
    total = sum(values["rows"] for values in metrics.values())
    mean = {name: sum(v[name] * v["rows"] for v in metrics.values()) / total for name in SHOWN[:-1]} | {"rows": total}
    with atomic_file(run_folder / "oof.parquet") as temporary:
        joined.write_parquet(temporary)
    write_json(run_folder / "cv.json", {"folds": metrics, "mean": mean})
    print(f"{'fold':<6}" + "".join(f"{name:>20}" for name in SHOWN))
    for fold, values in [*metrics.items(), ("all", mean)]:
        print(f"{fold!s:<6}" + "".join(f"{values[name]:>20.4f}" for name in SHOWN[:-1]) + f"{values['rows']:>20}")
    print(f"written: {run_folder / 'oof.parquet'} ({total} rows)")


if __name__ == "__main__":
    main()
