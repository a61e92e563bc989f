"""The merged model → its GPTQ twin of 4 or 8 bits, in groups of 128 weights, calibrated on training pairs.

The method (Frantar et al. 2023, "GPTQ") is gptqmodel's, through optimum's layer loop, in an environment
of its own. The text of the calibration's pairs reaches neither that environment nor the package: the
worker gets token ids, and writes none of them. pipeline.py calls this.
"""

import gc
import json
import shutil
import tempfile
from collections.abc import Mapping
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
    """Write a folder with the model's layers in few bits, head and rest in 16 bits, and the tokenizer.

    Args:
        run: The trained run.
        merged: The folder of its merged model.
        bits: 4 or 8.
        out: The folder.
        seed: Another one calibrates on other rows. One seed always gives the same bytes on the same
            machine.

    Raises:
        UserError: GPTQ does not take the model, no row is left to calibrate on, or the worker fails.
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

    # The worker is another process, and wants what this one holds without using it.
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(out) as folder:
        job_file = Path(temporary) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_worker([job_file, folder])
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


def check_model(run: Run) -> None:
    """Raise UserError where the model's kind, or the size of one of its layers, is not one that GPTQ takes."""
    skeleton = model_skeleton(run.weights, run.contract)
    base_model = run.contract.base_model
    kind = skeleton.config.model_type
    if kind not in MODEL_TYPES:
        raise UserError(
            f"pairwise.package.quantize: GPTQ is for decoders ({', '.join(MODEL_TYPES)}), {base_model} is a "
            f"{kind}; write int8, or none: it is small"
        )

    for name, (outputs, inputs) in linear_layers(skeleton.shapes).items():
        if inputs % GROUP_SIZE or outputs % OUTPUTS:
            raise UserError(
                f"pairwise.package.quantize: GPTQ takes groups of {GROUP_SIZE} inputs and {OUTPUTS} outputs, {name} of "
                f"{base_model} has {inputs} and {outputs}; write nf4 or int8"
            )


def linear_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Select the weights that are quantised, with their shapes (outputs, inputs)."""
    layers = {}
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) == 2:
            layers[name] = shape
    return layers
