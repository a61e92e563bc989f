"""One model quantised by optimum's GPTQ, in .venv-gptq: `python postprocess/gptq/worker.py JOB.json OUT`.

JOB.json has `model` (the folder of a decoder in 16 bits), `architecture` (its class in transformers), `attention`, `bits`,
`group_size`, `groups` (names of the linear layers that are quantised together) and `sequences` (token ids to calibrate on).
OUT gets config.json and model.safetensors in GPTQ's standard format. Imports nothing of this project: none of it is in that
environment.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "GPTQMODEL_DISABLE_PACK_EXT": "1",  # else C++ is compiled to pack words
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait spin otherwise: 34 s instead of 20 where another process has a core
}

import torch
import transformers
from optimum.gptq import GPTQQuantizer
from safetensors.torch import load_file, save_file


def main(job_file: Path, out: Path) -> None:
    """Quantise and save. On a CPU in float32: float16 is several times slower there; what is kept is float16 either way."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = getattr(transformers, job["architecture"]).from_pretrained(
        job["model"], dtype=dtype, attn_implementation=job["attention"], local_files_only=True, use_safetensors=True
    )
    longest = max(map(len, job["sequences"]))
    window = getattr(model.config, "sliding_window", None)
    quantizer = GPTQQuantizer(
        bits=job["bits"],
        group_size=job["group_size"],
        desc_act=False,
        sym=True,
        dataset=[{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in job["sequences"]],
        model_seqlen=longest,
        block_name_to_quantize="model.layers",
        modules_in_block_to_quantize=job["groups"],
        # Kept outputs go from layer to layer with the first one's mask, which is every layer's only within the window.
        cache_block_outputs=window is None or longest <= window,
        backend="gptq_torch",  # the one whose words stay in the standard order when it is made ready to run
    )
    quantizer.quantize_model(model.to(device))
    save(model.to("cpu"), quantizer, out)


def save(model: torch.nn.Module, quantizer: GPTQQuantizer, out: Path) -> None:
    """Write the model with float16 where it is not quantised, and a config.json without the calibration's rows."""
    quantizer.dataset = None
    model.config.quantization_config = quantizer.to_dict()
    model.config.dtype = torch.float16
    quantizer.save(model, str(out), max_shard_size="1TB")  # back from gptqmodel's own format, gptq_v2, to gptq
    (out / "quantize_config.json").unlink()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": quantizer.format,
        "bits": quantizer.bits,
        "group_size": quantizer.group_size,
        "desc_act": False,
        "sym": True,
        "meta": {"quantizer": [f"{name}:{version(name)}" for name in ("optimum", "gptqmodel")]},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = load_file(out / "model.safetensors")
    rounded = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
