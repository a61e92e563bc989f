"""Read a run folder: contracts, metrics, learning history, predictions, agreement of the models.

`python -m postprocess.report` calls `read_run` first. What a training writes must be there. Without
the pairs file or the agreement, `RunData.missing` says what the page lacks. A file that exists and
cannot be read raises a UserError. Nothing here imports torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import polars as pl

from postprocess.report.predictions import (
    OUT_OF_FOLD,
    PREDICTIONS,
    Predictions,
    add_pairs,
    is_comparison_of,
    read_predictions,
    read_table,
)
from preprocess.core.errors import UserError
from preprocess.core.files import read_json, read_object, read_yaml
from preprocess.model_input import VERDICTS
from recipes.pairwise.data.teacher_labels import LOCKBOX

CONTRACT = "contract.json"
METRICS = "metrics.json"
AGREEMENT = "agreement.json"
AGREEMENT_KEYS = {
    "rows",
    "packaged",
    "agrees",
    "mean_difference",
    "tolerance",
    "models",
    "packaged_minus_trained",
}
DEFAULT_PAIRS = "data/pairs.parquet"


@dataclass(frozen=True)
class Agreement:
    """The comparison that `python -m postprocess` made of the models as trained and as packaged."""

    report: dict  # agreement.json
    rows: pl.DataFrame  # agreement.parquet, the probabilities of each model


@dataclass(frozen=True)
class Fold:
    """What the training left in a run folder or a fold's folder."""

    contract: dict
    metrics: dict
    history: list[dict]  # the records that have a step; empty where nothing was trained


@dataclass(frozen=True)
class RunData:
    """The files of a run."""

    folder: Path
    folds: dict[str, Fold]  # by name; a run without folds has one, under the empty name
    predictions: Predictions  # the rows to measure
    verdicts: tuple[str, ...]  # in the order of the model's outputs
    agreement: Agreement | None
    lockbox: dict  # lockbox.json, the scores on rows that nothing was trained on; empty without
    missing: dict[str, str]  # a sentence where the pairs or the agreement are missing

    @property
    def first_fold(self) -> Fold:
        """The first of the folds: what it says of the model holds for all."""
        return next(iter(self.folds.values()))

    @property
    def name(self) -> str:
        """The folder's name; that of a fold or a mean with the name of their run before it."""
        folder = self.folder.resolve()
        if folder.name == "mean" or folder.name.startswith("fold-"):
            return f"{folder.parent.name}/{folder.name}"
        return folder.name

    @property
    def rows_were_trained_on(self) -> bool:
        """Whether the model has seen the rows that it is measured on."""
        return any(fold.metrics.get("rows_were_trained_on") for fold in self.folds.values())


def training_record(contract: dict) -> dict:
    """Return what a contract records of the training: recipe, git_commit, created, versions."""
    return contract.get("recorded", {})


def read_run(folder: Path, out_of_fold: bool = False, pairs_file: Path | None = None) -> RunData:
    """Read a run folder.

    The report measures the run's own validation rows, predictions.parquet. It measures the rows of
    all folds, oof.parquet, if the user wants that, or if the run has no predictions of its own or
    only those of rows that it was trained on.

    Args:
        folder: outputs/R, outputs/R/fold-N or outputs/R/mean.
        out_of_fold: Measure oof.parquet in any case.
        pairs_file: The pairs file of the training, if it has moved since.

    Raises:
        UserError: The folder is not a run folder, or one of its files cannot be read.
    """
    # A cross-validation has a contract, metrics and a history for each fold, other runs have one.
    fold_folders = {"": folder}
    predictions_file = folder / PREDICTIONS
    if should_measure_out_of_fold(folder, out_of_fold):
        fold_folders = {path.name: path for path in find_fold_folders(folder)}
        predictions_file = folder / OUT_OF_FOLD

    folds = {name: read_fold(path) for name, path in fold_folders.items()}
    first_name, first_fold = next(iter(folds.items()))
    verdicts = read_verdicts(fold_folders[first_name] / CONTRACT, first_fold.contract)

    # The rows to measure, with texts and labels if the pairs file is the one of the training.
    missing = {}
    file = pairs_file or find_pairs_file(fold_folders.values(), first_fold.contract)
    predictions, problem = add_pairs(
        read_predictions(predictions_file), file, first_fold.metrics.get("pairs_sha256")
    )
    # The page can do without the pairs file that the run names, but not a user who names one.
    if problem and pairs_file:
        raise UserError(problem)
    if problem:
        missing["pairs"] = problem

    # The comparison of the model as trained and as packaged.
    agreement, problem = read_agreement(folder)
    if problem:
        missing["agreement"] = problem

    return RunData(
        folder=folder,
        folds=folds,
        predictions=predictions,
        verdicts=verdicts,
        agreement=agreement,
        lockbox=read_optional(folder / LOCKBOX),
        missing=missing,
    )


def should_measure_out_of_fold(folder: Path, is_wanted: bool) -> bool:
    """Decide whether to report on oof.parquet instead of the run's own predictions.

    oof.parquet has out-of-fold predictions: each row's is by the fold's model that did not train on it.
    """
    file = folder / OUT_OF_FOLD
    if not file.is_file():
        if is_wanted:
            raise UserError(
                f"{file}: no such file; train all folds with make cv R={folder.name}, which writes it"
            )
        return False
    if is_wanted:
        return True

    # The user does not ask for oof.parquet. It is still the better choice where the model was trained on the
    # rows that it predicted: that would say nothing about its accuracy.
    has_predictions = (folder / PREDICTIONS).is_file()
    metrics = read_optional(folder / METRICS)
    return not has_predictions or bool(metrics.get("rows_were_trained_on"))


def find_fold_folders(folder: Path) -> list[Path]:
    """Find the folders of a cross-validation's folds, in the order of their numbers."""
    # By name alone, fold-10 would come before fold-2.
    fold_folders = sorted(folder.glob("fold-*"), key=lambda path: (len(path.name), path.name))
    if not fold_folders:
        raise UserError(
            f"{folder}: holds no fold-0 beside {OUT_OF_FOLD}; train all folds with make cv R={folder.name}"
        )
    return fold_folders


def read_fold(folder: Path) -> Fold:
    """Read what a training left in a folder: its contract, its metrics and its log."""
    # A training writes the contract last: where it is, the other files are too.
    contract_file = folder / CONTRACT
    if not contract_file.is_file():
        reason = "there is no such folder"
        if folder.is_dir():
            reason = f"holds no {CONTRACT}, the file that a training writes last"
        raise UserError(
            f"{folder}: {reason}; name the folder of a run, which axolotl train or "
            "python -m postprocess fills"
        )

    return Fold(
        contract=read_object(contract_file),
        metrics=read_object(folder / METRICS),
        history=read_history(folder / "history.json"),
    )


def read_optional(file: Path) -> dict:
    """Read a JSON file that holds an object; an absent file is an empty object."""
    if not file.is_file():
        return {}
    return read_object(file)


def read_history(file: Path) -> list[dict]:
    """Read the trainer's log from history.json; an absent file is an empty log."""
    # Nothing was trained for a mean of runs, or for a base model as it is.
    if not file.is_file():
        return []

    records = read_json(file)
    is_list = isinstance(records, list)
    if not is_list or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file}: expected a list of objects; remove the file, or train again")

    # The trainer's records all have a step; what other programs add has none.
    return [record for record in records if isinstance(record.get("step"), int)]


def find_pairs_file(folders: Iterable[Path], contract: Mapping) -> Path:
    """Find the pairs file that the model was trained on; `folders` are those of the run or its folds."""
    # run.json has the recipe's block `pairwise:` as it was when the run was started.
    for folder in folders:
        block = read_optional(folder / "run.json").get("block")
        if isinstance(block, dict) and block.get("pairs"):
            return Path(block["pairs"])

    # A run that nobody trained has no run.json: look into the recipe as it is today.
    recipe = Path("recipes") / str(training_record(contract).get("recipe"))
    if recipe.is_file():
        block = read_yaml(recipe).get("pairwise")
        if isinstance(block, dict):
            return Path(block.get("pairs", DEFAULT_PAIRS))
    return Path(DEFAULT_PAIRS)


def read_verdicts(contract_file: Path, contract: Mapping) -> tuple[str, ...]:
    """Read the verdicts that the model tells apart, in the order of its outputs.

    Raises:
        UserError: It has other verdicts than model_a, model_b and tie.
    """
    verdicts = contract.get("verdicts")
    possible_orders = [*permutations(VERDICTS[:2]), *permutations(VERDICTS)]
    if not isinstance(verdicts, list) or tuple(verdicts) not in possible_orders:
        raise UserError(
            f"{contract_file}: the verdicts are {verdicts}, but a report needs model_a and model_b, with or "
            "without tie; train again"
        )
    return tuple(verdicts)


def read_agreement(folder: Path) -> tuple[Agreement | None, str | None]:
    """Read how far the packaged model agrees with the trained one, if that was measured on today's predictions.

    Returns:
        The agreement and None, or None and a sentence that says why there is none.
    """
    file = folder / AGREEMENT
    if not file.is_file():
        return None, (
            "The run was not packaged yet: run `pairwise package`, which compares the models and writes "
            "agreement.json."
        )

    # The files may be older than today's predictions: of an earlier training, or of an earlier version of
    # this project, which wrote fewer keys.
    report = read_object(file)
    rows = read_table(folder / "agreement.parquet")
    is_current = report.keys() >= AGREEMENT_KEYS
    if is_current and (folder / PREDICTIONS).is_file():
        predictions = read_predictions(folder / PREDICTIONS)
        is_current = is_comparison_of(rows, predictions.rows)
    if not is_current:
        return None, (
            "agreement.json is from an earlier training or an earlier version of this project: run "
            "`pairwise package`, which compares the models again."
        )
    return Agreement(report, rows), None
