"""Read a run folder: contracts, metrics, learning history, predictions, agreement of the models.

`python -m postprocess.report` calls `read_run` first. Each file of a run may be absent: then its
part of `RunData` is None or empty, and `RunData.missing` says which command writes it. A file that
exists and cannot be read raises a UserError. Nothing here imports torch.
"""

import re
from collections.abc import Mapping
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
HISTORY = "history.json"
AGREEMENT = "agreement.json"
AGREEMENT_TABLE = "agreement.parquet"
RUN_FILES = (CONTRACT, METRICS, PREDICTIONS, OUT_OF_FOLD, HISTORY, AGREEMENT)
AGREEMENT_KEYS = (
    "rows",
    "packaged",
    "agrees",
    "mean_difference",
    "tolerance",
    "models",
    "packaged_minus_trained",
)
SUBFOLDER_OF_RUN = re.compile(r"fold-\d+|mean")  # folders of a run's folder that are runs too
DEFAULT_PAIRS = "data/pairs.parquet"


@dataclass(frozen=True)
class Agreement:
    """The comparison that `python -m postprocess` made of the models as trained and as packaged."""

    report: dict  # agreement.json
    rows: pl.DataFrame | None  # agreement.parquet, the probabilities of each model


@dataclass(frozen=True)
class Commands:
    """The command that creates a run's files, and the one that packages its model."""

    create: str
    package: str


@dataclass(frozen=True)
class Fold:
    """What the training left in a run folder or a fold's folder; empty where a file is absent."""

    contract: dict
    metrics: dict
    history: list[dict]  # the records that have a step


@dataclass(frozen=True)
class RunData:
    """The files of a run."""

    folder: Path
    folds: dict[str, Fold]  # by name; a run without folds has one, under the empty name
    first_fold: Fold  # what it says of the model holds for all folds
    predictions: Predictions | None  # the rows to measure
    verdicts: tuple[str, ...]  # in the order of the model's outputs
    agreement: Agreement | None
    lockbox: dict  # lockbox.json, the scores on rows that nothing was trained on; empty without
    missing: dict[str, str]  # a sentence by the name of what is missing, such as "pairs"

    @property
    def name(self) -> str:
        """The folder's name; fold-3 and mean with the name of their run before it."""
        folder = self.folder.resolve()
        if SUBFOLDER_OF_RUN.fullmatch(folder.name):
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
    check_run_folder(folder)

    # A cross-validation has a contract, metrics and a history for each fold, other runs have one.
    measures_out_of_fold = should_measure_out_of_fold(folder, out_of_fold)
    if measures_out_of_fold:
        fold_folders = {path.name: path for path in find_fold_folders(folder)}
        predictions_file = folder / OUT_OF_FOLD
    else:
        fold_folders = {"": folder}
        predictions_file = folder / PREDICTIONS

    folds = {name: read_fold(path) for name, path in fold_folders.items()}
    first_fold = next(iter(folds.values()), Fold({}, {}, []))
    commands = find_commands(folder, first_fold, measures_out_of_fold)
    missing = explain_missing(folds, first_fold, commands)

    # The rows to measure, with texts and labels if the pairs file is the one of the training.
    predictions = read_predictions(predictions_file)
    if predictions is None:
        missing["predictions"] = (
            f"There is no {PREDICTIONS}, so that nothing can be measured: "
            f"`{commands.create}` writes it."
        )
    else:
        file = pairs_file or find_pairs_file(fold_folders, first_fold)
        expected_sha256 = first_fold.metrics.get("pairs_sha256")
        predictions, problem = add_pairs(predictions, file, expected_sha256)
        # The page can do without the pairs file that the run names, but not a user who names one.
        if problem and pairs_file:
            raise UserError(problem)
        if problem:
            missing["pairs"] = problem

    # The comparison of the model as trained and as packaged.
    agreement, problem = read_agreement(folder, commands.package)
    if problem:
        missing["agreement"] = problem

    return RunData(
        folder=folder,
        folds=folds,
        first_fold=first_fold,
        predictions=predictions,
        verdicts=find_verdicts(fold_folders, first_fold.contract, predictions),
        agreement=agreement,
        lockbox=read_optional(folder / LOCKBOX),
        missing=missing,
    )


def check_run_folder(folder: Path) -> None:
    """Raise a UserError if the folder holds none of a run's files."""
    if any((folder / name).is_file() for name in RUN_FILES):
        return

    reason = "holds nothing of a run" if folder.is_dir() else "no such folder"
    raise UserError(
        f"{folder}: {reason}; name a run's folder, which axolotl train or "
        "python -m postprocess fills"
    )


def should_measure_out_of_fold(folder: Path, is_wanted: bool) -> bool:
    """Decide whether to measure oof.parquet instead of the run's own predictions."""
    file = folder / OUT_OF_FOLD
    if not file.is_file():
        if is_wanted:
            raise UserError(f"{file}: no such file; make cv R={folder.name} writes it")
        return False
    if is_wanted:
        return True

    # Predictions of rows that the model was trained on say nothing about its accuracy.
    has_predictions = (folder / PREDICTIONS).is_file()
    metrics = read_optional(folder / METRICS)
    return not has_predictions or bool(metrics.get("rows_were_trained_on"))


def find_fold_folders(folder: Path) -> list[Path]:
    """Find the folders of a cross-validation's folds, in the order of their numbers."""
    # By name, fold-10 would come before fold-2.
    folder_by_number = {}
    for path in folder.glob("fold-*"):
        number = path.name.removeprefix("fold-")
        if number.isdecimal():
            folder_by_number[int(number)] = path
    return [folder_by_number[number] for number in sorted(folder_by_number)]


def read_fold(folder: Path) -> Fold:
    """Read what the training left in a folder."""
    return Fold(
        contract=read_optional(folder / CONTRACT),
        metrics=read_optional(folder / METRICS),
        history=read_history(folder),
    )


def read_optional(file: Path) -> dict:
    """Read a JSON file that holds an object; an absent file is an empty object."""
    if not file.is_file():
        return {}
    return read_object(file)


def read_history(folder: Path) -> list[dict]:
    """Read the trainer's log from history.json; an absent file is an empty log."""
    file = folder / HISTORY
    if not file.is_file():
        return []

    records = read_json(file)
    is_list = isinstance(records, list)
    if not is_list or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file}: expected a list of objects; remove the file, or train again")

    # The trainer's records all have a step; what other programs add has none.
    return [record for record in records if isinstance(record.get("step"), int)]


def find_commands(folder: Path, first_fold: Fold, is_cross_validation: bool) -> Commands:
    """Find the commands that create this run and package its model, for advice to the user.

    Args:
        folder: The run's folder, which may be one of a fold (outputs/R/fold-3) or a mean (outputs/R/mean).
        first_fold: What the training left there. Without a contract, the recipe is the one that writes
            into this folder by default.
        is_cross_validation: Whether the rows of all folds are measured.
    """
    folder = folder.resolve()
    is_subfolder = SUBFOLDER_OF_RUN.fullmatch(folder.name) is not None
    run_name = folder.parent.name if is_subfolder else folder.name
    recipe = training_record(first_fold.contract).get("recipe") or f"{run_name}.yml"

    # oof.parquet and a mean of runs have commands of their own.
    package = f"python -m postprocess recipes/{recipe}"
    if is_cross_validation:
        return Commands(create=f"make cv R={Path(recipe).stem}", package=package)
    if folder.name == "mean":
        average = f"{package} --adapter …"
        return Commands(create=average, package=average)

    # Packaging writes the predictions of a base model that is not trained.
    create = f"axolotl train recipes/{recipe}"
    if is_untrained(first_fold):
        create = package

    # An environment variable selects the fold.
    if is_subfolder:
        environment = f"PAIRWISE_FOLD={folder.name.removeprefix('fold-')}"
        create = f"{environment} {create}"
        package = f"{environment} {package}"
    return Commands(create, package)


def is_untrained(fold: Fold) -> bool:
    """Return whether nothing was trained here: a base model as it is, or a mean of several runs."""
    is_base_model = fold.metrics.get("training_rows") == 0 or fold.contract.get("logit_bias")
    return bool(is_base_model) or "average" in fold.metrics


def explain_missing(
    folds: Mapping[str, Fold], first_fold: Fold, commands: Commands
) -> dict[str, str]:
    """Explain which command writes contract.json, metrics.json or history.json, where one is missing.

    Args:
        folds: The folds of a cross-validation, or the run alone.
        first_fold: The first of them.
        commands: The commands that make this run.

    Returns:
        A sentence for each missing file, by its name without the ending.
    """
    has_contracts = folds and all(fold.contract for fold in folds.values())
    has_metrics = folds and all(fold.metrics for fold in folds.values())
    has_history = any(fold.history for fold in folds.values())

    missing = {}
    files = {"contract": has_contracts, "metrics": has_metrics, "history": has_history}
    for name, is_complete in files.items():
        if not is_complete:
            missing[name] = f"There is no {name}.json: `{commands.create}` writes it."

    # There is nothing to write where nothing was trained.
    if not has_history and is_untrained(first_fold):
        missing["history"] = "Nothing was trained here, so that there are no learning curves."
    return missing


def find_pairs_file(fold_folders: Mapping[str, Path], first_fold: Fold) -> Path:
    """Find the pairs file that the model was trained on.

    Args:
        fold_folders: The folders of the folds, or of the run alone.
        first_fold: What the training left in the first of them.
    """
    # A mean of runs has no run.json of its own, but its members have.
    folders = list(fold_folders.values())
    average = first_fold.metrics.get("average")
    if average and average.get("members"):
        folders += [Path(member) for member in average["members"]]

    # run.json holds the `pairwise:` block that the run was started with.
    for folder in folders:
        block = read_optional(folder / "run.json").get("block")
        if isinstance(block, dict) and block.get("pairs"):
            return Path(block["pairs"])

    # Without run.json, the recipe as it is today.
    recipe = Path("recipes") / str(training_record(first_fold.contract).get("recipe"))
    if recipe.is_file():
        block = read_yaml(recipe).get("pairwise")
        if isinstance(block, dict):
            return Path(block.get("pairs", DEFAULT_PAIRS))
    return Path(DEFAULT_PAIRS)


def find_verdicts(
    fold_folders: Mapping[str, Path], contract: dict, predictions: Predictions | None
) -> tuple[str, ...]:
    """Find the verdicts that the model tells apart, in the order of its outputs.

    Args:
        fold_folders: The folders of the folds, or of the run alone; for the message.
        contract: The contract of the first of them; empty without one.
        predictions: The rows to measure, if there are any.

    Raises:
        UserError: The contract has other verdicts than model_a, model_b and tie.
    """
    verdicts = contract.get("verdicts")
    if verdicts is None:
        # Without a contract: a model of two verdicts gives a tie the probability 0.
        predicts_ties = predictions is not None and predictions.rows["p_tie"].max() > 0
        return VERDICTS if predicts_ties else VERDICTS[:2]

    possible_orders = [*permutations(VERDICTS[:2]), *permutations(VERDICTS)]
    if not isinstance(verdicts, list) or tuple(verdicts) not in possible_orders:
        [first_folder, *_] = fold_folders.values()
        raise UserError(
            f"{first_folder / CONTRACT}: verdicts are {verdicts}, expected model_a and model_b, "
            "with or without tie; train again"
        )
    return tuple(verdicts)


def read_agreement(folder: Path, package_command: str) -> tuple[Agreement | None, str | None]:
    """Read how far the packaged model agrees with the trained one, if that was measured on today's predictions.

    Args:
        folder: The run's folder, with agreement.json and agreement.parquet.
        package_command: The command that compares the models, for the sentence.

    Returns:
        The agreement and None, or None and a sentence that says why there is none.
    """
    file = folder / AGREEMENT
    if not file.is_file():
        return None, (
            f"The run was not packaged yet: `{package_command}` compares the models and writes "
            "agreement.json."
        )

    # An earlier version of this project wrote fewer keys.
    report = read_object(file)
    remedy = f"`{package_command}` compares the models again."
    missing_keys = [key for key in AGREEMENT_KEYS if key not in report]
    if missing_keys:
        return None, f"agreement.json is of an earlier version, without {missing_keys[0]}: {remedy}"

    # A file of an earlier training compares other models than those of today's predictions.
    rows = None
    if (folder / AGREEMENT_TABLE).is_file():
        rows = read_table(folder / AGREEMENT_TABLE)
    predictions = read_predictions(folder / PREDICTIONS)
    can_compare = rows is not None and predictions is not None
    if can_compare and not is_comparison_of(rows, predictions.rows):
        return None, f"agreement.json is of an earlier training: {remedy}"
    return Agreement(report, rows), None
