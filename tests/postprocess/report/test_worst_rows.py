"""The rows that the model gets most wrong: their ranking, and how their texts are cut."""

import pytest

from postprocess.report.worst_rows import cut_text, find_worst_rows, rank_wrong_rows, show_controls
from tests.postprocess.report import reported

FAMILY = "\U0001f469\u200d\U0001f467"


def test_the_worst_rows_are_those_with_the_least_probable_winner(tmp_path):
    rows = reported.read(tmp_path / "read/run").predictions.rows
    scored = reported.score(tmp_path / "run")
    assert rank_wrong_rows(scored) == [3, 1]
    assert [row.id for row in find_worst_rows(rows, scored, count=1)] == ["row3"]


def test_long_texts_are_cut_where_a_word_ends_and_open_to_the_whole():
    text = " ".join(["word"] * 100)
    cut = cut_text(text, 62)
    assert cut.shown == " ".join(["word"] * 12)
    assert cut.shown + cut.rest == text
    assert cut_text("x" * 75, 60).rest == ""
    assert len(cut_text("x" * 76, 60).shown) == 60
    assert cut_text("\n" * 30, 60).shown == "\n" * 13
    assert cut_text("x" * 100_000, 60).left_out == 100_000 - 60 - 50_000


@pytest.mark.parametrize(("character", "limit", "shown"), [("e\u0301", 51, 25), (FAMILY, 31, 10), (FAMILY, 32, 10)])
def test_a_character_made_of_several_is_not_cut(character, limit, shown):
    assert cut_text(character * 100, limit).shown == character * shown


def test_control_characters_are_seen():
    assert show_controls("a\r\nb\tc\x00\x7f\x9b") == "a\nb\tc␀␡\ufffd"
