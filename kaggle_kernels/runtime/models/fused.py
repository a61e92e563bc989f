"""Norms, rotary positions and gated activations in fewer passes over memory than transformers' own chains of operations.

A T4 spends a tenth of a Gemma-2 forward in them. They are replaced when a model is loaded, for the architectures below;
others are left alone.
"""

import sys

import torch

# What is added to the weight of a norm, by model_type.
NORM_OFFSETS = {
    "gemma2": 1.0,
    "llama": 0.0,
    "mistral": 0.0,
    "phi3": 0.0,
    "qwen2": 0.0,
    "qwen3": 0.0,
}

# Architectures whose positions may rotate a part of a head only.
PARTLY_ROTATED = ("phi3",)


class GatedMlp(torch.nn.Module):
    """A gated MLP whose product is formed in the memory of the activation."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.gate_proj = mlp.gate_proj
        self.up_proj = mlp.up_proj
        self.down_proj = mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        """The MLP's output, of the input's shape."""
        gate_btu = self.gate_proj(hidden_btd)
        gated_btu = self.act_fn(gate_btu)
        gated_btu *= self.up_proj(hidden_btd)
        return self.down_proj(gated_btu)


def fuse_elementwise(model: torch.nn.Module) -> None:
    """Replace a model's norms, gated MLPs and rotary positions by faster ones of the same result.

    A model of an architecture that is not in NORM_OFFSETS stays as it is.
    """
    model_type = model.config.model_type
    if model_type not in NORM_OFFSETS:
        return

    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, fuse_norm(module, NORM_OFFSETS[model_type]))
        elif name.endswith(".mlp") and hasattr(module, "gate_proj"):
            model.set_submodule(name, GatedMlp(module))

    # The attention calls apply_rotary_pos_emb of the Python module that defines the architecture.
    if model_type not in PARTLY_ROTATED:
        layer_class = type(layer_list(model)[0])
        architecture = sys.modules[layer_class.__module__]
        architecture.apply_rotary_pos_emb = rotate_queries_and_keys


def fuse_norm(norm: torch.nn.Module, offset: float) -> torch.nn.RMSNorm:
    """Make PyTorch's own RMSNorm, which is one kernel on a GPU, from an architecture's norm.

    PyTorch multiplies with the weight as it is. Some architectures add an `offset` to it first: Gemma-2
    multiplies with 1 + weight.
    """
    # Architectures have either of two names for it.
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        epsilon = norm.eps

    fused = torch.nn.RMSNorm(norm.weight.shape, eps=epsilon, device="meta")
    weight_d = norm.weight.detach() + offset
    fused.weight = torch.nn.Parameter(weight_d, requires_grad=False)
    return fused


def rotate_queries_and_keys(q, k, cos, sin, unsqueeze_dim=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions, as transformers' apply_rotary_pos_emb does, by its parameters."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)


def rotate_halves(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each number of the first half of the last axis together with its counterpart in the second half."""
    half = states.shape[-1] // 2
    first = states[..., :half]
    second = states[..., half:]

    # The first half becomes first * cos - second * sin, the second half second * cos + first * sin.
    rotated = states * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


def layer_list(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Find the list of a model's layers: of all its lists of modules the one with the most parameters."""
    parameters_by_list = {}
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            parameters_by_list[module] = sum(weight.numel() for weight in module.parameters())
    return max(parameters_by_list, key=parameters_by_list.get)
