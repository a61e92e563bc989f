"""`push` against the stand-in: every check first, then the datasets, then the kernel, and nothing twice."""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from kaggle_kernels.publish import push as publishing
from preprocess.core import ledger
from preprocess.core.files import sha256, write_json
from tests.fakes.kaggle.server import Fault, error_under_200
from tests.kaggle_kernels.build.test_ensemble_weights import predictions, write_run
from tests.kaggle_kernels.packages import flip_byte
from tests.kaggle_kernels.publish.pushes import call, error_of

PACKAGE = Path("outputs/two/package")
REF = "tester/pairwise-test"
CHANGING = ("StartBlobUpload", "PUT", "CreateDataset", "CreateDatasetVersion", "SaveKernel")


@pytest.fixture
def spec(pushable, kaggle, ledger_file):
    """A spec that passes every check, in the current folder, with a ledger of its own; Kaggle processes its package at once."""
    kaggle.site.processing_calls = 0
    return pushable


def push(spec, *options):
    return call("push", str(spec), *options)


def changes(kaggle):
    return [request.call for request in kaggle.requests if request.call in CHANGING]


def check_one_run(kaggle, version=1):
    """Kaggle has run that one version, and the ledger has it."""
    assert [made.number for made in kaggle.site.kernels[REF].versions] == list(range(1, version + 1))
    assert [entry["kernel_version"] for entry in ledger.read()] == [version]


def test_a_push_is_planned_made_and_then_has_nothing_to_do(spec, kaggle):
    planned = push(spec, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert changes(kaggle) == []
    assert planned.output.splitlines()[-1] == "nothing was pushed"

    pushed = push(spec)
    assert pushed.exit_code == 0, pushed.output
    assert "  tester/tiny-two: pinned to version 1\n" in pushed.output
    assert json.loads((PACKAGE / "dataset-metadata.json").read_text())["id"] == "OWNER/tiny-two"
    [entry] = [entry for entry in ledger.read() if entry["event"] == "push"]
    assert (entry["spec"], entry["kernel"], entry["kernel_version"]) == ("test", REF, 1)
    assert entry["datasets"] == {"tester/tiny-two": {"version": 1, "manifest": sha256(PACKAGE / "manifest.json")}}

    changes_before = changes(kaggle)
    unchanged = push(spec).output
    assert f"tester/tiny-two: unchanged, version 1\n{REF} version 1: is there, " in unchanged
    assert changes(kaggle) == changes_before

    write_run("two", predictions([0.9, 0.8, 0.2, 0.6], ["model_a", "model_a", "model_b", "model_b"]))
    shutil.copyfile(PACKAGE / "contract.json", PACKAGE.parent / "contract.json")
    write_json(PACKAGE.parent / "lockbox.json", {"rows": 9, "accuracy": 0.5})
    assert f"{REF} version 2: was pushed" in push(spec, "--again").output
    validation = [entry["validation"] for entry in ledger.read()]
    losses = {"log_loss": pytest.approx(0.3670, abs=1e-4), "brier_score": pytest.approx(0.225)}
    assert validation == [None, {"rows": 4, "accuracy": 0.75, **losses}]
    assert [entry["lockbox"] for entry in ledger.read()] == [None, {"rows": 9, "accuracy": 0.5}]


def test_all_problems_are_told_and_nothing_goes_up(spec, kaggle, monkeypatch):
    flip_byte(PACKAGE / "tokenizer.json")
    Path("outputs/two/agreement.json").unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    ended = push(spec)
    assert ended.exit_code == 2
    for problem in ("no credentials", "outputs/two/package/tokenizer.json", "outputs/two/agreement.json"):
        assert f"error: {problem}" in ended.output
    assert changes(kaggle) == []


def test_faults_of_every_question_are_mended_by_the_same_push(spec, kaggle):
    questions = ("GetDatasetStatus", "GetDataset", "StartBlobUpload", "ListDatasetFiles", "GetKernel", "DownloadDataset")
    kaggle.faults += [Fault(name, status=500) for name in questions]
    kaggle.faults += [
        Fault("IntrospectToken", status=503, times=2),
        Fault("GetDatasetStatus", seconds=0.5),
        Fault("PUT", where="model.safetensors", breaks_after_bytes=5000, status=503),
    ]
    pushed = push(spec)
    assert pushed.exit_code == 0, pushed.output
    assert [fault.call for fault in kaggle.faults if fault.times] == []
    assert kaggle.uploaded_bytes("model.safetensors") == (PACKAGE / "model.safetensors").stat().st_size
    check_one_run(kaggle)


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
    check_one_run(kaggle, version=2)


def test_where_kaggle_takes_no_versions_of_datasets_the_next_push_names_none(spec, kaggle):
    kaggle.site.takes_pins = False
    refused = error_of(push(spec))
    assert refused.startswith(f"{REF}: dataset sources tester/tiny-two/1: not accepted: version 1 runs without them")
    pushed = push(spec)
    assert pushed.exit_code == 0, pushed.output
    assert "  tester/tiny-two: Kaggle names no version; the newest is 1\n" in pushed.output
    assert kaggle.site.kernels[REF].versions[-1].pushed["datasetDataSources"] == ["tester/tiny-two"]
    assert "version 2: is there" in push(spec).output
    assert len(kaggle.calls("SaveKernel")) == 2, "one run a push"


def test_the_image_of_the_last_push_is_kept_through_a_refusal_unless_the_latest_is_wanted(spec, kaggle):
    kaggle.site.docker_image = "kaggle/image:1"
    assert push(spec).exit_code == 0
    kaggle.faults.append(error_under_200("SaveKernel", "no"))
    assert error_of(push(spec, "--again")).startswith(f"{REF}: no; mend that")
    for options in ((), ("--again", "--latest-image")):
        assert push(spec, *options).exit_code == 0
    pushed = [version.pushed for version in kaggle.site.kernels[REF].versions]
    images = [(request.get("dockerImage"), request["dockerImagePinningType"]) for request in pushed]
    assert images == [(None, "original"), ("kaggle/image:1", "original"), (None, "latest")]


@pytest.mark.parametrize("shown_late", [False, True])
def test_a_lost_answer_to_savekernel_starts_no_second_run(spec, kaggle, shown_late):
    kaggle.faults.append(Fault("SaveKernel", loses_answer=True))
    assert "perhaps pushed, perhaps not: Kaggle: SaveKernel: no connection, or it broke off" in error_of(push(spec))
    if shown_late:
        kaggle.faults.append(Fault("GetKernel", status=403, message="no such kernel yet", times=2))
    assert push(spec, "--again").exit_code == 0
    check_one_run(kaggle)


def test_a_push_that_was_not_made_is_made_by_the_next_also_where_the_version_before_is_the_same(spec, kaggle):
    assert push(spec).exit_code == 0
    kaggle.faults.append(Fault("SaveKernel", status=503))
    assert "perhaps pushed, perhaps not: Kaggle: SaveKernel: 503 " in error_of(push(spec, "--again"))
    assert push(spec).exit_code == 0
    assert [entry["kernel_version"] for entry in ledger.read()] == [1, 2]


def test_a_kernel_that_is_read_back_otherwise_is_an_error_and_pushed_again(spec, kaggle):
    kaggle.faults.append(Fault("GetKernel", times=5, answer={"metadata": {"enableInternet": True}}))
    assert "was pushed, and is not what was meant: enable_internet is true in place of false" in error_of(push(spec))
    refused = error_of(call("status", str(spec)))
    assert refused == "outputs/test/push.json: the push did not end; run push test again"
    kaggle.faults.append(Fault("GetKernel", answer={"metadata": {"enableInternet": True}}))
    assert push(spec).exit_code == 0
    check_one_run(kaggle, version=2)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["check_pushed", "measure_ensemble"], ids=["before it was read back", "before the ledger"])
def test_a_push_that_was_killed_is_completed_by_the_next_and_not_made_twice(spec, kaggle, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(publishing, step, interrupt)
        assert error_of(push(spec)) == "interrupted; run push again, which goes on from here"
    assert ledger.read() == []
    assert push(spec).exit_code == 0
    check_one_run(kaggle)


def test_two_pushes_at_a_time_are_refused(spec, kaggle):
    publishing.WORK.mkdir(parents=True)
    with FileLock(publishing.WORK / "lock"):
        assert error_of(push(spec)) == "outputs/.push/lock: another push runs in this folder; wait for it"
    assert changes(kaggle) == []
