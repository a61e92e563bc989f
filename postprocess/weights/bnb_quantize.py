"""A linear layer's weight → bitsandbytes' nf4 or int8, in the layout that transformers loads.

bitsandbytes computes the numbers. transformers would quantise a whole model in memory, as it loads it
from a 16-bit copy on the disk; merge.py quantises each weight as soon as it is merged. Always on the
CPU, so that a package is the same on every machine, and from float16, as a T4 has no bfloat16.
"""

import bitsandbytes.functional as bnb
import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from postprocess.weights.meta_model import empty_model

BLOCK = 64  # numbers of nf4 that share a scale
INT8_FORMAT = torch.tensor(0, dtype=torch.uint8)  # bitsandbytes' only layout of int8, "row"


def quantization_config(kind: str, head: list[str], double: bool = False) -> BitsAndBytesConfig:
    """Describe a kind of quantisation as transformers does.

    Args:
        kind: nf4 or int8.
        head: The modules that stay in 16 bits.
        double: Whether the scales of nf4 are quantised too.
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
        # With a threshold above 0, answers depend on what else is in the batch.
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=head
        )
    raise ValueError(f"quantize: {kind!r}; expected nf4 or int8")


def quantised_weights(
    config: PretrainedConfig, head: str, settings: BitsAndBytesConfig
) -> set[str]:
    """List the weights that transformers expects to be quantised: it says so itself, of an empty model."""
    model = empty_model(config, head)
    modules_before = dict(model.named_modules())
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings, pre_quantized=True)

    names = set()
    for name, module in model.named_modules():
        if type(module) is not type(modules_before.get(name, module)):
            names.add(f"{name}.weight")
    return names


def quantised_bytes(shape: tuple[int, ...], settings: BitsAndBytesConfig) -> int:
    """Estimate the bytes that a quantised weight of this shape takes."""
    outputs, inputs = shape
    if settings.load_in_8bit:
        return outputs * inputs + 4 * outputs
    return outputs * inputs // 2 + 4 * (outputs * inputs // BLOCK)


def quantise(
    name: str, weight: torch.Tensor, settings: BitsAndBytesConfig
) -> dict[str, torch.Tensor]:
    """Quantise one weight.

    Args:
        name: The weight's name in the model.
        weight: Its values in float16, (outputs, inputs).
        settings: As quantization_config gives them.

    Returns:
        The tensors that are stored of it, by name.
    """
    if settings.load_in_8bit:
        values, scales, _ = bnb.int8_vectorwise_quant(weight)
        module = name.removesuffix("weight")
        return {name: values, f"{module}SCB": scales, f"{module}weight_format": INT8_FORMAT}

    values, state = bnb.quantize_4bit(
        weight,
        blocksize=BLOCK,
        quant_type="nf4",
        compress_statistics=settings.bnb_4bit_use_double_quant,
    )
    stored = {name: values}
    for part, tensor in state.as_dict(packed=True).items():
        stored[f"{name}.{part}"] = tensor
    return stored
