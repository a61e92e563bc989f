"""Past submissions joined with the ledger, by the real kaggle command against the stand-in: every number by hand."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.spec import COMPETITIONS
from kaggle_kernels.publish.scores import PICTURE, Scored, correlation, draw, join
from preprocess.core import ledger
from tests.fakes.kaggle.site import Submission

CODE = {"git_commit": "0123456789" * 4, "git_dirty": False}


def made(number: int, accuracy: float | None = 0.7, log_loss: float = 0.6, recipe: str = "gemma2_cls", **changes) -> None:
    """The ledger's entries of submission `number`, from the training on; `changes` are of the submit's."""
    metrics = {"accuracy": accuracy, "log_loss": log_loss, "rows_were_trained_on": False}
    ledger.record("train", recipe=f"recipes/{recipe}.yml", contract=f"contract {number}", metrics=metrics, fold=0)
    trained = {f"outputs/{recipe}": f"contract {number}"}
    ledger.record("package", run=f"outputs/{recipe}", manifest=f"manifest {number}", trained=trained)
    datasets = {f"tester/{recipe}": {"version": number, "manifest": f"manifest {number}"}}
    kernel = {"spec": recipe, "kernel": f"tester/{recipe}", "kernel_version": number}
    ledger.record("push", **{**CODE, **kernel}, datasets=datasets)
    ledger.record("submit", **{**kernel, "submission_ref": str(1000 + number), "message": f"try {number}", **changes})


def listed(number: int, public: str = "", **changes) -> dict:
    """A submission as the kaggle command lists it."""
    row = {"ref": str(1000 + number), "date": f"2026-01-01 00:{number:02d}:00", "description": f"try {number}"}
    row |= {"status": "SubmissionStatus.COMPLETE", "publicScore": public}
    return row | changes


def submission(number: int, public: str, private: str = "", competition: str = "wsdm", status: str = "COMPLETE") -> Submission:
    """A submission as the stand-in has it."""
    kernel = ("tester/gemma2_cls", number, "submission.csv", f"try {number}")
    return Submission(1000 + number, COMPETITIONS[competition].slug, *kernel, public, private, status)


def scores(*options: str):
    return CliRunner().invoke(main, ["scores", *options, "--poll-seconds", "0.05", "--patience-seconds", "20"])


def test_kaggles_list_is_joined_with_commit_recipe_and_cv(fast_kaggle, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    submissions = fast_kaggle.site.submissions
    for number, accuracy, public, private in ((1, 0.7, "0.69", "0.68"), (2, 0.71, "0.692", "0.684"), (3, 0.72, "0.7", "0.682")):
        made(number, accuracy=accuracy)
        submissions.append(submission(number, public, private))
    submissions += [submission(4, "0.5", "0.5"), submission(5, "", status="ERROR")]
    submissions[3].description = "[red]no markup[/blue] [x]"
    made(5)
    done = scores()
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines() if line.strip()]
    assert lines[0] == "date (UTC) kernel commit recipe CV accuracy CV log loss public private message"
    assert lines[2:] == [
        "2026-01-01 00:05 gemma2_cls 5 0123456 gemma2_cls 0.7000 0.6000 error try 5",
        "2026-01-01 00:04 not in the ledger 0.5000 0.5000 [red]no markup[/blue] [x]",
        "2026-01-01 00:03 gemma2_cls 3 0123456 gemma2_cls 0.7200 0.6000 0.7000 0.6820 try 3",
        "2026-01-01 00:02 gemma2_cls 2 0123456 gemma2_cls 0.7100 0.6000 0.6920 0.6840 try 2",
        "2026-01-01 00:01 gemma2_cls 1 0123456 gemma2_cls 0.7000 0.6000 0.6900 0.6800 try 1",
        "correlation of CV and public score, accuracy (higher is better): 0.945 (Pearson, n = 3)",
        "correlation of CV and private score, accuracy (higher is better): 0.500 (Pearson, n = 3)",
        "outputs/scores.png: CV beside the leaderboard",
    ]
    with Image.open(PICTURE) as picture:
        assert picture.size == (750, 600)


def test_for_lmsys_the_metric_is_log_loss(fast_kaggle, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    for number, (cv, public) in enumerate(((0.93, "1.00"), (0.92, "0.98"), (0.91, "1.02")), 1):
        made(number, log_loss=cv)
        fast_kaggle.site.submissions.append(submission(number, public, competition="lmsys"))
    done = scores("--competition", "lmsys")
    assert "correlation of CV and public score, log loss (lower is better): -0.500 (Pearson, n = 3)" in done.output
    assert scores().output == "wsdm-cup-multilingual-chatbot-arena: no submissions\n"


def test_the_ref_decides_and_the_message_only_where_kaggle_had_not_listed_it(ledger_file):
    made(1, message="same")
    made(2, message="same")
    made(3, submission_ref="not listed yet", message="late")
    made(4, submission_ref="not listed yet", message="same")
    listing = [listed(3, description="late"), listed(2, description="same"), listed(9, description="other")]
    assert [row.kernel for row in join(listing, ledger.read())] == ["gemma2_cls 3", "gemma2_cls 2", None]


def test_a_run_that_was_trained_on_every_row_has_no_cv(ledger_file):
    made(1)
    metrics = {"accuracy": 0.99, "log_loss": 0.01, "rows_were_trained_on": True}
    ledger.record("train", recipe="recipes/gemma2_cls.yml", contract="contract 1", metrics=metrics, fold="all")
    [row] = join([listed(1, "0.7")], ledger.read())
    assert (row.recipes, row.accuracy, row.log_loss, row.public) == (("gemma2_cls",), None, None, 0.7)


def test_of_several_runs_the_cv_is_that_of_all_together_or_unknown(ledger_file):
    made(1, accuracy=0.70, recipe="one")
    made(2, accuracy=0.74, recipe="two")
    datasets = {f"tester/{name}": {"version": 1, "manifest": f"manifest {at}"} for at, name in ((1, "one"), (2, "two"))}
    kernel = {"spec": "both", "kernel": "tester/both", "kernel_version": 5}
    ledger.record("push", **{**CODE, **kernel}, datasets=datasets)
    ledger.record("submit", **kernel, submission_ref="1005", message="both")
    [row] = join([listed(5)], ledger.read())
    assert (row.recipes, row.accuracy, row.log_loss) == (("one", "two"), None, None)
    together = {"rows": 880, "accuracy": 0.75, "log_loss": 0.58}
    ledger.record("push", **kernel, **(CODE | {"git_dirty": True}), datasets=datasets, validation=together)
    [row] = join([listed(5)], ledger.read())
    assert (row.recipes, row.accuracy, row.log_loss) == (("one", "two"), 0.75, 0.58)
    assert row.commit == "0123456+", "pushed from a tree with changes"


def test_where_the_ledger_lacks_a_training_the_other_is_not_taken_for_the_whole(ledger_file):
    made(1)
    kernel = {"spec": "gemma2_cls", "kernel": "tester/gemma2_cls", "kernel_version": 1}
    datasets = {f"tester/{at}": {"version": 1, "manifest": manifest} for at, manifest in ((1, "manifest 1"), (2, "elsewhere"))}
    ledger.record("push", **{**CODE, **kernel}, datasets=datasets)
    [row] = join([listed(1)], ledger.read())
    assert (row.recipes, row.accuracy) == (("gemma2_cls",), None)


def row(cv: float | None, public: float | None) -> Scored:
    return Scored("2026-01-01 00:00", "m", "COMPLETE", public, None, "k 1", accuracy=cv)


@pytest.mark.parametrize(
    "rows, told",
    [
        ([(0.7, 0.6), (0.8, 0.7), (None, 0.9), (0.9, None)], "unknown, 2 of at least 3 submissions with both"),
        ([(0.7, 0.6), (0.7, 0.7), (0.7, 0.8)], "unknown, all 3 have the same CV"),
        ([(0.7, 0.6), (0.8, 0.6), (0.9, 0.6)], "unknown, all 3 have the same score"),
        ([(0.7, 0.8), (0.8, 0.7), (0.9, 0.6), (0.8, 0.7)], "-1.000 (Pearson, n = 4)"),
    ],
)
def test_the_correlation_is_pearsons_or_unknown(rows, told):
    found = correlation([row(*one) for one in rows], "accuracy", "public")
    assert found == f"correlation of CV and public score, accuracy (higher is better): {told}"


def test_without_a_point_an_earlier_picture_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw([row(0.7, 0.6)], "wsdm", "accuracy")
    assert Path("outputs/scores.png").is_file()
    assert not draw([row(None, 0.6)], "wsdm", "accuracy")
    assert not Path("outputs/scores.png").exists()
