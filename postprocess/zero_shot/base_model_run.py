"""Make the run folder of a recipe with `train: false` from its base model, as training would have left it.

It gets the tokenizer's files, the validation rows scored in both orders by the code that runs on
Kaggle (predictions.parquet, metrics.json), and last of all contract.json with model_input.py. The
contract's `logit_bias` cancels the base model's position bias. postprocess/pipeline.py calls this.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import (
    ORDERS,
    make_batches,
    make_requests,
    orders_of,
    verdict_logits,
)
from kaggle_kernels.runtime.package import PackageError
from postprocess.agreement.validation_rows import by_hash
from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.merge import find_base_names
from postprocess.weights.meta_model import Skeleton, model_skeleton
from postprocess.zero_shot.position_bias import find_logit_bias
from preprocess import model_input
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, sha256, write_json
from preprocess.model_input import Contract, ContractError, pair_from_row
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.contract import new_contract, record_training, write_contract
from recipes.pairwise.data.datasets import read_pairs, split, targets, winners
from recipes.pairwise.tracking import metrics

RESULT_FILES = ("contract.json", "model_input.py", "metrics.json", "predictions.parquet")
METRICS_OF_CALIBRATION = ("accuracy", "log_loss", "flip_rate")
CHUNK_ROWS = 500
TOKENS_PER_BATCH = 8192


def make_base_model_run(recipe: Recipe, base: Path, revision: str | None) -> None:
    """Fill the run folder of a recipe from a base model that nobody trains: calibrate it, and score the validation rows.

    Args:
        recipe: A recipe with `train: false`.
        base: The folder of the base model.
        revision: The commit of the hub's repository that the folder is a snapshot of, if any.

    Raises:
        UserError: The base has no such head, no pad token, too few positions, or gives numbers that
            are not finite.
    """
    folder = recipe.run_folder
    block = recipe.pairwise
    folder.mkdir(parents=True, exist_ok=True)
    # Nothing of an earlier run may vouch for this one.
    for name in RESULT_FILES:
        (folder / name).unlink(missing_ok=True)

    # What decides the model's input is checked before the model is loaded.
    tokenizer = load_tokenizer(recipe, base)
    tokenizer.save_pretrained(folder)
    contract = make_contract(recipe, base, revision, tokenizer)
    training, validation = split(read_pairs(block.pairs), block.fold, block.pairs)
    model = load_base(base, contract)

    # A reward model sees one response at a time, and has no place to prefer.
    start = time.monotonic()
    calibration_count = 0
    if contract.head != "reward":
        calibration = choose_calibration_rows(training, validation)
        calibration_count = len(calibration)
        logits_rov = compute_logits(model, contract, tokenizer, calibration, "calibrating")
        bias = find_logit_bias(logits_rov, contract.verdicts)
        contract = replace(contract, logit_bias=bias)
    end_of_calibration = time.monotonic()

    logits_rov = compute_logits(model, contract, tokenizer, validation, "scoring validation pairs")
    scores = write_predictions(folder, contract, logits_rov, validation)
    print_summary(contract, scores)
    # The keys that training writes too, so that later stages read both alike.
    facts = {
        "rows": len(validation),
        "training_rows": 0,
        "calibration_rows": calibration_count,
        "fold": block.fold,
        "rows_were_trained_on": False,
        "steps": 0,
        "seconds_calibrating": round(end_of_calibration - start, 1),
        "seconds_predicting": round(time.monotonic() - end_of_calibration, 1),
        "pairs_sha256": sha256(block.pairs),
    }
    write_json(folder / "metrics.json", scores | facts)

    # The contract comes last: it vouches for everything beside it.
    write_contract(folder, contract, recipe.path)
    record_training(recipe.path, folder, block.pairs)


def load_tokenizer(recipe: Recipe, base: Path):
    """Load the base model's tokenizer with the recipe's special_tokens.

    Raises:
        UserError: There is no fast tokenizer or no pad token, or a special token is new to it.
    """
    try:
        # From the folder alone: nothing is fetched, and no code of a model is run.
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{base}: no tokenizer that transformers can read ({reason})") from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{recipe.path}: base_model {base} has no fast tokenizer (tokenizer.json)")

    add_special_tokens(tokenizer, recipe, base)
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{recipe.path}: the tokenizer has no pad token; set special_tokens: {{pad_token: …}} in the recipe"
        )
    return tokenizer


def add_special_tokens(tokenizer, recipe: Recipe, base: Path) -> None:
    """Give a tokenizer the special tokens that a recipe names; they must be in its vocabulary already.

    Args:
        tokenizer: The base model's, which is changed.
        recipe: The recipe.
        base: The folder of the base model, for the message.

    Raises:
        UserError: They are not special tokens, or one is new: it has no trained embedding.
    """
    vocabulary_size = len(tokenizer)
    special_tokens = recipe.axolotl.get("special_tokens") or {}
    try:
        tokenizer.add_special_tokens(special_tokens)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{recipe.path}: special_tokens: {special_tokens!r} is not a tokenizer's ({error})"
        ) from None
    if len(tokenizer) != vocabulary_size:
        raise UserError(
            f"{recipe.path}: special_tokens: {special_tokens} are not all in the vocabulary of {base}; "
            "name tokens that are"
        )


def make_contract(recipe: Recipe, base: Path, revision: str | None, tokenizer) -> Contract:
    """Make the contract of an untrained model, before calibration.

    Args:
        recipe: The recipe.
        base: The folder of the base model.
        revision: Its commit on the hub, if any.
        tokenizer: As load_tokenizer gives it.

    Raises:
        UserError: The base model has too few positions, or lacks the head that the recipe names.
    """
    block = recipe.pairwise
    # Only eager attention applies a soft cap.
    default_attention = "eager" if block.softcap else "sdpa"
    # new_contract finds out whether the template and the answer tokens suit the tokenizer.
    try:
        contract = new_contract(
            block,
            tokenizer,
            attention=recipe.axolotl.get("attn_implementation") or default_attention,
            base_model=recipe.axolotl["base_model"],
            revision=revision,
            pad_token_id=tokenizer.pad_token_id,
        )
    except ContractError as error:
        raise UserError(f"{recipe.path}: {error}") from None

    skeleton = model_skeleton(base, contract)
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    if positions and block.budget_tokens > positions:
        raise UserError(
            f"pairwise.budget_tokens: {block.budget_tokens}, but the base model has {positions} positions; lower it"
        )
    check_has_head(base, skeleton)
    return contract


def check_has_head(base: Path, skeleton: Skeleton) -> None:
    """Raise UserError where a checkpoint lacks the head's tensors, for which transformers would make random ones."""
    with open_tensors(base) as tensors:
        base_names = find_base_names(tensors, skeleton)
    missing_names = [name for name in skeleton.head if name not in base_names]
    if missing_names:
        raise UserError(
            f"{base}: has no {', '.join(missing_names)}, so that its answers would be random; with train: false, "
            "choose head: label_tokens, or a base model that has this head"
        )


def load_base(base: Path, contract: Contract) -> torch.nn.Module:
    """Load the base model as the runtime loads it, on the GPU if there is one."""
    # A folder that no kernel could load is refused here, and not on Kaggle.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_model(base, contract, device)
    except PackageError as error:
        raise UserError(f"{base}: cannot be used as it is ({error})") from None


def choose_calibration_rows(training: pl.DataFrame, validation: pl.DataFrame) -> pl.DataFrame:
    """Choose up to 500 training rows that are not for validation, by a hash of their ids, without their labels.

    Where every row is for validation (fold: all of a small file), it is those.
    """
    # Without verdicts, no label can find its way into the calibration.
    texts = training.select("id", "prompt", "response_a", "response_b")
    rows = texts.join(validation.select("id"), on="id", how="anti")
    if rows.is_empty():
        rows = texts
    return rows.filter(pl.col("id").is_in(by_hash(rows["id"])))


def compute_logits(
    model: torch.nn.Module, contract: Contract, tokenizer, rows: pl.DataFrame, description: str
) -> np.ndarray:
    """Compute the logits of the verdicts, without a bias.

    Args:
        model: The base model.
        contract: Its contract.
        tokenizer: Its tokenizer.
        rows: Rows of a pairs file.
        description: What the progress bar says.

    Returns:
        Logits (rows, orders, verdicts) in float64, as the model gives them: not swapped back.

    Raises:
        UserError: A logit is not finite.
    """
    device = str(next(model.parameters()).device)
    orders = orders_of(contract, ORDERS)
    # Batches are made by length: a result finds its row by id and order.
    row_of_id = {row_id: row for row, row_id in enumerate(rows["id"])}
    logits_rov = np.empty((len(rows), len(orders), len(contract.verdicts)))

    with (
        tqdm(total=len(rows), desc=description, unit=" pairs", mininterval=5) as progress,
        torch.inference_mode(),
    ):
        for chunk in rows.iter_slices(CHUNK_ROWS):
            pairs = [pair_from_row(row) for row in chunk.iter_rows(named=True)]
            requests = make_requests(model_input, tokenizer, contract, pairs, orders)
            for batch in make_batches(requests, TOKENS_PER_BATCH):
                # A request is a pair in one order; a reward model reads it as two sequences.
                sequences = []
                for request in batch:
                    sequences += request.sequences
                logits_bv = verdict_logits(model, contract, sequences, device)
                if not torch.isfinite(logits_bv).all():
                    raise UserError(
                        f"{contract.base_model}: its logits are not finite in {model.dtype}; choose another base"
                    )
                for request, logits_v in zip(batch, logits_bv.tolist(), strict=True):
                    order_number = orders.index(request.order)
                    logits_rov[row_of_id[request.id], order_number] = logits_v
            progress.update(len(chunk))
    return logits_rov


def write_predictions(
    folder: Path, contract: Contract, logits_rov: np.ndarray, validation: pl.DataFrame
) -> dict[str, object]:
    """Write predictions.parquet.

    Args:
        folder: The run folder.
        contract: With the bias that calibration has found.
        logits_rov: The logits of the validation rows, without the bias.
        validation: The validation rows.

    Returns:
        The metrics, those before calibration among them.
    """
    verdicts = contract.verdicts
    bias_v = np.zeros(len(verdicts))
    if contract.logit_bias:
        bias_v = np.array(contract.logit_bias)
    calibrated_rov = metrics.probabilities(logits_rov + bias_v, verdicts)
    uncalibrated_rov = metrics.probabilities(logits_rov, verdicts)

    # Everything after this stage works with the calibrated probabilities.
    table = metrics.predictions(validation["id"].to_list(), calibrated_rov, verdicts, validation)
    with atomic_file(folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)

    # The same rows with and without the bias show what calibration has brought.
    labels_rv = targets(validation, verdicts)
    winners_r = winners(validation, verdicts)
    scores = metrics.scores(calibrated_rov, labels_rv, winners_r)
    scores_before = metrics.scores(uncalibrated_rov, labels_rv, winners_r)
    return {
        **scores,
        "accuracy_of_longer": metrics.longer_is_right(validation),
        "before_calibration": {name: scores_before[name] for name in METRICS_OF_CALIBRATION},
    }


def print_summary(contract: Contract, scores: Mapping) -> None:
    """Print which position bias calibration found, and how the metrics changed; nothing of a reward model.

    Args:
        contract: With the bias: -d/2 for model_a, d/2 for model_b.
        scores: As write_predictions returns them.
    """
    if not contract.logit_bias:
        return

    position_bias = 2 * contract.logit_bias[contract.verdicts.index("model_b")]
    print(
        f"  position bias: {position_bias:+.3f} on the first answer's logit, cancelled; on the validation rows:"
    )
    for name, value_before in scores["before_calibration"].items():
        label = name.replace("_", " ")
        print(f"  {label:<10} {value_before:.4f} before, {scores[name]:.4f} after")
