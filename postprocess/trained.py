"""The model as it was trained: its base, in the precision of the training, with the adapter on it by PEFT."""

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.model import CLASSES
from postprocess.run import ADAPTER, Run
from postprocess.skeleton import model_config
from preprocess.errors import UserError
from preprocess.files import read_json


def load_trained(run: Run, device: str) -> torch.nn.Module:
    """Base and adapter by PEFT, or the model of a full fine-tune, in the dtype of their files, attention as it will be served.

    A base that was quantised for the training (QLoRA) is quantised again, from the dtype that it had then.
    """
    quantised = trained_quantization(run)
    options = {"dtype": "auto"}
    if quantised:
        options = {
            "dtype": read_json(run.folder / "config.json").get("dtype") or "auto",
            "quantization_config": BitsAndBytesConfig.from_dict(quantised),
            "device_map": {"": device},
        }
    model = CLASSES[run.contract.head].from_pretrained(
        run.weights,
        config=model_config(run.weights, run.contract),
        attn_implementation="eager" if run.contract.softcap else "sdpa",
        local_files_only=True,
        use_safetensors=True,
        **options,
    )
    if run.has_adapter:
        model = PeftModel.from_pretrained(model, run.folder)
    return (model if quantised else model.to(device)).eval()


def trained_quantization(run: Run) -> dict | None:
    """bitsandbytes' settings of the base during training, as the run's own config.json recorded them; None for 16 bits."""
    if not run.has_adapter:
        return None
    file = run.folder / "config.json"
    recorded = read_json(file).get("quantization_config") if file.is_file() else None
    asked = next((key for key in ("load_in_4bit", "load_in_8bit") if run.recipe.axolotl.get(key)), None)
    if asked and not recorded:
        raise UserError(
            f"{file}: records no quantization_config, though {run.recipe.path.name} says {asked}; the adapter in "
            f"{ADAPTER[0]} is from another training: train again"
        )
    return recorded
