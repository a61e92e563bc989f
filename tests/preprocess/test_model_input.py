"""Properties of the one model input, for tokenizers of all three kinds, then literal ids."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from preprocess.model_input import (
    VERDICTS,
    Contract,
    ContractError,
    Pair,
    Template,
    check_golden,
    clean,
    contract_from_dict,
    encode,
    encode_all,
    pair_from_row,
    split_budget,
    swap,
    swap_probabilities,
    truncate,
)
from tests import tiny

SECTIONS = "# Prompt\n{prompt}\n# Response A\n{response_a}\n# Response B\n{response_b}\n"
REWARD_SECTIONS = "# Prompt\n{prompt}\n# Response\n{response}\n"
FRAMES = {"bpe": ("<bos>", "<end_of_turn>"), "wordpiece": ("[CLS]", "[SEP]"), "unigram": ("<s>", "</s>")}
CONTROL = {"bpe": {0, 1, 2, 4, 5, 6}, "wordpiece": {0, 2, 3, 4}, "unigram": {1, 2, 3}}
FRAGMENTS = [
    *["<bos>", "<eos>", "</s>", "<s>", "[SEP]", "[CLS]", "[MASK]", "<start_of_turn>", "<end_of_turn>", "<pad>", "[PAD]"],
    *["< / s >", "<</s>/s>", "＜/s＞", "# Response A\n", "\r\n", "\r", "\n", " ", "\x00", "\ufeff", "\ud83d", "\ude00"],
    *["river", "窗户", "نهر", "שלום", "‮abc‬", "👩‍👩‍👧‍👦", "e\u0301", "﷽", "x" * 50],
]
LONG = Pair("100,000 characters", ("a",), ("river 窗户 " * 12_500,), ("x" * 100_000,))

any_text = (
    st.none()
    | st.text(st.characters(), max_size=30)
    | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
    | st.builds(str.__mul__, st.sampled_from(FRAGMENTS), st.integers(1, 300))
)
any_turns = any_text | st.lists(any_text, max_size=3)
any_pair = st.builds(
    lambda *texts: pair_from_row(dict(zip(("id", "prompt", "response_a", "response_b"), ("x", *texts), strict=True))),
    *[any_turns] * 3,
)
any_head = st.sampled_from(["score", "reward"])
any_truncation = st.sampled_from(["left", "right", "middle"])


def unigram() -> Tokenizer:
    """A Unigram tokenizer whose vocabulary holds the control tokens as pieces, as SentencePiece models have them."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *"abcdefghijklmnopqrstuvwxyz#.,ABPR</>", "▁river"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(at)) for at, piece in enumerate(pieces)], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:4]])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.bpe_tokenizer(folder / "bpe")
    tiny.wordpiece_tokenizer(folder / "wordpiece")
    saved = {kind: Tokenizer.from_file(str(folder / kind / "tokenizer.json")) for kind in ("bpe", "wordpiece")}
    return saved | {"unigram": unigram()}


def contract(kind: str, head: str = "score", truncation: str = "middle", budget: int = 160) -> Contract:
    template = Template(FRAMES[kind][0], REWARD_SECTIONS if head == "reward" else SECTIONS, FRAMES[kind][1])
    verdicts = ("model_a", "model_b")
    return Contract(head, verdicts, template, budget, truncation, 0, "sdpa", False, "tiny", None, 2, (), (), "", {}, (), {})


@pytest.mark.parametrize("kind", FRAMES)
@given(pair=any_pair, head=any_head, truncation=any_truncation, budget=st.integers(140, 401))
@example(pair=LONG, head="score", truncation="middle", budget=140)
@example(pair=LONG, head="reward", truncation="left", budget=401)
def test_any_pair_fits_its_budget_and_no_text_forges_a_control_token(tokenizers, kind, pair, head, truncation, budget):
    sequences = encode(pair, tokenizers[kind], contract(kind, head, truncation, budget))
    assert len(sequences) == (2 if head == "reward" else 1)
    for ids in sequences:
        assert len(ids) <= budget
        start, *text, end = ids
        assert [start, end] == [tokenizers[kind].token_to_id(token) for token in FRAMES[kind]]
        assert CONTROL[kind].isdisjoint(text)


@pytest.mark.parametrize("kind", FRAMES)
@given(pairs=st.lists(any_pair, min_size=2, max_size=4), head=any_head, truncation=any_truncation)
def test_one_by_one_gives_the_ids_of_all_at_once(tokenizers, kind, pairs, head, truncation):
    settings = contract(kind, head, truncation)
    assert encode_all(pairs, tokenizers[kind], settings) == [encode(pair, tokenizers[kind], settings) for pair in pairs]


@given(pair=any_pair)
def test_with_enough_room_the_model_sees_every_turn_in_order_and_forged_tokens_as_plain_text(tokenizers, pair):
    settings = contract("bpe", budget=1_000_000)
    turns = itertools.zip_longest(pair.prompt, pair.response_a, pair.response_b, fillvalue="")
    expected = "".join(SECTIONS.format(prompt=prompt, response_a=a, response_b=b) for prompt, a, b in turns)
    ids = encode(pair, tokenizers["bpe"], settings)[0]
    assert tokenizers["bpe"].decode(ids, skip_special_tokens=False) == f"<bos>{expected}<end_of_turn>"


@pytest.mark.parametrize("kind", FRAMES)
@given(pair=any_pair, truncation=any_truncation, budget=st.integers(140, 401))
def test_swapping_the_responses_changes_their_places_and_nothing_else(tokenizers, kind, pair, truncation, budget):
    assert swap(swap(pair)) == pair
    reward = contract(kind, "reward", truncation, budget)
    assert encode(swap(pair), tokenizers[kind], reward) == encode(pair, tokenizers[kind], reward)[::-1]
    same_headings = Template("", SECTIONS.replace("Response A", "Response").replace("Response B", "Response"), "")
    score = dataclasses.replace(contract(kind, truncation=truncation, budget=budget), template=same_headings)
    (ids,), (swapped_ids,) = (encode(either, tokenizers[kind], score) for either in (pair, swap(pair)))
    assert sorted(ids) == sorted(swapped_ids)


@given(st.permutations(VERDICTS))
def test_swapping_probabilities_twice_gives_them_back_in_any_order_of_verdicts(verdicts):
    assert swap_probabilities(swap_probabilities([0.5, 0.3, 0.2], verdicts), verdicts) == [0.5, 0.3, 0.2]
    assert swap_probabilities([0.5, 0.3, 0.2], ("model_a", "tie", "model_b")) == [0.2, 0.3, 0.5]


def test_an_added_token_that_only_the_template_makes_a_control_token_cannot_be_forged_either(tokenizers):
    tokenizer = Tokenizer.from_str(tokenizers["bpe"].to_str())
    tokenizer.add_tokens([AddedToken("<turn>", special=False), AddedToken("\n\n", special=False)])
    turn, blank = tokenizer.token_to_id("<turn>"), tokenizer.token_to_id("\n\n")
    settings = dataclasses.replace(contract("bpe"), template=Template("<turn>", SECTIONS, "\n\n<turn>"))
    ids = encode(Pair("1", ("a<turn>b",), ("c\n\nd",), ("",)), tokenizer, settings)[0]
    assert [at for at, token in enumerate(ids) if token == turn] == [0, len(ids) - 1]
    assert ids.count(blank) == 2
    assert tokenizer.decode(ids).count("<turn>") == 3


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizers):
    backend = tokenizers["bpe"]
    encode(Pair("x", ("<bos>",), ("a",), ("b",)), backend, contract("bpe"))
    assert backend.encode_special_tokens is False
    assert backend.encode("<bos>", add_special_tokens=False).ids == [2]


def test_the_last_turns_are_kept_first(tokenizers):
    turns = tuple(f"{word} " * 12 for word in ("river", "window", "music", "bread"))
    pair = Pair("turns", turns, turns, turns)
    words = {word: tokenizers["bpe"].encode(word, add_special_tokens=False).ids[0] for word in ("river", "window", "bread")}
    ids = encode(pair, tokenizers["bpe"], contract("bpe", truncation="left"))[0]
    assert words["bread"] in ids
    assert words["river"] not in ids


@given(count=st.integers(0, 50), size=st.integers(2, 60), side=any_truncation)
def test_truncation_fills_the_size_and_cuts_one_piece(count, size, side):
    ids = list(range(1, count + 1))
    kept = truncate(ids, size, side, [0])
    assert len(kept) == min(count, size)
    cut = [token for token in ids if token not in kept]
    if cut:
        assert cut == list(range(cut[0], cut[-1] + 1))
        assert (cut[0] == 1) == (side == "left")
        assert (cut[-1] == count) == (side == "right")
        assert kept.count(0) == (side == "middle" and size >= 3)


@given(needs=st.lists(st.integers(0, 2000), min_size=2, max_size=3), budget=st.integers(0, 3000))
def test_a_budget_is_split_by_need_after_a_minimum_for_each(needs, budget):
    sizes = split_budget(needs, budget)
    assert all(min(need, budget // 8) <= size <= need for need, size in zip(needs, sizes, strict=True))
    assert min(sum(needs), budget) - len(needs) < sum(sizes) <= budget
    assert split_budget(needs[::-1], budget) == sizes[::-1]


def test_budgets_of_three_cases_are_these():
    assert split_budget([10, 20, 30], 100) == [10, 20, 30]
    assert split_budget([10, 1000, 1000], 100) == [10, 45, 45]
    assert split_budget([100, 100, 200], 100) == [27, 27, 45]


@given(any_text)
def test_a_cleaned_text_can_be_written_and_stays_as_it_is(text):
    cleaned = clean(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert "\r\n" not in cleaned
    assert clean(cleaned) == cleaned


def test_cleaning_is_as_the_docstring_says():
    assert clean(None) == ""
    assert clean("a\ud83d b") == "a\ufffd b"
    assert clean("\ud83d\ude00") == "😀"
    assert clean("a\r\nb\rc\r\r\nd") == "a\nb\rc\nd"


def test_a_null_an_empty_text_and_no_turn_give_the_same_ids(tokenizers):
    rows = [{"id": "x", "prompt": prompt, "response_a": "a", "response_b": "b"} for prompt in (None, "", [], [None], [""])]
    ids = [encode(pair_from_row(row), tokenizers["bpe"], contract("bpe")) for row in rows]
    assert ids == [ids[0]] * 5


def test_ids_of_one_tiny_case_are_these():
    words = ["<pad>", "<s>", "</s>", "?", "P", "A", "B", "why", "sky", "blue", "red", "[…]"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    settings = dataclasses.replace(
        contract("unigram", budget=60), template=Template("<s>", "P {prompt} A {response_a} B {response_b}", "</s>")
    )
    pair = Pair("tiny", ("why sky", "sky"), ("blue", "</s>"), ("red", ""))
    assert encode(pair, tokenizer, settings) == ([1, 4, 7, 8, 5, 9, 6, 10, 4, 8, 5, 3, 3, 3, 6, 2],)
    long = Pair("long", ("why " * 100,), ("blue " * 100,), ("red",))
    assert encode(long, tokenizer, settings) == ([1, 4, *[7] * 13, 11, *[7] * 13, 5, *[9] * 13, 11, *[9] * 13, 6, 10, 2],)
    reward = dataclasses.replace(settings, head="reward", template=Template("<s>", "P {prompt} A {response}", "</s>"))
    assert encode(Pair("r", ("why",), ("blue",), ("red",)), tokenizer, reward) == ([1, 4, 7, 5, 9, 2], [1, 4, 7, 5, 10, 2])


def test_the_golden_check_names_the_row_and_the_first_token_that_differs(tokenizers):
    def check(settings: Contract, rows: tuple) -> None:
        check_golden(tokenizers["bpe"], dataclasses.replace(settings, golden=tuple(json.loads(json.dumps(rows)))))

    settings = contract("bpe")
    pairs = [Pair("first", ("river",), ("a",), ("b",)), Pair("second", ("window",), ("c",), ("d",))]
    rows = [{"pair": dataclasses.asdict(pair), "ids": encode(pair, tokenizers["bpe"], settings)} for pair in pairs]
    check(settings, rows)

    one_character = dataclasses.replace(settings.template, turn=SECTIONS.replace("# Response A", "# response A"))
    with pytest.raises(ContractError, match="golden row first"):
        check(dataclasses.replace(settings, template=one_character), rows)
    ids = rows[1]["ids"][0]
    for wrong in ([*ids[:7], ids[7] + 1, *ids[8:]], ids[:7]):
        rows[1]["ids"] = [wrong]
        with pytest.raises(ContractError, match="golden row second: token 7 differs"):
            check(settings, rows)


def test_a_contract_survives_its_json_and_refuses_a_missing_or_an_unknown_key():
    values = json.loads(json.dumps(dataclasses.asdict(contract("bpe"))))
    assert contract_from_dict(values) == contract("bpe")
    values["budget"] = values.pop("budget_tokens")
    with pytest.raises(ContractError, match=r"missing keys \['budget_tokens'\], unknown keys \['budget'\]"):
        contract_from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_tokens": 60}, "budget_tokens: 60 leaves no room"),
        ({"template": Template("", "{prompt} {response_b} {response_a}", "")}, "once each, in this order"),
    ],
)
def test_a_contract_that_cannot_be_met_is_refused(tokenizers, change, message):
    with pytest.raises(ContractError, match=message):
        encode(Pair("x", ("a",), ("b",), ("c",)), tokenizers["bpe"], dataclasses.replace(contract("bpe"), **change))
