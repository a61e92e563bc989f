"""The merged model → its GPTQ twin of 4 or 8 bits, in groups of 128 weights, calibrated on training pairs.

The method (Frantar et al. 2023, "GPTQ") is gptqmodel's, through optimum's layer loop, in an environment of its own. The
calibration's pairs go through the run's own model_input.py; never is one of them a row that the package is checked on,
unless every row is trained on and checked (fold: all of a small file). Their text reaches neither that environment nor the
package: the worker gets token ids, and writes none of them.
"""

import gc
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import torch

from postprocess.agreement.validation_rows import by_hash
from postprocess.gptq.environment import run_worker
from postprocess.run_folder import Run, checked_tokenizer
from postprocess.weights.meta_model import model_skeleton
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_folder
from recipes.pairwise.data.datasets import read_pairs, split

ROWS = 256
GROUP_SIZE = 128
OUTPUTS = 32  # gptqmodel packs that many rows at once
# Linear layers of a decoder's layer: those with the same input are quantised together, each group after what stands before it.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
    ("mlp.down_proj",),
)


def quantize(run: Run, merged: Path, bits: int, out: Path, seed: int = 0) -> None:
    """Write the folder `out`: the model in `merged` with its layers in `bits` (4 or 8), head and rest in 16 bits, tokenizer.

    Another `seed` calibrates on other rows; one seed always gives the same bytes on the same machine. Raises UserError where
    the model is not of a kind that GPTQ takes here, where there is no row to calibrate on, or where the worker fails.
    """
    groups = check_model(run)
    job = {
        "model": str(merged.resolve()),
        "architecture": model_skeleton(merged, run.contract).config.architectures[0],
        "attention": "eager" if run.contract.softcap else "sdpa",
        "bits": bits,
        "group_size": GROUP_SIZE,
        "groups": groups,
        "sequences": calibration_sequences(run, calibration_rows(run, seed)),
    }
    gc.collect()
    torch.cuda.empty_cache()  # the worker is another process, and wants what this one holds without using it
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(out) as folder:
        job_file = Path(temporary) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_worker([job_file, folder])
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


def check_model(run: Run) -> list[list[str]]:
    """Check that GPTQ can take the run's model.

    Returns:
        The names of the linear layers within a decoder's layer, in the order and groups in which they are quantised.

    Raises:
        UserError: The model has layers of other names, or of a size that GPTQ cannot take.
    """
    skeleton = model_skeleton(run.weights, run.contract)
    base_model = run.contract.base_model
    layers = linear_layers(skeleton.shapes.items())
    names = {re.sub(r".*\.layers\.\d+\.", "", name).removesuffix(".weight") for name, _ in layers}

    groups = [[name for name in group if name in names] for group in GROUPS]
    if not layers or names != set(itertools.chain(*groups)):
        raise UserError(
            f"pairwise.package.quantize: GPTQ is for decoders with Llama's or Phi-3's names of layers, {base_model} is a "
            f"{skeleton.config.model_type}; write int8, or none if it is small"
        )

    for name, (outputs, inputs) in layers:
        if inputs % GROUP_SIZE or outputs % OUTPUTS:
            raise UserError(
                f"pairwise.package.quantize: GPTQ takes groups of {GROUP_SIZE} inputs and {OUTPUTS} outputs, {name} of "
                f"{base_model} has {inputs} and {outputs}; write nf4 or int8"
            )
    return groups


def linear_layers(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """The weights that are quantised, as (name, (outputs, inputs))."""
    return [(name, shape) for name, shape in shapes if ".layers." in name and len(shape) == 2]


def calibration_rows(run: Run, seed: int) -> pl.DataFrame:
    """Up to 256 training rows by a hash of seed and id, in that order, none of them in predictions.parquet.

    With fold `all` and a file so small that every row is in there, it is those: each was trained on as well.
    """
    pairs_file, predictions = run.validation_files()
    training, _ = split(read_pairs(pairs_file), run.recipe.pairwise.fold, pairs_file)
    checked = pl.read_parquet(predictions, columns=["id"])
    others = training.join(checked, on="id", how="anti")
    rows = training if others.is_empty() and run.recipe.pairwise.fold == "all" else others
    if rows.is_empty():
        raise UserError(
            f"{pairs_file}: every row outside fold {run.recipe.pairwise.fold} is in {predictions}, so that none is left for "
            "GPTQ to calibrate on; set pairwise.fold as it was in training"
        )
    chosen = pl.DataFrame({"id": by_hash(rows["id"], ROWS, salt=f"{seed}:")})
    return chosen.join(rows, on="id", how="left", maintain_order="left")


def calibration_sequences(run: Run, rows: pl.DataFrame) -> list[list[int]]:
    """Token ids as the model sees them, every second pair with its answers swapped, so that both orders are met."""
    tokenizer = checked_tokenizer(run)
    pairs = [run.model_input.pair_from_row(row) for row in rows.iter_rows(named=True)]
    turned = [run.model_input.swap(pair) if number % 2 else pair for number, pair in enumerate(pairs)]
    encoded = run.model_input.encode_all(turned, tokenizer, run.contract)
    return [list(ids) for sequences in encoded for ids in sequences]
