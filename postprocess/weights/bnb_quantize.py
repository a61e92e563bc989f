"""A linear layer's weight → bitsandbytes' nf4 or int8, in the layout that transformers loads.

The bytes are those that bitsandbytes would store. transformers would quantise a whole model in memory,
as it loads it from a 16-bit copy on the disk; merge.py quantises each weight as soon as it is merged.
Always on the CPU, so that a package is the same on every machine, and from float16, as a T4 has no bfloat16.
"""

from collections.abc import Iterable

import bitsandbytes.functional as bnb
import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from postprocess.weights.meta_model import empty_model

BLOCK = 64  # numbers of nf4 that share a scale
LEAST_SCALE = 1e-38  # for a block of zeros, whose scale is 0
BLOCKS_OF_SCALES = 256  # with double quantisation, scales that share a scale
INT8_FORMAT = torch.tensor(0, dtype=torch.uint8)  # bitsandbytes' only layout of int8, "row"


def quantization_config(kind: str, head: list[str], double: bool = False) -> BitsAndBytesConfig:
    """Describe nf4 or int8 as transformers does: the modules of the head stay in 16 bits.

    `double` quantises the scales of nf4 too.
    """
    if kind == "nf4":
        # To compute, a layer's weights are unpacked to float16: a T4 has no bfloat16.
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
    """List the weights that transformers will expect to be quantised: it replaces their layers in an empty model."""
    model = empty_model(config, head)
    modules_before = dict(model.named_modules())
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings, pre_quantized=True)

    # What has another class afterwards was replaced by a quantised layer.
    names = set()
    for name, module in model.named_modules():
        module_before = modules_before.get(name, module)
        if type(module) is not type(module_before):
            names.add(f"{name}.weight")
    return names


def quantised_bytes(shape: tuple[int, ...], settings: BitsAndBytesConfig) -> int:
    """Estimate the bytes that a quantised weight of this shape takes: its values, and their scales in float32."""
    outputs, inputs = shape
    if settings.load_in_8bit:
        return outputs * inputs + 4 * outputs
    return outputs * inputs // 2 + 4 * (outputs * inputs // BLOCK)


def quantise(
    name: str, shape: tuple[int, int], pieces: Iterable[torch.Tensor], settings: BitsAndBytesConfig
) -> dict[str, torch.Tensor]:
    """Quantise one weight, some rows at a time: bitsandbytes needs ten times the memory of what it is given.

    Each piece is a multiple of 64 rows in float16, so that no block of nf4 is cut in two.

    Returns:
        The tensors to store, by name: the same bytes as if the weight had been quantised whole.
    """
    values = []
    scales = []
    for piece in pieces:
        if settings.load_in_8bit:
            piece_values, piece_scales, _ = bnb.int8_vectorwise_quant(piece)
        else:
            piece_values, piece_scales = quantise_nf4(piece)
        values.append(piece_values)
        scales.append(piece_scales)

    if settings.load_in_8bit:
        module = name.removesuffix("weight")
        return {
            name: torch.cat(values),
            f"{module}SCB": torch.cat(scales),
            f"{module}weight_format": INT8_FORMAT,
        }

    # For nf4, bitsandbytes stores beside the values its state: the scales, and how to apply them.
    stored = {name: torch.cat(values)}
    state = make_nf4_state(torch.cat(scales), shape, settings.bnb_4bit_use_double_quant)
    for part, tensor in state.as_dict(packed=True).items():
        stored[f"{name}.{part}"] = tensor
    return stored


def quantise_nf4(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise numbers as bitsandbytes' quantize_4bit does on a CPU, to the same bytes in a third of its time.

    bitsandbytes finds a number's code by a binary search, one number at a time. Counting the bounds that
    lie below the number gives the same code, and a CPU compares a whole vector of numbers at once.

    Returns:
        The codes, two in a byte (uint8, (numbers / 2, 1)), and the scale of each block of 64 numbers
        (float32).
    """
    # The numbers left over after whole blocks are scaled in another way; real weights have none.
    if numbers.numel() % BLOCK:
        values, state = bnb.quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4")
        return values, state.absmax

    # A block's scale is its largest magnitude. The operations are bitsandbytes' own, in its order: to
    # divide by the scale, for example, would round some numbers differently.
    blocks = numbers.reshape(-1, BLOCK).to(torch.float32, copy=True)
    scales = blocks.abs().amax(dim=1)
    factors = 1.0 / scales.clamp(min=LEAST_SCALE)
    scaled = blocks.mul_(factors[:, None]).clamp_(-1, 1).reshape(-1)

    # nf4 has 16 levels between -1 and 1, in ascending order. A number's code is the place of the nearest
    # level, and so the count of the bounds halfway between two levels that lie below the number.
    levels = bnb.get_4bit_type("nf4", device="cpu")
    bounds = (levels[:-1] + levels[1:]) / 2
    codes = torch.zeros(scaled.shape, dtype=torch.uint8)
    for bound in bounds.tolist():
        codes += scaled > bound

    # The first number of two takes the upper four bits of a byte.
    upper = codes[::2]
    lower = codes[1::2]
    values = (upper << 4) | lower
    return values[:, None], scales


def make_nf4_state(scales: torch.Tensor, shape: tuple[int, int], is_double: bool) -> bnb.QuantState:
    """Make the state that bitsandbytes' quantize_4bit would return for a whole weight, of the scales of its blocks.

    Double quantisation rounds the scales too.
    """
    state = bnb.QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.float16,
    )
    if is_double:
        # bitsandbytes centres the scales before it rounds them to 8 bits.
        offset = scales.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(
            scales - offset, blocksize=BLOCKS_OF_SCALES
        )
        state.offset = offset
        state.nested = True
    return state
