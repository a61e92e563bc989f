"""GPTQ packages without GPTQ's libraries: linear layers that unpack their 4 or 8 bits for each matrix product.

Kaggle's image has none of them, and none can be taken there: gptqmodel is a source distribution that wants a newer
transformers and compiles its CUDA kernels at first use. The file format is the standard one (checkpoint_format gptq): qweight
and qzeros are int32 words, lowest bits first, of qweight along the inputs, of qzeros along the outputs, each zero less one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.functional import linear
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from kaggle_kernels.runtime.package import PackageError

UNPACKING = "gptq_unpacked"  # the name that transformers knows these classes by; its own loader of gptq wants the libraries
READ = {"bits": (4, 8), "desc_act": (False,), "sym": (True,), "checkpoint_format": ("gptq",)}


class GptqLinear(torch.nn.Module):
    """A linear layer of (outputs, inputs), each row in groups of `group_size` weights with one float16 scale."""

    def __init__(self, outputs: int, inputs: int, bias: torch.nn.Parameter | None, bits: int, group_size: int):
        super().__init__()
        self.bits, self.group_size = bits, group_size
        groups, in_word = inputs // group_size, 32 // bits
        self.register_buffer("qweight", torch.zeros(inputs // in_word, outputs, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, outputs // in_word, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))  # i // group_size: nothing was reordered
        self.bias = bias

    def weight_ui(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in `dtype`, of shape (outputs, inputs): (code - zero) * scale."""
        codes_ui = unpack(self.qweight, self.bits).transpose(0, 1).flatten(1)
        zeros_qu = unpack(self.qzeros, self.bits).flatten(1) + 1
        weight_uqi = codes_ui.unflatten(1, (-1, self.group_size)).to(dtype)
        weight_uqi.sub_(zeros_qu.T.unsqueeze(-1)).mul_(self.scales.T.unsqueeze(-1).to(dtype))
        return weight_uqi.flatten(1)

    def forward(self, input_bti: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the input's dtype."""
        return linear(input_bti, self.weight_ui(input_bti.dtype), self.bias)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in int32 `words` of shape (rows, columns), uint8 (rows, columns, 32 // bits). Bytes stand lowest first."""
    bytes_rcb = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return bytes_rcb if bits == 8 else torch.stack((bytes_rcb & 15, bytes_rcb >> 4), dim=-1).flatten(-2)


class UnpackingConfig(QuantizationConfigMixin):
    """What a GPTQ package's config.json says, as far as loading needs it."""

    def __init__(self, bits: int, group_size: int, **_):
        self.quant_method, self.bits, self.group_size = UNPACKING, bits, group_size


class UnpackingQuantizer(HfQuantizer):
    """Tells transformers to put a GptqLinear in the place of every linear layer below `layers` before it reads weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_) -> None:
        config = self.quantization_config
        found = [(name, old) for name, old in model.named_modules() if isinstance(old, torch.nn.Linear) and ".layers." in name]
        for name, old in found:
            with torch.device("meta"):
                new = GptqLinear(old.out_features, old.in_features, old.bias, config.bits, config.group_size)
            model.set_submodule(name, new)

    def is_serializable(self, **_) -> bool:
        """No: what is loaded here is served."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: what is loaded here is served."""
        return False


def unpacking(settings: Mapping[str, object], folder: Path | str) -> dict[str, object]:
    """config.json's `quantization_config` as from_pretrained must get it. PackageError for a kind that is not unpacked here."""
    for key, known in READ.items():
        if settings.get(key) not in known:
            expected = " or ".join(map(str, known))
            raise PackageError(f"{folder}: config.json: {key} is {settings.get(key)!r}, expected {expected}; quantise it again")
    if UNPACKING not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(UNPACKING)(UnpackingConfig)
        register_quantizer(UNPACKING)(UnpackingQuantizer)
    return {"quant_method": UNPACKING, "bits": settings["bits"], "group_size": settings["group_size"]}
