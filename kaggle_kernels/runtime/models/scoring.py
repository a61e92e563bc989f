"""Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn.utils.rnn import pad_sequence

from kaggle_kernels.runtime.models.overflow import ComputeInFloat32
from kaggle_kernels.runtime.models.shortcuts import reading

ORDERS = ("as_given", "swapped")

# The order of a reward model's two sequences.
REWARD_SIDES = ("model_a", "model_b")

# A forward pass may compute so many tokens of padding, by the package's quantisation: more would cost more than another
# pass. That costs most where weights are unpacked in each.
PADDING_LIMITS = {"none": 32, "int8": 32, "nf4": 128, "gptq8": 256, "gptq4": 512}
DEFAULT_PADDING_LIMIT = 128


@dataclass(frozen=True)
class Request:
    """One pair to be scored: the pair `id`, with its responses in `order`, as one sequence, or for the reward head two."""

    id: str
    order: str
    sequences: tuple[list[int], ...]
    padding_limit: int = DEFAULT_PADDING_LIMIT

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class BatchScores:
    """A batch's probabilities, one list a request in the order of contract.verdicts, and how many rows overflowed float16."""

    probabilities: list[list[float]]
    overflowed: int = 0


def orders_of(contract, orders: Iterable[str]) -> tuple[str, ...]:
    """List the orders worth scoring: a reward model sees each response alone, so that its second order is its first."""
    if contract.head == "reward":
        return ORDERS[:1]
    return tuple(orders)


def padded_tokens(batch: Sequence[Request]) -> int:
    """Count the tokens that are computed for a batch, padding included."""
    lengths = []
    for request in batch:
        lengths += [len(sequence) for sequence in request.sequences]

    # Each group is a forward pass of its own, padded to its longest sequence.
    tokens = 0
    for places in group_by_length(lengths, batch[0].padding_limit):
        longest = max(lengths[place] for place in places)
        tokens += longest * len(places)
    return tokens


def group_by_length(
    lengths: Sequence[int], padding_limit: int = DEFAULT_PADDING_LIMIT
) -> list[list[int]]:
    """Group sequences of like length, each group to be one forward pass.

    Args:
        lengths: The sequences' numbers of tokens.
        padding_limit: The most padding in a group. More of it costs more than another pass.

    Returns:
        For each group the sequences' places in `lengths`, longest first.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    padding = 0
    longest = 0
    for place in longest_first:
        # A sequence is padded to the longest of its group, which is the group's first one.
        padding += longest - lengths[place]
        if not groups or padding > padding_limit:
            groups.append([])
            padding = 0
            longest = lengths[place]
        groups[-1].append(place)
    return groups


def make_requests(
    model_input: ModuleType,
    tokenizer,
    contract,
    pairs: Sequence,
    orders: Iterable[str],
    padding_limit: int = DEFAULT_PADDING_LIMIT,
) -> list[Request]:
    """Encode pairs in each of `orders`, by the package's own model_input.py: a request for each."""
    requests = []
    for order in orders:
        ordered_pairs = pairs
        if order == "swapped":
            ordered_pairs = [model_input.swap(pair) for pair in pairs]
        encoded = model_input.encode_all(list(ordered_pairs), tokenizer, contract)
        for pair, sequences in zip(pairs, encoded, strict=True):
            requests.append(Request(pair.id, order, sequences, padding_limit))
    return requests


def make_batches(requests: Iterable[Request], tokens_per_batch: int) -> list[list[Request]]:
    """Make batches of requests of like length, the longest first.

    A batch, padded, holds at most `tokens_per_batch` tokens; a request that is longer than that is
    a batch of its own.
    """
    # A batch that is too large for memory then shows at once. The id decides between requests of
    # one length, so that the batches are the same in every run.
    longest_first = sorted(
        requests, key=lambda request: (-request.length, request.id, request.order)
    )
    batches: list[list[Request]] = []
    for request in longest_first:
        if batches and padded_tokens([*batches[-1], request]) <= tokens_per_batch:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


@torch.inference_mode()
def score_batch(
    model: torch.nn.Module,
    model_input: ModuleType,
    contract,
    batch: Sequence[Request],
    device: str,
    pass_context=contextlib.nullcontext,
) -> BatchScores:
    """Score a batch; a row that overflows float16 is computed again in float32, alone.

    Args:
        model: A model in eval mode.
        model_input: The package's own model_input.py.
        contract: The package's contract.
        batch: Requests that fit into memory together.
        device: Where the model's inputs go.
        pass_context: Makes the context of each forward pass (see pipeline.Stages.forward_pass).

    Returns:
        The probabilities, those of swapped requests swapped back; NaN where float32 does not help either.
    """
    probabilities_bv = batch_probabilities(model, contract, batch, device, pass_context)

    # Only float16 has a range that hidden states can leave.
    overflowed_rows = []
    if model.dtype is torch.float16:
        is_finite_b = probabilities_bv.isfinite().all(-1)
        overflowed_rows = torch.nonzero(~is_finite_b).flatten().tolist()

    # What fails here, for lack of memory or of a float32 kernel, costs this row alone.
    for row in overflowed_rows:
        batch_of_one = [batch[row]]
        with contextlib.suppress(RuntimeError), ComputeInFloat32():
            [row_v] = batch_probabilities(model, contract, batch_of_one, device, pass_context)
            probabilities_bv[row] = row_v

    rows = []
    for request, values in zip(batch, probabilities_bv.tolist(), strict=True):
        if request.order == "swapped":
            rows.append(model_input.swap_probabilities(values, contract.verdicts))
        else:
            rows.append(values)
    return BatchScores(rows, len(overflowed_rows))


def batch_probabilities(
    model: torch.nn.Module, contract, batch: Sequence[Request], device: str, pass_context
) -> torch.Tensor:
    """Compute the verdicts' probabilities of each request; those of swapped requests are not swapped back yet.

    Returns:
        Float32 of shape (requests, verdicts), on the CPU. In a swapped request model_a stands for response B.
    """
    sequences = []
    for request in batch:
        sequences += request.sequences
    padding_limit = batch[0].padding_limit  # one package's requests have the same
    logits_bv = verdict_logits(model, contract, sequences, device, pass_context, padding_limit)

    # This cancels the position bias of a base model that was not trained.
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias)
    return logits_bv.softmax(-1)


def verdict_logits(
    model: torch.nn.Module,
    contract,
    sequences: Sequence[list[int]],
    device: str,
    pass_context=contextlib.nullcontext,
    padding_limit: int = DEFAULT_PADDING_LIMIT,
) -> torch.Tensor:
    """Compute the logits of the verdicts for the requests of a batch.

    A request has one sequence of token ids; for the reward head two, for response A and for B.

    Returns:
        Float32 of shape (requests, verdicts), on the CPU.
    """
    # Sequences of like length go through the model together, wherever they stand in the batch.
    output_rows = [torch.empty(0)] * len(sequences)
    lengths = [len(ids) for ids in sequences]
    for places in group_by_length(lengths, padding_limit):
        group = [sequences[place] for place in places]
        with pass_context():
            outputs_bu = read_head(model, contract, group, device).float().cpu()
        for place, output_u in zip(places, outputs_bu, strict=True):
            output_rows[place] = output_u

    outputs = torch.stack(output_rows)
    if contract.head != "reward":
        return outputs

    # In Bradley and Terry's model the rewards of A and B are the logits of their winning.
    sides = [REWARD_SIDES.index(verdict) for verdict in contract.verdicts]
    rewards_by_side = outputs.view(-1, 2)
    return rewards_by_side[:, sides]


def read_head(
    model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str
) -> torch.Tensor:
    """Run the model once over sequences, and read its head for one token of each.

    Returns:
        Shape (sequences, outputs): the outputs of a classifier, or a causal LM's logits of the
        label tokens.
    """
    is_causal_lm = contract.head == "label_tokens"
    is_decoder = is_causal_lm or getattr(model, "causal", False)
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id)
    inputs = {"input_ids": ids_bt.to(device)}

    # A decoder's token does not see the padding behind it, so that only an encoder needs a mask.
    if not is_decoder and not mask_bt.all():
        inputs["attention_mask"] = mask_bt.to(device)

    places_b = torch.tensor(list_read_places(contract, sequences, is_decoder), device=device)
    with reading(places_b):
        logits = model(**inputs).logits
    if is_causal_lm:
        return pick_label_logits(logits, places_b, contract.label_token_ids)
    return logits


def pick_label_logits(
    logits_btv: torch.Tensor, places_b: torch.Tensor, label_token_ids: Sequence[int]
) -> torch.Tensor:
    """Pick the label tokens' logits for the token that is read, of all that a causal LM computed.

    After shortcuts.take_shortcuts it computes no others, unless an adapter is on its output layer.

    Args:
        logits_btv: Of shape (sequences, tokens or 1, vocabulary or label tokens).
        places_b: The place of each sequence's read token.
        label_token_ids: The label tokens, in the order of the verdicts.
    """
    has_all_tokens = logits_btv.shape[1] > 1
    if has_all_tokens:
        rows_b = torch.arange(len(places_b), device=logits_btv.device)
        logits_bv = logits_btv[rows_b, places_b.to(logits_btv.device)]
    else:
        logits_bv = logits_btv[:, 0]

    has_whole_vocabulary = logits_bv.shape[-1] > len(label_token_ids)
    if has_whole_vocabulary:
        return logits_bv[:, list(label_token_ids)]
    return logits_bv


def list_read_places(contract, sequences: Sequence[list[int]], is_decoder: bool) -> list[int]:
    """List for each sequence the place of the token whose hidden state the model's head reads."""
    # A causal LM answers with the token that follows the last one.
    if contract.head == "label_tokens":
        return [len(ids) - 1 for ids in sequences]

    # The classifiers that transformers makes of decoders read the last token that is not padding.
    if is_decoder:
        return [find_last_token(ids, contract.pad_token_id) for ids in sequences]

    # The heads of BERT and DeBERTa read the first token. Those of other encoders get all tokens,
    # whatever is listed here (see shortcuts.take_shortcuts).
    return [0] * len(sequences)


def find_last_token(ids: Sequence[int], pad_token_id: int) -> int:
    """Find the last token that is not the pad id; 0 where all are, as transformers' classifier reads such a row."""
    for place in range(len(ids) - 1, -1, -1):
        if ids[place] != pad_token_id:
            return place
    return 0


def pad(sequences: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right to the longest sequence.

    Returns:
        The ids, and 1 where they are no padding, both of shape (sequences, tokens).
    """
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids_bt = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    mask_bt = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids_bt, mask_bt


def score(  # noqa: PLR0913  the last three are options by name
    model: torch.nn.Module,
    model_input: ModuleType,
    tokenizer,
    contract,
    pairs: Sequence,
    *,
    orders: Iterable[str] = ORDERS,
    tokens_per_batch: int = 8192,
    device: str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Score pairs in one process. A reward model is run once a pair, whatever the orders.

    Returns:
        Probabilities by id and order, in the order of contract.verdicts; swapped ones are already swapped back.

    Raises:
        FloatingPointError: A row's probabilities are not finite.
    """
    # A reward model's orders do not differ: one is computed and counts for all.
    orders = tuple(orders)
    distinct_orders = orders_of(contract, orders)
    one_counts_for_all = distinct_orders != orders
    requests = make_requests(model_input, tokenizer, contract, pairs, distinct_orders)
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    for batch in make_batches(requests, tokens_per_batch):
        batch_scores = score_batch(model, model_input, contract, batch, device)
        for request, values in zip(batch, batch_scores.probabilities, strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(
                    f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}"
                )
            covered_orders = orders if one_counts_for_all else [request.order]
            for order in covered_orders:
                scores[request.id][order] = values
    return scores


def mean_of_orders(scores: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Average each pair's probabilities over the orders in which it was scored; a pair that was not scored is left out."""
    means = {}
    for pair_id, by_order in scores.items():
        if by_order:
            # The verdict's probabilities in each order stand together.
            by_verdict = zip(*by_order.values(), strict=True)
            means[pair_id] = [sum(values) / len(by_order) for values in by_verdict]
    return means
