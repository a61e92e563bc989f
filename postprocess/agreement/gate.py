"""Decides whether a model may be packaged, from the probabilities that model_scores.py wrote.

pipeline.py calls `needs_more_rows` until the rows decide, then `agreement`, which prints the comparison,
writes it and refuses a package that is not what was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from postprocess.agreement.comparison import compare
from postprocess.agreement.conditions import RECORD_CONDITION, REFUSED, UNDECIDED
from postprocess.agreement.model_scores import read_scores
from postprocess.agreement.slices import slice_rows
from postprocess.agreement.statistics import Column, ComparedRows
from postprocess.agreement.table import groups_of, probability_table, table_lines, without_nan
from postprocess.agreement.validation_rows import count_validation_rows, validation_rows
from postprocess.run_folder import Run
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json
from recipes.pairwise.data.datasets import targets, winners


@dataclass(frozen=True)
class Comparison:
    """The models compared on some rows.

    Attributes:
        rows: The validation rows.
        columns: The models' probabilities of them.
        report: What agreement.json holds.
    """

    rows: pl.DataFrame
    columns: Sequence[Column]
    report: dict


def needs_more_rows(run: Run, scores_files: Sequence[Path]) -> bool:
    """Find out whether the rows scored so far leave it open if the models agree, and there are more."""
    report = compare_models(run, scores_files).report
    return report["verdict"] == UNDECIDED and report["rows"] < count_validation_rows(run)


def agreement(run: Run, scores_files: Sequence[Path], out: Path) -> None:
    """Compare the models, print a table, write agreement.json and, beside it, all probabilities.

    Args:
        run: The run that is packaged.
        scores_files: What score_models wrote, part by part.
        out: agreement.json.

    Raises:
        UserError: The models do not agree, or the rows do not decide. All is written by then.
    """
    comparison = compare_models(run, scores_files)
    report = comparison.report
    print("\n".join(table_lines(report)))

    verdicts = run.contract.verdicts
    with atomic_file(out.with_suffix(".parquet")) as temporary:
        table = probability_table(comparison.rows, comparison.columns, verdicts)
        table.write_parquet(temporary)
    write_json(out, without_nan(report))
    refuse(run, report, out)


def compare_models(run: Run, scores_files: Sequence[Path]) -> Comparison:
    """Compare the models on all rows that were scored."""
    columns, golden = read_scores(scores_files)
    frame, _ = validation_rows(run, end=len(columns[0].probabilities_rov))
    verdicts = run.contract.verdicts
    groups_r = groups_of(frame)
    rows = ComparedRows(
        targets(frame, verdicts), winners(frame, verdicts), groups_r, slice_rows(frame, groups_r)
    )
    report = compare(columns, rows, run.recipe.pairwise.package)

    metrics_file = run.folder / "metrics.json"
    metrics = read_object(metrics_file) if metrics_file.is_file() else {}
    report["rows_were_trained_on"] = bool(metrics.get("rows_were_trained_on"))
    # The kernel scores these rows again, and must come to the same.
    report["golden"] = golden[report["packaged"]]
    return Comparison(frame, columns, report)


def refuse(run: Run, report: dict, out: Path) -> None:
    """Raise UserError where the models do not agree: what is off, by how much, and what to do about it."""
    if report["agrees"]:
        return

    for condition in report["conditions"]:
        if condition["verdict"] == REFUSED and condition["name"] == RECORD_CONDITION:
            raise UserError(
                f"{out}: base and adapter, loaded as they were trained, differ by "
                f"{condition['value']:.4f} in probability from predictions.parquet, which training "
                f"wrote: one of {run.weights}, {run.folder} is not the training's; put it back, or "
                "train again"
            )
        if condition["verdict"] == REFUSED:
            raise UserError(
                f"{out}: {condition['name']} is {condition['value']:.4f}, over {condition['bound_name']} "
                f"({condition['bound']:g}); no package is made: {advise(run, report)}; "
                f"{out.with_suffix('.parquet').name} beside it has the rows"
            )

    for condition in report["conditions"]:
        if condition["verdict"] == UNDECIDED:
            raise UserError(describe_undecided(condition, report["rows"], out))


def describe_undecided(condition: dict, row_count: int, out: Path) -> str:
    """Say what stays open although every validation row was compared, and how many rows would decide."""
    rows_needed = "more rows would decide"
    if condition["rows_needed"]:
        rows_needed = f"about {condition['rows_needed']:,} rows would decide"
    return (
        f"{out}: undecided, no package is made: {condition['name']} is {condition['value']:.4f} on all "
        f"{row_count:,} validation rows, but may be {condition['high']:.4f}, over {condition['bound_name']} "
        f"({condition['bound']:g}); {rows_needed}: hold out a larger fold, or raise the tolerance in the "
        "recipe"
    )


def advise(run: Run, report: dict) -> str:
    """Say what to change in the recipe: less rounding where that is to blame, else another kind of package."""
    quantize = run.recipe.pairwise.package.quantize
    means = {}
    for model in report["models"]:
        means[model["model"]] = model["against_trained"]["mean"]

    # Merging is not to blame where most of the difference comes after it.
    merged_mean = means.get("merged", 0)
    packaged_mean = means[report["packaged"]]
    is_merging_good = merged_mean <= max(report["tolerance"], packaged_mean / 2)
    if is_merging_good and report["packaged"] == "unmerged":
        return "package with adapter: merged and quantize: int8 or none"
    if is_merging_good and quantize == "int8":
        return "package with quantize: none"
    if is_merging_good and quantize != "none":
        return "package with quantize: int8 or none"

    if "unmerged" in means:
        return "no package of this run would be nearer, raise the tolerance if that will do or train again"
    if run.has_adapter:
        return f"merging alone moves it by {merged_mean:.4f}, package with quantize: nf4 and adapter: unmerged"
    return f"float16 alone moves it by {merged_mean:.4f}, train it again with fp16: true"
