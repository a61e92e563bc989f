"""One model quantised by optimum's GPTQ, in .venv-gptq: `python postprocess/gptq/worker.py JOB.json OUT`.

JOB.json has `model` (the folder of a decoder in 16 bits), `architecture` (its class in transformers),
`attention`, `bits`, `group_size`, `groups` (names of the linear layers that are quantised together) and
`sequences` (token ids to calibrate on). OUT gets config.json and model.safetensors in GPTQ's standard
format. Imports nothing of this project: none of it is in that environment.
"""

import atexit
import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    # Else C++ is compiled to pack words.
    "GPTQMODEL_DISABLE_PACK_EXT": "1",
    "HF_HUB_OFFLINE": "1",
    # Threads that wait spin otherwise: 34 s instead of 20 where another process has a core.
    "OMP_WAIT_POLICY": "PASSIVE",
}

import torch
import transformers
from optimum.gptq import GPTQQuantizer
from safetensors.torch import load_file, save_file


def main(job_file: Path, out: Path) -> None:
    """Quantise a model as a job says, which quantize.py wrote, and save it to the folder `out`."""
    # Saves a second: at its end, Python would search all that was imported for garbage.
    atexit.register(gc.freeze)

    job = json.loads(job_file.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(job, device)

    calibration_rows = []
    for ids in job["sequences"]:
        mask = [1] * len(ids)
        calibration_rows.append({"input_ids": [ids], "attention_mask": [mask]})
    longest = max(len(ids) for ids in job["sequences"])

    # The quantiser may keep a layer's outputs as the next one's inputs, and then gives all layers the
    # first one's attention mask. With a sliding window, layers have different masks, which are equal only
    # for sequences that fit into the window.
    window = getattr(model.config, "sliding_window", None)
    keeps_outputs = window is None or longest <= window

    quantizer = GPTQQuantizer(
        bits=job["bits"],
        group_size=job["group_size"],
        desc_act=False,
        sym=True,
        dataset=calibration_rows,
        model_seqlen=longest,
        block_name_to_quantize="model.layers",
        modules_in_block_to_quantize=job["groups"],
        cache_block_outputs=keeps_outputs,
        # Other backends reorder the packed weights when they get ready to run; this one does not.
        backend="gptq_torch",
    )
    quantizer.quantize_model(model.to(device))
    save(model.to("cpu"), quantizer, out)


def load_model(job: dict, device: str) -> torch.nn.Module:
    """Load the 16-bit model that a job names, in the dtype that is quick on the device."""
    # On a CPU, float16 is several times slower than float32. The result is saved in float16 either way.
    dtype = torch.float16 if device == "cuda" else torch.float32
    model_class = getattr(transformers, job["architecture"])
    return model_class.from_pretrained(
        job["model"],
        dtype=dtype,
        attn_implementation=job["attention"],
        local_files_only=True,
        use_safetensors=True,
    )


def save(model: torch.nn.Module, quantizer: GPTQQuantizer, out: Path) -> None:
    """Write a quantised model in GPTQ's standard format, in float16 where it is not quantised."""
    # config.json must not hold the calibration's rows.
    quantizer.dataset = None
    model.config.quantization_config = quantizer.to_dict()
    model.config.dtype = torch.float16
    # This converts gptqmodel's own format, gptq_v2, back to gptq.
    quantizer.save(model, str(out), max_shard_size="1TB")
    (out / "quantize_config.json").unlink()

    # Keep only the settings that loading needs, so that a package is the same on every machine.
    versions = [f"{name}:{version(name)}" for name in ("optimum", "gptqmodel")]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": quantizer.format,
        "bits": quantizer.bits,
        "group_size": quantizer.group_size,
        "desc_act": False,
        "sym": True,
        "meta": {"quantizer": versions},
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")

    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.half()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
