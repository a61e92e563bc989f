"""What scoring can leave out without another answer: work for tokens that nobody reads, and attention's slow kernel.

A head reads one token of a row: a decoder's last one, an encoder's first. In the last layer all tokens are needed for the
attention's keys and values, but what comes after it only for the token that is read: hooks on its output projection and
its MLP hand on that token alone. What they give, one token wide, is added to the residual of all tokens by broadcasting,
which is right in the one place that is read.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

SDPA = "sdpa_repeated"
AFTER_ATTENTION = ("self_attn.o_proj", "mlp", "attention.output.dense", "intermediate")  # decoders' names, then BERT's
BEING_READ = threading.local()  # of the batch that this thread is scoring: a split model has one in each of several threads


def repeated_attention(module, query_bhtd, key_bhtd, value_bhtd, attention_mask, scaling=None, **_):
    """PyTorch's attention with keys and values repeated for every head of their group.

    transformers' own leaves the groups to PyTorch where there is no mask (`enable_gqa`). Only FlashAttention on a GPU can
    do that: on a T4, which has none, and on a CPU the unfused kernel is taken instead.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    output_bhtd = scaled_dot_product_attention(
        query_bhtd,
        key_bhtd.repeat_interleave(groups, dim=1) if groups > 1 else key_bhtd,
        value_bhtd.repeat_interleave(groups, dim=1) if groups > 1 else value_bhtd,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and module.is_causal,
    )
    return output_bhtd.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA, repeated_attention)
AttentionMaskInterface.register(SDPA, sdpa_mask)


def take_shortcuts(model: torch.nn.Module) -> None:
    """Have `model` compute the end of its last layer only for the tokens in `reading`, and say whether it is `causal`.

    Outside of `reading` it computes everything.
    """
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    model.causal = bool(attentions) and all(module.is_causal for module in attentions)
    if model.causal or model.config.model_type == "bert":
        layers = next(module for name, module in model.named_modules() if name.endswith((".layers", ".encoder.layer")))
        for name in AFTER_ATTENTION:
            with contextlib.suppress(AttributeError):
                layers[-1].get_submodule(name).register_forward_pre_hook(only_what_is_read)


@contextlib.contextmanager
def reading(places_b: torch.Tensor) -> Iterator[None]:
    """In this thread, a forward pass is only read at one place of each row."""
    BEING_READ.places_b = places_b
    try:
        yield
    finally:
        BEING_READ.places_b = None


def only_what_is_read(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """A forward pre-hook: of the hidden states (rows, tokens, width) the read token of each row, (rows, 1, width)."""
    places_b = getattr(BEING_READ, "places_b", None)
    if places_b is None:
        return None
    hidden_btd, *others = args
    rows_b = torch.arange(len(places_b), device=hidden_btd.device)
    return (hidden_btd[rows_b, places_b.to(hidden_btd.device)].unsqueeze(1), *others)
