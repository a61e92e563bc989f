"""The merged model → its GPTQ twin of 4 or 8 bits, in groups of 128 weights, calibrated on training pairs.

The method (Frantar et al. 2023, "GPTQ") is gptqmodel's, through optimum's layer loop, in an environment of its own. The
calibration's pairs go through the run's own model_input.py; never is one of them a row that the package is checked on,
unless every row is trained on and checked (fold: all of a small file). Their text reaches neither that environment nor the
package: the worker gets token ids, and writes none of them.
"""

import gc
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from postprocess.gptq.environment import run_worker
from postprocess.run_folder import Run
from postprocess.weights.calibration import choose_calibration_rows, encode_calibration_rows
from postprocess.weights.meta_model import model_skeleton
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_folder

GROUP_SIZE = 128
OUTPUTS = 32  # gptqmodel packs that many rows at once
MODEL_TYPES = ("gemma2", "llama", "qwen2")


def quantize(run: Run, merged: Path, bits: int, out: Path, seed: int = 0) -> None:
    """Write the folder `out`: the model in `merged` with its layers in `bits` (4 or 8), head and rest in 16 bits, tokenizer.

    Another `seed` calibrates on other rows; one seed always gives the same bytes on the same machine. Raises UserError where
    the model is not of a kind that GPTQ takes here, where there is no row to calibrate on, or where the worker fails.
    """
    check_model(run)
    rows = choose_calibration_rows(run, seed)
    job = {
        "model": str(merged.resolve()),
        "architecture": model_skeleton(merged, run.contract).config.architectures[0],
        "attention": "eager" if run.contract.softcap else "sdpa",
        "bits": bits,
        "group_size": GROUP_SIZE,
        "sequences": encode_calibration_rows(run, rows),
    }
    gc.collect()
    torch.cuda.empty_cache()  # the worker is another process, and wants what this one holds without using it
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(out) as folder:
        job_file = Path(temporary) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_worker([job_file, folder])
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


def check_model(run: Run) -> None:
    """Raise UserError where the model's kind, or the size of one of its layers, is not one that GPTQ can take here."""
    skeleton = model_skeleton(run.weights, run.contract)
    kind = skeleton.config.model_type
    if kind not in MODEL_TYPES:
        raise UserError(
            f"pairwise.package.quantize: GPTQ is for decoders ({', '.join(MODEL_TYPES)}), {run.contract.base_model} is a "
            f"{kind}; write int8, or none: it is small"
        )
    for name, shape in linear_layers(skeleton.shapes.items()):
        if shape[1] % GROUP_SIZE or shape[0] % OUTPUTS:
            raise UserError(
                f"pairwise.package.quantize: GPTQ takes groups of {GROUP_SIZE} inputs and {OUTPUTS} outputs, {name} of "
                f"{run.contract.base_model} has {shape[1]} and {shape[0]}; write nf4 or int8"
            )


def linear_layers(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """The weights that are quantised, as (name, (outputs, inputs))."""
    return [(name, shape) for name, shape in shapes if ".layers." in name and len(shape) == 2]
