"""A recipe with `train: false`: the run folder that training would have left, made from the base model as it is.

The tokenizer's files, the validation fold scored in both orders by the code that runs on Kaggle (predictions.parquet,
metrics.json), and last of all contract.json with model_input.py, whose `logit_bias` cancels the base's position bias.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import ORDERS, make_batches, make_requests, orders_of, verdict_logits
from kaggle_kernels.runtime.package import PackageError
from postprocess.agreement.validation_rows import by_hash
from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.merge import find_base_names
from postprocess.weights.meta_model import model_skeleton
from postprocess.zero_shot.position_bias import position_bias
from preprocess import model_input
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, sha256, write_json
from preprocess.model_input import Contract, ContractError, pair_from_row
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.contract import new_contract, record_training, write_contract
from recipes.pairwise.data.datasets import read_pairs, split, targets, winners
from recipes.pairwise.tracking import metrics

MADE = ("contract.json", "model_input.py", "metrics.json", "predictions.parquet")
CHUNK_ROWS = 500
TOKENS_PER_BATCH = 8192
COMPARED = ("accuracy", "log_loss", "flip_rate")


def untrained(recipe: Recipe, base: Path, revision: str | None) -> None:
    """Fill the run folder of `recipe` from the base model in the folder `base`, of the hub's commit `revision` if any.

    Raises UserError where the base has no such head, no pad token, too few positions, or gives numbers that are not finite.
    """
    folder, block = recipe.run_folder, recipe.pairwise
    folder.mkdir(parents=True, exist_ok=True)
    for name in MADE:  # nothing of an earlier run may vouch for this one
        (folder / name).unlink(missing_ok=True)
    tokenizer = recipe_tokenizer(recipe, base)
    tokenizer.save_pretrained(folder)
    contract = base_contract(recipe, base, revision, tokenizer)
    frame = read_pairs(block.pairs)
    _, validation = split(frame, block.fold, block.pairs)
    model, device = load_base(base, contract)

    started = time.monotonic()
    calibration = calibration_rows(frame, validation)
    if contract.head != "reward":
        logits_rov = row_logits(model, contract, tokenizer, calibration, device, "calibrating")
        contract = replace(contract, logit_bias=position_bias(logits_rov, contract.verdicts))
    calibrated = time.monotonic()
    logits_rov = row_logits(model, contract, tokenizer, validation, device, "scoring validation pairs")
    values = write_results(folder, contract, logits_rov, validation)
    print_summary(contract, values)
    write_json(
        folder / "metrics.json",
        {
            **values,
            "rows": len(validation),
            "training_rows": 0,
            "calibration_rows": len(calibration) if contract.logit_bias else 0,
            "fold": block.fold,
            "rows_were_trained_on": False,
            "steps": 0,
            "seconds_calibrating": round(calibrated - started, 1),
            "seconds_predicting": round(time.monotonic() - calibrated, 1),
            "pairs_sha256": sha256(block.pairs),
        },
    )
    write_contract(folder, contract, recipe.path)
    record_training(recipe.path, folder, block.pairs)


def recipe_tokenizer(recipe: Recipe, base: Path):
    """The base's tokenizer with the recipe's special_tokens, which must be in its vocabulary already."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{base}: no tokenizer that transformers can read ({' '.join(str(error).split())[:200]})") from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{recipe.path}: base_model {base} has no fast tokenizer (tokenizer.json)")
    size = len(tokenizer)
    special = recipe.axolotl.get("special_tokens") or {}
    try:
        tokenizer.add_special_tokens(special)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{recipe.path}: special_tokens: {special!r} is not a tokenizer's ({error})") from None
    if len(tokenizer) != size:
        raise UserError(
            f"{recipe.path}: special_tokens: {special} are not all in the vocabulary of {base}; name tokens that are"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"{recipe.path}: the tokenizer has no pad token; set special_tokens: {{pad_token: …}} in the recipe")
    return tokenizer


def base_contract(recipe: Recipe, base: Path, revision: str | None, tokenizer) -> Contract:
    """The contract of the base model used as it is, before calibration; the head that it asks for is there."""
    block = recipe.pairwise
    attention = recipe.axolotl.get("attn_implementation") or ("eager" if block.softcap else "sdpa")
    try:
        contract = new_contract(
            block,
            tokenizer,
            attention=attention,
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
    with open_tensors(base) as tensors:
        if absent := [name for name in skeleton.head if name not in find_base_names(tensors, skeleton)]:
            raise UserError(
                f"{base}: has no {', '.join(absent)}, so that its answers would be random; with train: false, choose "
                "head: label_tokens, or a base model that has this head"
            )
    return contract


def load_base(base: Path, contract: Contract) -> tuple[torch.nn.Module, str]:
    """The base model as the runtime loads it, on the GPU if there is one, and the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_model(base, contract, device), device
    except PackageError as error:
        raise UserError(f"{base}: cannot be used as it is ({error})") from None


def calibration_rows(frame: pl.DataFrame, validation: pl.DataFrame) -> pl.DataFrame:
    """Up to 500 rows that are not for validation, by a hash of their ids, texts only: no label is looked at.

    Where every row is for validation (fold: all of a small file), it is those.
    """
    texts = frame.select("id", "prompt", "response_a", "response_b")
    others = texts.join(validation.select("id"), on="id", how="anti")
    rows = others if len(others) else texts
    return rows.filter(pl.col("id").is_in(by_hash(rows["id"])))


def row_logits(
    model: torch.nn.Module, contract: Contract, tokenizer, frame: pl.DataFrame, device: str, what: str
) -> np.ndarray:
    """The verdicts' logits of a table's rows without a bias, float64 of shape (rows, orders, verdicts), not swapped back."""
    orders = orders_of(contract, ORDERS)
    found: dict[tuple[str, str], list[float]] = {}
    with tqdm(total=len(frame), desc=what, unit=" pairs", mininterval=5) as progress, torch.inference_mode():
        for start in range(0, len(frame), CHUNK_ROWS):
            chunk = frame[start : start + CHUNK_ROWS]
            pairs = [pair_from_row(row) for row in chunk.iter_rows(named=True)]
            for batch in make_batches(make_requests(model_input, tokenizer, contract, pairs, orders), TOKENS_PER_BATCH):
                logits_bv = verdict_logits(model, contract, [ids for request in batch for ids in request.sequences], device)
                if not torch.isfinite(logits_bv).all():
                    raise UserError(f"{contract.base_model}: its logits are not finite in {model.dtype}; choose another base")
                found |= {
                    (request.id, request.order): values for request, values in zip(batch, logits_bv.tolist(), strict=True)
                }
            progress.update(len(chunk))
    return np.array([[found[row_id, order] for order in orders] for row_id in frame["id"]], dtype=np.float64)


def write_results(folder: Path, contract: Contract, logits_rov: np.ndarray, validation: pl.DataFrame) -> dict[str, object]:
    """Write predictions.parquet; the metrics, those before calibration among them."""
    labels_rv, winners_r = targets(validation, contract.verdicts), winners(validation, contract.verdicts)
    bias: Sequence[float] = contract.logit_bias or (0.0,) * len(contract.verdicts)
    both = metrics.probabilities(logits_rov + np.array(bias), contract.verdicts)
    table = metrics.predictions(validation["id"].to_list(), both, contract.verdicts, validation)
    with atomic_file(folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)
    before = metrics.scores(metrics.probabilities(logits_rov, contract.verdicts), labels_rv, winners_r)
    return {
        **metrics.scores(both, labels_rv, winners_r),
        "accuracy_of_longer": metrics.longer_is_right(validation),
        "before_calibration": {name: before[name] for name in COMPARED},
    }


def print_summary(contract: Contract, values: Mapping) -> None:
    """Print what the calibration found and what it did to the validation rows."""
    if contract.logit_bias:
        shift = contract.logit_bias[contract.verdicts.index("model_b")] * 2
        print(f"  position bias: {shift:+.3f} on the first answer's logit, cancelled; on the validation rows:")
        for name, found in values["before_calibration"].items():
            print(f"  {name.replace('_', ' '):<10} {found:.4f} before, {values[name]:.4f} after")
