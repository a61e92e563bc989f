"""Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

ORDERS = ("as_given", "swapped")


@dataclass(frozen=True)
class Request:
    """One sequence to be scored: the pair `id`, with its responses in `order`."""

    id: str
    order: str
    ids: list[int]


def make_requests(model_input: ModuleType, tokenizer, contract, pairs: Sequence, orders: Iterable[str]) -> list[Request]:
    """The requests for `pairs` in `orders`, encoded by the package's own model_input."""
    made = []
    for order in orders:
        ordered = [model_input.swap(pair) for pair in pairs] if order == "swapped" else list(pairs)
        encoded = model_input.encode_all(ordered, tokenizer, contract)
        made += [Request(pair.id, order, sequences[0]) for pair, sequences in zip(pairs, encoded, strict=True)]
    return made


def make_batches(requests: Iterable[Request], tokens_per_batch: int) -> list[list[Request]]:
    """Batches of requests of like length, longest first, so that one too large for memory shows at once.

    A batch, padded, holds at most `tokens_per_batch` tokens; a request that is longer than that is a batch of its own.
    """
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: (-len(request.ids), request.id, request.order)):
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= tokens_per_batch:
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
    longest = max(len(request.ids) for request in batch)
    ids_bt = torch.full((len(batch), longest), contract.pad_token_id, dtype=torch.long)
    mask_bt = torch.zeros((len(batch), longest), dtype=torch.long)
    for row, request in enumerate(batch):
        ids_bt[row, : len(request.ids)] = torch.tensor(request.ids)
        mask_bt[row, : len(request.ids)] = 1
    logits_bv = model(input_ids=ids_bt.to(device), attention_mask=mask_bt.to(device)).logits
    probabilities_bv = logits_bv.float().softmax(-1).tolist()
    return [
        model_input.swap_probabilities(values, contract.verdicts) if request.order == "swapped" else values
        for request, values in zip(batch, probabilities_bv, strict=True)
    ]


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

    Raises FloatingPointError where a row's probabilities are not finite, ValueError where two pairs share an id.
    """
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    if len(scores) != len(pairs):
        raise ValueError(f"{len(pairs) - len(scores)} pairs have the id of another one; scores are joined by id")
    for batch in make_batches(make_requests(model_input, tokenizer, contract, pairs, orders), tokens_per_batch):
        for request, values in zip(batch, score_batch(model, model_input, contract, batch, device), strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}")
            scores[request.id][request.order] = values
    return scores


def mean_of_orders(scores: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """The mean over the orders in which each pair was scored, by id; a pair that was not scored is left out."""
    return {
        pair_id: [sum(values) / len(by_order) for values in zip(*by_order.values(), strict=True)]
        for pair_id, by_order in scores.items()
        if by_order
    }
