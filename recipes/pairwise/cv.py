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
from recipes.pairwise.data.datasets import list_folds, read_pairs
from recipes.pairwise.data.teacher_labels import hash_labels

AVERAGED = ("accuracy", "log_loss", "flip_rate", "accuracy_of_longer")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("recipe")
@click.option(
    "--join", "only_join", is_flag=True, help="Train nothing; join the folds that are trained."
)
@click.option("--base-model", help="Train from this base model, not the recipe's; before `--`.")
@click.argument("axolotl_options", nargs=-1, type=click.UNPROCESSED)
@exits_with_2
def main(
    recipe: str, only_join: bool, base_model: str | None, axolotl_options: tuple[str, ...]
) -> None:
    """Train all folds of RECIPE with axolotl and write outputs/R/oof.parquet and cv.json.

    Options that follow are Axolotl's, for instance --launcher torchrun.
    """
    if "PAIRWISE_FOLD" in os.environ:
        raise UserError(
            "PAIRWISE_FOLD is set, which chooses one fold, but cross-validation trains every fold; unset it"
        )
    checked = read_recipe(recipe)
    pairs = Path(checked.pairwise.pairs)
    command = ["axolotl", "train", recipe]
    if base_model is not None:
        command += ["--base-model", base_model]
    command += axolotl_options

    folds = list_folds(read_pairs(pairs))
    if only_join:
        collect(checked.run_folder, folds, pairs)
        return

    for fold in folds:
        folder = checked.run_folder / f"fold-{fold}"
        if is_complete(folder, checked, base_model or checked.axolotl["base_model"]):
            print(f"fold {fold}: up to date in {folder}")
            continue

        print(f"fold {fold}: {' '.join(command)} with PAIRWISE_FOLD={fold}", flush=True)
        environment = os.environ | {"PAIRWISE_FOLD": str(fold)}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            raise UserError(
                f"fold {fold}: axolotl train ended with exit code {code}; run this again to go on from this fold"
            )
    collect(checked.run_folder, folds, pairs)


def is_complete(folder: Path, recipe: Recipe, base_model: str) -> bool:
    """Return whether the run in `folder` has ended, and trained what the recipe says today."""
    # A run gets this file only after its weights and predictions.
    contract_file = folder / "contract.json"
    if not contract_file.exists():
        return False
    recipe_changed_since = recipe.path.stat().st_mtime > contract_file.stat().st_mtime
    if recipe_changed_since:
        return False

    # What the recipe only names: the base model, the code that makes token ids, pairs, teachers' labels.
    contract = read_json(contract_file)
    metrics = read_json(folder / "metrics.json")
    return (
        contract["base_model"] == base_model
        and contract["model_input_sha256"] == sha256(model_input.__file__)
        and metrics["pairs_sha256"] == sha256(recipe.pairwise.pairs)
        and metrics.get("labels_sha256", {}) == hash_labels(recipe.pairwise.distill)
    )


def collect(run_folder: Path, folds: list[int], pairs: Path) -> None:
    """Join what the runs of all folds predicted and measured: to oof.parquet and cv.json, and in a printed table.

    Raises:
        UserError: The predictions are not one for each training row of the pairs file.
    """
    predictions = []
    metrics = {}
    for fold in folds:
        fold_folder = run_folder / f"fold-{fold}"
        predictions.append(pl.read_parquet(fold_folder / "predictions.parquet"))
        metrics[fold] = read_json(fold_folder / "metrics.json")

    # Each row is in one fold, and predicted by the run that held this fold out.
    joined = pl.concat(predictions).sort("id")
    expected_ids = read_pairs(pairs).filter(role="train")["id"].sort()
    if joined["id"].to_list() != expected_ids.to_list():
        raise UserError(
            f"{run_folder}: the folds' predictions are not of the rows in {pairs}; train all folds on that file"
        )

    mean = mean_over_rows(metrics)
    with atomic_file(run_folder / "oof.parquet") as temporary:
        joined.write_parquet(temporary)
    write_json(run_folder / "cv.json", {"folds": metrics, "mean": mean})

    # The table.
    print(f"{'fold':<6}" + "".join(f"{name:>20}" for name in (*AVERAGED, "rows")))
    for fold, values in [*metrics.items(), ("all", mean)]:
        columns = "".join(f"{values[name]:>20.4f}" for name in AVERAGED)
        print(f"{fold!s:<6}{columns}{values['rows']:>20}")
    print(f"written: {run_folder / 'oof.parquet'} ({mean['rows']} rows)")


def mean_over_rows(metrics: dict[int, dict]) -> dict[str, float]:
    """Return the folds' metrics averaged with their rows as weights, and the number of rows."""
    rows = sum(values["rows"] for values in metrics.values())
    mean = {"rows": rows}
    for name in AVERAGED:
        total = sum(values[name] * values["rows"] for values in metrics.values())
        mean[name] = total / rows
    return mean


if __name__ == "__main__":
    main()
