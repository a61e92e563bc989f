"""Scores validation rows with the model as trained and with what is made of it. pipeline.py calls this.

Everything but the trained model is loaded and scored by the code that runs on Kaggle. Each model gives
one `Column` of probabilities: `recorded` (predictions.parquet, written by training), `trained` (base and
adapter loaded by PEFT, in the precision of the training), `merged` (16 bits), and the candidates for the
package: `quantised` (merged, then quantised), `unmerged` (the base in nf4, the adapter apart), or both.
"""

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import ORDERS, make_requests, orders_of, score
from postprocess.agreement.devices import list_gpus, place_package
from postprocess.agreement.reference_model import load_trained
from postprocess.agreement.statistics import Column, stack_orders
from postprocess.agreement.validation_rows import part_bounds, read_metrics, validation_rows
from postprocess.run_folder import Run, checked_tokenizer
from postprocess.weights.meta_model import model_skeleton
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, sha256, write_json
from recipes.pairwise.data.datasets import targets, winners
from recipes.pairwise.tracking import metrics

# About 20 s: float16 is ten times slower than float32 on CPUs without units for it.
FLOAT16_ON_CPU_FLOP = 5e10
GOLDEN_ORDER = "as_given"
TOKENS_PER_BATCH = 8192
ROWS_PER_STEP = 64  # after each of them progress is shown; a lack of memory costs one at most


def score_models(run: Run, folders: Mapping[str, Path], part: int, out: Path) -> None:
    """Score a part of the validation rows with every model, and write the probabilities to a JSON file.

    Args:
        run: The run that is packaged.
        folders: The models' folders by name: `merged` where there is one, then the candidates
            `quantised`, `quantised-2`, …, `unmerged`.
        part: Which validation rows; see validation_rows.part_bounds.
        out: The file. Besides the columns it has the golden rows' probabilities of each model.
    """
    first, end = part_bounds(part)
    rows, pairs = validation_rows(run, first, end)
    tokenizer = checked_tokenizer(run)
    dtype = choose_dtype(run, tokenizer, pairs)

    # The GPU holds one model at a time. So no variable may keep a model longer than it is scored: the
    # trained one is passed on without a name, the others are deleted.
    columns = {}
    golden = {}
    columns["trained"], golden["trained"] = score_model(
        "trained", load_trained(run), run, tokenizer, pairs
    )
    name_by_folder: dict[Path, str] = {}
    for name, folder in folders.items():
        # With quantize: none, `merged` and `quantised` are one folder, which is scored once.
        if folder in name_by_folder:
            first_name = name_by_folder[folder]
            columns[name] = columns[first_name]
            golden[name] = golden[first_name]
            continue

        gc.collect()
        model = load_served(run, folder, dtype)
        columns[name], golden[name] = score_model(name, model, run, tokenizer, pairs)
        name_by_folder[folder] = name
        del model

    if has_record(run):
        columns = {"recorded": read_recorded_column(run, rows), **columns}
    write_scores(out, columns, golden)


def write_scores(out: Path, columns: Mapping[str, Column], golden: Mapping[str, list]) -> None:
    """Write the columns and the golden rows' probabilities, both by model, for read_scores to read.

    {
        "columns": {"trained": {"precision": "bfloat16", "rov": [[[0.6, 0.3, 0.1], …], …]}, …},
        "golden": {"trained": [{"id": "7", "probabilities": [0.6, 0.3, 0.1]}, …], …}
    }
    """
    columns_as_json = {}
    for name, column in columns.items():
        probabilities = column.probabilities_rov.tolist()
        columns_as_json[name] = {"precision": column.precision, "rov": probabilities}
    write_json(out, {"columns": columns_as_json, "golden": golden})


def read_scores(scores_files: Sequence[Path]) -> tuple[list[Column], dict[str, list]]:
    """Read what score_models wrote of several parts of the rows: the columns of all rows, and the golden rows' scores."""
    # Each part has the same models, and other rows: a model's rows of all parts are one after another.
    parts = [read_object(file) for file in scores_files]
    first_part = parts[0]
    columns = []
    for name, first_column in first_part["columns"].items():
        probabilities_by_part = [np.array(part["columns"][name]["rov"]) for part in parts]
        probabilities_rov = np.concatenate(probabilities_by_part)
        columns.append(Column(name, probabilities_rov, first_column["precision"]))

    # The golden rows are the same in each part.
    return columns, first_part["golden"]


def has_record(run: Run) -> bool:
    """Find out whether training recorded the model's probabilities.

    A mean of runs was never trained as such: its predictions are those of the model that they would
    be compared with.
    """
    return "members" not in read_metrics(run)


def read_recorded_column(run: Run, rows: pl.DataFrame) -> Column:
    """Take the probabilities that training wrote down from the validation rows."""
    return Column("recorded", stack_orders(rows, run.contract.verdicts), "as trained")


def load_served(run: Run, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load a model as Kaggle's kernel does, its layers over several GPUs where one cannot hold them."""
    first_device = "cuda:0" if list_gpus() else "cpu"
    return load_model(folder, run.contract, first_device, dtype, place_package(folder))


def score_model(
    name: str, model: torch.nn.Module, run: Run, tokenizer, pairs: Sequence
) -> tuple[Column, list[dict]]:
    """Score the validation rows and the golden rows with one model.

    Golden rows are twenty awkward pairs in the run's contract, which every stage scores to show that it
    computes the same.

    Returns:
        The probabilities of the validation rows, and for each golden row its id and probabilities.

    Raises:
        UserError: A probability is not finite.
    """
    golden_pairs = [run.model_input.pair_from_row(row["pair"]) for row in run.contract.golden]
    try:
        column = score_column(name, model, run, tokenizer, pairs)
        golden_scores = score_pairs(name, model, run, tokenizer, golden_pairs, (GOLDEN_ORDER,))
    except FloatingPointError as error:
        raise UserError(
            f"{name}: {error}: numbers overflow in this model, so it cannot be packaged; train again, "
            "or start from another base model"
        ) from None

    # The kernel, which scores them once more, compares them by id.
    golden = []
    for pair in golden_pairs:
        probabilities = golden_scores[pair.id][GOLDEN_ORDER]
        golden.append({"id": pair.id, "probabilities": probabilities})
    return column, golden


def score_column(name: str, model: torch.nn.Module, run: Run, tokenizer, pairs: Sequence) -> Column:
    """Score pairs in both orders with a model in eval mode.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    scores = score_pairs(name, model, run, tokenizer, pairs)
    rows = []
    for pair in pairs:
        rows.append([scores[pair.id][order] for order in ORDERS])

    probabilities_rov = np.array(rows, dtype=np.float64)
    precision = str(model.dtype).removeprefix("torch.")
    return Column(name, probabilities_rov, precision)


def score_pairs(
    name: str,
    model: torch.nn.Module,
    run: Run,
    tokenizer,
    pairs: Sequence,
    orders: Sequence[str] = ORDERS,
) -> dict[str, dict[str, list[float]]]:
    """Score pairs, some at a time, in smaller batches once memory runs out.

    Returns:
        The probabilities of each pair by its id and by order.

    Raises:
        FloatingPointError: A probability is not finite.
        torch.OutOfMemoryError: A sequence alone does not fit.
    """
    scores = {}
    tokens_per_batch = TOKENS_PER_BATCH
    unscored_pairs = list(pairs)
    with tqdm(total=len(unscored_pairs), desc=name, unit=" rows", delay=2, leave=False) as progress:
        while unscored_pairs:
            step_pairs = unscored_pairs[:ROWS_PER_STEP]
            step_scores = None
            try:
                step_scores = score(
                    model,
                    run.model_input,
                    tokenizer,
                    run.contract,
                    step_pairs,
                    orders=orders,
                    tokens_per_batch=tokens_per_batch,
                    device=str(model.device),
                )
            except torch.OutOfMemoryError:
                # A batch of one sequence cannot be made smaller.
                if tokens_per_batch < run.contract.budget_tokens:
                    raise

            # Only here, outside of the except, are the tensors of the failed pass free.
            if step_scores is None:
                tokens_per_batch //= 2
                torch.cuda.empty_cache()
                continue

            scores |= step_scores
            unscored_pairs = unscored_pairs[ROWS_PER_STEP:]
            progress.update(len(step_pairs))
    return scores


def write_results(
    run: Run, rows: pl.DataFrame, probabilities_rov: np.ndarray, facts: Mapping[str, object]
) -> dict[str, float]:
    """Write predictions.parquet and metrics.json as training would: of a mean of runs, or of a base model as it is.

    `facts` are what metrics.json says besides the metrics, which are returned.
    """
    verdicts = run.contract.verdicts
    table = metrics.predictions(rows["id"].to_list(), probabilities_rov, verdicts, rows)
    with atomic_file(run.folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)

    scores = metrics.scores(probabilities_rov, targets(rows, verdicts), winners(rows, verdicts))
    results = {
        **scores,
        "accuracy_of_longer": metrics.longer_is_right(rows),
        "rows": len(rows),
        "pairs_sha256": sha256(run.recipe.pairwise.pairs),
        **facts,
    }
    write_json(run.folder / "metrics.json", results)
    return scores


def choose_dtype(run: Run, tokenizer, pairs: Sequence) -> torch.dtype:
    """Choose what the models compute in: float16 as on Kaggle, but float32 where a CPU would take long.

    The time is estimated from the number of floating-point operations. The weights are rounded to float16 in
    both cases.
    """
    if list_gpus():
        return torch.float16

    # A forward pass multiplies each token by each matrix of each layer. Embeddings are looked up, and the
    # head, which computes for one token of a row, hardly counts.
    skeleton = model_skeleton(run.weights, run.contract)
    weights_per_token = 0
    for name, shape in skeleton.shapes.items():
        is_in_layer = "embed" not in name and name not in skeleton.head
        if is_in_layer and len(shape) == 2:
            weights_per_token += math.prod(shape)

    orders = orders_of(run.contract, ORDERS)
    requests = make_requests(run.model_input, tokenizer, run.contract, pairs, orders)
    tokens = sum(request.tokens for request in requests)

    # For each token, a weight costs one multiplication and one addition.
    flop = 2 * tokens * weights_per_token
    is_fast_enough = flop <= FLOAT16_ON_CPU_FLOP
    return torch.float16 if is_fast_enough else torch.float32
