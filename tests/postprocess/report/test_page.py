"""The page: what it shows, what it says of what is missing, and that no text can leave its place."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from postprocess.report.__main__ import main
from preprocess.model_input import VERDICTS
from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, TWO, Row

HOSTILE = (
    '\x00\x07\x1b[31m</div></style><script>alert(1)</script><img src="http://example.org/x" onerror=alert(2)>{{ 7 * 7 }}\u202e'
)
LOADS = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}
SECTIONS = ["scores", "calibration", "position", "learning", "agreement", "errors"]


class Parsed(HTMLParser):
    """The page's elements with their attributes, and its text without style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data):
        if self.cdata_elem is None:  # neither style nor script
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def parse(folder: Path) -> Parsed:
    return Parsed(reported.render(folder))


def test_the_command_writes_the_page_with_the_run_and_its_numbers(tmp_path):
    folder = reported.write_run(tmp_path / "tiny")
    reported.write_agreement(folder)
    result = CliRunner().invoke(main, [str(folder)], catch_exceptions=False)
    assert (result.exit_code, result.output) == (0, f"report: {folder / 'report.html'}\n")
    raw = (folder / "report.html").read_text(encoding="utf-8")
    page = Parsed(raw)
    for fact in (
        "tiny This page holds rows of the pairs file",
        "Accuracy 0.500 [0.500, 0.500] Log loss 0.643",
        "Brier score 0.467 [0.381, 0.554]",
        "temperature 1.53: log loss −0.016",
        "recipe tiny.yml base model some/base git commit 0123456789ab-dirty trained 2026-11-25 09:43:39 UTC",
        "head score, 2 verdicts tokens 256 a row fold held out 0 rows measured 4 rows trained on 1,590 steps 60",
        "versions torch 2.13.0",
        "4 rows of 2 groups of prompts, by the mean of both orders.",
        "English † 3 rows (75.0 %), 2 groups",
        "Expected calibration error 0.4200, over ten bins of equal width.",
        "25.0 % of the verdicts flip when the answers are swapped.",
        "The merged model agrees: its mean difference is 0.0001, the tolerance 0.05.",
        "merged float16 0.500 [0.400, 0.600] 0.643 [0.600, 0.700] 0.00012 0.00114 – 3",
        "2 of 4 verdicts are wrong.",
        "row3 winner B, the model says A English made fold 0",
        "curve step loss training 1 0.69 training 2 0.68 training 3 0.67",
    ):
        assert fact in page.words()
    assert "peft" not in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg"]
    assert "The probability of answer A as trained and as merged, a dot a row" in labels
    assert reported.render(folder) == raw, "the same run gives the same page"


def test_what_cannot_be_read_is_one_line_and_no_page(tmp_path):
    folder = reported.write_run(tmp_path / "tiny")
    result = CliRunner().invoke(main, [str(folder), "--oof"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert not (folder / "report.html").exists()


def test_texts_of_the_data_are_text_and_nothing_else_and_the_page_names_no_place_to_load_from(tmp_path):
    rows = [Row(0.9, 0.9, "model_b", prompt=HOSTILE, a=HOSTILE, b=HOSTILE, language=HOSTILE, source=HOSTILE), *FOUR]
    raw = reported.render(reported.write_run(tmp_path / "tiny", rows))
    page = Parsed(raw)
    tags = [tag for tag, _ in page.elements]
    assert [tag for tag in tags if tag in ("script", "style", "img", "iframe", "object", "link")] == ["style"]
    attributes = [pair for _, pairs in page.elements for pair in pairs.items()]
    assert [name for name, _ in attributes if name.startswith("on")] == []
    assert [value for name, value in attributes if name in LOADS] == [f"#{section}" for section in SECTIONS]
    policy = next(value for name, value in attributes if name == "content" and "-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert page.text.count("<script>alert(1)</script>") == 7, "three texts; language and source, in a table and in the row"
    assert "{{ 7 * 7 }}" in page.text and "␀␇␛[31m</div>" in page.text
    assert {character for character in raw if ord(character) < 32} == {"\n"}


def test_what_is_missing_is_one_sentence_each_and_the_rest_is_there(tmp_path):
    folder = reported.write_run(tmp_path / "tiny")
    for file in ("history.json", "../pairs.parquet"):
        (folder / file).unlink()
    page = parse(folder)
    for sentence in (
        "Nothing was trained here, so that there are no learning curves.",
        "does not exist, so that texts, languages, sources, lengths and groups of prompts are missing",
        "The run was not packaged yet: run pairwise package, which compares the models",
    ):
        assert sentence in page.words()
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == SECTIONS


def test_a_cross_validation_is_measured_over_all_folds(crossed):
    text = parse(crossed).words()
    for fact in (
        "folds 0, 1 rows measured 4",
        "4 rows of 4 groups of prompts, by the mean of both orders, each row by the model that never saw it.",
        "By fold accuracy",
        "fold 1 † 2 rows (50.0 %)",
        "training validation, one line per fold",
        "Accuracy 0.500",
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("rows", "verdicts", "changed", "facts"),
    [
        (
            [Row(0.9, 0.9, "tie", tie=0.1), Row(0.6, 0.6, "model_b", tie=0.2), Row(0.5, 0.5, "tie", tie=0.9)],
            VERDICTS,
            {},
            ["head score, 3 verdicts", "winner tie, the model says A", "A 0.810 · B 0.090 · tie 0.100"],
        ),
        ([Row(0.9, 0.9)], TWO, {}, ["a reward model reads each answer alone", "No verdict is wrong."]),
        (FOUR, TWO, {"rows_were_trained_on": True}, ["The model was trained on the rows that it is measured on here"]),
        (
            [Row(0.9, 0.8, "model_b", a=text) for text in ("", "\u200b", "\n ", "word " * 400)],
            TWO,
            {},
            [
                "Answer A 0 characters empty",
                "Answer A 1 character blank",
                "Answer A 2 characters blank",
                "Answer A 2,000 characters",
                "word the rest: 1,301 characters",
            ],
        ),
    ],
)
def test_the_page_says_what_is_special_in_a_run(tmp_path, rows, verdicts, changed, facts):
    text = parse(reported.write_run(tmp_path / "tiny", rows, verdicts, **changed)).words()
    for fact in facts:
        assert fact in text
