"""Scores validation rows with the model as trained and with what is made of it. pipeline.py calls this.

Everything but the trained model is loaded and scored by the code that runs on Kaggle. The columns:
`recorded` (predictions.parquet, written by training), `trained` (base and adapter loaded by PEFT, in the
precision of the training), `merged` (16 bits), and the candidates for the package: `quantised` (merged,
then quantised), `unmerged` (the base in nf4, the adapter apart), or both.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import ORDERS, make_requests, orders_of, score
from postprocess.agreement.reference_model import load_merged, load_trained
from postprocess.agreement.statistics import QUANTISED, Column
from postprocess.agreement.validation_rows import part_bounds, validation_rows
from postprocess.run_folder import Run, checked_tokenizer
from postprocess.weights.meta_model import model_skeleton
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, write_json

# About 20 s: float16 is ten times slower than float32 on CPUs without units for it.
FLOAT16_ON_CPU_FLOP = 5e10
GOLDEN_ORDER = ("as_given",)
TOKENS_PER_BATCH = 8192


def score_models(run: Run, folders: Mapping[str, Path | None], part: int, out: Path) -> None:
    """Score a part of the validation rows with every model, and write the probabilities to a JSON file.

    Args:
        run: The run that is packaged.
        folders: The models' folders by column: `merged` where there is one (None: made in memory),
            then the candidates `quantised`, `quantised-2`, …, `unmerged`.
        part: Which validation rows; see validation_rows.part_bounds.
        out: The file. Besides the columns it has the golden rows' probabilities of each model.
    """
    rows, pairs = validation_rows(run, *part_bounds(part))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = checked_tokenizer(run)
    dtype = choose_dtype(run, tokenizer, pairs, device)

    columns = []
    if has_record(run):
        columns.append(read_recorded_column(run, rows))
    golden = {}
    for name, load in list_loaders(run, folders, device, dtype):
        model = load()
        try:
            columns.append(score_column(name, model, run, tokenizer, pairs))
            golden[name] = score_golden_rows(model, run, tokenizer)
        except FloatingPointError as error:
            raise UserError(
                f"{name}: {error}; this model overflows, package it from other weights"
            ) from None
        # The next model needs the memory.
        del model
        gc.collect()

    # With quantize: none, one model has both names.
    if QUANTISED in folders and folders[QUANTISED] == folders.get("merged"):
        merged = next(column for column in columns if column.name == "merged")
        columns.append(Column(QUANTISED, merged.probabilities_rov, merged.precision))
        golden[QUANTISED] = golden["merged"]

    as_json = []
    for column in columns:
        probabilities = column.probabilities_rov.tolist()
        as_json.append({"name": column.name, "precision": column.precision, "rov": probabilities})
    write_json(out, {"columns": as_json, "golden": golden})


def read_scores(scores_files: Sequence[Path]) -> tuple[list[Column], dict[str, list]]:
    """Read what score_models wrote of several parts, as one.

    Returns:
        The columns of all rows, and the golden rows' probabilities by model.
    """
    parts = [read_object(file) for file in scores_files]
    columns = []
    for place, first in enumerate(parts[0]["columns"]):
        probabilities = [np.array(part["columns"][place]["rov"]) for part in parts]
        columns.append(Column(first["name"], np.concatenate(probabilities), first["precision"]))
    return columns, parts[0]["golden"]


def has_record(run: Run) -> bool:
    """Find out whether training recorded the model's probabilities.

    A mean of runs was never trained as such: its predictions are those of the model that they would
    be compared with.
    """
    metrics_file = run.folder / "metrics.json"
    return not metrics_file.is_file() or "average" not in read_object(metrics_file)


def read_recorded_column(run: Run, rows: pl.DataFrame) -> Column:
    """Take the probabilities that training wrote down from the validation rows."""
    by_order = []
    for order in ORDERS:
        names = [f"p_{verdict}_{order}" for verdict in run.contract.verdicts]
        by_order.append(rows.select(names).to_numpy().astype(np.float64))
    return Column("recorded", np.stack(by_order, axis=1), "as trained")


def list_loaders(
    run: Run, folders: Mapping[str, Path | None], device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], torch.nn.Module]]]:
    """List the models to be scored, each folder once; all but `trained` compute in `dtype`.

    Yields:
        A column's name, and the function that loads its model.
    """
    yield "trained", lambda: load_trained(run, device)
    loaded_folders = set()
    for name, folder in folders.items():
        if folder is None:
            yield name, lambda: load_merged(run, device, dtype)
        elif folder not in loaded_folders:
            loaded_folders.add(folder)
            yield name, lambda folder=folder: load_model(folder, run.contract, device, dtype)


def score_column(name: str, model: torch.nn.Module, run: Run, tokenizer, pairs: Sequence) -> Column:
    """Score pairs in both orders with a model in eval mode.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    scores = score_in_memory(model, run, tokenizer, pairs)
    rows = []
    for pair in pairs:
        rows.append([scores[pair.id][order] for order in ORDERS])

    # A quantised model's first parameters may be whole numbers.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return Column(name, np.array(rows, dtype=np.float64), str(dtype).removeprefix("torch."))


def score_in_memory(model: torch.nn.Module, run: Run, tokenizer, pairs: Sequence) -> dict:
    """Score pairs in both orders, in batches half as large as long as they do not fit the GPU."""
    tokens_per_batch = TOKENS_PER_BATCH
    while True:
        try:
            return score(
                model,
                run.model_input,
                tokenizer,
                run.contract,
                pairs,
                tokens_per_batch=tokens_per_batch,
                device=str(model.device),
            )
        except torch.OutOfMemoryError:
            # A batch of one row cannot be made smaller.
            if tokens_per_batch < run.contract.budget_tokens:
                raise
        # The longest rows come first: little is scored twice.
        tokens_per_batch //= 2
        torch.cuda.empty_cache()


def score_golden_rows(model: torch.nn.Module, run: Run, tokenizer) -> list[dict]:
    """Score the contract's golden rows, which the kernel scores again."""
    contract = run.contract
    pairs = [run.model_input.pair_from_row(row["pair"]) for row in contract.golden]
    device = str(model.device)
    scores = score(
        model, run.model_input, tokenizer, contract, pairs, orders=GOLDEN_ORDER, device=device
    )
    golden = []
    for pair in pairs:
        golden.append({"id": pair.id, "probabilities": scores[pair.id][GOLDEN_ORDER[0]]})
    return golden


def choose_dtype(run: Run, tokenizer, pairs: Sequence, device: str) -> torch.dtype:
    """Choose what the models compute in: float16 as on Kaggle, but float32 where a CPU would take long.

    The weights are rounded to float16 whatever it is.
    """
    if device != "cpu":
        return torch.float16

    # A forward pass multiplies each token by each matrix of a layer.
    skeleton = model_skeleton(run.weights, run.contract)
    weights_per_token = 0
    for name, shape in skeleton.shapes.items():
        is_in_layer = "embed" not in name and name not in skeleton.head
        if is_in_layer and len(shape) == 2:
            weights_per_token += math.prod(shape)

    orders = orders_of(run.contract, ORDERS)
    requests = make_requests(run.model_input, tokenizer, run.contract, pairs, orders)
    tokens = sum(request.tokens for request in requests)
    flop = 2 * tokens * weights_per_token
    return torch.float16 if flop <= FLOAT16_ON_CPU_FLOP else torch.float32
