"""Decides whether a model may be packaged, from the probabilities that model_scores.py wrote.

pipeline.py calls `needs_more_rows` until the rows decide, then `agreement`, which prints the comparison,
writes it and refuses a package that is not what was trained.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from postprocess.agreement.comparison import compare
from postprocess.agreement.conditions import RECORD_CONDITION, UNDECIDED
from postprocess.agreement.model_scores import read_scores
from postprocess.agreement.slices import groups_of, slice_rows
from postprocess.agreement.statistics import Column, ComparedRows
from postprocess.agreement.table import probability_table, table_lines, without_nan
from postprocess.agreement.validation_rows import (
    count_validation_rows,
    read_metrics,
    validation_rows,
)
from postprocess.run_folder import Run
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, write_json
from recipes.pairwise.data.datasets import targets, winners


def needs_more_rows(run: Run, scores_files: Sequence[Path]) -> bool:
    """Find out whether the rows scored so far leave it open if the models agree, and there are more."""
    _, _, report = compare_models(run, scores_files)
    return report["verdict"] == UNDECIDED and report["rows"] < count_validation_rows(run)


def agreement(run: Run, scores_files: Sequence[Path], out: Path) -> None:
    """Compare the models, print a table, write agreement.json and, beside it, all probabilities.

    Raises:
        UserError: The models do not agree, or there are too few rows to decide. Both files are
            written by then.
    """
    rows, columns, report = compare_models(run, scores_files)
    print("\n".join(table_lines(report)))

    # agreement.json is written last: where it is, the table is there too.
    table = probability_table(rows, columns, run.contract.verdicts)
    table_file = out.with_suffix(".parquet")
    with atomic_file(table_file) as temporary:
        table.write_parquet(temporary)
    write_json(out, without_nan(report))

    if not report["agrees"]:
        raise UserError(f"{out}: {explain_refusal(run, report, table_file)}")


def compare_models(
    run: Run, scores_files: Sequence[Path]
) -> tuple[pl.DataFrame, Sequence[Column], dict]:
    """Compare the models on all rows that were scored; each of the files holds a part of them.

    Returns:
        The validation rows, the models' probabilities of them, and what agreement.json holds.
    """
    # The rows themselves are read again: as many as were scored, in the same order.
    columns, golden = read_scores(scores_files)
    row_count = len(columns[0].probabilities_rov)
    frame, _ = validation_rows(run, end=row_count)

    verdicts = run.contract.verdicts
    groups_r = groups_of(frame)
    rows = ComparedRows(
        labels_rv=targets(frame, verdicts),
        winners_r=winners(frame, verdicts),
        groups_r=groups_r,
        slices=slice_rows(frame, groups_r),
    )
    report = compare(columns, rows, run.recipe.pairwise.package)

    # The kernel scores the golden rows again, and must come to the same.
    report["golden"] = golden[report["packaged"]]
    report["rows_were_trained_on"] = read_metrics(run)["rows_were_trained_on"]
    return frame, columns, report


def explain_refusal(run: Run, report: dict, table_file: Path) -> str:
    """Say why no package is made, and what to do about it.

    `report` is the content of agreement.json. `table_file` has the probabilities of each row to look at.
    """
    # Show the first condition that led to this verdict: list_conditions puts causes before what may
    # follow from them.
    verdict = report["verdict"]
    deciding = [condition for condition in report["conditions"] if condition["verdict"] == verdict]
    condition = deciding[0]
    if verdict == UNDECIDED:
        return describe_undecided(condition, report["rows"])

    value = f"{condition['value']:.4f}"
    if condition["name"] == RECORD_CONDITION:
        return (
            f"the model, loaded as it was trained, differs by {value} in probability from "
            f"predictions.parquet, which training wrote: a file in {run.weights} or {run.folder} has been "
            "exchanged since; put the training's file back, or train again"
        )
    return (
        f"{condition['name']} is {value}, over {condition['bound_name']} ({condition['bound']:g}); no "
        f"package is made: {advise(run, report)}; {table_file.name} beside it has the rows"
    )


def describe_undecided(condition: dict, row_count: int) -> str:
    """Say what stays open although every validation row was compared, and how many rows would decide."""
    rows_needed = "more rows would decide"
    if condition["rows_needed"]:
        rows_needed = f"about {condition['rows_needed']:,} rows would decide"
    return (
        f"undecided, no package is made: {condition['name']} is {condition['value']:.4f} on all "
        f"{row_count:,} validation rows, but may be {condition['high']:.4f}, which is over "
        f"{condition['bound_name']} ({condition['bound']:g}); {rows_needed}: hold out a larger fold, or "
        "raise the tolerance in the recipe"
    )


def advise(run: Run, report: dict) -> str:
    """Say what to change in the recipe so that the package comes nearer to the trained model.

    Two steps move a package away from it: merging the adapter into float16 weights, and rounding these to
    fewer bits. The advice is about the step that is to blame.
    """
    # How far each model is from the trained one: the mean difference in probability.
    mean_differences = {}
    for model in report["models"]:
        mean_differences[model["model"]] = model["against_trained"]["mean"]
    packaged = report["packaged"]
    packaged_mean = mean_differences[packaged]
    merged_mean = mean_differences.get("merged", 0)

    # Rounding is to blame where the merged model alone is within the tolerance, or at most half as far
    # away as the package. An unmerged package has its base in nf4, whatever `quantize` says.
    quantize = run.recipe.pairwise.package.quantize
    is_quantised = quantize != "none" or packaged == "unmerged"
    is_merging_good = merged_mean <= report["tolerance"] or merged_mean <= packaged_mean / 2
    if is_merging_good and is_quantised:
        return advise_less_rounding(packaged, quantize)

    # Otherwise merging is to blame, or float16 where no adapter was merged. Where an unmerged package
    # was compared too, no other kind is left.
    if "unmerged" in mean_differences:
        return (
            "no other kind of package would be nearer to the trained model: raise the tolerance if this "
            "is near enough, or train again"
        )
    if run.has_adapter:
        return (
            f"merging alone changes probabilities by {merged_mean:.4f}: package with quantize: nf4 and "
            "adapter: unmerged"
        )

    # Without an adapter nothing was merged: only float16 can have changed the model.
    change = f"float16 alone changes probabilities by {merged_mean:.4f}"
    if not run.recipe.pairwise.train:
        return f"{change}: choose another base model, or raise the tolerance if this is near enough"
    return f"{change}: train it again with fp16: true"


def advise_less_rounding(packaged: str, quantize: str) -> str:
    """Say which kind of package rounds the weights less than the one that was refused."""
    if packaged == "unmerged":
        return "package with adapter: merged and quantize: int8 or none"
    if quantize == "int8":
        return "package with quantize: none"
    return "package with quantize: int8 or none"
