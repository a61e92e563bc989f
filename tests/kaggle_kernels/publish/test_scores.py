"""Past submissions joined with the ledger: every number by hand."""

from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from preprocess.competitions import COMPETITIONS
from preprocess.core import ledger
from tests.fakes.kaggle.site import Submission


def enter(
    number: int, *recipes: str, validation: dict | None = None, lockbox: dict | None = None, is_dirty: bool = False
) -> None:
    """The ledger's entries of submission `number`, from the training of its recipes on."""
    datasets = {}
    for recipe in recipes:
        ledger.record("train", recipe=f"recipes/{recipe}.yml", contract=f"contract of {recipe}")
        trained = {f"outputs/{recipe}": f"contract of {recipe}"}
        ledger.record("package", run=f"outputs/{recipe}", manifest=f"manifest of {recipe}", trained=trained)
        datasets[f"tester/{recipe}"] = {"version": number, "manifest": f"manifest of {recipe}"}
    code = {"git_commit": "0123456789" * 4, "git_dirty": is_dirty}
    kernel = {"spec": "mine", "kernel": "tester/mine", "kernel_version": number}
    ledger.record("push", **code, **kernel, datasets=datasets, validation=validation, lockbox=lockbox)
    ledger.record("submit", **kernel, submission_ref=str(1000 + number), message="same")


def submission(number: int, public: str, private: str = "", competition: str = "wsdm", status: str = "COMPLETE") -> Submission:
    """A submission as the stand-in has it."""
    kernel = ("tester/mine", number, "submission.csv", "same")
    return Submission(1000 + number, COMPETITIONS[competition].slug, *kernel, public, private, status)


def scores(*options: str) -> list[str]:
    done = CliRunner().invoke(main, ["scores", *options, "--poll-seconds", "0.05", "--patience-seconds", "20"])
    assert done.exit_code == 0, done.output
    return [" ".join(line.split()) for line in done.output.splitlines() if line.strip()]


def test_kaggles_list_is_joined_with_commit_recipe_and_cv(kaggle, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    lockbox = {"rows": 300, "accuracy": 0.6857, "log_loss": 0.6}
    enter(1, "gemma2_cls", validation={"rows": 880, "accuracy": 0.7, "log_loss": 0.58}, lockbox=lockbox)
    enter(2, "one", "two", is_dirty=True)
    enter(4, "gemma2_cls", validation={"rows": 880, "accuracy": 0.72, "log_loss": 0.57})
    kaggle.site.submissions += [submission(1, "0.69", "0.68"), submission(2, "0.692", "0.684"), submission(3, "0.5", "0.5")]
    kaggle.site.submissions += [submission(4, "", status="ERROR"), submission(5, "0.98", competition="lmsys")]
    kaggle.site.submissions[2].description = "[red]no markup[/blue] [x]"
    assert scores()[0] == "date (UTC) kernel commit recipe lockbox CV public private message"
    assert scores()[2:] == [
        "2026-01-01 00:04 mine 4 0123456 gemma2_cls 0.7200 error same",
        "2026-01-01 00:03 not in the ledger 0.5000 0.5000 [red]no markup[/blue] [x]",
        "2026-01-01 00:02 mine 2 0123456+ one 0.6920 0.6840 same",
        "two",
        "2026-01-01 00:01 mine 1 0123456 gemma2_cls 0.6857 0.7000 0.6900 0.6800 same",
    ]


def test_for_lmsys_the_metric_is_log_loss(kaggle, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    enter(1, "gemma2_lmsys", validation={"rows": 880, "accuracy": 0.7, "log_loss": 0.93})
    kaggle.site.submissions.append(submission(1, "1.00", competition="lmsys"))
    assert scores("--competition", "lmsys")[-1] == "2026-01-01 00:01 mine 1 0123456 gemma2_lmsys 0.9300 1.0000 same"
    assert scores() == ["wsdm-cup-multilingual-chatbot-arena: no submissions"]
