"""Linear layers → bitsandbytes' nf4 or int8 in the layout that transformers loads, for GPUs without bfloat16.

Rows come in pieces and are quantised from float16 by bitsandbytes' own functions, nf4 in blocks of 64 numbers and int8 row by
row, so that pieces give the bytes that whole tensors give. Always on the CPU: the same package on every machine.
"""

from collections.abc import Iterable, Iterator

import bitsandbytes.functional as bnb
import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from postprocess.weights.meta_model import empty_model
from postprocess.weights.shard_writer import Planned, Stored

KINDS = ("nf4", "int8")
BLOCK = 64  # numbers of nf4 that share a scale
BLOCKS_OF_SCALES = 256  # with double quantisation, scales that share a scale
ROW_FORMAT = torch.tensor(0, dtype=torch.uint8)  # int8's only layout, "row"


def quantization_config(kind: str, head: list[str], double: bool = False) -> BitsAndBytesConfig:
    """Bitsandbytes' settings for `kind`, nf4's scales quantised too where `double`.

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


def quantised_weights(config: PretrainedConfig, head: str, settings: BitsAndBytesConfig) -> set[str]:
    """The names of the weights that transformers will expect in `settings`' layout: it says so itself, of an empty model."""
    model = empty_model(config, head)
    before = dict(model.named_modules())
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings, pre_quantized=True)
    return {f"{name}.weight" for name, module in model.named_modules() if type(module) is not type(before.get(name, module))}


def plan_quantised(name: str, shape: tuple[int, ...], settings: BitsAndBytesConfig) -> Planned:
    """What is stored of a quantised weight, and its bytes."""
    rows, numbers = shape[0], shape[0] * shape[1]
    if settings.load_in_8bit:
        return Planned(name, (name, *_int8_names(name)), numbers + 4 * rows + 1)
    blocks = -(-numbers // BLOCK)
    names = [name, f"{name}.absmax", f"{name}.quant_map", f"{name}.quant_state.bitsandbytes__nf4"]
    if settings.bnb_4bit_use_double_quant:
        names += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    return Planned(name, tuple(names), -(-numbers // 2) + 4 * blocks)


def quantise(name: str, shape: tuple[int, ...], rows: Iterable[torch.Tensor], settings: BitsAndBytesConfig) -> Iterator[Stored]:
    """What is stored of the weight `name` of shape (out, in), whose `rows` come in float16, a multiple of 64 at a time."""
    yield from (_int8 if settings.load_in_8bit else _nf4)(name, shape, rows, settings)


def _int8_names(name: str) -> tuple[str, str]:
    module = name.removesuffix("weight")
    return f"{module}SCB", f"{module}weight_format"


def _int8(name: str, shape: tuple[int, ...], rows: Iterable[torch.Tensor], settings: BitsAndBytesConfig) -> Iterator[Stored]:
    scales: list[torch.Tensor] = []

    def pieces() -> Iterator[torch.Tensor]:
        for piece in rows:
            values, row_scales, _ = bnb.int8_vectorwise_quant(piece)
            scales.append(row_scales)
            yield values

    scale_name, format_name = _int8_names(name)
    yield Stored(name, torch.int8, shape, pieces())
    yield Stored(scale_name, torch.float32, shape[:1], scales)
    yield Stored(format_name, torch.uint8, (), [ROW_FORMAT])


def _nf4(name: str, shape: tuple[int, ...], rows: Iterable[torch.Tensor], settings: BitsAndBytesConfig) -> Iterator[Stored]:
    scales: list[torch.Tensor] = []

    def pieces() -> Iterator[torch.Tensor]:
        for piece in rows:
            packed, state = bnb.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
            scales.append(state.absmax)
            yield packed

    yield Stored(name, torch.uint8, (-(-shape[0] * shape[1] // 2), 1), pieces())
    state = _quantisation_state(torch.cat(scales), shape, settings.bnb_4bit_use_double_quant)
    for key, value in state.as_dict(packed=True).items():
        yield Stored(f"{name}.{key}", value.dtype, tuple(value.shape), [value])


def _quantisation_state(scales: torch.Tensor, shape: tuple[int, ...], double: bool) -> bnb.QuantState:
    """The state that bitsandbytes' quantize_4bit gives of a whole tensor with these scales."""
    common = {"shape": torch.Size(shape), "dtype": torch.float16, "blocksize": BLOCK, "quant_type": "nf4"}
    code = bnb.get_4bit_type("nf4", device="cpu")
    if not double:
        return bnb.QuantState(absmax=scales, code=code, **common)
    offset = scales.mean()
    quantised, of_scales = bnb.quantize_blockwise(scales - offset, blocksize=BLOCKS_OF_SCALES)
    return bnb.QuantState(absmax=quantised, code=code, offset=offset, state2=of_scales, **common)
