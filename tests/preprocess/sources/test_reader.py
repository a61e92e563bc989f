"""Each layout is recognised by its columns, and every row comes back: usable, or with a reason."""

import json
import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.core.errors import UserError
from preprocess.model_input import VERDICTS
from preprocess.sources.reader import read_prompts
from preprocess.sources.rows import ROWS, SHARES, TEXTS
from tests.preprocess.sources.whole_files import jsonl, read_rows

NO_SHARES = "vote shares do not add up to 1, or the weight is not positive"
REASONS = {
    *["no id", "empty prompt", "empty answer", "unknown winner", "identical answers, one wins"],
    *["not a JSON object", "not a list of turns", "not a JSON list of turns", "not a list of chat messages"],
    *["chosen and rejected answer different prompts", "vote shares are not numbers"],
    NO_SHARES,
}
GOOD = {
    "WSDM": {"id": "good", "prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"},
    "LMSYS": {"id": "good", "prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]', "winner_tie": 1}
    | {"winner_model_a": 0, "winner_model_b": 0},
    "chosen/rejected": {"id": "good", "prompt": "p", "chosen": "a", "rejected": "b"},
}

# Written and read again, these stay as they are; what cleaning changes is tested with model_input.
plain_text = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=20).filter(str.strip)
some_id = st.sampled_from(["7", "007", "1e5", "NaN", "null", "id,with\ncommas"]) | plain_text
message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "gpt", "tool"]), "content": st.none() | plain_text})
any_value = (
    st.sampled_from([None, "", " ", "a", "\ud83d", '["a"]', "[null]", "{", 0, 1, 0.5, -1, 1e400, True, "model_a", "tie", {}])
    | st.lists(st.sampled_from([None, "a", " ", 1]), max_size=2)
    | st.lists(message, max_size=4)
)


@st.composite
def judgements(draw, single_turn: bool = False):
    count = 1 if single_turn else draw(st.integers(1, 3))
    prompt, a, b = (draw(st.lists(plain_text, min_size=count, max_size=count)) for _ in range(3))
    b[-1] += "!" if a == b else ""
    return draw(some_id), prompt, a, b, draw(st.sampled_from(VERDICTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


def wsdm(**columns) -> pl.DataFrame:
    height = max(map(len, columns.values()), default=1)
    return pl.DataFrame({name: [value] * height for name, value in GOOD["WSDM"].items()} | columns)


def read_back(path) -> list[tuple]:
    rows = read_rows(path)
    assert rows.schema == ROWS
    assert rows["reason"].null_count() == rows.height
    assert rows["row"].to_list() == list(range(1, rows.height + 1))
    return rows.select("id", *TEXTS, "winner").rows()


@given(st.lists(judgements(), min_size=1, max_size=4))
def test_turns_of_wsdm_and_lmsys_come_back_from_every_kind_of_file(folder, rows):
    frame = pl.DataFrame(rows, schema=["id", *TEXTS, "winner"], orient="row")
    frame.write_parquet(folder / "turns.parquet")
    assert read_back(folder / "turns.parquet") == rows
    assert read_back(jsonl(folder / "turns.jsonl", *frame.to_dicts())) == rows

    as_json = frame.with_columns(pl.col(TEXTS).map_elements(lambda turns: json.dumps(turns.to_list()), pl.String))
    lmsys = as_json.with_columns((frame["winner"] == verdict).cast(int).alias(f"winner_{verdict}") for verdict in VERDICTS)
    lmsys = lmsys.drop("winner")
    lmsys.write_csv(folder / "lmsys.csv")
    lmsys.write_parquet(folder / "lmsys.parquet")
    assert read_back(folder / "lmsys.csv") == rows
    assert read_back(folder / "lmsys.parquet") == rows
    assert read_prompts(folder / "lmsys.csv").rows() == [row[:2] for row in rows]


@given(st.lists(judgements(single_turn=True), min_size=1, max_size=4))
def test_single_texts_come_back_from_csv_and_as_chosen_and_rejected(folder, rows):
    table = wsdm(id=[row[0] for row in rows], winner=[row[4] for row in rows])
    table = table.with_columns(**{name: pl.Series([row[at][0] for row in rows]) for at, name in enumerate(TEXTS, 1)})
    table.write_csv(folder / "texts.csv")
    assert read_back(folder / "texts.csv") == rows
    assert read_prompts(folder / "texts.csv").rows() == [row[:2] for row in rows]

    table.rename({"response_a": "chosen", "response_b": "rejected"}).drop("winner").write_csv(folder / "chosen.csv")
    for row, (row_id, prompt, a, b, winner) in zip(rows, read_back(folder / "chosen.csv"), strict=True):
        assert (row_id, prompt) == row[:2]
        assert {"model_a": (a, b), "model_b": (b, a)}[winner] == row[2:4]


@pytest.mark.parametrize("layout", GOOD)
@given(data=st.data())
def test_a_row_of_any_values_is_usable_or_has_a_reason(folder, layout, data):
    row = st.fixed_dictionaries({}, optional=dict.fromkeys([*GOOD[layout], *SHARES, "weight"], any_value))
    bad = data.draw(st.lists(row, max_size=5))
    rows = read_rows(jsonl(folder / "any.jsonl", GOOD[layout], *bad, "{broken"))
    assert rows.height == len(bad) + 2
    assert set(rows["reason"].drop_nulls()) <= REASONS
    for usable in rows.filter(pl.col("reason").is_null()).iter_rows(named=True):
        assert usable["id"]
        assert usable["winner"] in VERDICTS
        assert all("".join(usable[name]).strip() for name in TEXTS)
        assert usable["response_a"] != usable["response_b"] or usable["winner"] == "tie"
        assert math.isclose(sum(usable[name] for name in SHARES), 1, abs_tol=1e-3)
        assert 0 < usable["weight"] < math.inf


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"winner": "modelA"}, "unknown winner"),
        ({"response_b": " \n"}, "empty answer"),
        ({"response_a": None}, "empty answer"),
        ({"prompt": " "}, "empty prompt"),
        ({"id": None}, "no id"),
        ({"response_b": "a", "winner": "model_b"}, "identical answers, one wins"),
        ({"p_model_a": 0.9, "p_model_b": 0.9, "p_tie": 0}, NO_SHARES),
        ({"p_model_a": 1, "p_model_b": 0, "p_tie": 0, "weight": 0}, NO_SHARES),
    ],
)
def test_an_unusable_row_has_a_reason_and_keeps_its_values(tmp_path, change, reason):
    identical_tie = GOOD["WSDM"] | {"response_b": "a"}  # which can be used
    rows = read_rows(jsonl(tmp_path / "x.jsonl", GOOD["WSDM"] | change, identical_tie))
    assert rows["reason"].to_list() == [reason, None]
    for name, value in change.items():
        if name in TEXTS:
            assert rows[name].to_list()[0] == (None if value is None else [value])
    assert rows["winner"][0] == change.get("winner", "tie")


def test_language_source_and_vote_shares_of_a_teacher_are_kept(tmp_path):
    table = wsdm(id=["1", "2"], prompt=['你好, "x"\n', "b"], language=["Chinese", None], source=["crowd", None])
    table.with_columns(p_model_a=pl.lit(0.25), p_model_b=pl.lit(0.5), p_tie=pl.lit(0.25), weight=pl.lit(3)).write_csv(
        tmp_path / "stem.csv"
    )
    rows = read_rows(tmp_path / "stem.csv").drop("file", "role")
    assert rows.row(0) == (1, "1", ['你好, "x"\n'], ["a"], ["b"], "tie", "Chinese", "crowd", 0.25, 0.5, 0.25, 3.0, False, None)
    assert rows.select("language", "source").row(1) == ("unknown", "stem")


def test_lmsys_turns_may_be_null_and_hold_lone_surrogates_and_are_never_evaluated(tmp_path):
    texts = {"prompt": '["p\\ud83d", "q"]', "response_a": '[null, "a"]', "response_b": '["b\\r\\n", "c"]'}
    changes = [texts, {"prompt": "[print('x')]"}, {"winner_model_a": 1}]
    rows = read_rows(jsonl(tmp_path / "x.jsonl", *(GOOD["LMSYS"] | change for change in changes)))
    assert rows.select(TEXTS).row(0) == (["p\ufffd", "q"], ["", "a"], ["b\n", "c"])
    assert rows["reason"].to_list() == [None, "not a JSON list of turns", "unknown winner"]
    assert rows["prompt"].to_list()[1] == ["[print('x')]"]
    assert rows["winner"].to_list()[2] == "winner_model_a 1, winner_model_b 0, winner_tie 1"


def test_chosen_and_rejected_texts_get_sides_by_a_hash_of_the_id(tmp_path):
    rows = [{"id": str(at), "prompt": "p", "chosen": f"good {at}", "rejected": "bad"} for at in range(200)]
    winners = read_rows(jsonl(tmp_path / "x.jsonl", *rows))["winner"].to_list()
    assert 70 < winners.count("model_a") < 130
    assert [winner[-1] for winner in winners[:8]] == list("bbabaaaa"), "another hash would change what a model is trained on"
    assert read_rows(jsonl(tmp_path / "y.jsonl", *rows[::-1]))["winner"].to_list() == winners[::-1]


def test_chosen_and_rejected_chats_become_turns(tmp_path):
    start = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p"}]
    middle = [{"role": "assistant", "content": "a"}, {"from": "human", "value": "q"}]
    ends = {name: [{"role": "assistant", "content": name}] for name in ("good", "bad")}
    whole = {"chosen": start + middle + ends["good"], "rejected": start + middle + ends["bad"]}
    split = {"prompt": start + middle, "chosen": ends["good"], "rejected": ends["bad"]}
    texts = {"prompt": "be brief\n\np", "chosen": start + ends["good"], "rejected": start + ends["bad"]}
    table = read_rows(jsonl(tmp_path / "x.jsonl", whole, split, texts))
    assert table["reason"].to_list() == [None] * 3
    assert table["prompt"].to_list() == [["be brief\n\np", "q"]] * 2 + [["be brief\n\np"]]
    answers = [sorted(pair) for pair in table.select("response_a", "response_b").rows()]
    assert answers == [[["a", "bad"], ["a", "good"]]] * 2 + [[["bad"], ["good"]]]
    assert table["id"][0] == table["id"][1], "a row without an id gets one from its texts"
    other = {"chosen": start + ends["good"], "rejected": middle[1:] + ends["bad"]}
    same = {"chosen": start + ends["good"], "rejected": start + ends["good"]}
    unusable = read_rows(jsonl(tmp_path / "y.jsonl", texts, other, same))
    assert unusable["reason"].to_list() == [None, "chosen and rejected answer different prompts", "identical answers, one wins"]
    assert unusable["id"].is_null().to_list() == [False, True, False]

    chats = {name: [start + ends[name]] for name in ends}
    pl.DataFrame(chats).rename({"good": "chosen", "bad": "rejected"}).write_parquet(tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet")["prompt"].to_list() == [["be brief\n\np"]]


def test_lines_that_are_no_json_objects_are_rejected_with_their_text(tmp_path):
    rows = read_rows(jsonl(tmp_path / "x.jsonl", GOOD["WSDM"], "", "{broken", "[1]"))
    rejected = rows.select("row", "prompt", "reason").rows()[1:]
    assert rejected == [(3, ["{broken"], "not a JSON object"), (4, ["[1]"], "not a JSON object")]


@pytest.mark.parametrize(("layout", "column"), [("WSDM", "response_b"), ("LMSYS", "winner_tie"), ("chosen/rejected", "prompt")])
def test_a_missing_column_is_named_with_the_nearest_layout(tmp_path, layout, column):
    pl.DataFrame([GOOD[layout]]).drop(column).write_csv(tmp_path / "x.csv")
    with pytest.raises(UserError, match=rf"x\.csv: missing column {column} of the layout {layout} .* nearest; found "):
        read_rows(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.parquet", b"PAR1 no"),
        ("empty.csv", b""),
        ("bytes.jsonl", b"\xff\xfe"),
        ("train.zip", b"PK"),
        ("absent.csv", None),
    ],
)
def test_an_unreadable_file_is_one_clear_error(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_json_lines_that_are_no_objects_are_told_as_such_and_not_as_missing_columns(tmp_path):
    (tmp_path / "x.jsonl").write_text('id,prompt\n["a"]\n')
    with pytest.raises(UserError, match=r"x\.jsonl: none of its 2 lines is a JSON object with keys; fetch or export it again"):
        read_rows(tmp_path / "x.jsonl")


def test_a_file_without_one_usable_row_is_an_error_with_the_reasons(tmp_path):
    wsdm(winner=["modelA", "", ""], id=["1", "2", "3"], prompt=["p", "", "q"]).write_csv(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"not one of its 3 rows can be used \(unknown winner: 2, empty prompt: 1\)"):
        read_rows(tmp_path / "x.csv")


def test_prompts_of_a_test_file_need_no_verdict(tmp_path):
    wsdm(prompt=["[1] p", "q"]).drop("winner").write_csv(tmp_path / "x.csv")
    assert read_prompts(tmp_path / "x.csv")["prompt"].to_list() == [["[1] p"], ["q"]]
    chat = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    jsonl(tmp_path / "y.jsonl", {"chosen": chat}, {"chosen": [1]}, "{broken")
    assert read_prompts(tmp_path / "y.jsonl").rows() == [("1", ["p"])]
    pl.DataFrame({"id": [1], "text": ["x"]}).write_csv(tmp_path / "z.csv")
    with pytest.raises(UserError, match="no column prompt"):
        read_prompts(tmp_path / "z.csv")
