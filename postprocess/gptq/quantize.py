"""The merged model → its GPTQ twin of 4 or 8 bits, in groups of 128 weights, calibrated on training pairs.

The method (Frantar et al. 2023, "GPTQ") is gptqmodel's, through optimum's layer loop, in an environment
of its own. The text of the calibration's pairs reaches neither that environment nor the package: the
worker gets token ids, and writes none of them. pipeline.py calls this.
"""

import gc
import json
import re
import shutil
import tempfile
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
# Linear layers of a decoder's layer. Those with the same input are quantised together, each group after
# what stands before it.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
    ("mlp.down_proj",),
)


def quantize(run: Run, merged: Path, bits: int, out: Path, seed: int = 0) -> None:
    """Quantise a merged model by GPTQ, and write it with its tokenizer as a folder.

    The linear layers get few bits; the head and the rest stay in 16. The seed decides which rows GPTQ is
    calibrated on: one seed always gives the same bytes on the same machine.

    Raises:
        UserError: GPTQ does not take the model, no row is left to calibrate on, or the worker fails.
    """
    groups = check_model(run)
    rows = choose_calibration_rows(run, seed)
    job = {
        "model": str(merged.resolve()),
        "architecture": model_skeleton(merged, run.contract).config.architectures[0],
        "attention": "eager" if run.contract.softcap else "sdpa",
        "bits": bits,
        "group_size": GROUP_SIZE,
        "groups": groups,
        "sequences": encode_calibration_rows(run, rows),
    }

    # The worker is another process: give back the memory that this one holds without using it.
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(out) as folder:
        job_file = Path(temporary) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_worker([job_file, folder])
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


def check_model(run: Run) -> list[list[str]]:
    """Check that GPTQ can take a run's model, and sort the names of its linear layers into groups.

    Returns:
        The names within a decoder layer, such as mlp.up_proj. Those of one group are quantised together.

    Raises:
        UserError: The model has layers of other names, or of a size that GPTQ cannot take.
    """
    # The matrices of the decoder layers; embeddings and head stay as they are.
    skeleton = model_skeleton(run.weights, run.contract)
    base_model = run.contract.base_model
    matrix_shapes = {}
    for weight_name, shape in skeleton.shapes.items():
        if ".layers." in weight_name and len(shape) == 2:
            matrix_shapes[weight_name] = shape

    # Every decoder layer has the same names: model.layers.7.mlp.up_proj.weight becomes mlp.up_proj.
    layer_names = set()
    for weight_name in matrix_shapes:
        name = re.sub(r".*\.layers\.\d+\.", "", weight_name).removesuffix(".weight")
        layer_names.add(name)

    groups = []
    for group in GROUPS:
        groups.append([name for name in group if name in layer_names])

    # A layer that no group has would stay in 16 bits without anyone noticing.
    unknown_names = layer_names.difference(*GROUPS)
    if not matrix_shapes or unknown_names:
        raise UserError(
            f"pairwise.package.quantize: GPTQ is for decoders whose layers are named as Llama's or Phi-3's, but "
            f"{base_model} is a {skeleton.config.model_type}; write int8, or none if it is small"
        )

    for weight_name, (outputs, inputs) in matrix_shapes.items():
        if inputs % GROUP_SIZE != 0 or outputs % OUTPUTS != 0:
            raise UserError(
                f"pairwise.package.quantize: GPTQ needs a multiple of {GROUP_SIZE} inputs and of {OUTPUTS} outputs, but "
                f"{weight_name} of {base_model} has {inputs} and {outputs}; write nf4 or int8"
            )
    return groups
