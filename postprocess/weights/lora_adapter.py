"""A run's LoRA adapter on a model without weights, so that PEFT itself merges one layer at a time.

PEFT merges models that are whole in memory. Here the model stands on the meta device, where it takes
none, and the adapter's tensors are mapped from their file. merge.py hands each layer the one weight
that it changes, and PEFT computes the result: what it knows of ranks, scalings and variants of LoRA
is not written down again here.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer

from postprocess.run_folder import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, adapter_settings
from postprocess.weights.checkpoint_reader import open_tensors
from preprocess.core.errors import UserError
from recipes.pairwise.config.axolotl_keys import LORA_INITIALISATIONS

PREFIX = "base_model.model."
ADAPTER_NAME = "default"
ROWS = 1024  # of a weight that are converted at a time
LOW_RANK_PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?=\.|$)"
)

# Settings of adapter_config.json whose merge is more than adding B A to one weight.
REFUSED_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
KNOWN_SETTINGS = {field.name for field in fields(LoraConfig)}


@dataclass(frozen=True)
class Adapter:
    """What training changed, by the names that the tensors have in the model."""

    path: Path  # the adapter's file
    layers: Mapping[str, LoraLayer]  # PEFT's layer for each weight that has a low-rank change
    # The tensors that were trained whole: heads, biases, modules_to_save.
    replacements: Mapping[str, torch.Tensor]


def load_adapter(run_folder: Path, model: torch.nn.Module) -> Adapter:
    """Put a run's LoRA adapter on a model without weights, by PEFT.

    Returns:
        The adapter: PEFT's layers, which can merge a weight each, and the tensors that were trained whole.

    Raises:
        UserError: The adapter is not for this model, is not complete, or cannot be merged.
    """
    file = run_folder / ADAPTER_WEIGHTS
    settings = adapter_settings(run_folder)
    check_settings(settings, run_folder / ADAPTER_SETTINGS)

    # The matrices A and B of each layer, and the tensors that replace the base's own.
    low_rank_parts, replacements = read_adapter_file(file)

    peft_model = load_low_rank_parts(model, settings, low_rank_parts, file)

    # PEFT does not complain of a layer whose matrices are missing: it would merge no change.
    layers = find_layers(peft_model)
    check_complete(layers, file)
    return Adapter(file, layers, replacements)


def load_low_rank_parts(
    model: torch.nn.Module,
    settings: Mapping[str, object],
    low_rank_parts: Mapping[str, torch.Tensor],
    file: Path,
) -> PeftModel:
    """Build PEFT's layers by the adapter's settings, and give them the matrices of its file.

    Raises:
        UserError: PEFT cannot build them on this model, or the file has matrices that no layer takes.
    """
    architecture = type(model).__name__
    try:
        peft_model = build_peft_model(model, settings)
        loaded = peft_model.load_state_dict(low_rank_parts, strict=False, assign=True)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        # The last line of PEFT's message says what is wrong.
        last_line = str(error).splitlines()[-1]
        reason = " ".join(last_line.split())[:200]
        raise UserError(
            f"{file}: PEFT cannot put this adapter on {architecture} ({reason}); it is an adapter of another "
            f"base, or {ADAPTER_SETTINGS} is not its own: put the training's files back"
        ) from None

    if loaded.unexpected_keys:
        raise UserError(
            f"{file}: {loaded.unexpected_keys[0]} is not part of {architecture} with the settings of "
            f"{ADAPTER_SETTINGS}, so this is an adapter of another base; put the training's files back"
        )
    return peft_model


def build_peft_model(model: torch.nn.Module, settings: Mapping[str, object]) -> PeftModel:
    """Add PEFT's LoRA layers to a model, as adapter_config.json says."""
    # A newer PEFT may have written settings that this one lacks, empty ones.
    known_settings = {name: value for name, value in settings.items() if name in KNOWN_SETTINGS}
    with warnings.catch_warnings():
        # PEFT warns of tied embeddings that are trained apart. merge.py keeps them apart.
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**known_settings))


def read_adapter_file(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Read the tensors of an adapter's file; their bytes are read from the disk when they are used.

    Returns:
        Two dictionaries: the matrices of low-rank changes, by their names in PEFT's model; and the tensors
        that were trained whole, such as the head, by their names in the base model.

    Raises:
        UserError: The file is broken, or is not an adapter's.
    """
    low_rank_parts = {}
    replacements = {}
    with open_tensors(file) as opened:
        for name in opened.names():
            if not name.startswith(PREFIX):
                raise UserError(
                    f"{file}: the key {name} does not start with {PREFIX}, so this is a whole model, or was not "
                    "saved by PEFT; put the training's adapter there"
                )

            # With the setting `bias: all`, PEFT also saves the untrained biases of modules that it replaced.
            if ".original_module." in name and not LOW_RANK_PART.search(name):
                continue

            tensor = opened.get(name)
            if LOW_RANK_PART.search(name):
                low_rank_parts[name_in_peft_model(name)] = tensor
            else:
                replacements[model_name(name)] = tensor
    return low_rank_parts, replacements


def name_in_peft_model(name_in_file: str) -> str:
    """Give a low-rank part the name that it has in PEFT's model, where the adapter's own name stands in it."""
    # PEFT leaves the adapter's name, which is always "default" here, out of the file.
    name = LOW_RANK_PART.sub(r".\1.default", name_in_file)
    if name.endswith("lora_magnitude_vector.default"):
        name += ".weight"
    return name


def check_settings(settings: Mapping[str, object], config_file: Path) -> None:
    """Raise UserError where adapter_config.json describes an adapter whose merge is not tested here."""
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{config_file}: peft_type is {settings.get('peft_type')!r}; only LORA can be merged"
        )

    # Other initialisations, such as PiSSA, change the base's weights at the start of a training. The
    # adapter's file does not hold this change.
    initialisation = settings.get("init_lora_weights", True)
    if initialisation not in LORA_INITIALISATIONS:
        raise UserError(
            f"{config_file}: init_lora_weights is {initialisation!r}, which changed the base's own "
            "weights; train with init_lora_weights true or gaussian"
        )

    for name, value in settings.items():
        is_refused = name in REFUSED_SETTINGS or name not in KNOWN_SETTINGS
        if value and is_refused:
            raise UserError(
                f"{config_file}: {name} is set, and this kind of LoRA cannot be merged; train without it"
            )


def find_layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """List the layers with low-rank changes by the name that their weight has in the model."""
    layers = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            layers[model_name(f"{name}.weight")] = module
    return layers


def model_name(peft_name: str) -> str:
    """Give the name that a tensor has without PEFT's wrappers."""
    # A layer under LoRA holds the base's layer, a module trained whole stands beside the original.
    name = peft_name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name)


def check_complete(layers: Mapping[str, LoraLayer], file: Path) -> None:
    """Raise UserError where an adapter's file lacks a part of a layer's change."""
    for weight, layer in layers.items():
        for part, tensor in layer.state_dict().items():
            # Only what was in the file has left the meta device, on which tensors have no bytes.
            is_missing = tensor.is_meta and part.startswith("lora_")
            if is_missing:
                raise UserError(
                    f"{file}: {weight} has no {part.split('.')[0]}; the file is not complete: train again"
                )


def merge_layer(layer: LoraLayer, base_weight: torch.Tensor) -> torch.Tensor:
    """Add a layer's low-rank change to its base weight, in float32, whatever dtype the base has."""
    is_plain_lora = isinstance(layer, Linear) and ADAPTER_NAME not in layer.lora_variant
    if is_plain_lora:
        return merge_plain_lora(layer, base_weight)

    # All other variants of LoRA are merged by PEFT. It adds in place, so it gets a copy: the tensor itself
    # may be the content of the base's file.
    base_layer = layer.get_base_layer()
    own_copy = base_weight.to(torch.float32, copy=True)
    base_layer.weight = torch.nn.Parameter(own_copy, requires_grad=False)

    # PEFT's model merges in float32 as well.
    layer.float()
    layer.merge()
    merged_weight = base_layer.weight.detach()
    # No weight stays in memory with its layer.
    layer.to("meta")
    return merged_weight


def merge_plain_lora(layer: Linear, base_weight: torch.Tensor) -> torch.Tensor:
    """Compute W + scaling B A, as PEFT does it, with one copy of the weight in place of PEFT's three."""
    a = layer.lora_A[ADAPTER_NAME].weight.to(torch.float32)
    b = layer.lora_B[ADAPTER_NAME].weight.to(torch.float32)
    merged_weight = (b @ a).mul_(layer.scaling[ADAPTER_NAME])

    # Some rows at a time, so that there is never a whole copy of the base weight in float32.
    for rows, base_rows in zip(merged_weight.split(ROWS), base_weight.split(ROWS), strict=True):
        rows += base_rows.to(torch.float32)
    return merged_weight
