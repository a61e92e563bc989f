"""The rows that the model gets most wrong: their ranking, and how their texts are cut."""

from postprocess.report.worst_rows import cut_text, find_worst_rows, rank_wrong_rows, show_controls
from tests.postprocess.report import reported


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


def test_control_characters_are_seen():
    assert show_controls("a\r\nb\tc\x00\x7f\x9b") == "a\nb\tc␀␡\ufffd"
