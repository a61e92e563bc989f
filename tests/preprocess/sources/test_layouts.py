"""Each public layout, as its card describes it: what a row becomes, and why a row is rejected."""

import polars as pl
import pytest

from preprocess.sources.reader import read_prompts
from preprocess.sources.rows import SHARES, TEXTS
from tests.preprocess.sources.whole_files import jsonl, read_rows


def chat(*texts) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


ARENA_33K = {
    "question_id": "q1",
    "model_a": "chatglm-6b",
    "winner": "tie (bothbad)",
    "conversation_a": chat("p", "a", "q", "b"),
    "conversation_b": chat("p", "c", "q", "d"),
    "turn": 2,
}
ARENA_140K = {
    "id": "q2",
    "winner": "both_bad",
    "conversation_a": [{"role": "user", "content": parts("p")}, {"role": "assistant", "content": parts("a")}],
    "conversation_b": [{"role": "user", "content": parts("p")}, {"role": "assistant", "content": parts("b")}],
}
PPE = {"question_id": "q3", "model_a": "x", "winner": "model_b", "prompt": "p", "response_1": "a", "response_2": "b"}
HELPSTEER = {"domain": "general", "context": chat("p", "a", "q"), "response1": "b", "response2": "c", "overall_preference": -2}
ULTRAFEEDBACK = {
    "prompt": "p",
    "prompt_id": "0a1b",
    "chosen": chat("p", "good"),
    "rejected": chat("p", "bad"),
    "score_chosen": 8.0,
    "score_rejected": 7.0,
}
HH = {
    "chosen": "\n\nHuman: p\n\nAssistant: a\n\nHuman: q\n\nAssistant: Human: good",
    "rejected": "\n\nHuman: p\n\nAssistant: a\n\nHuman: q\n\nAssistant: bad",
}


def votes(row: dict) -> list[float]:
    return [round(row[name], 4) for name in SHARES]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "row_id", "texts", "winner", "both_bad"),
    [
        (ARENA_33K, "q1", (["p", "q"], ["a", "b"], ["c", "d"]), "tie", True),
        (ARENA_140K, "q2", (["p"], ["a"], ["b"]), "tie", True),
        (ARENA_140K | {"winner": "model_a"}, "q2", (["p"], ["a"], ["b"]), "model_a", False),
        (PPE, "q3", (["p"], ["a"], ["b"]), "model_b", False),
        (HELPSTEER, "809fc55ed38b5e4a", (["p", "q"], ["a", "b"], ["a", "c"]), "model_a", False),
    ],
    ids=["arena 33k", "arena 140k", "arena 140k decided", "ppe", "helpsteer3"],
)
def test_a_row_of_each_layout_becomes_turns_and_a_verdict(tmp_path, suffix, row, row_id, texts, winner, both_bad):
    path = jsonl(tmp_path / "x.jsonl", row)
    if suffix == "parquet":
        path = tmp_path / "x.parquet"
        pl.DataFrame([row]).write_parquet(path)
    (read,) = read_rows(path).to_dicts()
    assert read["reason"] is None
    assert tuple(read[name] for name in TEXTS) == texts
    assert (read["winner"], read["both_bad"]) == (winner, both_bad)
    assert read["id"] == row_id
    assert read_prompts(path)["prompt"].to_list() == [texts[0]]


@pytest.mark.parametrize(
    ("preference", "winner", "shares"),
    [
        (-3, "model_a", [1, 0, 0]),
        (-1, "model_a", [0.6667, 0.3333, 0]),
        (0, "tie", [0, 0, 1]),
        (2, "model_b", [0.1667, 0.8333, 0]),
    ],
)
def test_helpsteer_s_grades_become_soft_votes(tmp_path, preference, winner, shares):
    (row,) = read_rows(jsonl(tmp_path / "x.jsonl", HELPSTEER | {"overall_preference": preference})).to_dicts()
    assert (row["winner"], votes(row)) == (winner, shares)


@pytest.mark.parametrize(("score", "share"), [(8.0, None), (7.0, 0.7311), (-1e9, 1.0)])
def test_ultrafeedback_s_scores_become_soft_votes_and_equal_ones_a_tie(tmp_path, score, share):
    (row,) = read_rows(jsonl(tmp_path / "x.jsonl", ULTRAFEEDBACK | {"score_rejected": score})).to_dicts()
    if share is None:
        assert (row["winner"], votes(row)) == ("tie", [0, 0, 1])
        return
    winner_response = row["response_a"] if row["winner"] == "model_a" else row["response_b"]
    assert winner_response == ["good"]
    assert row[f"p_{row['winner']}"] == pytest.approx(share, abs=1e-4)
    assert row["p_tie"] == 0


def test_transcripts_of_hh_are_split_at_the_speakers(tmp_path):
    pl.DataFrame([HH]).write_parquet(tmp_path / "x.parquet")
    for path in (jsonl(tmp_path / "x.jsonl", HH), tmp_path / "x.parquet"):
        (row,) = read_rows(path).to_dicts()
        assert row["prompt"] == ["p", "q"]
        assert sorted([row["response_a"], row["response_b"]]) == [["a", "Human: good"], ["a", "bad"]]


@pytest.mark.parametrize(
    ("good", "change", "reason"),
    [
        (ARENA_33K, {"conversation_b": chat("other", "c")}, "the two conversations have different prompts"),
        (ARENA_33K, {"winner": "nobody"}, "unknown winner"),
        (ARENA_33K, {"question_id": None}, "no id"),
        (
            ARENA_140K,
            {"conversation_a": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]},
            "holds an image or another part that is no text",
        ),
        (PPE, {"response_2": ""}, "empty answer"),
        (HELPSTEER, {"overall_preference": 4}, "unknown winner"),
        (HELPSTEER, {"overall_preference": None}, "unknown winner"),
        (HELPSTEER, {"context": []}, "empty prompt"),
        (ULTRAFEEDBACK, {"score_chosen": "high"}, "scores are not numbers"),
        (HH, {"rejected": "\n\nHuman: other\n\nAssistant: bad"}, "chosen and rejected answer different prompts"),
    ],
)
def test_an_unusable_row_of_each_layout_has_its_reason(tmp_path, good, change, reason):
    rows = read_rows(jsonl(tmp_path / "x.jsonl", good | change, good))
    assert rows["reason"].to_list() == [reason, None]


@pytest.mark.parametrize(
    ("good", "verdict"),
    [(ARENA_140K, "winner"), (PPE, "winner"), (HELPSTEER, "overall_preference"), (ULTRAFEEDBACK, "score_chosen")],
)
def test_rows_of_a_pool_need_no_verdict(tmp_path, good, verdict):
    row = {name: value for name, value in good.items() if name != verdict}
    (read,) = read_rows(jsonl(tmp_path / "x.jsonl", row), role="pool").to_dicts()
    assert (read["reason"], read["winner"], read["p_model_a"]) == (None, None, None)
    assert read["prompt"][0] == "p"
