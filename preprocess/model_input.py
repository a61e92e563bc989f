"""One pair in, token ids out: the only code that decides what a model sees, in training and in serving alike.

A byte-for-byte copy of this file is written beside every trained model and executed from there by every later stage, so
it imports the standard library only and the tokenizer is handed in. `contract.json` beside it holds the settings.

Cleaning: null becomes the empty string, a lone surrogate becomes U+FFFD, CRLF becomes LF. An empty turn contributes no
tokens, only its template's headings. A pair without any turn is one empty turn; the shorter of three lists of turns is
padded with empty ones.

Budget: the last turn is kept first, then the one before it, while whole turns fit; the first that does not fit is cut to
what is left if that is worth having (MINIMUM_TURN_TOKENS), and everything before it is dropped. Within a turn, the tokens
are split over prompt, response A and response B in proportion to need, each sure of an eighth of them if it needs it.

User text cannot forge control tokens, which are those that the tokenizer marks as special and any added token that the
template spells out: it is encoded with special tokens switched off, and a text that yields one all the same (Unigram
models hold "</s>" as a piece) is encoded again in pieces that cannot.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path

MARKER = " […] "
MINIMUM_SHARE = 8
MINIMUM_TURN_TOKENS = 48
VERDICTS = ("model_a", "model_b", "tie")


class ContractError(ValueError):
    """The contract and what is being served differ in a way that would make answers wrong."""


@dataclass(frozen=True)
class Pair:
    """One prompt with two responses, each a tuple of turns."""

    id: str
    prompt: tuple[str, ...]
    response_a: tuple[str, ...]
    response_b: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """The literal text around a conversation: `start`, then `turn` for each turn, then `end`.

    `turn` holds {prompt}, {response_a} and {response_b} once each; for the reward head {prompt} and {response}.
    Special tokens are spelled out, e.g. "<bos>" or "[SEP]": nothing is added by the tokenizer.
    """

    start: str
    turn: str
    end: str


@dataclass(frozen=True)
class Contract:
    """What a model was trained with. Fields are those of contract.json; `recorded` only informs."""

    head: str  # score | label_tokens | reward
    verdicts: tuple[str, ...]  # the order of the logits
    template: Template
    budget_tokens: int
    truncation: str  # left | right | middle: which part of a text that is too long is cut
    pad_token_id: int
    attention: str
    softcap: bool
    base_model: str
    revision: str | None
    num_labels: int  # outputs of the classification head: one a verdict, 1 for reward, 0 for label_tokens
    label_token_ids: tuple[int, ...]  # label_tokens: the answers' tokens, in the order of verdicts
    logit_bias: tuple[float, ...]  # added to the verdicts' logits before the softmax; empty: nothing
    model_input_sha256: str
    tokenizer_sha256: Mapping[str, str]
    golden: tuple[Mapping, ...]  # twenty rows: {"pair": {...}, "ids": [[...], ...]}
    recorded: Mapping[str, object]


def pair_from_row(row: Mapping) -> Pair:
    """A pair from a table's row with id, prompt, response_a and response_b; a text is a conversation of one turn."""

    def turns(value) -> tuple[str, ...]:
        if value is None or isinstance(value, str):
            return (clean(value),)
        return tuple(clean(turn) for turn in value) or ("",)

    return Pair(str(row["id"]), turns(row["prompt"]), turns(row["response_a"]), turns(row["response_b"]))


def clean(text: str | None) -> str:
    """Null to "", lone surrogates to U+FFFD, CRLF to LF. Cleaning twice changes nothing."""
    if text is None:
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"\r+\n", "\n", text) if "\r" in text else text


def swap(pair: Pair) -> Pair:
    """The same pair with the two responses exchanged."""
    return replace(pair, response_a=pair.response_b, response_b=pair.response_a)


def swap_probabilities(probabilities: Sequence[float], verdicts: Sequence[str]) -> list[float]:
    """Probabilities in the order of `verdicts` for the swapped pair, told of the pair as given (and the other way round)."""
    other = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
    return [probabilities[verdicts.index(other[verdict])] for verdict in verdicts]


def contract_from_dict(values: Mapping) -> Contract:
    """A Contract from the parsed contract.json; a missing or unknown key is a ContractError."""
    known = {field.name for field in fields(Contract)}
    if set(values) != known:
        raise ContractError(
            f"contract.json: missing keys {sorted(known - set(values))}, unknown keys {sorted(set(values) - known)}; "
            "it was not written by the model_input.py beside it"
        )
    as_tuples = {name: tuple(values[name]) for name in ("verdicts", "label_token_ids", "logit_bias", "golden")}
    return Contract(**{**values, **as_tuples, "template": Template(**values["template"])})


def read_contract(folder: str | Path) -> Contract:
    """The contract in `folder`/contract.json."""
    return contract_from_dict(json.loads((Path(folder) / "contract.json").read_text(encoding="utf-8")))


def encode(pair: Pair, tokenizer, contract: Contract) -> tuple[list[int], ...]:
    """Token ids of one pair: one sequence, or for the reward head two (prompt with A, prompt with B).

    No sequence is longer than `contract.budget_tokens`. See `encode_all`, which this calls.
    """
    return encode_all([pair], tokenizer, contract)[0]


def encode_all(pairs: Iterable[Pair], tokenizer, contract: Contract) -> list[tuple[list[int], ...]]:
    """Token ids of many pairs, in their order; the same ids as `encode` gives one by one, many times faster.

    `tokenizer` is a fast tokenizer of transformers or a `tokenizers.Tokenizer`. Raises ContractError where the template
    alone leaves no room in the budget.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_truncation()
    backend.no_padding()
    frame = _encode_frame(backend, contract)
    conversations = [conversation for pair in pairs for conversation in _conversations(pair, contract)]
    texts = [text for turns in conversations for turn in turns for text in turn]
    token_ids = iter(_encode_user_texts(texts, backend, contract.template))
    sequences = [_assemble([[next(token_ids) for _ in turn] for turn in turns], frame, contract) for turns in conversations]
    per_pair = 2 if contract.head == "reward" else 1
    return [tuple(sequences[start : start + per_pair]) for start in range(0, len(sequences), per_pair)]


def split_budget(needs: Sequence[int], budget: int) -> list[int]:
    """How many of `budget` tokens each text gets: in proportion to need, after each is sure of an eighth if it needs it."""
    if sum(needs) <= budget:
        return list(needs)
    sure = [min(need, budget // MINIMUM_SHARE) for need in needs]
    rest, missing = budget - sum(sure), sum(needs) - sum(sure)
    return [have + (need - have) * rest // missing for need, have in zip(needs, sure, strict=True)]


def truncate(ids: list[int], size: int, side: str, marker: Sequence[int] = ()) -> list[int]:
    """At most `size` ids: cut on the `left`, on the `right`, or in the `middle`, where `marker` stands for the cut."""
    if len(ids) <= size:
        return ids
    if side == "left":
        return ids[len(ids) - size :]
    if side == "right":
        return ids[:size]
    marker = list(marker) if len(marker) + 2 <= size else []
    first = (size - len(marker) + 1) // 2
    last = size - len(marker) - first
    return ids[:first] + marker + ids[len(ids) - last :]


def check_golden(tokenizer, contract: Contract) -> None:
    """Encode the contract's golden rows again; raise ContractError at the first token that differs, with its context."""
    if not contract.golden:
        raise ContractError("contract.json holds no golden rows, so nothing shows that ids are as in training; train again")
    pairs = [pair_from_row(row["pair"]) for row in contract.golden]
    for pair, ids, row in zip(pairs, encode_all(pairs, tokenizer, contract), contract.golden, strict=True):
        for found, expected in zip_longest(ids, row["ids"], fillvalue=()):
            if list(found) != list(expected):
                at = next(i for i, (f, e) in enumerate(zip_longest(found, expected)) if f != e)
                near = slice(max(at - 5, 0), at + 5)
                raise ContractError(
                    f"golden row {pair.id}: token {at} differs from training: found {list(found[near])}, trained with "
                    f"{list(expected[near])}; the template, the tokenizer or model_input.py has changed since training"
                )


@dataclass(frozen=True)
class _Frame:
    """The template's own ids: around the conversation, around the texts of a turn, and where a text was cut."""

    start: list[int]
    turn: list[list[int]]
    end: list[int]
    marker: list[int]


def _encode_frame(backend, contract: Contract) -> _Frame:
    fields_of_turn = ("{prompt}", "{response}") if contract.head == "reward" else ("{prompt}", "{response_a}", "{response_b}")
    pieces = re.split("|".join(re.escape(name) for name in fields_of_turn), contract.template.turn)
    if [name for name in re.findall(r"\{\w+\}", contract.template.turn) if name in fields_of_turn] != list(fields_of_turn):
        raise ContractError(f"template.turn must hold {', '.join(fields_of_turn)} once each, in this order")
    texts = [contract.template.start, *pieces, contract.template.end, MARKER]
    start, *turn, end, marker = [backend.encode(text, add_special_tokens=False).ids if text else [] for text in texts]
    if len(start) + sum(map(len, turn)) + len(end) + MINIMUM_TURN_TOKENS > contract.budget_tokens:
        raise ContractError(f"budget_tokens: {contract.budget_tokens} leaves no room beside the template; raise it")
    return _Frame(start, turn, end, marker)


def _conversations(pair: Pair, contract: Contract) -> list[list[tuple[str, ...]]]:
    """The pair as sequences of turns, each turn the texts that its template takes: one sequence, or two for reward."""
    turns = list(zip_longest(pair.prompt, pair.response_a, pair.response_b, fillvalue="")) or [("", "", "")]
    if contract.head == "reward":
        return [[(prompt, a) for prompt, a, _ in turns], [(prompt, b) for prompt, _, b in turns]]
    return [turns]


def _assemble(turns: list[list[list[int]]], frame: _Frame, contract: Contract) -> list[int]:
    """One sequence within the budget from the ids of its turns' texts: the last turns first, the oldest one kept is cut."""
    room = contract.budget_tokens - len(frame.start) - len(frame.end)
    around = sum(map(len, frame.turn))
    kept: list[list[int]] = []
    for texts in reversed(turns):
        needs = [len(text) for text in texts]
        if kept and around + min(sum(needs), MINIMUM_TURN_TOKENS) > room:
            break
        sizes = split_budget(needs, room - around)
        cut = [truncate(text, size, contract.truncation, frame.marker) for text, size in zip(texts, sizes, strict=True)]
        ids = list(frame.turn[0])
        for text, piece in zip(cut, frame.turn[1:], strict=True):
            ids += text
            ids += piece
        kept.append(ids)
        room -= len(ids)
        if sum(needs) > sum(sizes):
            break
    return [*frame.start, *(token for ids in reversed(kept) for token in ids), *frame.end]


def _encode_user_texts(texts: list[str], backend, template: Template) -> list[list[int]]:
    """Ids of texts in which control tokens are plain text, whatever they spell."""
    spelled_out = template.start + template.turn + template.end
    control = {
        token: added.content
        for token, added in backend.get_added_tokens_decoder().items()
        if added.special or (added.content.strip() and added.content in spelled_out)
    }
    unknown = {getattr(backend.model, "unk_token", None), "<unk>", "[UNK]"}
    forbidden = frozenset(token for token, content in control.items() if content not in unknown)
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [
            ids if forbidden.isdisjoint(ids) else _encode_in_pieces(text, backend, control, forbidden)
            for text, ids in zip(texts, encoded, strict=True)
        ]
    finally:
        backend.encode_special_tokens = before


def _encode_in_pieces(text: str, backend, control: Mapping[int, str], forbidden: frozenset[int]) -> list[int]:
    """Ids of a text cut inside every control token that it spells, so that none can be matched whole."""
    spelled = "|".join(re.escape(content) for content in sorted(control.values(), key=len, reverse=True) if content)
    cuts = [match.start() + 1 for match in re.finditer(spelled, text)]
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [token for piece in pieces for token in backend.encode(piece, add_special_tokens=False).ids]
    return [token for token in ids if token not in forbidden]
