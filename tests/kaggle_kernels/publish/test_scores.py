"""Past submissions joined with the ledger: every number by hand."""

from click.testing import CliRunner
from kagglesdk.competitions.types.competition_api_service import ApiSubmission

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.spec import COMPETITIONS
from kaggle_kernels.publish.scores import Origin, find_origin
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


def origin(number: int, metric: str = "accuracy") -> Origin:
    """What the ledger says of submission `number`."""
    listed = ApiSubmission()
    listed.ref = 1000 + number
    return find_origin(listed, ledger.read(), metric)


def submission(number: int, public: str, private: str = "", competition: str = "wsdm", status: str = "COMPLETE") -> Submission:
    """A submission as the stand-in has it."""
    kernel = ("tester/gemma2_cls", number, "submission.csv", f"try {number}")
    return Submission(1000 + number, COMPETITIONS[competition].slug, *kernel, public, private, status)


def scores(*options: str):
    return CliRunner().invoke(main, ["scores", *options, "--poll-seconds", "0.05", "--patience-seconds", "20"])


def test_kaggles_list_is_joined_with_commit_recipe_and_cv(kaggle, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    submissions = kaggle.site.submissions
    for number, accuracy, public, private in ((1, 0.7, "0.69", "0.68"), (2, 0.71, "0.692", "0.684"), (3, 0.72, "0.7", "0.682")):
        made(number, accuracy=accuracy)
        submissions.append(submission(number, public, private))
    submissions += [submission(4, "0.5", "0.5"), submission(5, "", status="ERROR")]
    submissions[3].description = "[red]no markup[/blue] [x]"
    made(5)
    done = scores()
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines() if line.strip()]
    assert lines[0] == "date (UTC) kernel commit recipe CV public private message"
    assert lines[2:] == [
        "2026-01-01 00:05 gemma2_cls 5 0123456 gemma2_cls 0.7000 error try 5",
        "2026-01-01 00:04 not in the ledger 0.5000 0.5000 [red]no markup[/blue] [x]",
        "2026-01-01 00:03 gemma2_cls 3 0123456 gemma2_cls 0.7200 0.7000 0.6820 try 3",
        "2026-01-01 00:02 gemma2_cls 2 0123456 gemma2_cls 0.7100 0.6920 0.6840 try 2",
        "2026-01-01 00:01 gemma2_cls 1 0123456 gemma2_cls 0.7000 0.6900 0.6800 try 1",
    ]


def test_for_lmsys_the_metric_is_log_loss(kaggle, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    for number, (cv, public) in enumerate(((0.93, "1.00"), (0.92, "0.98"), (0.91, "1.02")), 1):
        made(number, log_loss=cv)
        kaggle.site.submissions.append(submission(number, public, competition="lmsys"))
    output = scores("--competition", "lmsys").output
    assert [cv for cv in ("0.9300", "0.9200", "0.9100") if cv not in output] == []
    assert scores().output == "wsdm-cup-multilingual-chatbot-arena: no submissions\n"


def test_the_ref_decides_whatever_the_message(ledger_file):
    made(1, message="same")
    made(2, message="same")
    assert [origin(number).kernel for number in (1, 2, 9)] == ["gemma2_cls 1", "gemma2_cls 2", "not in the ledger"]


def test_a_run_that_was_trained_on_every_row_has_no_cv(ledger_file):
    made(1)
    metrics = {"accuracy": 0.99, "log_loss": 0.01, "rows_were_trained_on": True}
    ledger.record("train", recipe="recipes/gemma2_cls.yml", contract="contract 1", metrics=metrics, fold="all")
    assert (origin(1).recipes, origin(1).cv) == (("gemma2_cls",), None)


def test_of_several_runs_the_cv_is_that_of_all_together_or_unknown(ledger_file):
    made(1, accuracy=0.70, recipe="one")
    made(2, accuracy=0.74, recipe="two")
    datasets = {f"tester/{name}": {"version": 1, "manifest": f"manifest {at}"} for at, name in ((1, "one"), (2, "two"))}
    kernel = {"spec": "both", "kernel": "tester/both", "kernel_version": 5}
    ledger.record("push", **{**CODE, **kernel}, datasets=datasets)
    ledger.record("submit", **kernel, submission_ref="1005", message="both")
    assert (origin(5).recipes, origin(5).cv) == (("one", "two"), None)
    together = {"rows": 880, "accuracy": 0.75, "log_loss": 0.58}
    ledger.record("push", **kernel, **(CODE | {"git_dirty": True}), datasets=datasets, validation=together)
    assert (origin(5).cv, origin(5, "log_loss").cv) == (0.75, 0.58)
    assert origin(5).commit == "0123456+", "pushed from a tree with changes"


def test_where_the_ledger_lacks_a_training_the_other_is_not_taken_for_the_whole(ledger_file):
    made(1)
    kernel = {"spec": "gemma2_cls", "kernel": "tester/gemma2_cls", "kernel_version": 1}
    datasets = {f"tester/{at}": {"version": 1, "manifest": manifest} for at, manifest in ((1, "manifest 1"), (2, "elsewhere"))}
    ledger.record("push", **{**CODE, **kernel}, datasets=datasets)
    assert (origin(1).recipes, origin(1).cv) == (("gemma2_cls",), None)
