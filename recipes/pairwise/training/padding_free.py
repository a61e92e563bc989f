"""Padding-free batches: the sequences of a micro-batch stand end to end in one row, and none sees another.

PairCollator makes such batches with `pairwise.padding_free`; the plugin calls `use_padding_free` on the loaded model. Every
token that is computed is one of the data's. Three things differ from a padded batch:

- attention runs within each sequence, whose bounds `cu_seq_lens_q` holds, as in flash-attention's varlen calls,
- positions begin at 0 again in every sequence,
- a classifier's head reads the place in each sequence that pooling a padded batch would read.
"""

import functools

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_outputs import SequenceClassifierOutput

from preprocess.core.errors import UserError

# transformers makes no mask for an attention whose name it does not know.
ATTENTION = "within_sequences"
FLASH_ATTENTION = "flash_attention_2"
# How a batch says where its sequences are, by the names that flash-attention reads.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
ENCODERS = ("bert", "modernbert")  # by model_type; a decoder's classifier has a layer named score


def use_padding_free(model: nn.Module) -> None:
    """Change a loaded model so that it takes padding-free batches: rows of several sequences, end to end.

    Attention is replaced by one that stays within each sequence; flash-attention does so by itself. A
    classifier's forward is replaced by one that classifies each sequence, not the row.

    Raises:
        UserError: The model computes attention by itself, or its head is not known here.
    """
    # PEFT wraps the model that its adapter is on.
    is_wrapped = hasattr(model, "get_base_model")
    inner_model = model.get_base_model() if is_wrapped else model
    class_name = type(inner_model).__name__
    config = inner_model.config

    # Flash-attention reads from the batch where its sequences are; any other attention is replaced.
    is_flash_attention = config._attn_implementation == FLASH_ATTENTION
    if not is_flash_attention and not inner_model._supports_sdpa:
        raise UserError(
            f"pairwise.padding_free: {class_name} computes attention by itself, so that it cannot be replaced; remove the key"
        )
    if not is_flash_attention:
        AttentionInterface.register(ATTENTION, attend_within_sequences)
        inner_model.set_attn_implementation(ATTENTION)

    # A causal LM needs no other forward: the batch names the places whose logits it computes.
    is_classifier = class_name.endswith("ForSequenceClassification")
    if not is_classifier:
        return
    has_known_head = hasattr(inner_model, "score") or config.model_type in ENCODERS
    if not has_known_head:
        raise UserError(
            f"pairwise.padding_free: which token the head of {class_name} reads is not known here; remove the key"
        )
    inner_model.forward = functools.partial(classify, inner_model)


def attend_within_sequences(  # noqa: PLR0913  transformers' signature
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a padding-free batch; transformers calls this in every layer.

    Args:
        module: The layer, which says whether it is causal.
        query: Of shape (1, heads, tokens, size of a head).
        key: As the query, with fewer heads where groups of heads share one.
        value: As the key.
        attention_mask: None, see ATTENTION.
        cu_seq_lens_q: Where each sequence begins, and where the last one ends, of shape (sequences + 1,).
        max_length_q: Tokens of the longest sequence.
        dropout: The share of attention weights to drop. On a GPU there is no such dropout.
        scaling: Of the scores; None for the inverse root of the size of a head.
        sliding_window: Only tokens less than this far away are seen; None for all.
        kwargs: What other implementations read.

    Returns:
        The output of shape (1, tokens, heads, size of a head), and None in place of the weights.
    """
    if query.is_cuda:
        # How many tokens before and after its own a token sees; -1 for all of them.
        farthest_back = -1 if sliding_window is None else sliding_window - 1
        farthest_ahead = 0 if module.is_causal else farthest_back
        output = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(farthest_back, farthest_ahead),
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return output[None], None

    lengths = cu_seq_lens_q.diff().tolist()
    queries = query.split(lengths, dim=2)
    keys = key.split(lengths, dim=2)
    values = value.split(lengths, dim=2)
    outputs = []
    for query_s, key_s, value_s, length in zip(queries, keys, values, lengths, strict=True):
        mask = make_window_mask(length, sliding_window, module.is_causal)
        output = scaled_dot_product_attention(
            query_s,
            key_s,
            value_s,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=module.is_causal and mask is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def make_window_mask(
    length: int, sliding_window: int | None, is_causal: bool
) -> torch.Tensor | None:
    """Make the mask of a sliding window for one sequence.

    Returns:
        Of shape (length, length), True where a row's token sees a column's. None where the window is
        longer than the sequence, and so hides nothing.
    """
    if sliding_window is None or length <= sliding_window:
        return None

    places = torch.arange(length)
    tokens_back = places[:, None] - places[None, :]
    if is_causal:
        return (tokens_back >= 0) & (tokens_back < sliding_window)
    return tokens_back.abs() < sliding_window


def classify(
    classifier: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs
) -> SequenceClassifierOutput:
    """Classify every sequence of a padding-free batch; this takes the place of a classifier's forward.

    The batch is one row of several sequences. transformers' own forward would read one token of the row,
    and so classify the row.

    Args:
        classifier: The classifier.
        input_ids: The sequences end to end, of shape (1, tokens).
        position_ids: Each token's position in its sequence, of the same shape.
        kwargs: Where the sequences are (see BOUNDS), and what PEFT passes on beside that, all None.

    Returns:
        The logits, of shape (sequences, labels).
    """
    bounds = {name: kwargs[name] for name in BOUNDS}
    options = {}
    if classifier.config.model_type not in ENCODERS:
        # With a cache of keys and values, transformers would let each token see the whole row.
        options["use_cache"] = False
    output = classifier.base_model(
        input_ids=input_ids, position_ids=position_ids, **bounds, **options
    )

    hidden_ts = output.last_hidden_state[0]
    logits = pool_and_classify(classifier, hidden_ts, bounds["cu_seq_lens_q"].long())
    return SequenceClassifierOutput(logits=logits)


def pool_and_classify(
    classifier: nn.Module, hidden_ts: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """Apply a classifier's head to each sequence, as its own forward does to each row.

    Args:
        classifier: The classifier.
        hidden_ts: Hidden states of shape (tokens, hidden size).
        bounds: Where each sequence begins, and where the last one ends.

    Returns:
        The logits, of shape (sequences, labels).
    """
    first_places = bounds[:-1]
    last_places = bounds[1:] - 1
    model_type = classifier.config.model_type

    if model_type == "bert":
        pooled = classifier.base_model.pooler(hidden_ts[first_places][:, None])
        return classifier.classifier(classifier.dropout(pooled))

    if model_type == "modernbert":
        pooled = hidden_ts[first_places]
        if classifier.config.classifier_pooling == "mean":
            sequences = hidden_ts.split(bounds.diff().tolist())
            pooled = torch.stack([sequence.mean(dim=0) for sequence in sequences])
        return classifier.classifier(classifier.drop(classifier.head(pooled)))

    return classifier.score(hidden_ts[last_places])
