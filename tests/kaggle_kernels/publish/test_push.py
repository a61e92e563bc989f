"""`push` by the real kaggle command against the stand-in: every check first, then the datasets, then the kernel."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from kaggle_kernels.__main__ import main
from kaggle_kernels.publish import push as publishing
from preprocess.core import ledger
from preprocess.core.files import sha256
from tests.fakes.kaggle.server import Fault, error_under_200
from tests.kaggle_kernels.build.test_ensemble_weights import predictions, write_run
from tests.kaggle_kernels.packages import flip_byte

PACKAGE = Path("outputs/two/package")
CHANGING = ("StartBlobUpload", "PUT", "CreateDataset", "CreateDatasetVersion", "SaveKernel")


@pytest.fixture(autouse=True)
def own_ledger(ledger_file):
    """Each test has a ledger of its own."""


@pytest.fixture
def spec(pushable, fast_kaggle):
    """A spec that passes every check, in the current folder; Kaggle processes its package at once."""
    fast_kaggle.site.processing_calls = 0
    return pushable


def push(spec, *options):
    options = (*options, "--poll-seconds", "0.02", "--patience-seconds", "30")
    return CliRunner().invoke(main, ["push", str(spec), *options])


def error_of(ended):
    """The last line of a command that ended with exit code 2."""
    assert ended.exit_code == 2, ended.output
    return ended.output.splitlines()[-1].removeprefix("error: ")


def changes(kaggle):
    return [request.call for request in kaggle.requests if request.call in CHANGING]


def test_a_push_is_planned_made_and_then_has_nothing_to_do(spec, kaggle):
    planned = push(spec, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert changes(kaggle) == []
    assert "tester/pairwise-test: a new version, with tester/tiny-two/1\n" in planned.output
    assert [line.split()[1:3] for line in planned.output.splitlines() if line.startswith("  kaggle ")] == [
        *(["datasets", name] for name in ("create", "status", "files", "download")),
        *(["kernels", name] for name in ("push", "pull")),
    ]
    made = push(spec)
    assert made.exit_code == 0, made.output
    manifest = sha256(PACKAGE / "manifest.json")
    assert json.loads((PACKAGE / "dataset-metadata.json").read_text())["id"] == "OWNER/tiny-two"
    [entry] = [entry for entry in ledger.read() if entry["event"] == "push"]
    assert (entry["spec"], entry["kernel"], entry["kernel_version"]) == ("test", "tester/pairwise-test", 1)
    assert entry["datasets"] == {"tester/tiny-two": {"version": 1, "manifest": manifest}}
    changes_before = changes(kaggle)
    again = push(spec)
    assert again.output.count(": unchanged, version 1") == 2
    assert changes(kaggle) == changes_before
    assert push(spec, "--dry-run").output.splitlines()[-1] == "a push would change nothing"
    write_run("two", predictions([0.9, 0.8, 0.2, 0.6], ["model_a", "model_a", "model_b", "model_b"]))
    shutil.copyfile(PACKAGE / "contract.json", PACKAGE.parent / "contract.json")
    assert "tester/pairwise-test: version 2 was pushed" in push(spec, "--again").output
    validation = [entry["validation"] for entry in ledger.read()]
    assert validation == [None, {"rows": 4, "accuracy": 0.75, "log_loss": pytest.approx(0.3670, abs=1e-4)}]


def test_all_problems_are_told_and_nothing_goes_up(spec, kaggle, monkeypatch):
    flip_byte(PACKAGE / "tokenizer.json")
    Path("outputs/two/agreement.json").unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    ended = push(spec)
    assert ended.exit_code == 2
    for problem in (
        "the kaggle command has no credentials",
        "outputs/two/package/tokenizer.json",
        "outputs/two/agreement.json",
    ):
        assert f"error: {problem}" in ended.output
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert push(spec).output.count("credentials") == 2  # among the checks, and as one error
    assert changes(kaggle) == []


def test_what_kaggle_says_against_a_kernel_is_one_error_and_the_next_push_sends_no_dataset(spec, kaggle):
    kaggle.faults += [
        error_under_200("SaveKernel", "Maximum weekly GPU quota of 30.00 hours reached"),
        Fault("SaveKernel", answer={"invalidDatasetSources": ["tester/tiny-two/1"]}),
    ]
    for told in ("Maximum weekly GPU quota of 30.00 hours reached", "dataset sources ['tester/tiny-two/1']: not accepted"):
        assert error_of(push(spec)) == f"tester/pairwise-test: {told}; mend that, then run push again"
    sent = len(kaggle.calls("StartBlobUpload"))
    assert push(spec).exit_code == 0
    assert len(kaggle.calls("StartBlobUpload")) == sent
    assert len(kaggle.calls("CreateDataset")) == 1
    assert [entry["kernel_version"] for entry in ledger.read()] == [2]


def test_a_kernel_that_is_read_back_otherwise_is_an_error_and_pushed_again(spec, kaggle):
    kaggle.faults.append(Fault("GetKernel", times=4, answer={"metadata": {"enableInternet": True}}))
    assert "was pushed, and is not what was meant: enable_internet is true in place of false" in error_of(push(spec))
    refused = CliRunner().invoke(main, ["status", str(spec)])
    assert refused.output == "error: outputs/test/push.json: the push did not end; run push test first\n"
    kaggle.faults.append(Fault("GetKernel", answer={"metadata": {"enableInternet": True}}))
    assert "tester/pairwise-test: version 2 was pushed" in push(spec).output
    assert [entry["kernel_version"] for entry in ledger.read()] == [2]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["check_pushed", "measure_ensemble"], ids=["before it was read back", "before the ledger"])
def test_a_push_that_was_killed_is_completed_by_the_next_and_not_made_twice(spec, kaggle, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(publishing, step, interrupt)
        assert error_of(push(spec)) == "interrupted; run push again, which goes on from here"
    assert ledger.read() == []
    assert push(spec).exit_code == 0
    assert len(kaggle.calls("SaveKernel")) == 1
    assert [entry["kernel_version"] for entry in ledger.read()] == [1]


def test_two_pushes_at_a_time_are_refused(spec, kaggle):
    publishing.WORK.mkdir(parents=True)
    with FileLock(publishing.WORK / "lock"):
        assert error_of(push(spec)) == "outputs/.push/lock: another push runs in this folder; wait for it"
    assert changes(kaggle) == []
