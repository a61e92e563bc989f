"""The same validation rows through the model as trained and through what is made of it: probabilities compared row by row.

Everything but the trained model is loaded and scored by the code that runs on Kaggle. The columns: `recorded`
(predictions.parquet, written by training), `trained` (base and adapter loaded by PEFT, in the precision of the training),
`merged` (16 bits), and the candidates for the package: `quantised` (merged, then quantised), `unmerged` (the base in nf4,
the adapter apart), or both, of which the one closer to `trained` is taken.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from kaggle_kernels.runtime.model import load_model
from kaggle_kernels.runtime.package import PackageError, check_hash, read_tokenizer
from kaggle_kernels.runtime.scoring import ORDERS, make_requests, orders_of, score
from postprocess.rows import validation_rows
from postprocess.run import Run
from postprocess.skeleton import model_skeleton
from postprocess.trained import load_merged, load_trained
from preprocess.errors import UserError
from preprocess.files import write_json
from recipes.pairwise.data import targets, winners
from recipes.pairwise.metrics import scores

FLOAT16_ON_CPU_FLOP = 5e10  # about 20 s: float16 is ten times slower than float32 on CPUs without units for it
GOLDEN_ORDER = ("as_given",)
CANDIDATES = ("quantised", "unmerged")


@dataclass(frozen=True)
class Column:
    """One model's probabilities of the rows, float64 of shape (rows, orders, verdicts), and the precision it computed in."""

    name: str
    probabilities_rov: np.ndarray
    precision: str


def agreement(run: Run, folders: Mapping[str, Path | None], out: Path) -> None:
    """Compare, print a table and write `out` (agreement.json), which also holds the packaged model's golden probabilities.

    `folders` are those of the models by column: `merged` where there is one (None: it is made in memory), then candidates for
    the package. Raises UserError
    where the mean difference from training to the model that is to be packaged is over the recipe's tolerance.
    """
    rows, pairs = validation_rows(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = checked_tokenizer(run)
    dtype = kernel_dtype(run, tokenizer, pairs, device)
    columns, golden = [recorded_column(run, rows)], {}
    for name, load in model_loaders(run, folders, device, dtype):
        column, golden[name] = _score_model(name, load(), run, tokenizer, pairs)
        columns.append(column)
        gc.collect()
    if "quantised" in folders and folders["quantised"] == folders["merged"]:
        columns.append(Column("quantised", columns[-1].probabilities_rov, columns[-1].precision))
        golden["quantised"] = golden["merged"]
    verdicts, tolerance = run.contract.verdicts, run.recipe.pairwise.package.tolerance
    report = compare(columns, targets(rows, verdicts), winners(rows, verdicts), tolerance)
    print_table(report)
    write_json(out, {**report, "golden": golden[report["packaged"]]})
    recorded = report["models"][0]["against_trained"]["mean"]
    if recorded > tolerance:
        raise UserError(
            f"{out}: base and adapter, loaded as they were trained, differ by {recorded:.4f} in probability "
            f"from predictions.parquet, which training wrote: one of {run.weights}, {run.folder} is not the training's; put it "
            "back, or train again"
        )
    if not report["agrees"]:
        raise UserError(
            f"{out}: the {report['packaged']} model differs from training by {report['mean_difference']:.4f} in probability on "
            f"average, over pairwise.package.tolerance ({report['tolerance']}); no package is made: quantise less, or look at "
            f"{out}"
        )


def recorded_column(run: Run, rows: pl.DataFrame) -> Column:
    """The probabilities that training wrote down."""
    per_order = [
        rows.select(f"p_{verdict}_{order}" for verdict in run.contract.verdicts).to_numpy().astype(np.float64)
        for order in ORDERS
    ]
    return Column("recorded", np.stack(per_order, axis=1), "as trained")


def model_loaders(
    run: Run, folders: Mapping[str, Path | None], device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], torch.nn.Module]]]:
    """The models to be scored, as (name, function that loads it), each folder once; all but `trained` compute in `dtype`."""
    yield "trained", lambda: load_trained(run, device)
    loaded = set()
    for name, folder in folders.items():
        if folder is None:
            yield name, lambda: load_merged(run, device, dtype)
        elif folder not in loaded:
            loaded.add(folder)
            yield name, lambda folder=folder: load_model(folder, run.contract, device, dtype)


def _score_model(name: str, model: torch.nn.Module, run: Run, tokenizer, pairs: list) -> tuple[Column, list[dict]]:
    """A model's column, and its probabilities of the contract's golden rows."""
    contract, model_input, device = run.contract, run.model_input, str(model.device)
    golden_pairs = [model_input.pair_from_row(row["pair"]) for row in contract.golden]
    try:
        found = score(model, model_input, tokenizer, contract, pairs, device=device)
        golden = score(model, model_input, tokenizer, contract, golden_pairs, orders=GOLDEN_ORDER, device=device)
    except FloatingPointError as error:
        raise UserError(f"{name}: {error}; this model overflows, package it from other weights") from None
    precision = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    values = np.array([[found[pair.id][order] for order in ORDERS] for pair in pairs], dtype=np.float64)
    rows = [{"id": pair.id, "probabilities": golden[pair.id][GOLDEN_ORDER[0]]} for pair in golden_pairs]
    return Column(name, values, precision), rows


def checked_tokenizer(run: Run):
    """The run's tokenizer, once it gives the golden rows the ids that they had in training."""
    try:
        for file in run.tokenizer_files():
            check_hash(file, run.contract.tokenizer_sha256[file.name], "contract.json")
        tokenizer = read_tokenizer(run.folder)
        run.model_input.check_golden(tokenizer, run.contract)
    except (PackageError, run.model_input.ContractError) as error:
        raise UserError(f"{run.folder}: {error}") from None
    return tokenizer


def kernel_dtype(run: Run, tokenizer, pairs: list, device: str) -> torch.dtype:
    """What the models compute in: float16 as on Kaggle; float32 from the same float16 weights where a CPU would take long."""
    if device != "cpu":
        return torch.float16
    skeleton = model_skeleton(run.weights, run.contract)
    layers = [shape for name, shape in skeleton.shapes.items() if "embed" not in name and name not in skeleton.head]
    multiplied = sum(math.prod(shape) for shape in layers if len(shape) == 2)
    requests = make_requests(run.model_input, tokenizer, run.contract, pairs, orders_of(run.contract, ORDERS))
    tokens = sum(request.tokens for request in requests)
    return torch.float16 if 2 * tokens * multiplied <= FLOAT16_ON_CPU_FLOP else torch.float32


def compare(columns: list[Column], labels_rv: np.ndarray, winners_r: np.ndarray, tolerance: float) -> dict:
    """The report: each column's metrics and its differences from `recorded` and from `trained`, and whether they agree.

    Differences are between probabilities of the same row, order and verdict. Of the candidates, the one with the smaller mean
    difference from `trained` is to be packaged. The models agree where it differs from `recorded` and from `trained`, and if
    it was merged the merged one from `trained`, by at most `tolerance` on average.
    """
    by_name = {column.name: column for column in columns}
    table = []
    for column in columns:
        metrics = scores(column.probabilities_rov, labels_rv, winners_r)
        against = {f"against_{name}": _difference(column, by_name[name]) for name in ("recorded", "trained")}
        table.append({"model": column.name, "precision": column.precision, **metrics, **against})
    candidates = {name: _difference(by_name[name], by_name["trained"])["mean"] for name in CANDIDATES if name in by_name}
    packaged = min(candidates, key=candidates.get)
    gated = [(packaged, "recorded"), (packaged, "trained")] + ([("merged", "trained")] if packaged == "quantised" else [])
    worst = max(_difference(by_name[one], by_name[other])["mean"] for one, other in gated)
    return {
        "rows": len(labels_rv),
        "tolerance": tolerance,
        "packaged": packaged,
        "candidates": candidates,
        "mean_difference": worst,
        "agrees": math.isfinite(worst) and worst <= tolerance,
        "models": table,
    }


def _difference(one: Column, other: Column) -> dict[str, float]:
    """Largest and mean difference in probability, and the rows whose verdict (by the mean of both orders) is another."""
    differences = np.abs(one.probabilities_rov - other.probabilities_rov)
    verdicts = [column.probabilities_rov.mean(axis=1).argmax(axis=1) for column in (one, other)]
    return {
        "largest": float(differences.max()),
        "mean": float(differences.mean()),
        "verdicts_changed": int((verdicts[0] != verdicts[1]).sum()),
    }


def print_table(report: dict) -> None:
    """Print one line a model."""
    print(f"  {report['rows']} validation rows in both orders; differences in probability from the model as trained")
    print("  model      precision  accuracy  log loss  largest diff  mean diff  verdicts changed")
    for line in report["models"]:
        against = line["against_trained"]
        print(
            f"  {line['model']:<10} {line['precision']:<10} {line['accuracy']:8.4f} {line['log_loss']:9.4f} "
            f"{against['largest']:13.5f} {against['mean']:10.5f} {against['verdicts_changed']:17d}"
        )
    if len(report["candidates"]) > 1:
        other = next(name for name in report["candidates"] if name != report["packaged"])
        found, instead = (report["candidates"][name] for name in (report["packaged"], other))
        print(f"  packaged: {report['packaged']}, {found:.5f} from the model as trained on average ({other}: {instead:.5f})")
    if any(line["model"] in ("merged", "unmerged") and line["precision"] == "float32" for line in report["models"]):
        print("  no GPU here: float16 weights with float32 activations; the kernel computes in float16")
