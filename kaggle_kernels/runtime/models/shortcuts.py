"""What scoring can leave out without another answer: work for tokens that nobody reads, and attention's slow kernel.

A head reads one token of a row: a decoder's last one, an encoder's first. In the last layer all tokens are needed for the
attention's keys and values, but what comes after it only for the token that is read: hooks on its output projection and
its MLP hand on that token alone. What they give, one token wide, is added to the residual of all tokens by broadcasting,
which is right in the one place that is read. Of a causal LM's output layer only the rows of the label tokens are kept.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kaggle_kernels.runtime.models.fused import fuse_elementwise, layer_list

# The name under which transformers finds repeated_attention.
SDPA = "sdpa_repeated"

# Encoders whose head reads nothing but the first token.
READ_FIRST_TOKEN = ("bert", "deberta-v2")

# What comes after the attention in a layer, by the names of decoders, then of BERT.
AFTER_ATTENTION = ("self_attn.o_proj", "mlp", "attention.output.dense", "intermediate")

# The places read in the batch of this thread: a split model has a batch in each of several threads.
BEING_READ = threading.local()


def repeated_attention(module, query_bhtd, key_bhtd, value_bhtd, attention_mask, scaling=None, **_):
    """Compute attention by PyTorch, with keys and values repeated for every head of their group.

    transformers' own leaves the groups to PyTorch where there is no mask (`enable_gqa`). Only
    FlashAttention can do that: a T4, which has none, and a CPU would fall back to a slow kernel.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key_bhtd = key_bhtd.repeat_interleave(groups, dim=1)
        value_bhtd = value_bhtd.repeat_interleave(groups, dim=1)

    output_bhtd = scaled_dot_product_attention(
        query_bhtd,
        key_bhtd,
        value_bhtd,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and module.is_causal,
    )
    return output_bhtd.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA, repeated_attention)
AttentionMaskInterface.register(SDPA, sdpa_mask)


class LabelHead(torch.nn.Module):
    """The rows of a causal LM's output layer that belong to the label tokens, in float32."""

    def __init__(
        self, output_layer: torch.nn.Linear, label_token_ids: Sequence[int], device: torch.device
    ):
        super().__init__()
        rows = list(label_token_ids)
        weight_vd = output_layer.weight.detach()[rows]
        self.weight_vd = weight_vd.to(device, torch.float32)
        self.bias_v = None
        if output_layer.bias is not None:
            bias_v = output_layer.bias.detach()[rows]
            self.bias_v = bias_v.to(device, torch.float32)

    def forward(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        """The label tokens' logits, (rows, tokens, labels); the model itself scales or caps them afterwards."""
        hidden_btd = hidden_btd.float()
        return linear(hidden_btd, self.weight_vd, self.bias_v)


def take_shortcuts(model: torch.nn.Module, label_token_ids: Sequence[int] = ()) -> None:
    """Make a model's forward pass faster where the result does not change.

    In the context `reading` its last layer then computes the tokens that are read only. The model
    gets an attribute `causal`: whether a token sees those before it only.

    Args:
        model: A model as transformers or PEFT made it.
        label_token_ids: Of a causal LM, the only tokens whose logits are wanted; empty for a
            classifier.
    """
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    model.causal = bool(attentions) and all(module.is_causal for module in attentions)

    fuse_elementwise(model)
    if label_token_ids:
        keep_label_rows(model, label_token_ids)

    # The head of any other encoder may read all tokens.
    reads_one_token = model.causal or model.config.model_type in READ_FIRST_TOKEN
    if not reads_one_token:
        return

    # A layer has some of these names only: architectures have different ones.
    last_layer = layer_list(model)[-1]
    for name in AFTER_ATTENTION:
        with contextlib.suppress(AttributeError):
            last_layer.get_submodule(name).register_forward_pre_hook(keep_read_tokens)


def keep_label_rows(model: torch.nn.Module, label_token_ids: Sequence[int]) -> None:
    """Have a causal LM compute, for the read token of each row, the logits of the label tokens only.

    These tokens stand for the verdicts, such as A and B. An output layer with an adapter on it
    keeps those of the whole vocabulary.
    """
    output_layer = model.get_output_embeddings()
    if type(output_layer) is torch.nn.Linear:
        # In a split model the output layer may stand on another device than the last layer.
        last_device = next(layer_list(model)[-1].parameters()).device
        output_layer = LabelHead(output_layer, label_token_ids, last_device)
        model.set_output_embeddings(output_layer)
    output_layer.register_forward_pre_hook(keep_read_tokens)


@contextlib.contextmanager
def reading(places_b: torch.Tensor) -> Iterator[None]:
    """Tell the model's hooks, for a forward pass in this thread, the one place of each row that is read."""
    BEING_READ.places_b = places_b
    try:
        yield
    finally:
        BEING_READ.places_b = None


def keep_read_tokens(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """A forward pre-hook that cuts a module's input to the token of each row that is read.

    Hidden states of shape (rows, tokens, width) become (rows, 1, width), and other arguments stay. Outside
    of the context `reading` it returns None, by which PyTorch leaves the input as it is.
    """
    places_b = getattr(BEING_READ, "places_b", None)
    if places_b is None:
        return None

    hidden_btd, *others = args
    rows_b = torch.arange(len(places_b), device=hidden_btd.device)
    read_bd = hidden_btd[rows_b, places_b.to(hidden_btd.device)]
    return (read_bd.unsqueeze(1), *others)
