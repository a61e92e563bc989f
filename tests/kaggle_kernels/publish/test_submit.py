"""`status` and `submit` against the stand-in."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kaggle_kernels.publish import submit as module
from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.kernels import read_kernel, save_kernel
from kaggle_kernels.publish.push import PushRecord, read_record, write_record
from preprocess.competitions import COMPETITIONS
from preprocess.core import ledger
from preprocess.core.files import write_json
from tests.conftest import ROOT
from tests.fakes.kaggle.server import Fault
from tests.fakes.kaggle.site import Dataset, KernelVersion, Run, Submission, Version
from tests.kaggle_kernels.publish import pushes
from tests.kaggle_kernels.publish.pushes import error_of

REF, WSDM_CUP = "tester/pairwise-demo", COMPETITIONS["wsdm"].slug
SPEC = Path("specs/demo.yml")
GOOD = b"id,winner\n1,model_a\n2,model_b\n"
DATASETS = {
    "tester/pairwise-demo": {"version": 3, "manifest": "ab" * 32},
    "tester/pairwise-wheels": {"version": 1, "manifest": "cd" * 32},
}
RECORD = json.dumps({"manifests": {"pairwise-demo": "ab" * 32}}).encode()  # kernel.json of a run with the demo's package


@pytest.fixture
def pushed(tmp_path, monkeypatch, kaggle, ledger_file):
    """The demo's kernel as push leaves it, here and on the stand-in, COMPLETE; the run of its one version."""
    monkeypatch.chdir(tmp_path)
    versions = {ref: dataset["version"] for ref, dataset in DATASETS.items()}
    kernel = read_kernel(ROOT / "kaggle_kernels/examples/demo", "tester", versions)
    run = Run(statuses=["COMPLETE"], output={"submission.csv": GOOD, "other.bin": b"x", "kernel.json": RECORD})
    kaggle.site.runs.append(run)
    for ref, version in versions.items():
        kaggle.site.datasets[ref] = Dataset(ref, "other", True, [Version(version, {}, 0)])
    save_kernel(connect(Pace()), kernel)
    kaggle.requests.clear()
    made = PushRecord(
        kernel=REF,
        fingerprint=kernel.fingerprint(),
        datasets=DATASETS,
        time=(datetime.now(UTC) - timedelta(minutes=63)).isoformat(timespec="seconds"),
        version_before=0,
        image="",
        version=1,
        is_finished=True,
    )
    write_record(SPEC, made)
    return run


def call(command, *options):
    return pushes.call(command, "demo", *options)


def submit(*options, message="first try"):
    return call("submit", "-m", message, "--yes", *options)


def test_a_run_is_followed_to_its_end_and_each_line_of_its_log_told_once(pushed):
    pushed.statuses, pushed.log = ["QUEUED", "RUNNING", "RUNNING", "COMPLETE"], ["loading\n", "scored 3 of 3 rows\n"]
    ended = call("status", "--wait")
    assert ended.exit_code == 0, ended.output
    lines = ended.output.splitlines()
    statuses = [line for line in lines if line.startswith("tester/pairwise-demo version 1: ")]
    assert [line.split()[3] for line in statuses] == ["QUEUED,", "RUNNING,", "COMPLETE,"]
    assert all(line.endswith("1 h 03 min after the push") for line in statuses)
    assert [line for line in lines if line.startswith("  | ")] == ["  | loading", "  | scored 3 of 3 rows"]
    assert lines[-1] == 'next: python -m kaggle_kernels submit demo -m "MESSAGE"'


def test_an_error_ends_with_the_logs_last_lines(pushed):
    pushed.statuses, pushed.failure = ["ERROR"], "Your notebook tried to allocate more memory than is available"
    pushed.log = [f"line {number}\n" for number in range(30)]
    ended = call("status")
    assert "version 1: ERROR: Your notebook tried to allocate more memory than is available; https://" in error_of(ended)
    assert [line for line in ended.output.splitlines() if "|" in line] == [f"  | line {number}" for number in range(10, 30)]


def test_a_run_that_does_not_end_leaves_a_command_that_goes_on(pushed):
    pushed.statuses = ["QUEUED"]
    ended = call("status", "--wait", "--patience-seconds", "0.01")
    assert error_of(ended) == "tester/pairwise-demo version 1: still QUEUED; run status again, which goes on waiting"


def test_a_complete_version_is_submitted_once_and_leads_back(pushed, kaggle):
    ended = submit()
    assert ended.exit_code == 0, ended.output
    for fact in ("tester/pairwise-wheels version 1\n", "message: first try\n"):
        assert fact in ended.output
    [made] = kaggle.site.submissions
    assert (made.kernel, made.kernel_version, made.file_name, made.description) == (REF, 1, "submission.csv", "first try")
    [entry] = ledger.read()
    expected = {"event": "submit", "spec": "demo", "competition": WSDM_CUP, "kernel": REF, "kernel_version": 1}
    expected |= {"submission_ref": "1001", "message": "first try", "datasets": DATASETS}
    assert {key: entry[key] for key in expected} == expected
    downloaded = sorted(path.name for path in Path("outputs/demo/output").iterdir())
    assert downloaded == ["kernel.json", "submission.csv"]
    assert f"version 1: was submitted at {entry['time']} as 1001 ('first try')" in error_of(submit())
    assert len(kaggle.site.submissions) == 1
    assert submit("--again", message="second").exit_code == 0
    assert [made.description for made in kaggle.site.submissions] == ["first try", "second"]


def test_a_kernel_that_was_made_anew_counts_from_1_and_was_not_submitted(pushed, kaggle):
    time = (datetime.now(UTC) - timedelta(days=2)).isoformat(timespec="seconds")
    ledger.record("submit", time=time, kernel=REF, kernel_version=1, submission_ref="7", message="of the kernel before")
    assert submit().exit_code == 0


@pytest.mark.parametrize(
    "statuses, output, told",
    [
        (["RUNNING"], {}, "RUNNING, and only a COMPLETE version can be submitted; see status --wait"),
        (["COMPLETE"], {"scores.parquet": b"x"}, "its output has no submission.csv; its log says why: status"),
    ],
    ids=["running", "no file"],
)
def test_what_is_no_submission_is_not_submitted(pushed, kaggle, statuses, output, told):
    Path("outputs/demo/output").mkdir()
    Path("outputs/demo/output/submission.csv").write_bytes(GOOD)
    pushed.statuses, pushed.output = statuses, output
    assert told in error_of(submit())
    assert kaggle.calls("CreateCodeSubmission") == []


@pytest.mark.parametrize(
    "manifests, problem",
    [({"pairwise-demo": "cd" * 32}, "another pairwise-demo"), ({}, "another run")],
    ids=["package", "none"],
)
def test_the_output_of_another_run_is_not_taken_for_the_pushed_ones(pushed, kaggle, manifests, problem):
    """The kernel may have got another version of a dataset, or Kaggle still shows the version before."""
    pushed.output["kernel.json"] = json.dumps({"manifests": manifests}).encode()
    assert f"version 1: the output that Kaggle has is of {problem}; wait a minute" in error_of(submit())
    assert kaggle.calls("CreateCodeSubmission") == []


def test_the_pushed_version_is_asked_for_and_submitted_whatever_ran_since(pushed, kaggle):
    [version] = kaggle.site.kernels[REF].versions
    newer = {**version.pushed, "text": "print(1)", "enableInternet": True}
    kaggle.site.kernels[REF].versions.append(KernelVersion(2, newer, Run(statuses=["ERROR"])))
    assert "version 1: COMPLETE" in call("status").output
    assert submit().exit_code == 0
    assert kaggle.site.submissions[0].kernel_version == 1


def test_a_version_that_is_not_what_was_pushed_or_is_gone_is_not_submitted(pushed, kaggle):
    kaggle.site.kernels[REF].versions[0].pushed["text"] = "print(1)"
    assert error_of(submit()) == f"{REF} version 1: is not what was pushed: Kaggle shows other code; run push again"
    del kaggle.site.kernels[REF]
    assert error_of(submit()) == f"{REF}: is not on Kaggle any more; run push again"


def test_it_asks_and_where_nobody_can_answer_or_the_message_is_blank_it_refuses(pushed, kaggle, monkeypatch):
    assert error_of(submit(message=" ")).startswith("-m: the message is blank")
    ended = call("submit", "-m", "first try")
    assert error_of(ended) == "submit asks before it submits, and there is nobody to ask: add --yes"
    assert kaggle.requests == []
    asked = []
    monkeypatch.setattr(module, "can_ask", lambda: True)
    monkeypatch.setattr(module.click, "confirm", asked.append)
    assert error_of(call("submit", "-m", "first try")) == "nothing was submitted"
    assert asked == ["submit this?"]
    assert kaggle.site.submissions == []


@pytest.mark.parametrize(
    "fault", [{"loses_answer": True}, {"status": 502}, {"status": 429}], ids=["a lost answer", "a gateway's error", "too many"]
)
def test_one_submission_is_made_whatever_was_lost_on_the_way(pushed, kaggle, fault):
    """Also where an earlier one has the same message, and Kaggle shows a submission late."""
    earlier = Submission(
        1001, WSDM_CUP, REF, 1, "submission.csv", "first try", "0.7", "0.7", day=f"{datetime.now(UTC):%Y-%m-%d}"
    )
    kaggle.site.submissions.append(earlier)
    kaggle.faults.append(Fault("CreateCodeSubmission", **fault))
    lost = submit()
    assert "perhaps submitted, perhaps not: Kaggle: CreateCodeSubmission: " in error_of(lost)
    assert "submissions of today (UTC): 1 of 5" in lost.output
    assert ledger.read() == []
    kaggle.faults.append(Fault("ListSubmissions", answer={"submissions": []}))
    ended = submit()
    assert ended.output.splitlines()[-1] == f"submitted: tester/pairwise-demo version 1 to {WSDM_CUP} as 1002"
    assert len(kaggle.site.submissions) == 2
    assert [entry["submission_ref"] for entry in ledger.read()] == ["1002"]


def interrupt(*_):
    raise KeyboardInterrupt


def interrupt_submission(monkeypatch, message):
    """A call of submit that is killed once Kaggle has the submission."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "record_submission", interrupt)
        assert error_of(submit(message=message)) == "interrupted; run submit again, which goes on from here"


@pytest.mark.parametrize(
    "message, outcome",
    [("first  try ", f"submitted: tester/pairwise-demo version 1 to {WSDM_CUP} as 1001"), ("second try", "was submitted at ")],
)
def test_a_submission_that_was_interrupted_is_found_and_written_down(pushed, kaggle, monkeypatch, message, outcome):
    """Kaggle may trim a message."""
    interrupt_submission(monkeypatch, "first  try ")
    kaggle.site.submissions[0].description = "first try"
    assert outcome in submit(message=message).output.splitlines()[-1]
    assert len(kaggle.site.submissions) == 1
    assert [(entry["submission_ref"], entry["message"]) for entry in ledger.read()] == [("1001", "first  try ")]


def test_an_interrupted_submission_of_an_older_version_is_written_down_with_its_own_datasets(pushed, kaggle, monkeypatch):
    interrupt_submission(monkeypatch, "first try")
    [version] = kaggle.site.kernels[REF].versions
    kaggle.site.kernels[REF].versions.append(KernelVersion(2, version.pushed, pushed))
    datasets = {**DATASETS, "tester/pairwise-wheels": {"version": 2, "manifest": "ef" * 32}}
    write_record(SPEC, replace(read_record(SPEC), version=2, datasets=datasets))
    assert submit(message="second").exit_code == 0
    entries = [(entry["kernel_version"], entry["message"], entry["datasets"]) for entry in ledger.read()]
    assert entries == [(1, "first try", DATASETS), (2, "second", datasets)]


def test_a_note_of_another_version_of_this_program_is_one_line(pushed):
    write_json("outputs/demo/submit.json", {"version": 1})
    assert error_of(submit()).startswith("outputs/demo/submit.json: not written by this version of the program; look on Kaggle")


def test_a_submission_that_kaggle_refuses_is_one_error(pushed, kaggle):
    kaggle.site.submissions_a_day = 0
    ended = error_of(submit())
    assert ended == f"{REF} version 1: not submitted: Your team has used its daily Submission allowance (0) today"
    assert ledger.read() == []
    kaggle.site.submissions_a_day = 1
    assert submit().exit_code == 0
