"""The model as it was trained: its base, in the precision of the training, with the adapter on it by PEFT.

It is the reference that every packaged model is compared with. model_scores.py calls this, and so do
the mean of runs (weights/average_lora.py) and the teachers' labels (labels/score_rows.py).
"""

from collections.abc import Sequence

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import CLASSES
from kaggle_kernels.runtime.models.shortcuts import keep_label_rows
from postprocess.agreement.devices import place_checkpoint
from postprocess.run_folder import ADAPTER_WEIGHTS, Run
from postprocess.weights.meta_model import LABELLED, model_config, read_config
from preprocess.core.errors import UserError
from preprocess.core.files import read_object
from recipes.pairwise.training.heads import replace_head_forward
from recipes.pairwise.training.output_layer import replace_output_layer

QUANTISED_LAYERS = (Linear4bit, Linear8bitLt)


def load_trained(run: Run) -> torch.nn.Module:
    """Load a run's model in eval mode, as training held it: in the dtype of its files, its head computing in float32."""
    contract = run.contract
    has_classifier = contract.head in LABELLED
    has_classifier_in_adapter = run.has_adapter and has_classifier
    model = load_base(run, keeps_own_head=has_classifier_in_adapter)

    # The adapter's files hold the trained classifier too. PEFT puts its weights into the model's, which
    # must have as many outputs.
    if has_classifier_in_adapter and model.config.num_labels != contract.num_labels:
        replace_output_layer(model, contract.num_labels)
    if run.has_adapter:
        model = PeftModel.from_pretrained(model, run.folder)

    compute_head_in_float32(model, contract.label_token_ids)
    return model.eval()


def load_base(run: Run, keeps_own_head: bool) -> torch.nn.Module:
    """Load the model that the run's adapter is put on, or the whole model of a full fine-tune.

    Args:
        run: The trained run.
        keeps_own_head: Whether to load as many outputs as the base's own head has. The adapter then
            holds the run's head, which may have another number of them.
    """
    config = model_config(run.weights, run.contract)
    # Nothing is generated, so that no keys and values need to be kept.
    config.use_cache = False
    if keeps_own_head:
        config.num_labels = read_config(run.weights).num_labels

    # A base that was quantised for the training (QLoRA) is quantised again while it is loaded, from the
    # dtype that training read it in. Where the run does not name that, "auto" takes the files' own.
    precision = {"dtype": "auto"}
    quantization = trained_quantization(run)
    if quantization:
        trained_config = read_object(run.folder / "config.json")
        precision["dtype"] = trained_config.get("dtype") or "auto"
        precision["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)

    return CLASSES[run.contract.head].from_pretrained(
        run.weights,
        config=config,
        # Attention is computed as in training: only transformers' own implementation has the cap.
        attn_implementation="eager" if run.contract.softcap else None,
        local_files_only=True,
        use_safetensors=True,
        **precision,
        **place_checkpoint(),
    )


def compute_head_in_float32(model: torch.nn.Module, label_token_ids: Sequence[int]) -> None:
    """Have the model's head compute its logits in float32, as training does. The model is changed in place.

    In bf16, neighbouring numbers near 20 are 1/8 apart: logits would be rounded too coarsely to be compared.

    Args:
        model: The model with its adapter.
        label_token_ids: For a causal LM, the tokens that stand for verdicts: it computes the logits of no
            others. Empty for a classifier.
    """
    # A causal LM's output layer; None for a classifier. Where an adapter is on the layer, PEFT has put
    # a layer of its own around it, which holds the original one as `base_layer`.
    output_layer = model.get_output_embeddings()
    base_layer = getattr(output_layer, "base_layer", output_layer)

    # QLoRA may quantise the output layer too. Then training has computed logits with the quantised
    # layer, and so does this model: it is left as it is.
    is_quantised = isinstance(base_layer, QUANTISED_LAYERS)
    if not is_quantised:
        replace_head_forward(model, label_token_ids)
    if label_token_ids:
        keep_label_rows(model, label_token_ids)


def trained_quantization(run: Run) -> dict | None:
    """Read how the base model was quantised while its adapter was trained (QLoRA).

    Returns:
        The settings of transformers' BitsAndBytesConfig; None where the base had 16 or 32 bits.

    Raises:
        UserError: The recipe asks for a quantised base, but the run has none on record.
    """
    # Only under an adapter can the base be quantised: a full fine-tune trains it.
    if not run.has_adapter:
        return None

    config_file = run.folder / "config.json"
    settings = None
    if config_file.is_file():
        settings = read_object(config_file).get("quantization_config")

    for key in ("load_in_4bit", "load_in_8bit"):
        if run.recipe.axolotl.get(key) and not settings:
            raise UserError(
                f"{config_file}: records no quantization_config, though {run.recipe.path.name} says {key}, "
                f"so {ADAPTER_WEIGHTS} beside it is from another training; train again"
            )
    return settings
