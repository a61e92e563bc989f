"""push, status, submit and scores against the stand-in: every spec, and runs and submissions that do not go well."""

import copy
import re

import pytest
from click.testing import CliRunner, Result

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.bundle import kernel_folder
from kaggle_kernels.build.spec import COMPETITIONS, all_specs, find_spec, read_spec
from preprocess.core import ledger
from tests.fakes.kaggle.server import Fault, KaggleServer
from tests.fakes.kaggle.site import WSDM, Run, Submission
from tests.kaggle_kernels.publish.pushes import (
    KERNEL,
    RAW_SHA256,
    SMALL,
    bytes_of,
    call,
    check_whole,
    error_of,
    output_of,
    pretend_ready,
)

NAMES = [path.stem for path in all_specs()]
IN_EVERY_TEST_RUN = ("gemma2_llama3", "gemma2_lmsys")  # two packages and wheels; the other competition


def test_there_are_specs():
    assert len(NAMES) > 10
    assert set(IN_EVERY_TEST_RUN) < set(NAMES)


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_TEST_RUN else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_spec_goes_from_package_to_score(here, name):
    path, spec = find_spec(name), read_spec(find_spec(name))
    folders = pretend_ready(path)
    here.site.runs.append(Run(output=output_of(path)))
    here.site.scores.append(("0.7123", "0.7045"))

    pushed = call("push", name)
    assert pushed.exit_code == 0, pushed.output
    check_whole(here, folders)
    assert all(dataset.is_private for dataset in here.site.datasets.values())
    [version] = here.site.kernels[f"tester/{spec.slug}"].versions
    asked = version.pushed
    assert asked["datasetDataSources"] == [f"tester/{slug}/1" for slug in folders]
    assert asked["competitionDataSources"] == [COMPETITIONS[spec.competition].slug]
    assert (asked["isPrivate"], asked["enableInternet"], asked["machineShape"]) == (True, False, "NvidiaTeslaT4")
    assert asked["text"] == (kernel_folder(path) / "kernel.py").read_text()

    followed = call("status", name, "--wait")
    assert (followed.exit_code, "scored 3 of 3 rows" in followed.output) == (0, True), followed.output
    submitted = call("submit", name, "-m", f"{name}, first", "--yes")
    assert submitted.exit_code == 0, submitted.output
    [submission] = here.site.submissions
    assert (submission.kernel, submission.kernel_version) == (f"tester/{spec.slug}", 1)
    assert (submission.file_name, submission.description) == ("submission.csv", f"{name}, first")
    made = [(entry["event"], entry.get("kernel_version")) for entry in ledger.read()]
    assert made[-2:] == [("push", 1), ("submit", 1)]

    scores = call("scores", "--competition", spec.competition)
    validated = ["0.7000", "0.6000"] if len(spec.packages) == 1 else []  # no predictions here to mix those of several
    assert re.findall(r"0\.\d{4}", scores.output) == [*validated, "0.7123", "0.7045"], scores.output
    traced = CliRunner().invoke(main, ["trace", name])
    assert (traced.exit_code, traced.output.count(f"data/train.parquet, 300 rows, sha256 {RAW_SHA256}")) == (
        0,
        len(spec.packages),
    ), traced.output

    again = call("push", name)
    assert again.exit_code == 0, again.output
    assert (here.uploaded_bytes(), len(here.site.kernels[f"tester/{spec.slug}"].versions)) == (bytes_of(*folders.values()), 1)


@pytest.fixture
def pushed(small):
    """Pushes the small spec, whose run then goes as told; gives the stand-in."""
    kaggle, _ = small

    def push(**run) -> KaggleServer:
        kaggle.site.runs.append(Run(**{"output": output_of(find_spec(SMALL)), **run}))
        assert call("push", SMALL).exit_code == 0
        return kaggle

    return push


def submit(message: str = "first") -> Result:
    return call("submit", SMALL, "-m", message, "--yes")


def test_a_kernel_that_fails_is_told_with_its_log_and_pushed_again_it_goes_on(pushed):
    kaggle = pushed(statuses=["RUNNING", "ERROR"], failure="out of memory", log=["loading\n", "CUDA out of memory\n"])
    followed = call("status", SMALL, "--wait")
    assert error_of(followed).startswith(f"error: {KERNEL} version 1: ERROR: out of memory; https://")
    assert "  | CUDA out of memory\n" in followed.output
    assert "ERROR, and only a COMPLETE version can be submitted" in error_of(submit())
    sent = kaggle.uploaded_bytes()
    kaggle.site.runs.append(Run(output=output_of(find_spec(SMALL))))
    assert call("push", SMALL, "--again").exit_code == 0
    assert call("status", SMALL, "--wait").exit_code == 0
    assert submit().exit_code == 0
    assert (kaggle.uploaded_bytes(), [made.kernel_version for made in kaggle.site.submissions]) == (sent, [2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, told",
    [
        ({"output": {}}, "its output has no submission.csv; its log says why: status"),
        ({"output": {"submission.csv": b"id,label\n1,a\n"}}, "its columns are 'id,label', wsdm-cup"),
        ({"statuses": ["RUNNING"]}, "RUNNING, and only a COMPLETE version can be submitted; see status --wait"),
    ],
)
def test_what_cannot_be_submitted_is_not(pushed, run, told):
    kaggle = pushed(**{"statuses": ["COMPLETE"], **run})
    assert told in error_of(submit())
    assert kaggle.calls("CreateCodeSubmission") == []


@pytest.mark.slow
def test_submissions_that_are_used_up_are_told_before_one_is_tried(pushed):
    kaggle = pushed(statuses=["COMPLETE"])
    kaggle.site.submissions_a_day = 1
    kaggle.site.submissions.append(Submission(1001, WSDM, KERNEL, 1, "submission.csv", "another", "0.7", "0.7", 0))
    assert "no submission is left today" in error_of(submit())
    assert kaggle.calls("CreateCodeSubmission") == []
    kaggle.site.submissions_a_day = 5
    assert submit().exit_code == 0


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([Fault("CreateCodeSubmission", loses_answer=True)], marks=pytest.mark.slow),
        pytest.param([Fault("CreateCodeSubmission", status=502)], marks=pytest.mark.slow),
        [
            *(Fault(name, status=503) for name in ("GetKernelSessionStatus", "ListKernelSessionOutput", "ListSubmissions")),
            Fault("GET", status=503, times=2),
        ],
    ],
    ids=["a lost answer", "a gateway's error", "each question fails once"],
)
def test_one_submission_is_made_whatever_was_lost_on_the_way(pushed, faults):
    kaggle = pushed(statuses=["COMPLETE"])
    kaggle.faults += copy.deepcopy(faults)
    done = submit()
    assert done.exit_code == 0, done.output
    assert [fault.call for fault in kaggle.faults if fault.times] == []
    assert [submission.description for submission in kaggle.site.submissions] == ["first"]
    assert [entry["submission_ref"] for entry in ledger.read() if entry["event"] == "submit"] == ["1001"]
    assert "was submitted at" in error_of(submit())
