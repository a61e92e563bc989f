"""Two T4s without data: checkpoints of large models that have names, shapes and dtypes only, and a count of what is alive.

PyTorch's FakeTensorMode computes shapes, devices and dtypes of tensors on `cuda:0` and `cuda:1` without a driver. It does not
see the allocator's fragments, the workspaces of cuBLAS, and CUDA itself.
"""

import json
import weakref
from collections import Counter
from pathlib import Path

import bitsandbytes  # noqa: F401  registers its operations
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from kaggle_kernels.runtime.models.model import CLASSES
from recipes.pairwise.config.schema import GPTQ_BITS

T4_BYTES = 15 * 2**30
GPTQ_GROUP = 128
NF4_BLOCK = 64
DTYPES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class FakeCheckpoint:
    """Stands in for safetensors' safe_open: the tensors of a header, without their data."""

    def __init__(self, path, **_):
        header = json.loads(Path(path).read_bytes()[8:])
        dtypes = {name: dtype for dtype, name in DTYPES.items()}

        self.tensors = {}
        for name, tensor in header.items():
            self.tensors[name] = torch.empty(tensor["shape"], dtype=dtypes[tensor["dtype"]])

    def __exit__(self, *_):
        return None

    def keys(self) -> list[str]:
        """List the tensors' names."""
        return list(self.tensors)

    def get_slice(self, name: str) -> torch.Tensor:
        """Give a tensor, of which any slice can be taken."""
        return self.tensors[name]


def write_checkpoint(folder: Path, config: dict, head: str, quantize: str) -> None:
    """Write config.json, and the header alone of a checkpoint in the layout that postprocess gives it.

    Args:
        folder: Where to; it must not exist.
        config: The base model's keys of config.json.
        head: The contract's head.
        quantize: The package's format.
    """
    config = AutoConfig.for_model(**config, pad_token_id=0, num_labels=1 if head == "reward" else 2, dtype=torch.float16)
    with torch.device("meta"):
        model = CLASSES[head].from_config(config, dtype=torch.float16)

    # Shape and dtype of each tensor; an output layer that is the embedding is stored once.
    tensors = {}
    for name, tensor in model.state_dict().items():
        if quantize != "none" and ".layers." in name and tensor.dim() == 2:
            tensors |= quantised_layout(name, tensor.shape, quantize)
        else:
            tensors[name] = (tensor.shape, tensor.dtype)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)

    header = {}
    position = 0
    for name, (shape, dtype) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size

    folder.mkdir(parents=True)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    model.config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | {"architectures": [type(model).__name__]}
    if quantize in GPTQ_BITS:
        layout = {"group_size": GPTQ_GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
        values["quantization_config"] = {"quant_method": "gptq", "bits": GPTQ_BITS[quantize], **layout}
    (folder / "config.json").write_text(json.dumps(values))


def quantised_layout(name: str, shape: torch.Size, quantize: str) -> dict[str, tuple]:
    """List the shape and dtype of each tensor that a quantised weight (outputs, inputs) is stored as."""
    outputs, inputs = shape
    prefix = name.removesuffix("weight")
    if quantize == "int8":
        return {name: (shape, torch.int8), f"{prefix}SCB": ((outputs,), torch.float32)}
    if quantize == "nf4":
        blocks = outputs * inputs // NF4_BLOCK
        return {
            name: ((outputs * inputs // 2, 1), torch.uint8),
            f"{name}.absmax": ((blocks,), torch.float32),
            f"{name}.quant_map": ((16,), torch.float32),
        }

    bits = GPTQ_BITS[quantize]
    groups = inputs // GPTQ_GROUP
    return {
        f"{prefix}qweight": ((inputs * bits // 32, outputs), torch.int32),
        f"{prefix}qzeros": ((groups, outputs * bits // 32), torch.int32),
        f"{prefix}scales": ((groups, outputs), torch.float16),
        f"{prefix}g_idx": ((inputs,), torch.int32),
    }


class BitsAndBytesLinear(torch.nn.Module):
    """A linear layer of nf4 or int8 that computes by bitsandbytes' operations, as its own layers do on a GPU.

    Their weights are a subclass of Tensor, and so are tensors without data: they cannot be both.
    """

    def __init__(self, linear: torch.nn.Linear, quantize: str):
        super().__init__()
        self.quantize = quantize
        self.shape = linear.weight.shape
        self.bias = linear.bias
        for name, (shape, dtype) in quantised_layout("weight", self.shape, quantize).items():
            tensor = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, input_bti: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output, in the input's dtype."""
        operations = torch.ops.bitsandbytes
        if self.quantize == "nf4":
            weight_ui = operations.dequantize_4bit(
                self.weight, self.weight_absmax, NF4_BLOCK, "nf4", self.shape, input_bti.dtype
            )
            return torch.nn.functional.linear(input_bti, weight_ui, self.bias)

        codes, row_scales, _ = operations.int8_vectorwise_quant(input_bti.flatten(0, 1))
        products = operations.int8_linear_matmul(codes, self.weight)
        output = operations.int8_mm_dequant(products, row_scales, self.SCB, dtype=input_bti.dtype, bias=self.bias)
        return output.unflatten(0, input_bti.shape[:2])


def quantise_layers(model: torch.nn.Module, quantize: str) -> None:
    """Put a quantised layer in the place of every linear one, on the same device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            model.set_submodule(name, BitsAndBytesLinear(module, quantize))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak, by device."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.now = Counter()
        self.peak = Counter()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return

        device = str(tensor.device)
        self.sizes[key] = storage.nbytes()
        self.now[device] += storage.nbytes()
        self.peak[device] = max(self.peak[device], self.now[device])
        weakref.finalize(storage, self.remove, key, device)

    def remove(self, key: int, device: str) -> None:
        """Forget a storage that was freed."""
        self.now[device] -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def efficient_attention(query, key, value, attn_mask=None, scale=None, is_causal=False):
    """Compute attention by the kernel that PyTorch takes on a T4; to ask for the GPU's kernels would need a driver."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, compute_log_sumexp=False, is_causal=is_causal, scale=scale
    )[0]


def math_attention(query, key, value, attn_mask=None, scale=None, is_causal=False):
    """Compute attention by PyTorch's own operations, which hold every score: what the build's arithmetic is of."""
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, is_causal=is_causal, scale=scale)[0]
