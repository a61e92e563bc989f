"""Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from kaggle_kernels.runtime.shortcuts import reading

ORDERS = ("as_given", "swapped")


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
    """Tokens of a batch, padding included."""
    return max(request.length for request in batch) * sum(len(request.sequences) for request in batch)


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
    model: torch.nn.Module, model_input: ModuleType, contract, batch: list[Request], device: str
) -> list[list[float]]:
    """Probabilities of a batch, one list a request in the order of contract.verdicts, swapped ones swapped back.

    The softmax is in float32. Where the model overflowed, the probabilities are NaN.
    """
    logits_bv = verdict_logits(model, contract, [ids for request in batch for ids in request.sequences], device)
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias, device=logits_bv.device)
    probabilities_bv = logits_bv.softmax(-1).tolist()
    return [
        model_input.swap_probabilities(values, contract.verdicts) if request.order == "swapped" else values
        for request, values in zip(batch, probabilities_bv, strict=True)
    ]


def verdict_logits(model: torch.nn.Module, contract, sequences: list[list[int]], device: str) -> torch.Tensor:
    """The verdicts' logits, float32 of shape (requests, verdicts), of one sequence a request, for the reward head of two.

    A classifier finds the last token that is not padding by itself, so its rows are padded on the right, and what a decoder
    reads there never sees the padding: it needs no mask. A causal LM is padded on the left: the answer then stands at the
    last place of every row, and only there are logits computed.
    """
    longest, left = max(map(len, sequences)), contract.head == "label_tokens"
    causal = getattr(model, "causal", False)
    ids_bt = torch.full((len(sequences), longest), contract.pad_token_id, dtype=torch.long)
    for row, ids in enumerate(sequences):
        ids_bt[row, longest - len(ids) if left else 0 :][: len(ids)] = torch.tensor(ids)
    inputs = {"input_ids": ids_bt.to(device)}
    if (left or not causal) and min(map(len, sequences)) < longest:
        lengths_b1 = torch.tensor([[len(ids)] for ids in sequences])
        places_t = torch.arange(longest)
        mask_bt = (places_t >= longest - lengths_b1 if left else places_t < lengths_b1).long()
        inputs["attention_mask"] = mask_bt.to(device)
        if left:
            inputs["position_ids"] = (mask_bt.cumsum(-1) - 1).clamp(min=0).to(device)
    if left:
        inputs |= {"logits_to_keep": 1, "use_cache": False}
    with reading(torch.tensor([read_place(ids, longest, contract, causal) for ids in sequences], device=device)):
        logits = model(**inputs).logits
    if left:
        return logits[:, -1, list(contract.label_token_ids)].float()
    if contract.head == "score":
        return logits.float()
    return logits.float().view(-1, 2)[:, [("model_a", "model_b").index(verdict) for verdict in contract.verdicts]]


def read_place(ids: list[int], longest: int, contract, causal: bool) -> int:
    """Where the head reads a row of a batch: at its last token that is not padding, an encoder's at its first."""
    if contract.head == "label_tokens":
        return longest - 1
    if not causal:
        return 0
    return next((place for place in reversed(range(len(ids))) if ids[place] != contract.pad_token_id), 0)


def score(
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
