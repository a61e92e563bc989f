"""The same validation rows through the model as trained, merged and quantised: probabilities compared row by row.

The merged and the quantised model are loaded and scored by the code that runs on Kaggle. Four columns: `recorded`
(predictions.parquet, written by training), `trained` (base and adapter loaded by PEFT), `merged` and `quantised`.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from kaggle_kernels.runtime.model import load_model
from kaggle_kernels.runtime.package import PackageError, check_hash, read_tokenizer
from kaggle_kernels.runtime.scoring import ORDERS, make_requests, score
from postprocess.merge import classifier_config, classifier_skeleton
from postprocess.run import Run
from preprocess.errors import UserError
from preprocess.files import write_json
from recipes.pairwise.data import read_pairs, targets
from recipes.pairwise.metrics import scores

ROWS = 500
FLOAT16_ON_CPU_FLOP = 5e10  # about 20 s: float16 is ten times slower than float32 on CPUs without units for it
GOLDEN_ORDER = ("as_given",)


@dataclass(frozen=True)
class Column:
    """One model's probabilities of the rows, float64 of shape (rows, orders, verdicts), and the precision it computed in."""

    name: str
    probabilities_rov: np.ndarray
    precision: str


def agreement(run: Run, merged: Path, quantised: Path, out: Path) -> None:
    """Compare, print a table and write `out` (agreement.json), which also holds the golden rows' probabilities.

    Raises UserError where the mean difference from training to the quantised model is over the recipe's tolerance.
    """
    rows, pairs = validation_rows(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = checked_tokenizer(run)
    dtype = kernel_dtype(run, tokenizer, pairs, device)
    columns = [recorded_column(run, rows)]
    golden: list[dict] = []
    for name, load in model_loaders(run, merged, quantised, device, dtype):
        column, golden = _score_model(name, load(), run, tokenizer, pairs)
        columns.append(column)
        gc.collect()
    if merged == quantised:
        columns.append(Column("quantised", columns[-1].probabilities_rov, columns[-1].precision))
    report = compare(columns, targets(rows, run.contract.verdicts), run.recipe.pairwise.package.tolerance)
    print_table(report)
    write_json(out, {**report, "golden": golden})
    if not report["agrees"]:
        raise UserError(
            f"{out}: the quantised model differs from training by {report['mean_difference']:.4f} in probability on average, "
            f"over pairwise.package.tolerance ({report['tolerance']}); no package is made: quantise less, or look at {out}"
        )


def validation_rows(run: Run) -> tuple[pl.DataFrame, list]:
    """Up to 500 of the rows in predictions.parquet, chosen by a hash of their ids, as a table and as pairs, in one order.

    The table has the columns of the recipe's pairs file and the probabilities of predictions.parquet.
    """
    pairs_file, file = run.validation_files()
    predictions = read_predictions(file, run.contract.verdicts)
    keep = sorted(predictions["id"], key=lambda row_id: sha256(row_id.encode()).hexdigest())[:ROWS]
    rows = read_pairs(pairs_file).filter(pl.col("id").is_in(keep)).join(predictions, on="id", how="inner")
    if len(rows) != len(keep) or not keep:
        raise UserError(
            f"{pairs_file}: holds {len(rows)} of the {len(keep)} validation rows in {file}; it is not the file of the training"
        )
    return rows, [run.model_input.pair_from_row(row) for row in rows.iter_rows(named=True)]


def read_predictions(file: Path, verdicts: tuple[str, ...]) -> pl.DataFrame:
    """id and the probabilities of each order from a run's predictions.parquet."""
    try:
        return pl.read_parquet(file, columns=["id", *(f"p_{verdict}_{order}" for verdict in verdicts for order in ORDERS)])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not the predictions of training ({str(error).splitlines()[0]}); train again") from None


def recorded_column(run: Run, rows: pl.DataFrame) -> Column:
    """The probabilities that training wrote down."""
    per_order = [
        rows.select(f"p_{verdict}_{order}" for verdict in run.contract.verdicts).to_numpy().astype(np.float64)
        for order in ORDERS
    ]
    return Column("recorded", np.stack(per_order, axis=1), "as trained")


def model_loaders(
    run: Run, merged: Path, quantised: Path, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], torch.nn.Module]]]:
    """The models to be scored, as (name, function that loads it); merged and quantised compute in `dtype`."""
    yield "trained", lambda: load_trained(run, device)
    yield "merged", lambda: load_model(merged, run.contract, device, dtype)
    if quantised != merged:
        yield "quantised", lambda: load_model(quantised, run.contract, device, dtype)


def load_trained(run: Run, device: str) -> torch.nn.Module:
    """Base and adapter by PEFT, or the fully fine-tuned model, in the dtype of their files, attention as it will be served."""
    model = AutoModelForSequenceClassification.from_pretrained(
        run.weights,
        config=classifier_config(run.weights, run.contract),
        attn_implementation="eager" if run.contract.softcap else "sdpa",
        dtype="auto",
        local_files_only=True,
        use_safetensors=True,
    )
    if run.has_adapter:
        model = PeftModel.from_pretrained(model, run.folder)
    return model.to(device).eval()


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
    shapes = classifier_skeleton(run.weights, run.contract).shapes
    multiplied = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    requests = make_requests(run.model_input, tokenizer, run.contract, pairs, ORDERS)
    tokens = sum(request.tokens for request in requests)
    return torch.float16 if 2 * tokens * multiplied <= FLOAT16_ON_CPU_FLOP else torch.float32


def compare(columns: list[Column], labels_rv: np.ndarray, tolerance: float) -> dict:
    """The report: each column's metrics and its differences from `recorded` and from `trained`, and whether they agree.

    Differences are between probabilities of the same row, order and verdict. The models agree where the quantised one
    differs from `recorded` and from `trained`, and the merged one from `trained`, by at most `tolerance` on average.
    """
    by_name = {column.name: column for column in columns}
    table = []
    for column in columns:
        metrics = scores(column.probabilities_rov, labels_rv)
        against = {f"against_{name}": _difference(column, by_name[name]) for name in ("recorded", "trained")}
        table.append({"model": column.name, "precision": column.precision, **metrics, **against})
    last = by_name["quantised"]
    gated = [(last, by_name["recorded"]), (last, by_name["trained"]), (by_name["merged"], by_name["trained"])]
    worst = max(_difference(one, other)["mean"] for one, other in gated)
    return {
        "rows": len(labels_rv),
        "tolerance": tolerance,
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
    if any(line["model"] == "merged" and line["precision"] == "float32" for line in report["models"]):
        print("  no GPU here: float16 weights with float32 activations; the kernel computes in float16")
