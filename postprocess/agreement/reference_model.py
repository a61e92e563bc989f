"""The model as it was trained: its base, in the precision of the training, with the adapter on it by PEFT."""

from collections.abc import Sequence

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import CLASSES
from kaggle_kernels.runtime.models.shortcuts import keep_label_rows
from postprocess.run_folder import ADAPTER, Run
from postprocess.weights.merge import merged_model
from postprocess.weights.meta_model import LABELLED, empty_model, model_config, read_config
from preprocess.core.errors import UserError
from preprocess.core.files import read_object
from recipes.pairwise.training.heads import compute_logits_in_float32
from recipes.pairwise.training.output_layer import replace_output_layer


def load_trained(run: Run, device: str) -> torch.nn.Module:
    """Load the model as training held it: in the dtype of its files, its head computing in float32.

    A base that was quantised for the training (QLoRA) is quantised again, from the dtype that it had
    then. Attention is computed as the kernel does it.

    Args:
        run: A LoRA run, or a full fine-tune.
        device: Where the model goes.
    """
    quantization = trained_quantization(run)
    options = {"dtype": "auto"}
    if quantization:
        options = {
            "dtype": read_object(run.folder / "config.json").get("dtype") or "auto",
            "quantization_config": BitsAndBytesConfig.from_dict(quantization),
        }
    config = model_config(run.weights, run.contract)
    has_new_head = run.has_adapter and run.contract.head in LABELLED
    if has_new_head:
        # The base may have a head of its own with other outputs; the adapter holds the run's.
        config.num_labels = read_config(run.weights).num_labels
    model = CLASSES[run.contract.head].from_pretrained(
        run.weights,
        config=config,
        attn_implementation="eager" if run.contract.softcap else None,
        local_files_only=True,
        use_safetensors=True,
        # Straight to the GPU, without a copy in the machine's memory.
        device_map={"": device},
        **options,
    )
    if has_new_head and model.config.num_labels != run.contract.num_labels:
        replace_output_layer(model, run.contract.num_labels)
    if run.has_adapter:
        model = PeftModel.from_pretrained(model, run.folder)

    compute_head_in_float32(model, run.contract.label_token_ids)
    # Nothing is generated, so that no keys and values need to be kept.
    model.config.use_cache = False
    return model.eval()


def compute_head_in_float32(model: torch.nn.Module, label_token_ids: Sequence[int]) -> None:
    """Compute the head's logits as training does: in bf16, those near 20 would be rounded to 1/8.

    Args:
        model: The model with its adapter.
        label_token_ids: Of a causal LM, the only tokens that it computes logits of; empty for a classifier.
    """
    # A recipe may have had the output layer quantised too: then training had no other.
    output_layer = model.get_output_embeddings()
    base_layer = getattr(output_layer, "base_layer", output_layer)
    if not isinstance(base_layer, Linear4bit | Linear8bitLt):
        compute_logits_in_float32(model, label_token_ids)
    if label_token_ids:
        keep_label_rows(model, label_token_ids)


def load_merged(run: Run, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load the merged model, its float16 weights made in memory.

    Args:
        run: The run.
        device: Where the model goes.
        dtype: What it computes in, as the kernel would.
    """
    config, tensors = merged_model(run)
    model = type(empty_model(config, run.contract.head)).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation="eager" if run.contract.softcap else None,
    )
    if run.contract.label_token_ids:
        keep_label_rows(model, run.contract.label_token_ids)
    model.config.use_cache = False
    return model.to(device).eval()


def trained_quantization(run: Run) -> dict | None:
    """Read bitsandbytes' settings of the base during training from the run's config.json; None for 16 bits."""
    if not run.has_adapter:
        return None

    file = run.folder / "config.json"
    recorded = read_object(file).get("quantization_config") if file.is_file() else None
    for key in ("load_in_4bit", "load_in_8bit"):
        if run.recipe.axolotl.get(key) and not recorded:
            raise UserError(
                f"{file}: records no quantization_config, though {run.recipe.path.name} says {key}; "
                f"the adapter in {ADAPTER[0]} is from another training: train again"
            )
    return recorded
