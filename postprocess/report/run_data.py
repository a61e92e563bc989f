"""What a run folder holds, read for the report: facts, predictions joined with their pairs, history, agreement.

Any of it may be absent: then it is None or empty, and `missing` says in one sentence which command makes it. A file that is
there and cannot be read is a UserError. Nothing here imports torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, read_object, read_yaml, sha256
from preprocess.model_input import VERDICTS
from recipes.pairwise.data.datasets import read_pairs
from recipes.pairwise.tracking.metrics import ORDERS

PREDICTIONS, OUT_OF_FOLD = "predictions.parquet", "oof.parquet"
OF_A_RUN = ("contract.json", "metrics.json", PREDICTIONS, OUT_OF_FOLD, "history.json", "agreement.json")
OF_PAIRS = ("prompt", "response_a", "response_b", "language", "source", "group")
OF_AN_AGREEMENT = ("rows", "packaged", "agrees", "mean_difference", "tolerance", "models", "packaged_minus_trained")
SAME = 1e-6  # two float32 roundings of a probability
OF_A_RECIPE = r"fold-\d+|mean"  # the folders in a run's folder that are runs themselves
DEFAULT_PAIRS = "data/pairs.parquet"


@dataclass(frozen=True)
class Evidence:
    """A run folder, read.

    `rows`: id, fold, winner and the probabilities of predictions.parquet or oof.parquet, sorted by id, beside them where
    `has_texts` the columns of OF_PAIRS that the pairs file has and its labels as label_model_a, label_model_b, label_tie.
    `contracts` and `metrics` have one entry for each fold that the rows are of, by name. `history` likewise: the records of
    history.json. `missing`: sentences by what is missing: predictions, pairs, contract, metrics, history, agreement.
    """

    folder: Path
    contracts: dict[str, dict]
    metrics: dict[str, dict]
    rows_file: Path | None
    rows: pl.DataFrame | None
    verdicts: tuple[str, ...]
    has_texts: bool
    history: dict[str, list[dict]]
    agreement: dict | None
    agreement_rows: pl.DataFrame | None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def recorded(self) -> dict:
        """What the first contract recorded of its training: recipe, git_commit, created, versions."""
        return first(self.contracts).get("recorded") or {}

    @property
    def rows_were_trained_on(self) -> bool:
        """Whether the model has seen the rows that it is measured on."""
        return any(values.get("rows_were_trained_on") for values in self.metrics.values())


def read_evidence(folder: Path, out_of_fold: bool = False, pairs: Path | None = None) -> Evidence:
    """Read a run folder. Its own predictions are what is measured, or oof.parquet, the rows of all folds.

    The latter where `out_of_fold`, and where there are no predictions of its own, or none of rows that were held out.
    `pairs`: the pairs file of the training, where it is not where the run says that it was.
    """
    if not any((folder / name).is_file() for name in OF_A_RUN):
        found = "holds nothing of a run" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {found}; name a run's folder, which axolotl train or python -m postprocess fills")
    use_oof = wants_out_of_fold(folder, out_of_fold)
    folders = fold_folders(folder) if use_oof else {"": folder}
    contracts, metrics = ({name: optional(path / file) for name, path in folders.items()} for file in OF_A_RUN[:2])
    history = {name: records for name, path in folders.items() if (records := read_history(path))}
    train, package = commands(folder, first(contracts), first(metrics), use_oof)
    missing = {
        name: f"There is no {name}.json: `{train}` writes it."
        for name, found in (("contract", contracts), ("metrics", metrics), ("history", history))
        if not (found and all(found.values()))
    }
    if not history and is_untrained(first(contracts), first(metrics)):
        missing["history"] = "Nothing was trained here, so that there are no learning curves."
    rows_file, rows = read_rows(folder, OUT_OF_FOLD if use_oof else PREDICTIONS)
    verdicts = verdicts_of(folders, contracts, rows)
    if rows is None:
        missing["predictions"] = f"There is no {PREDICTIONS}, so that nothing can be measured: `{train}` writes it."
    else:
        rows, told = with_pairs(rows, find_pairs(folders, contracts, metrics, pairs), first(metrics).get("pairs_sha256"), pairs)
        missing |= {"pairs": told} if told else {}
    agreement, agreement_rows, told = read_agreement(folder, package)
    missing |= {"agreement": told} if told else {}
    has_texts = rows is not None and "prompt" in rows.columns
    return Evidence(
        folder, contracts, metrics, rows_file, rows, verdicts, has_texts, history, agreement, agreement_rows, missing
    )


def first(of_fold: dict[str, dict]) -> dict:
    """The first fold's entry, or an empty one."""
    return next(iter(of_fold.values()), {})


def optional(file: Path) -> dict:
    """The object in a JSON file, empty where there is no such file."""
    return read_object(file) if file.is_file() else {}


def is_untrained(contract: dict, metrics: dict) -> bool:
    """Whether nothing was trained in the folder itself: a base model as it is, or a mean of runs."""
    return metrics.get("training_rows") == 0 or "average" in metrics or bool(contract.get("logit_bias"))


def wants_out_of_fold(folder: Path, asked: bool) -> bool:
    """Whether to measure oof.parquet in place of the run's own predictions."""
    if asked and not (folder / OUT_OF_FOLD).is_file():
        raise UserError(f"{folder / OUT_OF_FOLD}: no such file; make cv R={folder.name} writes it")
    if asked or not (folder / OUT_OF_FOLD).is_file():
        return asked
    trained_on = optional(folder / "metrics.json").get("rows_were_trained_on")
    return bool(trained_on) or not (folder / PREDICTIONS).is_file()


def fold_folders(folder: Path) -> dict[str, Path]:
    """The folders of a cross-validation's folds, by the folds' names in their order."""
    found = [path for path in folder.glob("fold-*") if re.fullmatch(r"fold-\d+", path.name)]
    return {path.name: path for path in sorted(found, key=lambda path: int(path.name.removeprefix("fold-")))}


def commands(folder: Path, contract: dict, metrics: dict, out_of_fold: bool) -> tuple[str, str]:
    """The command that fills this folder, and the one that packages its run.

    Without a contract, the recipe is the one that writes there by default.
    """
    run = folder.resolve().parent if re.fullmatch(OF_A_RECIPE, folder.resolve().name) else folder.resolve()
    recipe = (contract.get("recorded") or {}).get("recipe") or f"{run.name}.yml"
    package = f"python -m postprocess recipes/{recipe}"
    if out_of_fold:
        return f"make cv R={Path(recipe).stem}", package
    if folder.name == "mean":
        return (f"{package} --adapter …",) * 2
    fold = re.fullmatch(r"fold-(\d+)", folder.name)
    environment = f"PAIRWISE_FOLD={fold[1]} " if fold else ""
    train = package if is_untrained(contract, metrics) else f"axolotl train recipes/{recipe}"
    return environment + train, environment + package


def read_table(file: Path) -> pl.DataFrame:
    """A Parquet file that a run left."""
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not a Parquet file ({str(error).splitlines()[0]}); remove it, or make it again") from None


def read_rows(folder: Path, name: str) -> tuple[Path | None, pl.DataFrame | None]:
    """The predictions' file and its rows, sorted by id and checked; None where there is no such file."""
    file = folder / name
    if not file.is_file():
        return None, None
    rows = read_table(file)
    probabilities = [f"p_{verdict}{suffix}" for suffix in ("", *(f"_{order}" for order in ORDERS)) for verdict in VERDICTS]
    if absent := [column for column in ("id", "fold", "winner", *probabilities) if column not in rows.columns]:
        raise UserError(f"{file}: no column {', '.join(absent)}; it was not written by axolotl train; train again")
    if rows.is_empty() or rows["id"].is_duplicated().any():
        raise UserError(f"{file}: {'no rows' if rows.is_empty() else 'an id occurs twice'}; train again")
    values = rows.select(pl.col(probabilities).cast(pl.Float64)).fill_null(float("nan"))
    bad = values.select((~pl.all_horizontal(pl.all().is_between(0, 1))).alias("bad"))["bad"]
    if bad.any():
        raise UserError(f"{file}: row {rows['id'][bad.arg_max()]} has probabilities that are not between 0 and 1; train again")
    return file, rows.sort("id")


def verdicts_of(folders: dict[str, Path], contracts: dict[str, dict], rows: pl.DataFrame | None) -> tuple[str, ...]:
    """The verdicts that the model tells apart: the contract's, or without one those that have a probability."""
    found = first(contracts).get("verdicts")
    if found is None:
        return VERDICTS if rows is not None and rows["p_tie"].max() else VERDICTS[:2]
    if found not in (list(order) for length in (2, 3) for order in permutations(VERDICTS[:length])):
        file = next(iter(folders.values())) / OF_A_RUN[0]
        raise UserError(f"{file}: verdicts are {found}, expected model_a and model_b, with or without tie; train again")
    return tuple(found)


def find_pairs(folders: dict[str, Path], contracts: dict, metrics: dict, given: Path | None) -> Path:
    """The pairs file of the training: as given, as in run.json, or of a mean in a member's, or as in the contract's recipe."""
    if given:
        return given
    members = (first(metrics).get("average") or {}).get("members") or {}
    for folder in (*folders.values(), *map(Path, members)):
        block = optional(folder / "run.json").get("block") or {}
        if isinstance(block, dict) and block.get("pairs"):
            return Path(block["pairs"])
    recipe = Path("recipes") / str((first(contracts).get("recorded") or {}).get("recipe"))
    block = read_yaml(recipe).get("pairwise") if recipe.is_file() else {}
    return Path(block.get("pairs", DEFAULT_PAIRS) if isinstance(block, dict) else DEFAULT_PAIRS)


def with_pairs(rows: pl.DataFrame, file: Path, expected: str | None, given: Path | None) -> tuple[pl.DataFrame, str]:
    """The rows joined with their pairs, and what to say: empty where the file is the training's, by its hash."""
    without = "so that texts, languages, sources, lengths and groups of prompts are missing here"
    name_it = "name the file of the training with `--pairs FILE`"
    if not file.is_file():
        if given:
            raise UserError(f"{file}: no such file; --pairs names the pairs file of the training")
        return rows, f"{file} is not there, {without}: {name_it}."
    if expected and sha256(file) != expected:
        if given:
            raise UserError(f"{file}: not the file of the training, whose SHA-256 is {expected[:12]}… in metrics.json")
        return rows, f"{file} has changed since training, {without}: {name_it}, or train again."
    pairs = read_pairs(file)
    labels = [pl.col(f"p_{verdict}").cast(pl.Float64).alias(f"label_{verdict}") for verdict in VERDICTS]
    kept = [column for column in OF_PAIRS if column in pairs.columns]
    joined = rows.join(pairs.select("id", *kept, *labels), on="id", how="left", maintain_order="left")
    if joined["label_model_a"].null_count() or len(joined) != len(rows):
        return rows, f"{file} does not hold every row of the predictions, {without}: {name_it}, or train again."
    return joined, ""


def read_history(folder: Path) -> list[dict]:
    """The trainer's log: of history.json, or of the newest checkpoint of a run that left none."""
    if (folder / "history.json").is_file():
        records = read_json(folder / "history.json")
    else:
        states = {int(path.parent.name.split("-")[1]): path for path in checkpoints(folder)}
        records = read_object(states[max(states)]).get("log_history") if states else []
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{folder / 'history.json'}: expected a list of objects; remove the file, or train again")
    return [record for record in records if isinstance(record.get("step"), int)]


def checkpoints(folder: Path) -> Iterator[Path]:
    """The trainer's states in the checkpoints of a run."""
    return (path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name.split("-")[1].isdecimal())


def read_agreement(folder: Path, package: str) -> tuple[dict | None, pl.DataFrame | None, str]:
    """agreement.json and agreement.parquet, where they are of the predictions in this folder; else why not."""
    report, table = folder / "agreement.json", folder / "agreement.parquet"
    if not report.is_file():
        return None, None, f"The run was not packaged yet: `{package}` compares the models and writes agreement.json."
    figures, rows = read_object(report), read_table(table) if table.is_file() else None
    again = f"`{package}` compares the models again."
    if absent := [key for key in OF_AN_AGREEMENT if key not in figures]:
        return None, None, f"agreement.json is of an earlier version, without {absent[0]}: {again}"
    own = read_rows(folder, PREDICTIONS)[1]
    if rows is not None and own is not None and not is_of(rows, own):
        return None, None, f"agreement.json is of an earlier training: {again}"
    return figures, rows, ""


def is_of(agreement_rows: pl.DataFrame, predictions: pl.DataFrame) -> bool:
    """Whether what was compared as `recorded` is what these predictions hold."""
    columns = [column.removeprefix("recorded_") for column in agreement_rows.columns if column.startswith("recorded_p_")]
    if not columns or not {"id", "order"} <= set(agreement_rows.columns):
        return False
    for (order,), part in agreement_rows.group_by("order"):
        both = part.join(predictions, on="id", how="left")
        far = [(pl.col(f"recorded_{name}") - pl.col(f"{name}_{order}")).abs().fill_null(1.0).max() for name in columns]
        if both.select(pl.max_horizontal(far)).item() > SAME:
            return False
    return True
