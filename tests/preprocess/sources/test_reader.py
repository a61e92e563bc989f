"""Each layout is recognised by its columns, and every row comes back: usable, or with a reason."""

import json

import polars as pl
import pytest

from preprocess.core.errors import UserError
from preprocess.sources.reader import read_prompts, read_rows
from preprocess.sources.rows import ROWS


def wsdm(**columns) -> pl.DataFrame:
    row = {"id": "1", "prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_a"}
    height = max(map(len, columns.values()), default=1)
    return pl.DataFrame({name: columns.get(name, [value] * height) for name, value in row.items()} | columns)


def lmsys(prompt, a, b, flags=(1, 0, 0)) -> pl.DataFrame:
    texts = {"prompt": prompt, "response_a": a, "response_b": b}
    return pl.DataFrame(
        {"id": [7], "model_a": ["x"], "model_b": ["y"]}
        | {name: [text if isinstance(text, str) else json.dumps(text)] for name, text in texts.items()}
        | {f"winner_{name}": [flag] for name, flag in zip(("model_a", "model_b", "tie"), flags, strict=True)}
    )


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_wsdm_is_read_alike_from_parquet_and_csv(tmp_path):
    table = wsdm(id=["1", "2"], prompt=['你好, "x"\n', "b"], winner=["model_b", "tie"], language=["Chinese", None])
    table.write_parquet(tmp_path / "x.parquet")
    table.write_csv(tmp_path / "x.csv")
    rows = read_rows(tmp_path / "x.parquet")
    assert rows.schema == ROWS
    assert rows.drop("file").equals(read_rows(tmp_path / "x.csv").drop("file"))
    assert rows.drop("file").row(0) == (
        *(1, "1", ['你好, "x"\n'], ["a"], ["b"], "model_b", "Chinese", "x"),
        *(0.0, 1.0, 0.0, 1.0, None),
    )
    assert rows["language"].to_list() == ["Chinese", "unknown"]


def test_an_own_source_column_wins_over_the_files_name(tmp_path):
    wsdm(source=["crowd", None], id=["1", "2"]).write_parquet(tmp_path / "stem.parquet")
    assert read_rows(tmp_path / "stem.parquet")["source"].to_list() == ["crowd", "stem"]


def test_ids_keep_their_leading_zeros_in_csv(tmp_path):
    wsdm(id=["007"]).write_csv(tmp_path / "x.csv")
    assert read_rows(tmp_path / "x.csv")["id"].to_list() == ["007"]


def test_lmsys_turns_may_be_null_and_hold_lone_surrogates(tmp_path):
    lmsys('["p\\ud83d", "q"]', '[null, "a"]', ["b\r\n", "c"], (0, 0, 1)).write_csv(tmp_path / "x.csv")
    row = read_rows(tmp_path / "x.csv").row(0, named=True)
    assert (row["id"], row["winner"], row["reason"]) == ("7", "tie", None)
    assert (row["prompt"], row["response_a"], row["response_b"]) == (["p\ufffd", "q"], ["", "a"], ["b\n", "c"])


def test_lmsys_cells_are_never_evaluated(tmp_path):
    bad = lmsys("[print('x')]", ["a"], ["b"])
    pl.concat([bad, lmsys(["p"], ["a"], ["b"])]).write_csv(tmp_path / "x.csv")
    rows = read_rows(tmp_path / "x.csv")
    assert rows["reason"].to_list() == ["not a JSON list of turns", None]
    assert rows["prompt"].to_list()[0] == ["[print('x')]"]


def test_chosen_and_rejected_texts_get_sides_by_a_hash_of_the_id(tmp_path):
    rows = [{"id": str(at), "prompt": "p", "chosen": f"good {at}", "rejected": "bad"} for at in range(200)]
    table = read_rows(jsonl(tmp_path / "x.jsonl", *rows))
    for row in table.iter_rows(named=True):
        winner = row["response_a" if row["winner"] == "model_a" else "response_b"]
        assert winner == [f"good {row['id']}"]
    assert 70 < (table["winner"] == "model_a").sum() < 130
    backwards = read_rows(jsonl(tmp_path / "y.jsonl", *rows[::-1])).reverse()
    assert backwards["winner"].to_list() == table["winner"].to_list()


def test_chosen_and_rejected_chats_become_turns(tmp_path):
    start = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p"}]
    middle = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]
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


def test_chats_in_parquet_are_read_too(tmp_path):
    chat = {
        name: [[{"role": "user", "content": "p"}, {"role": "assistant", "content": name}]] for name in ("chosen", "rejected")
    }
    pl.DataFrame(chat).write_parquet(tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet")["prompt"].to_list() == [["p"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"winner": "modelA"}, "unknown winner"),
        ({"winner": None}, "unknown winner"),
        ({"response_a": ""}, "empty answer"),
        ({"response_b": " \n"}, "empty answer"),
        ({"response_b": None}, "empty answer"),
        ({"prompt": " "}, "empty prompt"),
        ({"id": None}, "no id"),
        ({"response_b": "a"}, "identical answers, one wins"),
    ],
)
def test_an_unusable_row_has_a_reason_and_keeps_what_was_found(tmp_path, change, reason):
    wsdm(**{name: [value, "x" if name != "winner" else "tie"] for name, value in change.items()}).write_parquet(
        tmp_path / "x.parquet"
    )
    rows = read_rows(tmp_path / "x.parquet")
    assert rows["reason"].to_list() == [reason, None]
    name, value = next(iter(change.items()))
    found = rows[name].to_list()[0]
    assert (found[0] if isinstance(found, list) else found or None) == (value or ("" if value == "" else None))


def test_lines_that_are_no_json_objects_are_rejected_with_their_text(tmp_path):
    good = {"id": 1, "prompt": "p", "chosen": "a", "rejected": "b"}
    rows = read_rows(jsonl(tmp_path / "x.jsonl", good, "{broken", "[1]"))
    assert rows["reason"].to_list() == [None, "not a JSON object", "not a JSON object"]
    assert rows["prompt"].to_list()[1:] == [["{broken"], ["[1]"]]
    assert rows["row"].to_list() == [1, 2, 3]


def test_vote_shares_of_a_teacher_are_kept(tmp_path):
    shares = {"p_model_a": [0.25, 0.9], "p_model_b": [0.5, 0.9], "p_tie": [0.25, 0.0], "weight": [3.0, 1.0]}
    wsdm(id=["1", "2"], **shares).write_parquet(tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet")
    assert rows.select("p_model_a", "p_model_b", "p_tie", "weight").row(0) == (0.25, 0.5, 0.25, 3.0)
    assert rows["reason"].to_list()[1] == "vote shares do not add up to 1, or the weight is not positive"


def test_a_missing_column_is_named_with_the_nearest_layout(tmp_path):
    wsdm().drop("response_b").write_csv(tmp_path / "x.csv")
    with pytest.raises(
        UserError, match=r"x\.csv: missing column response_b of the layout WSDM .*found id, prompt, response_a, winner"
    ):
        read_rows(tmp_path / "x.csv")
    lmsys(["p"], ["a"], ["b"]).drop("winner_tie").write_csv(tmp_path / "y.csv")
    with pytest.raises(UserError, match="missing column winner_tie of the layout LMSYS"):
        read_rows(tmp_path / "y.csv")
    pl.DataFrame({"chosen": ["a"], "rejected": ["b"]}).write_parquet(tmp_path / "z.parquet")
    with pytest.raises(UserError, match="missing column prompt of the layout chosen/rejected"):
        read_rows(tmp_path / "z.parquet")


def test_unreadable_files_are_one_clear_error(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.csv").write_bytes("id,prompt,response_a,response_b,winner\n1,é,a,b,tie\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "header.csv").write_text("id,prompt,response_a,response_b,winner\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "train.zip").write_bytes(b"PK")
    (tmp_path / "folder.csv").mkdir()
    for name in (
        "broken.parquet",
        "latin.csv",
        "empty.csv",
        "header.csv",
        "bytes.jsonl",
        "train.zip",
        "folder.csv",
        "none.csv",
    ):
        with pytest.raises(UserError) as error:
            read_rows(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_without_one_usable_row_is_an_error_with_the_reasons(tmp_path):
    wsdm(winner=["modelA", "", ""], id=["1", "2", "3"], prompt=["p", "", "q"]).write_csv(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"not one of its 3 rows can be used \(unknown winner: 2, empty prompt: 1\)"):
        read_rows(tmp_path / "x.csv")


def test_prompts_of_a_test_file_need_no_verdict(tmp_path):
    wsdm(prompt=["[1] p", "q"]).drop("winner").write_csv(tmp_path / "x.csv")
    lmsys(["p", None], ["a"], ["b"]).drop("winner_model_a", "winner_model_b", "winner_tie").write_csv(tmp_path / "y.csv")
    assert read_prompts(tmp_path / "x.csv")["prompt"].to_list() == [["[1] p"], ["q"]]
    assert read_prompts(tmp_path / "y.csv")["prompt"].to_list() == [["p", ""]]
    pl.DataFrame({"id": [1], "text": ["x"]}).write_csv(tmp_path / "z.csv")
    with pytest.raises(UserError, match="no column prompt"):
        read_prompts(tmp_path / "z.csv")
