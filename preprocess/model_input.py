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
    num_labels: (
        int  # outputs of the classification head: one a verdict, 1 for reward, 0 for label_tokens
    )
    label_token_ids: tuple[int, ...]  # label_tokens: the answers' tokens, in the order of verdicts
    logit_bias: tuple[
        float, ...
    ]  # added to the verdicts' logits before the softmax; empty: nothing
    model_input_sha256: str
    tokenizer_sha256: Mapping[str, str]
    golden: tuple[Mapping, ...]  # twenty rows: {"pair": {...}, "ids": [[...], ...]}
    recorded: Mapping[str, object]


def pair_from_row(row: Mapping) -> Pair:
    """Make a pair of a table's row with id, prompt, response_a and response_b; a text is a conversation of one turn."""
    return Pair(
        id=str(row["id"]),
        prompt=_read_turns(row["prompt"]),
        response_a=_read_turns(row["response_a"]),
        response_b=_read_turns(row["response_b"]),
    )


def _read_turns(value) -> tuple[str, ...]:
    """Clean a text or a list of texts; where there is none, that is one empty turn."""
    if value is None or isinstance(value, str):
        return (clean(value),)
    turns = tuple(clean(turn) for turn in value)
    return turns or ("",)


def clean(text: str | None) -> str:
    """Turn null into "", lone surrogates into U+FFFD, and CRLF into LF. Cleaning twice changes nothing."""
    if text is None:
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"\r+\n", "\n", text) if "\r" in text else text


def swap(pair: Pair) -> Pair:
    """Exchange the two responses of a pair."""
    return replace(pair, response_a=pair.response_b, response_b=pair.response_a)


def swap_probabilities(probabilities: Sequence[float], verdicts: Sequence[str]) -> list[float]:
    """Exchange model_a's and model_b's probability, which turns those of a pair into those of the swapped pair.

    Args:
        probabilities: One for each verdict.
        verdicts: The verdicts in that order.
    """
    other = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
    return [probabilities[verdicts.index(other[verdict])] for verdict in verdicts]


def contract_from_dict(values: Mapping) -> Contract:
    """Make a Contract of the parsed contract.json.

    Raises:
        ContractError: A key is missing or unknown.
    """
    contract_keys = {field.name for field in fields(Contract)}
    missing_keys = sorted(contract_keys - set(values))
    unknown_keys = sorted(set(values) - contract_keys)
    if missing_keys or unknown_keys:
        raise ContractError(
            f"contract.json: missing keys {missing_keys}, unknown keys {unknown_keys}; "
            "it was not written by the model_input.py beside it"
        )

    # JSON has lists where a Contract has tuples.
    arguments = dict(values)
    for name in ("verdicts", "label_token_ids", "logit_bias", "golden"):
        arguments[name] = tuple(values[name])
    arguments["template"] = Template(**values["template"])
    return Contract(**arguments)


def read_contract(folder: str | Path) -> Contract:
    """Read the contract in `folder`/contract.json."""
    text = (Path(folder) / "contract.json").read_text(encoding="utf-8")
    return contract_from_dict(json.loads(text))


def encode(pair: Pair, tokenizer, contract: Contract) -> tuple[list[int], ...]:
    """Encode one pair: one sequence of token ids, or for the reward head two (prompt with A, prompt with B).

    No sequence is longer than `contract.budget_tokens`. See `encode_all`, which this calls.
    """
    return encode_all([pair], tokenizer, contract)[0]


def encode_all(pairs: Iterable[Pair], tokenizer, contract: Contract) -> list[tuple[list[int], ...]]:
    """Encode many pairs: the same token ids as `encode` gives one by one, many times faster.

    Args:
        pairs: The pairs.
        tokenizer: A fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
        contract: Names the template, the budget and the head.

    Returns:
        The sequences of each pair, in the order of the pairs.

    Raises:
        ContractError: The template alone leaves no room in the budget.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_truncation()
    backend.no_padding()
    frame = _encode_frame(backend, contract)

    conversations = []
    for pair in pairs:
        conversations += _list_conversations(pair, contract.head)

    # The tokenizer gets every text in one call, and no text twice.
    texts = set()
    for turns in conversations:
        for turn in turns:
            texts.update(turn)
    ids_of_text = _encode_user_texts(list(texts), backend, contract.template)

    sequences = []
    for turns in conversations:
        encoded_turns = []
        for turn in turns:
            encoded_turns.append([ids_of_text[text] for text in turn])
        sequences.append(_assemble(encoded_turns, frame, contract))

    per_pair = 2 if contract.head == "reward" else 1
    starts = range(0, len(sequences), per_pair)
    return [tuple(sequences[start : start + per_pair]) for start in starts]


def split_budget(needs: Sequence[int], budget: int) -> list[int]:
    """Divide tokens among texts in proportion to need, after each is sure of an eighth of them if it needs it.

    Args:
        needs: The tokens of each text.
        budget: The tokens that there are for all of them.

    Returns:
        How many tokens each text gets.
    """
    if sum(needs) <= budget:
        return list(needs)

    guaranteed_sizes = [min(need, budget // MINIMUM_SHARE) for need in needs]
    tokens_left = budget - sum(guaranteed_sizes)
    tokens_missing = sum(needs) - sum(guaranteed_sizes)
    sizes = []
    for need, guaranteed_size in zip(needs, guaranteed_sizes, strict=True):
        share_of_rest = (need - guaranteed_size) * tokens_left // tokens_missing
        sizes.append(guaranteed_size + share_of_rest)
    return sizes


def truncate(ids: list[int], size: int, side: str, marker: Sequence[int] = ()) -> list[int]:
    """Cut token ids to at most `size`.

    Args:
        ids: The ids of a text.
        size: How many may be left.
        side: Where they are cut: on the `left`, on the `right`, or in the `middle`.
        marker: The ids that stand in the middle for what was cut there, if there is room for them.
    """
    if len(ids) <= size:
        return ids
    if side == "left":
        return ids[len(ids) - size :]
    if side == "right":
        return ids[:size]

    # A marker with no text around it says nothing.
    has_room_for_marker = len(marker) + 2 <= size
    middle = list(marker) if has_room_for_marker else []
    first = (size - len(middle) + 1) // 2
    last = size - len(middle) - first
    return ids[:first] + middle + ids[len(ids) - last :]


def check_golden(tokenizer, contract: Contract) -> None:
    """Check that the contract's golden rows, twenty awkward pairs, get the token ids that they had in training.

    Raises:
        ContractError: One does not; the message shows the first token that differs. Or there are none.
    """
    if not contract.golden:
        raise ContractError(
            "contract.json holds no golden rows, so nothing shows that ids are as in training; train again"
        )

    pairs = [pair_from_row(row["pair"]) for row in contract.golden]
    encoded_pairs = encode_all(pairs, tokenizer, contract)
    for row, pair, sequences in zip(contract.golden, pairs, encoded_pairs, strict=True):
        for ids, trained_ids in zip_longest(sequences, row["ids"], fillvalue=()):
            if list(ids) != list(trained_ids):
                raise ContractError(_explain_difference(pair.id, list(ids), list(trained_ids)))


def _explain_difference(pair_id: str, ids: list[int], trained_ids: list[int]) -> str:
    """Say at which token a golden row differs from training, with the five tokens on either side."""
    position = 0
    for token, trained_token in zip(ids, trained_ids, strict=False):
        if token != trained_token:
            break
        position += 1

    first = max(position - 5, 0)
    end = position + 5
    return (
        f"golden row {pair_id}: token {position} differs from training: found {ids[first:end]}, trained with "
        f"{trained_ids[first:end]}; the template, the tokenizer or model_input.py has changed since training"
    )


@dataclass(frozen=True)
class _Frame:
    """The template's own ids: around the conversation, around the texts of a turn, and where a text was cut."""

    start: list[int]
    turn: list[list[int]]
    end: list[int]
    marker: list[int]


def _encode_frame(backend, contract: Contract) -> _Frame:
    """Encode what the template puts around a pair's texts.

    Raises:
        ContractError: The template lacks a field, or leaves no room in the budget.
    """
    template = contract.template
    field_names = ["{prompt}", "{response_a}", "{response_b}"]
    if contract.head == "reward":
        field_names = ["{prompt}", "{response}"]
    any_field = "|".join(re.escape(name) for name in field_names)
    if re.findall(any_field, template.turn) != field_names:
        raise ContractError(
            f"template.turn must hold {', '.join(field_names)} once each, in this order"
        )

    # What stands between the fields is encoded apart from them: no token joins the two.
    pieces_of_turn = re.split(any_field, template.turn)
    start = _encode_plain(template.start, backend)
    turn = [_encode_plain(piece, backend) for piece in pieces_of_turn]
    end = _encode_plain(template.end, backend)

    template_tokens = len(start) + sum(map(len, turn)) + len(end)
    if template_tokens + MINIMUM_TURN_TOKENS > contract.budget_tokens:
        raise ContractError(
            f"budget_tokens: {contract.budget_tokens} leaves no room beside the template; raise it"
        )
    return _Frame(start, turn, end, _encode_plain(MARKER, backend))


def _encode_plain(text: str, backend) -> list[int]:
    """Encode a text as it stands; the tokenizer adds no tokens of its own."""
    if text == "":
        return []
    return backend.encode(text, add_special_tokens=False).ids


def _list_conversations(pair: Pair, head: str) -> list[list[tuple[str, ...]]]:
    """List what a pair is encoded as: one conversation, or for the reward head one with each response.

    A conversation is a list of turns, and a turn has the texts that its template takes. Where one list of
    turns is shorter than another, empty texts stand for what is missing.
    """
    turns = list(zip_longest(pair.prompt, pair.response_a, pair.response_b, fillvalue=""))
    if not turns:
        turns = [("", "", "")]
    if head != "reward":
        return [turns]

    with_response_a = [(prompt, response_a) for prompt, response_a, _ in turns]
    with_response_b = [(prompt, response_b) for prompt, _, response_b in turns]
    return [with_response_a, with_response_b]


def _assemble(turns: list[list[list[int]]], frame: _Frame, contract: Contract) -> list[int]:
    """Join the turns of a conversation to one sequence within the budget.

    The last turn is the one that is judged: turns are kept from the last one back, and the oldest one
    that is kept may be cut.

    Args:
        turns: For each turn, the token ids of its texts.
        frame: The ids that the template puts around them.
        contract: Says how long a sequence may be, and where a text is cut.
    """
    room = contract.budget_tokens - len(frame.start) - len(frame.end)
    tokens_around_texts = sum(map(len, frame.turn))
    kept_turns: list[list[int]] = []
    for texts in reversed(turns):
        needs = [len(text) for text in texts]
        least_tokens = tokens_around_texts + min(sum(needs), MINIMUM_TURN_TOKENS)
        if kept_turns and least_tokens > room:
            break

        sizes = split_budget(needs, room - tokens_around_texts)
        ids = list(frame.turn[0])
        for text, size, piece_after in zip(texts, sizes, frame.turn[1:], strict=True):
            ids += truncate(text, size, contract.truncation, frame.marker)
            ids += piece_after
        kept_turns.append(ids)
        room -= len(ids)

        # Nothing is left for what stands before a turn that had to be cut.
        is_cut = sum(needs) > sum(sizes)
        if is_cut:
            break

    sequence = list(frame.start)
    for ids in reversed(kept_turns):
        sequence += ids
    return sequence + frame.end


def _encode_user_texts(texts: list[str], backend, template: Template) -> dict[str, list[int]]:
    """Encode texts of users, in which control tokens are plain text, whatever the texts spell.

    Args:
        texts: The texts.
        backend: The tokenizer.
        template: Some tokens are control tokens because it spells them out.

    Returns:
        The token ids of each text.
    """
    control_tokens = _find_control_tokens(backend, template)
    # A tokenizer gives the unknown token to what it cannot spell: a text may yield that one.
    unknown_tokens = {getattr(backend.model, "unk_token", None), "<unk>", "[UNK]"}
    forbidden_ids = set()
    for token_id, content in control_tokens.items():
        if content not in unknown_tokens:
            forbidden_ids.add(token_id)

    # With this switch on, the tokenizer looks for no special tokens in a text.
    switch_before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        ids_of_text = {}
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids_of_text[text] = encoding.ids
            if not forbidden_ids.isdisjoint(ids_of_text[text]):
                pieces = _cut_control_tokens(text, control_tokens.values())
                ids_of_text[text] = _encode_pieces(pieces, backend, forbidden_ids)
    finally:
        backend.encode_special_tokens = switch_before
    return ids_of_text


def _find_control_tokens(backend, template: Template) -> dict[int, str]:
    """Find the control tokens, id and text: all special ones, and added ones that the template spells out."""
    template_text = template.start + template.turn + template.end
    control_tokens = {}
    for token_id, token in backend.get_added_tokens_decoder().items():
        is_in_template = token.content.strip() != "" and token.content in template_text
        if token.special or is_in_template:
            control_tokens[token_id] = token.content
    return control_tokens


def _cut_control_tokens(text: str, control_texts: Iterable[str]) -> list[str]:
    """Cut a text after the first character of each control token that it spells, so that none stays whole."""
    # A longer token comes first, or a shorter one that it begins with would hide it.
    longest_first = sorted(control_texts, key=len, reverse=True)
    any_control_text = "|".join(re.escape(content) for content in longest_first if content)

    pieces = []
    start = 0
    for match in re.finditer(any_control_text, text):
        cut = match.start() + 1
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    return pieces


def _encode_pieces(pieces: Iterable[str], backend, forbidden_ids: set[int]) -> list[int]:
    """Encode the pieces of a text one by one, without the forbidden tokens that a piece may still yield."""
    ids = []
    for piece in pieces:
        for token_id in backend.encode(piece, add_special_tokens=False).ids:
            if token_id not in forbidden_ids:
                ids.append(token_id)
    return ids
