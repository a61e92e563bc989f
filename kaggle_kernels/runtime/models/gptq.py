"""GPTQ packages without GPTQ's libraries: linear layers that unpack their 4 or 8 bits for each matrix product.

Kaggle's image has none of them, and none can be taken there: gptqmodel is a source distribution that wants a newer
transformers and compiles its CUDA kernels at first use.

The file format is the standard one (checkpoint_format gptq). qweight and qzeros are int32 words, lowest bits first, of
qweight along the inputs, of qzeros along the outputs, each zero less one.
"""

import re

import torch
from torch.nn.functional import linear
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# The name that transformers knows these classes by; its own loader of gptq wants the libraries.
UNPACKING = "gptq_unpacked"

# A linear layer elsewhere, such as the head, is not quantised.
IN_LAYER = re.compile(r"\.\d+\.")


class GptqLinear(torch.nn.Module):
    """A linear layer in GPTQ's format: codes of 4 or 8 bits, a zero and a scale for each group of inputs.

    It is loaded in the layout of the file. `prepare` then turns that once into the layout of a weight.
    """

    def __init__(self, linear_layer: torch.nn.Linear, bits: int, group_size: int):
        super().__init__()
        self.bits = bits
        self.group_size = group_size
        self.bias = linear_layer.bias

        # Tensors with the file format's names and shapes. g_idx, the group of each input, is not
        # needed: inputs were not reordered.
        outputs, inputs = linear_layer.out_features, linear_layer.in_features
        groups = inputs // group_size
        codes_in_word = 32 // bits
        qweight = torch.zeros(inputs // codes_in_word, outputs, dtype=torch.int32)
        self.register_buffer("qweight", qweight)
        qzeros = torch.zeros(groups, outputs // codes_in_word, dtype=torch.int32)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", torch.zeros(groups, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))

    def prepare(self) -> None:
        """Turn the loaded tensors, once, into the layout that each matrix product needs.

        The file has inputs along the rows, a weight has outputs there, so that all tensors are
        transposed. In their names u are the outputs, i the inputs, q the groups of inputs.
        """
        # Words of codes along the inputs stay packed: of shape (outputs, inputs / codes in a word).
        words_ui = self.qweight.T.clone(memory_format=torch.contiguous_format)

        # A group's zero is the code that stands for a weight of 0. The format stores zero - 1.
        stored_zeros_qu = unpack(self.qzeros, self.bits)
        zeros_uq = stored_zeros_qu.T + 1
        scales_uq = self.scales.T.contiguous()

        # With a last axis of one they broadcast over the inputs of their group.
        self.register_buffer("words_ui", words_ui)
        self.register_buffer("zeros_uq1", zeros_uq.unsqueeze(-1))
        self.register_buffer("scales_uq1", scales_uq.unsqueeze(-1))

        # Both layouts at once would take twice the memory.
        del self.qweight, self.qzeros, self.scales, self.g_idx

    def weight_ui(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in `dtype`, of shape (outputs, inputs): (code - zero) * scale."""
        codes_ui = unpack(self.words_ui, self.bits)
        codes_uqi = codes_ui.unflatten(1, (-1, self.group_size))

        # In place: the weights of a layer are large beside a batch.
        weight_uqi = codes_uqi.to(dtype)
        weight_uqi.sub_(self.zeros_uq1)
        weight_uqi.mul_(self.scales_uq1.to(dtype))
        return weight_uqi.flatten(1)

    def forward(self, input_bti: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the input's dtype."""
        return linear(input_bti, self.weight_ui(input_bti.dtype), self.bias)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack the codes of 4 or 8 bits in int32 words, lowest bits first.

    Returns:
        uint8 of shape (rows, columns * 32 // bits), for `words` of shape (rows, columns).
    """
    bytes_ri = words.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_ri

    # Two codes share a byte, the first one in its lower half.
    codes = torch.stack((bytes_ri & 15, bytes_ri >> 4), dim=-1)
    return codes.flatten(-2)


@register_quantization_config(UNPACKING)
class UnpackingConfig(QuantizationConfigMixin):
    """What a GPTQ package's config.json says, as far as loading needs it."""

    def __init__(self, bits: int, group_size: int, **_):
        self.quant_method = UNPACKING
        self.bits = bits
        self.group_size = group_size


@register_quantizer(UNPACKING)
class UnpackingQuantizer(HfQuantizer):
    """Tells transformers to put a GptqLinear in the place of every linear layer of a layer before it reads weights."""

    requires_calibration = True
    is_trainable = False  # what is loaded here is served

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_) -> None:
        config = self.quantization_config
        for name, module in list(model.named_modules()):
            is_linear = isinstance(module, torch.nn.Linear)
            if not is_linear or not IN_LAYER.search(name):
                continue

            # On the meta device: its tensors are read from the package afterwards.
            with torch.device("meta"):
                packed = GptqLinear(module, config.bits, config.group_size)
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_) -> None:
        for module in model.modules():
            if isinstance(module, GptqLinear):
                module.prepare()

    def is_serializable(self, **_) -> bool:
        """No: what is loaded here is served."""
        return False
