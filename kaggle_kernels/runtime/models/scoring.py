"""Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from kaggle_kernels.runtime.models.shortcuts import reading

ORDERS = ("as_given", "swapped")
SPARE_TOKENS = 128  # about what a forward pass costs beside its tokens, of 4-bit weights that are unpacked each time


@dataclass(frozen=True)
class Request:
    """One pair to be scored: the pair `id`, with its responses in `order`, as one sequence, or for the reward head two."""

    id: str
    order: str
    sequences: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def orders_of(contract, orders: Iterable[str]) -> tuple[str, ...]:
    """The orders worth scoring: a reward model sees each response alone, so that its second order is its first."""
    return ORDERS[:1] if contract.head == "reward" else tuple(orders)


def padded_tokens(batch: Sequence[Request]) -> int:
    """Tokens that are computed for a batch, padding included."""
    lengths = [len(ids) for request in batch for ids in request.sequences]
    return sum(lengths[group[0]] * len(group) for group in alike(lengths))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """The lengths' places in groups, longest first, each to be one forward pass with at most SPARE_TOKENS of padding."""
    groups: list[list[int]] = []
    padding = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        padding += lengths[groups[-1][0]] - lengths[place] if groups else 0
        if not groups or padding > SPARE_TOKENS:
            groups.append([])
            padding = 0
        groups[-1].append(place)
    return groups


def make_requests(model_input: ModuleType, tokenizer, contract, pairs: Sequence, orders: Iterable[str]) -> list[Request]:
    """The requests for `pairs` in `orders`, encoded by the package's own model_input."""
    made = []
    for order in orders:
        ordered = [model_input.swap(pair) for pair in pairs] if order == "swapped" else list(pairs)
        encoded = model_input.encode_all(ordered, tokenizer, contract)
        made += [Request(pair.id, order, sequences) for pair, sequences in zip(pairs, encoded, strict=True)]
    return made


def make_batches(requests: Iterable[Request], tokens_per_batch: int) -> list[list[Request]]:
    """Batches of requests of like length, longest first, so that one too large for memory shows at once.

    A batch, padded, holds at most `tokens_per_batch` tokens; a request that is longer than that is a batch of its own.
    """
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: (-request.length, request.id, request.order)):
        if batches and padded_tokens([*batches[-1], request]) <= tokens_per_batch:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


@torch.inference_mode()
def score_batch(
    model: torch.nn.Module, model_input: ModuleType, contract, batch: list[Request], device: str, passing=contextlib.nullcontext
) -> list[list[float]]:
    """Probabilities of a batch, one list a request in the order of contract.verdicts, swapped ones swapped back.

    The softmax is in float32. Where the model overflowed, the probabilities are NaN. Each forward pass is made in the context
    `passing()`.
    """
    logits_bv = verdict_logits(model, contract, [ids for request in batch for ids in request.sequences], device, passing)
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias)
    probabilities_bv = logits_bv.softmax(-1).tolist()
    return [
        model_input.swap_probabilities(values, contract.verdicts) if request.order == "swapped" else values
        for request, values in zip(batch, probabilities_bv, strict=True)
    ]


def verdict_logits(
    model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str, passing=contextlib.nullcontext
) -> torch.Tensor:
    """The verdicts' logits, float32 of shape (requests, verdicts), of one sequence a request, for the reward head of two.

    Sequences of like length go through the model together: a pair's two responses, which are not, each with others.
    """
    compute_logits = label_token_logits if contract.head == "label_tokens" else classifier_logits
    rows = [torch.empty(0)] * len(sequences)
    for group in alike(list(map(len, sequences))):
        with passing():
            outputs_bu = compute_logits(model, contract, [sequences[place] for place in group], device).float().cpu()
        for place, row in zip(group, outputs_bu, strict=True):
            rows[place] = row
    logits = torch.stack(rows)
    if contract.head != "reward":
        return logits
    return logits.view(-1, 2)[:, [("model_a", "model_b").index(verdict) for verdict in contract.verdicts]]


def classifier_logits(model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str) -> torch.Tensor:
    """The outputs of a classifier, (sequences, outputs). Its rows are padded on the right.

    By itself it finds the last token that is not padding. What a decoder reads there never sees the padding behind it, so that
    only an encoder needs a mask.
    """
    is_decoder = getattr(model, "causal", False)
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id, pad_left=False)
    inputs = {"input_ids": ids_bt.to(device)}
    if not is_decoder and not mask_bt.all():
        inputs["attention_mask"] = mask_bt.long().to(device)

    # A decoder's head reads the last token of a row that is not padding, an encoder's the first.
    read_places = [0] * len(sequences)
    if is_decoder:
        read_places = [last_token_place(ids, contract.pad_token_id) for ids in sequences]
    with reading(torch.tensor(read_places, device=device)):
        return model(**inputs).logits


def label_token_logits(model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str) -> torch.Tensor:
    """The answer tokens' logits of a causal LM, (sequences, verdicts).

    Its rows are padded on the left: the answer then stands at the last place of every row, and only there are logits computed.
    """
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id, pad_left=True)
    position_ids_bt = (mask_bt.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_bt.to(device), "position_ids": position_ids_bt.to(device)}
    if not mask_bt.all():
        inputs["attention_mask"] = mask_bt.long().to(device)

    last_place = ids_bt.shape[1] - 1
    with reading(torch.full((len(sequences),), last_place, device=device)):
        logits_b1v = model(**inputs, logits_to_keep=1, use_cache=False).logits
    return logits_b1v[:, -1, list(contract.label_token_ids)]


def pad(sequences: Sequence[list[int]], pad_token_id: int, pad_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded to the longest sequence, and where they are no padding, both (sequences, tokens)."""
    lengths_b1 = torch.tensor([[len(ids)] for ids in sequences])
    longest = int(lengths_b1.max())
    places_t = torch.arange(longest)
    mask_bt = places_t >= longest - lengths_b1 if pad_left else places_t < lengths_b1

    ids_bt = torch.full(mask_bt.shape, pad_token_id)
    ids_bt[mask_bt] = torch.tensor([token for ids in sequences for token in ids])
    return ids_bt, mask_bt


def last_token_place(ids: Sequence[int], pad_token_id: int) -> int:
    """The place of the last token that is not the pad id; 0 where all are, as the classifier reads such a row."""
    for place in range(len(ids) - 1, -1, -1):
        if ids[place] != pad_token_id:
            return place
    return 0


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
    """Probabilities by id and order, in the order of contract.verdicts; swapped ones are already swapped back.

    A reward model is run once a pair, whatever the orders. Raises FloatingPointError where a row's probabilities are not
    finite, ValueError where two pairs share an id.
    """
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    if len(scores) != len(pairs):
        raise ValueError(f"{len(pairs) - len(scores)} pairs have the id of another one; scores are joined by id")
    orders = tuple(orders)
    worth = orders_of(contract, orders)
    for batch in make_batches(make_requests(model_input, tokenizer, contract, pairs, worth), tokens_per_batch):
        for request, values in zip(batch, score_batch(model, model_input, contract, batch, device), strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}")
            scores[request.id] |= dict.fromkeys([request.order] if worth == orders else orders, values)
    return scores


def mean_of_orders(scores: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """The mean over the orders in which each pair was scored, by id; a pair that was not scored is left out."""
    return {
        pair_id: [sum(values) / len(by_order) for values in zip(*by_order.values(), strict=True)]
        for pair_id, by_order in scores.items()
        if by_order
    }
