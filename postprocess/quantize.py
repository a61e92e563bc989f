"""The merged model → its quantised twin by bitsandbytes, the head left as it is, for GPUs without bfloat16.

Quantised from float16 weights and computing in float16, as a T4 does. The model is saved before it has run: on a CPU, a
forward pass repacks nf4 weights in place and what is saved afterwards is wrong.
"""

import shutil
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.model import CLASSES
from postprocess.run import Run
from postprocess.skeleton import head_modules
from preprocess.files import atomic_folder


def quantize(run: Run, merged: Path, quantize: str, out: Path) -> None:
    """Write the folder `out`: the model in `merged` with linear layers in `quantize` (nf4, int8), its tokenizer."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = CLASSES[run.contract.head].from_pretrained(
        merged,
        quantization_config=quantization_config(quantize, head_modules(merged, run.contract.head)),
        dtype=torch.float16,
        device_map={"": device},
        local_files_only=True,
        use_safetensors=True,
    )
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


def quantization_config(kind: str, head: list[str], double: bool = False) -> BitsAndBytesConfig:
    """bitsandbytes' settings for `kind`, nf4's scales quantised too where `double`.

    int8 has its threshold at 0, else answers depend on what else is in the batch.
    """
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=double,
            llm_int8_skip_modules=head,
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=head)
    raise ValueError(f"quantize: {kind!r}; expected nf4 or int8")
