"""The merged model of a run → the same in nf4 or int8. pipeline.py calls this."""

import gc
from dataclasses import replace
from pathlib import Path

import torch

from kaggle_kernels.runtime.models.model import CLASSES
from postprocess.agreement.devices import place_checkpoint
from postprocess.run_folder import Run
from postprocess.weights.bnb_quantize import quantization_config
from postprocess.weights.calibration import choose_calibration_rows, encode_calibration_rows
from postprocess.weights.merge import Form, merge
from postprocess.weights.meta_model import head_modules, model_skeleton
from postprocess.weights.smooth_quant import MODEL_TYPES, Smoothing, smooth
from preprocess.core.errors import UserError


def quantise_merged(run: Run, merged: Path, kind: str, out: Path, key: str = "") -> None:
    """Quantise the merged model of a run to nf4 or int8, and write it as the folder `out`.

    An interrupted call with the same key is continued at the file of weights that it was writing.
    """
    smoothing = calibrate_smoothing(run, merged) if kind == "int8" else None

    # The head stays in 16 bits: it is small, and every verdict depends on it.
    head = head_modules(merged, run.contract.head)
    form = Form(quantization_config(kind, head), smoothing=smoothing)

    # The adapter is merged already: for the writer, this is a run without one, like a full fine-tune.
    merged_run = replace(run, weights=merged, has_adapter=False)
    merge(merged_run, out, form, key=key)


def calibrate_smoothing(run: Run, merged: Path) -> Smoothing | None:
    """Compute the scales by which SmoothQuant prepares a run's merged model for int8.

    They are computed from activations on up to 256 training rows, the same that GPTQ calibrates on.

    Returns:
        The scales; None where the architecture is not known, or no row is left to calibrate on. Then the
        reason is printed, and the model is quantised without SmoothQuant.
    """
    model_type = model_skeleton(run.weights, run.contract).config.model_type
    if model_type not in MODEL_TYPES:
        print(
            f"  int8 without SmoothQuant, which is for {', '.join(MODEL_TYPES)}; this is a {model_type}"
        )
        return None

    try:
        rows = choose_calibration_rows(run)
    except UserError as error:
        print(f"  int8 without SmoothQuant: {error}")
        return None

    # Load transformers' own modules: the faster ones that serve a model keep other weights in their norms.
    has_gpu = torch.cuda.is_available()
    model = CLASSES[run.contract.head].from_pretrained(
        merged,
        dtype=torch.float16 if has_gpu else torch.float32,
        attn_implementation="eager" if run.contract.softcap else None,
        local_files_only=True,
        use_safetensors=True,
        **place_checkpoint(),
    )
    smoothing = smooth(model.eval(), encode_calibration_rows(run, rows))
    print(f"  int8 with SmoothQuant, calibrated on {len(rows)} training rows")

    # Free the memory: the quantiser reads the weights again from the disk.
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return smoothing
