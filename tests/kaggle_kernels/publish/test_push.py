"""`push` against the stand-in: every check first, then the datasets, then the kernel, and nothing twice."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from kaggle_kernels.__main__ import main
from kaggle_kernels.publish import client
from kaggle_kernels.publish import push as publishing
from preprocess.core import ledger
from preprocess.core.files import sha256
from tests.fakes.kaggle.server import Fault, error_under_200
from tests.kaggle_kernels.build.test_ensemble_weights import predictions, write_run
from tests.kaggle_kernels.packages import flip_byte

PACKAGE = Path("outputs/two/package")
REF = "tester/pairwise-test"
CHANGING = ("StartBlobUpload", "PUT", "CreateDataset", "CreateDatasetVersion", "SaveKernel")


@pytest.fixture(autouse=True)
def own_ledger(ledger_file):
    """Each test has a ledger of its own."""


@pytest.fixture
def spec(pushable, kaggle):
    """A spec that passes every check, in the current folder; Kaggle processes its package at once."""
    kaggle.site.processing_calls = 0
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


def versions(kaggle):
    return [version.number for version in kaggle.site.kernels[REF].versions]


def test_a_push_is_planned_made_and_then_has_nothing_to_do(spec, kaggle):
    planned = push(spec, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert changes(kaggle) == []
    dataset_line, kernel_line = planned.output.splitlines()[-2:]
    assert dataset_line.startswith("tester/tiny-two: 7 files, ")
    assert dataset_line.endswith(" MB, a new private dataset")
    assert kernel_line == f"{REF}: a new version, with tester/tiny-two/1"

    made = push(spec)
    assert made.exit_code == 0, made.output
    assert "  tester/tiny-two: pinned to version 1\n" in made.output
    assert json.loads((PACKAGE / "dataset-metadata.json").read_text())["id"] == "OWNER/tiny-two"
    [entry] = [entry for entry in ledger.read() if entry["event"] == "push"]
    assert (entry["spec"], entry["kernel"], entry["kernel_version"]) == ("test", REF, 1)
    assert entry["datasets"] == {"tester/tiny-two": {"version": 1, "manifest": sha256(PACKAGE / "manifest.json")}}

    changes_before = changes(kaggle)
    assert push(spec).output.count(": unchanged, version 1") == 2
    assert changes(kaggle) == changes_before
    assert push(spec, "--dry-run").output.splitlines()[-1] == "a push would change nothing"

    write_run("two", predictions([0.9, 0.8, 0.2, 0.6], ["model_a", "model_a", "model_b", "model_b"]))
    shutil.copyfile(PACKAGE / "contract.json", PACKAGE.parent / "contract.json")
    assert f"{REF}: version 2 was pushed" in push(spec, "--again").output
    validation = [entry["validation"] for entry in ledger.read()]
    assert validation == [None, {"rows": 4, "accuracy": 0.75, "log_loss": pytest.approx(0.3670, abs=1e-4)}]


def test_all_problems_are_told_and_nothing_goes_up(spec, kaggle, monkeypatch):
    flip_byte(PACKAGE / "tokenizer.json")
    Path("outputs/two/agreement.json").unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    ended = push(spec)
    assert ended.exit_code == 2
    for problem in ("no credentials", "outputs/two/package/tokenizer.json", "outputs/two/agreement.json"):
        assert f"error: {problem}" in ended.output
    assert changes(kaggle) == []


def test_faults_of_every_call_are_mended_by_the_same_push(spec, kaggle):
    reads = ("GetDatasetStatus", "GetDataset", "ListDatasetFiles", "GetKernel", "DownloadDataset")
    kaggle.faults += [Fault(name, status=500) for name in reads]
    kaggle.faults += [Fault(name, status=429) for name in ("StartBlobUpload", "CreateDataset", "SaveKernel")]
    kaggle.faults += [
        Fault("IntrospectToken", status=503, times=2),
        Fault("GetDatasetStatus", seconds=0.5),
        Fault("PUT", where="model.safetensors", breaks_after_bytes=5000, status=503),
    ]
    made = push(spec)
    assert made.exit_code == 0, made.output
    assert [fault.call for fault in kaggle.faults if fault.times] == []
    assert kaggle.uploaded_bytes("model.safetensors") == (PACKAGE / "model.safetensors").stat().st_size
    assert versions(kaggle) == [1]


def test_what_kaggle_says_against_a_kernel_is_one_error_and_the_next_push_sends_no_dataset(spec, kaggle):
    kaggle.faults.append(error_under_200("SaveKernel", "Maximum weekly GPU quota of 30.00 hours reached"))
    competitions, kaggle.site.competitions = kaggle.site.competitions, set()
    slug = "wsdm-cup-multilingual-chatbot-arena"
    for problem in ("Maximum weekly GPU quota of 30.00 hours reached", f"competition sources {slug}: not accepted"):
        assert error_of(push(spec)) == f"{REF}: {problem}; mend that, then run push again"
    kaggle.site.competitions = competitions
    sent = len(kaggle.calls("StartBlobUpload"))
    assert push(spec).exit_code == 0
    assert len(kaggle.calls("StartBlobUpload")) == sent
    assert len(kaggle.calls("CreateDataset")) == 1
    assert [entry["kernel_version"] for entry in ledger.read()] == [2]


def test_where_kaggle_takes_no_versions_of_datasets_the_next_push_names_none(spec, kaggle):
    kaggle.site.takes_pins = False
    refused = error_of(push(spec))
    assert refused.startswith(f"{REF}: dataset sources tester/tiny-two/1: not accepted: version 1 runs without them")
    made = push(spec)
    assert made.exit_code == 0, made.output
    assert "  tester/tiny-two: Kaggle names no version; the newest is 1\n" in made.output
    assert kaggle.site.kernels[REF].versions[-1].pushed["datasetDataSources"] == ["tester/tiny-two"]
    assert push(spec).output.count(": unchanged, version") == 2
    assert len(kaggle.calls("SaveKernel")) == 2, "one run a push"


def test_the_image_of_the_last_push_is_kept_unless_the_latest_is_wanted(spec, kaggle):
    kaggle.site.docker_image = "kaggle/image:1"
    for options in ((), ("--again",), ("--again", "--latest-image")):
        assert push(spec, *options).exit_code == 0
    pushed = [version.pushed for version in kaggle.site.kernels[REF].versions]
    images = [(request.get("dockerImage"), request["dockerImagePinningType"]) for request in pushed]
    assert images == [(None, "original"), ("kaggle/image:1", "original"), (None, "latest")]


@pytest.mark.parametrize("looks", [4, 0], ids=["shown to this push", "shown to the next push"])
def test_a_lost_answer_to_savekernel_starts_no_second_run(spec, kaggle, monkeypatch, looks):
    kaggle.faults.append(Fault("SaveKernel", loses_answer=True))
    with monkeypatch.context() as patch:
        patch.setattr(client, "FEW_LOOKS", looks)
        first = push(spec)
    if looks == 0:
        assert "perhaps pushed, perhaps not: Kaggle: SaveKernel: the connection broke off" in error_of(first)
    assert push(spec, "--again" if looks == 0 else "--dry-run").exit_code == 0
    assert versions(kaggle) == [1]
    assert [entry["kernel_version"] for entry in ledger.read()] == [1]


def test_a_kernel_that_is_read_back_otherwise_is_an_error_and_pushed_again(spec, kaggle):
    kaggle.faults.append(Fault("GetKernel", times=5, answer={"metadata": {"enableInternet": True}}))
    assert "was pushed, and is not what was meant: enable_internet is true in place of false" in error_of(push(spec))
    refused = CliRunner().invoke(main, ["status", str(spec)])
    assert refused.output == "error: outputs/test/push.json: the push did not end; run push test first\n"
    kaggle.faults.append(Fault("GetKernel", answer={"metadata": {"enableInternet": True}}))
    assert f"{REF}: version 2 was pushed" in push(spec).output
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
    assert versions(kaggle) == [1]
    assert [entry["kernel_version"] for entry in ledger.read()] == [1]


def test_two_pushes_at_a_time_are_refused(spec, kaggle):
    publishing.WORK.mkdir(parents=True)
    with FileLock(publishing.WORK / "lock"):
        assert error_of(push(spec)) == "outputs/.push/lock: another push runs in this folder; wait for it"
    assert changes(kaggle) == []


@pytest.mark.parametrize(
    "seconds_left, line",
    [
        (10 * 3600, "checked: GPU hours: 10 of 30 left until 2026-01-03 00:00 UTC"),
        (1800, "warning: GPU hours: 0.5 of 30 left until 2026-01-03 00:00 UTC; a kernel that reaches the end is stopped"),
        (0, "warning: GPU hours: 0 of 30 left until 2026-01-03 00:00 UTC: Kaggle will take the datasets, and refuse the"),
    ],
)
def test_the_hours_that_are_left_are_told(spec, kaggle, seconds_left, line):
    kaggle.site.gpu_seconds_used = kaggle.site.gpu_seconds_allowed - seconds_left
    assert f"\n{line}" in push(spec, "--dry-run").output
    table = CliRunner().invoke(main, ["quota"]).output
    assert f"{30 - seconds_left / 3600:.2f}" in table
