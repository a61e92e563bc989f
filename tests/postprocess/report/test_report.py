"""python -m postprocess.report: what it reads, what it says of what is missing, and that no text can leave its place."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from postprocess.report.__main__ import main
from postprocess.report.page import render
from postprocess.report.run_data import read_evidence
from postprocess.report.worst_rows import shortened, visible
from preprocess.core.files import write_json
from preprocess.model_input import VERDICTS
from recipes.pairwise.cv import collect
from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, TWO, Row

PAGE = Path("postprocess/report")
HOSTILE = (
    '\x00\x07\x1b[31m</div></style><script>alert(1)</script><img src="http://example.org/x" onerror=alert(2)>{{ 7 * 7 }}\u202e'
)
LOADS = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}


class Parsed(HTMLParser):
    """The page's elements with their attributes, and its text without style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text, self.inside = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        self.inside = tag if tag in ("style", "script") else self.inside

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        self.text += "" if self.inside else data

    def words(self) -> str:
        return " ".join(self.text.split())


def report(folder: Path, *options: str) -> Parsed:
    """The page of a run folder, made by the command."""
    result = CliRunner().invoke(main, [str(folder), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output == f"report: {folder / 'report.html'}\n"
    return Parsed((folder / "report.html").read_text(encoding="utf-8"))


def refusal(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(main, [str(folder), *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert not (folder / "report.html").exists()
    return result.stderr


def test_the_page_tells_the_run_and_its_numbers(tmp_path):
    text = report(reported.run(tmp_path / "tiny")).words()
    for told in (
        "tiny This page holds rows of the pairs file",
        "Accuracy 0.500 [0.500, 0.500] Log loss 0.643",
        "recipe tiny.yml base model some/base git commit 0123456789ab-dirty trained 2026-11-25 09:43:39 UTC",
        "head score, 2 verdicts tokens 256 a row fold held out 0 rows measured 4 rows trained on 1,590 steps 60",
        "versions torch 2.13.0",
        "4 rows of 2 groups of prompts, by the mean of both orders.",
        "English † 3 rows, 2 groups",
        "Expected calibration error 0.4200, over ten bins of equal width.",
        "25.0 % of the verdicts flip when the answers are swapped.",
        "2 of 4 verdicts are wrong.",
        "winner B, the model says A English made fold 0 row3",
    ):
        assert told in text
    assert "peft" not in text


def test_texts_of_the_data_are_text_and_nothing_else(tmp_path):
    rows = [Row(0.9, 0.9, "model_b", prompt=HOSTILE, a=HOSTILE, b=HOSTILE, language=HOSTILE, source=HOSTILE), *FOUR]
    page = report(reported.run(tmp_path / "tiny", rows))
    assert [tag for tag, _ in page.elements if tag in ("script", "style", "img", "iframe", "object", "link")] == [
        "style",
        "script",
    ]
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert page.text.count("<script>alert(1)</script>") == 7, "three texts; language and source, in a table and in the row"
    assert "{{ 7 * 7 }}" in page.text and "␀␇␛[31m</div>" in page.text
    raw = (tmp_path / "tiny/report.html").read_text(encoding="utf-8")
    assert {character for character in raw if ord(character) < 32} == {"\n"}


def test_the_page_names_no_place_to_load_from(tmp_path):
    raw_text = report(reported.run(tmp_path / "tiny"))
    assert "http" not in (tmp_path / "tiny/report.html").read_text().replace("http-equiv", "")
    named = [value for _, attributes in raw_text.elements for name, value in attributes.items() if name in LOADS]
    assert named == ["#scores", "#calibration", "#position", "#learning", "#agreement", "#errors"]
    policy = next(attributes["content"] for _, attributes in raw_text.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("contract.json", "There is no contract.json: axolotl train recipes/tiny.yml writes it."),
        ("metrics.json", "There is no metrics.json: axolotl train recipes/tiny.yml writes it."),
        ("history.json", "There is no history.json: axolotl train recipes/tiny.yml writes it."),
        ("predictions.parquet", "so that nothing can be measured: axolotl train recipes/tiny.yml writes it."),
        ("../pairs.parquet", "is not there, so that texts, languages, sources, lengths and groups of prompts are missing here"),
        ("agreement.json", "The run was not packaged yet: python -m postprocess recipes/tiny.yml compares the models"),
    ],
)
def test_what_is_missing_is_one_sentence_and_the_rest_is_there(tmp_path, file, sentence):
    folder = reported.run(tmp_path / "tiny")
    (folder / file).unlink(missing_ok=True)
    page = report(folder)
    assert sentence in page.words()
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == [
        *("scores", "calibration", "position", "learning", "agreement", "errors")
    ]


def test_a_pairs_file_that_has_changed_is_not_read_and_one_that_has_moved_is_named(tmp_path):
    folder = reported.run(tmp_path / "tiny")
    moved = (tmp_path / "pairs.parquet").rename(tmp_path / "moved.parquet")
    reported.pairs_file(tmp_path / "pairs.parquet", [*FOUR, Row(0.5, 0.5)])
    text = report(folder).words()
    assert "pairs.parquet has changed since training, so that texts" in text
    assert "short" not in text
    assert "Labels are the winners alone" in text
    assert "Answer A" in report(folder, "--pairs", str(moved)).words()
    (folder / "report.html").unlink()
    assert "pairs.parquet: not the file of the training" in refusal(folder, "--pairs", str(tmp_path / "pairs.parquet"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json: not valid JSON"),
        ("contract.json", "[]", "contract.json: expected an object, found list"),
        ("history.json", "{}", "history.json: expected a list of objects"),
        ("predictions.parquet", "x", "predictions.parquet: not a Parquet file"),
        ("agreement.json", "[]", "agreement.json: expected an object"),
    ],
)
def test_a_damaged_file_is_one_line_and_no_page(tmp_path, file, content, message):
    folder = reported.run(tmp_path / "tiny")
    (folder / file).write_text(content)
    told = refusal(folder)
    assert told.startswith("error: ") and told.count("\n") == 1
    assert message in told


def test_probabilities_that_are_none_are_refused(tmp_path):
    folder = reported.run(tmp_path / "tiny")
    table = pl.read_parquet(folder / "predictions.parquet")
    table.with_columns(p_model_a_swapped=pl.lit(float("nan"))).write_parquet(folder / "predictions.parquet")
    assert "row row0 has probabilities that are not between 0 and 1" in refusal(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "no such folder; name a run's folder" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds nothing of a run" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    ("folder", "changed", "command"),
    [
        ("R/fold-3", {}, "PAIRWISE_FOLD=3 python -m postprocess recipes/tiny.yml"),
        ("R/mean", {"average": {"members": {}}}, "python -m postprocess recipes/tiny.yml --adapter …"),
        ("R", {"training_rows": 0}, "python -m postprocess recipes/tiny.yml"),
    ],
)
def test_the_command_that_is_named_is_that_of_the_run(tmp_path, folder, changed, command):
    run = reported.run(tmp_path / folder, **changed)
    assert f"The run was not packaged yet: {command} compares the models" in report(run).words()
    (run / "predictions.parquet").unlink()
    trains = "PAIRWISE_FOLD=3 axolotl train recipes/tiny.yml" if folder == "R/fold-3" else command
    assert f"so that nothing can be measured: {trains} writes it." in report(run).words()


def test_folds_that_are_gone_are_told_of_and_their_rows_are_measured(crossed):
    for fold in (0, 1):
        shutil.rmtree(crossed / f"fold-{fold}")
    text = report(crossed, "--pairs", str(crossed.parent / "pairs.parquet")).words()
    assert "There is no contract.json: make cv R=R writes it." in text
    assert "By fold accuracy" in text


@pytest.fixture
def crossed(tmp_path):
    """A cross-validation of two folds, joined as `make cv` does it."""
    rows = [
        Row(row.given, row.swapped, row.winner, row.prompt, row.a, row.b, fold=number % 2) for number, row in enumerate(FOUR)
    ]
    for fold in (0, 1):
        reported.run(tmp_path / f"R/fold-{fold}", rows, pairs=tmp_path / "pairs.parquet", fold=fold, **CV_METRICS)
    collect(tmp_path / "R", [0, 1], tmp_path / "pairs.parquet")
    return tmp_path / "R"


CV_METRICS = dict.fromkeys(("accuracy", "log_loss", "flip_rate", "accuracy_of_longer"), 0.5)


def test_a_cross_validation_is_measured_over_all_folds(crossed):
    page = report(crossed)
    text = page.words()
    assert "folds 0, 1 rows measured 4" in text
    assert "4 rows of 4 groups of prompts, by the mean of both orders, each row by the model that never saw it." in text
    assert "By fold accuracy" in text
    assert "fold 1 † 2 rows" in text
    assert "training validation, a line a fold" in text
    assert "Accuracy 0.500" in text


def test_rows_of_all_folds_are_preferred_to_rows_that_were_trained_on(crossed):
    own = reported.run(crossed.parent / "own", FOUR[:1], rows_were_trained_on=True)
    for file in own.iterdir():
        file.rename(crossed / file.name)
    assert read_evidence(crossed).rows.height == 4
    metrics = json.loads((crossed / "metrics.json").read_text())
    write_json(crossed / "metrics.json", metrics | {"rows_were_trained_on": False})
    assert read_evidence(crossed).rows.height == 1
    assert read_evidence(crossed, out_of_fold=True).rows.height == 4


def test_rows_of_all_folds_cannot_be_had_where_there_are_none(tmp_path):
    assert "oof.parquet: no such file; make cv R=tiny writes it" in refusal(reported.run(tmp_path / "tiny"), "--oof")


def test_a_model_that_saw_the_rows_is_said_to(tmp_path):
    text = report(reported.run(tmp_path / "R/mean", rows_were_trained_on=True, average={"members": {}})).words()
    assert text.startswith("R/mean: report")
    assert "The model was trained on the rows that it is measured on here" in text


def test_three_verdicts(tmp_path):
    rows = [Row(0.9, 0.9, "tie", tie=0.1), Row(0.6, 0.6, "model_b", tie=0.2), Row(0.5, 0.5, "tie", tie=0.9)]
    text = report(reported.run(tmp_path / "tiny", rows, VERDICTS)).words()
    assert "head score, 3 verdicts" in text
    assert "winner tie, the model says A" in text
    assert "A 0.810 · B 0.090 · tie 0.100" in text


def test_a_reward_model_has_no_position(tmp_path):
    text = report(reported.run(tmp_path / "tiny", [Row(0.9, 0.9), Row(0.9, 0.9, "model_b")])).words()
    assert "a reward model reads each answer alone, so that there is no position to prefer" in text
    assert "flip" not in text


def test_a_base_model_as_it_is_tells_what_its_calibration_did(tmp_path):
    before = {"accuracy": 0.4, "log_loss": 0.8, "flip_rate": 0.5}
    folder = reported.run(tmp_path / "tiny", training_rows=0, before_calibration=before)
    (folder / "history.json").unlink()
    text = report(folder).words()
    assert "Nothing was trained here, so that there are no learning curves." in text
    assert "this base model had accuracy 0.400, log loss 0.800, and 50.0 % of its verdicts flipped." in text


def test_a_perfect_run_has_no_errors(tmp_path):
    assert "No verdict is wrong." in report(reported.run(tmp_path / "tiny", [Row(0.9, 0.8), Row(0.2, 0.1, "model_b")])).words()


def agree(folder: Path, recorded: float | None = None) -> None:
    """Write what `python -m postprocess` leaves of a comparison, of the predictions in the folder or of others."""
    predictions, parts = pl.read_parquet(folder / "predictions.parquet"), []
    for order in ("as_given", "swapped"):
        own = {name: pl.col(f"p_{name}_{order}") if recorded is None else pl.lit(recorded) for name in TWO}
        columns = {f"{model}_p_{name}": column for model in ("recorded", "trained", "merged") for name, column in own.items()}
        parts.append(predictions.select("id", order=pl.lit(order), **columns))
    pl.concat(parts).write_parquet(folder / "agreement.parquet")
    far = {"mean": 0.00012, "largest": 0.00114, "kl_divergence": None, "verdicts_changed": 3}
    line = {"model": "merged", "precision": "float16", "accuracy": 0.5, "log_loss": 0.643, "against_trained": far}
    gains = {"accuracy": {"difference": 0.0, "interval": [0.0, 0.0]}}
    figures = {"rows": 4, "tolerance": 0.05, "packaged": "merged", "mean_difference": 0.00012, "agrees": True}
    intervals = {"accuracy_interval": [0.4, 0.6], "log_loss_interval": [0.6, 0.7]}
    write_json(folder / "agreement.json", figures | {"models": [line | intervals], "packaged_minus_trained": gains})


def test_the_agreement_is_told_with_its_picture(tmp_path):
    folder = reported.run(tmp_path / "tiny")
    agree(folder)
    page = report(folder)
    assert "The merged model agrees: its mean difference is 0.0001, the tolerance 0.05." in page.words()
    assert "merged float16 0.500 [0.400, 0.600] 0.643 [0.600, 0.700] 0.00012 0.00114 – 3" in page.words()
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg"]
    assert "The probability of answer A as trained and as merged, a dot a row" in labels


def test_the_agreement_of_an_earlier_training_is_not_shown(tmp_path):
    folder = reported.run(tmp_path / "tiny")
    agree(folder, recorded=0.5)
    assert "agreement.json is of an earlier training: python -m postprocess recipes/tiny.yml" in report(folder).words()


def test_checkpoints_tell_the_history_of_a_run_that_left_none(tmp_path):
    folder = reported.run(tmp_path / "tiny")
    (folder / "history.json").unlink()
    for step in (9, 10):
        write_json(folder / f"checkpoint-{step}/trainer_state.json", {"log_history": [{"step": step, "loss": 0.5}]})
    assert read_evidence(folder).history == {"": [{"step": 10, "loss": 0.5}]}


def test_long_texts_are_cut_where_a_word_ends_and_open_to_the_whole():
    text = " ".join(["word"] * 100)
    found = shortened(text, 62)
    assert found.shown == " ".join(["word"] * 12)
    assert found.shown + found.rest == text
    assert shortened("x" * 75, 60).rest == ""
    assert len(shortened("x" * 76, 60).shown) == 60
    assert shortened("\n" * 30, 60).shown == "\n" * 13
    assert shortened("x" * 100_000, 60).left_out == 100_000 - 60 - 50_000


def test_a_character_made_of_several_is_not_cut():
    assert shortened("e\u0301" * 100, 51).shown == "e\u0301" * 25
    family = "\U0001f469\u200d\U0001f467"
    assert shortened(family * 100, 31).shown == family * 10
    assert shortened(family * 100, 32).shown == family * 10


@pytest.mark.parametrize(
    ("answer", "told"), [("", "0 characters empty"), ("\u200b", "1 character blank"), ("\n ", "2 characters blank")]
)
def test_an_answer_without_anything_to_see_is_said_to_be(tmp_path, answer, told):
    text = report(reported.run(tmp_path / "tiny", [Row(0.9, 0.8, "model_b", a=answer)])).words()
    assert f"Answer A {told}" in text


def test_control_characters_are_seen():
    assert visible("a\r\nb\tc\x00\x7f\x9b") == "a\nb\tc␀␡\ufffd"


def test_the_same_run_gives_the_same_page(tmp_path):
    evidence = read_evidence(reported.run(tmp_path / "tiny"))
    assert render(evidence) == render(evidence)
