"""Make the run folder of a recipe with `train: false` from its base model, as training would have left it.

It gets the tokenizer's files, the validation rows scored in both orders by the code that runs on
Kaggle (predictions.parquet, metrics.json), and last of all contract.json with model_input.py. The
contract's `logit_bias` cancels the base model's position bias. postprocess/pipeline.py calls this.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import AutoTokenizer

from postprocess.agreement.model_scores import score_column, write_results
from postprocess.agreement.reference_model import load_trained
from postprocess.agreement.validation_rows import by_hash
from postprocess.run_folder import RESULT_FILES, Run
from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.merge import find_base_names
from postprocess.weights.meta_model import model_skeleton
from postprocess.zero_shot.position_bias import find_logit_bias
from preprocess import model_input
from preprocess.core.errors import UserError
from preprocess.model_input import Contract, ContractError, pair_from_row, swap_probabilities
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.contract import new_contract, record_training, write_contract
from recipes.pairwise.data.datasets import read_pairs, split

SMALLEST = 1e-30  # of a probability in float32, before its logarithm


def make_base_model_run(recipe: Recipe, base: Path, revision: str | None) -> None:
    """Fill the run folder of a recipe from a base model that nobody trains: calibrate it, and score the validation rows.

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
    run = Run(recipe, folder, contract, model_input, base, has_adapter=False)
    model = load_trained(run)

    # A reward model sees one response at a time, and has no place to prefer.
    start = time.monotonic()
    calibration_count = 0
    if contract.head != "reward":
        calibration = choose_calibration_rows(training, validation)
        calibration_count = len(calibration)
        logits_rov = compute_logits(run, model, tokenizer, calibration)
        bias = find_logit_bias(logits_rov, contract.verdicts)
        contract = replace(contract, logit_bias=bias)
        run = replace(run, contract=contract)
        # The bias of model_b is half of what the first answer's logit has too much, that of model_a minus half.
        position_bias = 2 * bias[contract.verdicts.index("model_b")]
        print(f"  position bias: {position_bias:+.3f} on the first answer's logit, cancelled")
    end_of_calibration = time.monotonic()

    # The keys that training writes too, so that later stages read both alike.
    probabilities_rov = score_rows("validation pairs", run, model, tokenizer, validation)
    facts = {
        "training_rows": 0,
        "calibration_rows": calibration_count,
        "fold": block.fold,
        "rows_were_trained_on": False,
        "steps": 0,
        "seconds_calibrating": round(end_of_calibration - start, 1),
        "seconds_predicting": round(time.monotonic() - end_of_calibration, 1),
    }
    write_results(run, validation, probabilities_rov, facts)

    # The contract comes last: it vouches for everything beside it.
    write_contract(folder, contract, recipe.path)
    record_training(recipe.path, folder, block.pairs)


def load_tokenizer(recipe: Recipe, base: Path):
    """Load the tokenizer of the base model in the folder `base`, and add the recipe's special_tokens.

    Raises:
        UserError: There is no fast tokenizer or no pad token, or a special token is new to it.
    """
    try:
        # Only the folder is read: nothing is fetched, and no code that comes with a model is run.
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{base}: holds no tokenizer that transformers can read ({reason}); fetch the model again"
        ) from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"{recipe.path}: base_model {base} has no fast tokenizer (tokenizer.json); choose another base model"
        )

    add_special_tokens(tokenizer, recipe, base)
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{recipe.path}: the base model's tokenizer has no pad token; name one in the recipe with "
            "special_tokens: {pad_token: …}"
        )
    return tokenizer


def add_special_tokens(tokenizer, recipe: Recipe, base: Path) -> None:
    """Give a tokenizer the special tokens that a recipe names; they must be in its vocabulary already.

    Raises:
        UserError: They are not special tokens, or one is new: it has no trained embedding.
    """
    vocabulary_size = len(tokenizer)
    special_tokens = recipe.axolotl.get("special_tokens") or {}
    try:
        tokenizer.add_special_tokens(special_tokens)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{recipe.path}: special_tokens: the tokenizer does not take {special_tokens!r} ({error})"
        ) from None

    if len(tokenizer) != vocabulary_size:
        raise UserError(
            f"{recipe.path}: special_tokens: {special_tokens} are not all in the vocabulary of {base}, and a new "
            "token would have no trained embedding; name tokens that are in it"
        )


def make_contract(recipe: Recipe, base: Path, revision: str | None, tokenizer) -> Contract:
    """Make the contract of a model that nobody trained: everything that decides its input.

    The biases that calibration will find are not in it yet.

    Raises:
        UserError: The base model has too few positions, or lacks the head that the recipe names.
    """
    block = recipe.pairwise
    # Of transformers' implementations of attention, only `eager` applies a soft cap.
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
            f"{recipe.path}: pairwise.budget_tokens: {block.budget_tokens}, but the base model has {positions} "
            "positions; lower it"
        )

    # If the checkpoint lacked the head, transformers would fill it with random numbers.
    with open_tensors(base) as tensors:
        base_names = find_base_names(tensors, skeleton)
    missing_names = [name for name in skeleton.head if name not in base_names]
    if missing_names:
        raise UserError(
            f"{base}: has no {', '.join(missing_names)}, so that its answers would be random; for a recipe with "
            "train: false, choose head: label_tokens, or a base model that has this head"
        )
    return contract


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


def score_rows(
    description: str, run: Run, model: torch.nn.Module, tokenizer, rows: pl.DataFrame
) -> np.ndarray:
    """Score rows in both orders, (rows, orders, verdicts).

    Raises:
        UserError: A probability is not finite.
    """
    pairs = [pair_from_row(row) for row in rows.iter_rows(named=True)]
    try:
        return score_column(description, model, run, tokenizer, pairs).probabilities_rov
    except FloatingPointError as error:
        raise UserError(f"{run.weights}: {error}; choose another base") from None


def compute_logits(run: Run, model: torch.nn.Module, tokenizer, rows: pl.DataFrame) -> np.ndarray:
    """Compute the logits of the verdicts on each row, from which position bias is measured.

    Returns:
        Logits (rows, orders, verdicts), each sequence's up to a constant. They are as the model gives them:
        in the swapped order too, model_a is the response that stands first.
    """
    probabilities_rov = score_rows("calibrating", run, model, tokenizer, rows)

    # In the swapped order, score_rows has exchanged model_a and model_b, so that a verdict names the same
    # response in both orders. Position bias is about the place of a response: undo the exchange.
    verdicts = run.contract.verdicts
    swapped_columns = swap_probabilities(range(len(verdicts)), verdicts)
    probabilities_rov[:, 1] = probabilities_rov[:, 1][:, swapped_columns]

    # The logarithm of a softmax is the logits less a constant. Position bias is a difference of two logits,
    # in which the constant cancels out.
    return np.log(np.clip(probabilities_rov, SMALLEST, 1))
