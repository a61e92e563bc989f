"""push, status, submit and scores against the stand-in: every spec; and every fault ends well, or in one line and a second try.

What is there is never sent twice: the stand-in counts the bytes.
"""

import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from kaggle_kernels.__main__ import main
from kaggle_kernels.build import generated_folder
from kaggle_kernels.spec import COMPETITIONS, all_specs, find_spec, read_spec
from preprocess import ledger
from preprocess.files import sha256
from tests.conftest import ROOT
from tests.kaggle_kernels.pretend import output_of, pretend_ready
from tests.kaggle_server import Fault, KaggleServer, error_under_200
from tests.kaggle_site import WSDM, Run, Site, Submission

NAMES = [path.stem for path in all_specs()]
IN_EVERY_TEST_RUN = ("gemma2_llama3", "gemma2_lmsys")  # two packages and wheels; the other competition
FAST = ("--poll-seconds", "0.01", "--patience-seconds", "20")
SMALL, DATASET, KERNEL = "minilm_cls", "tester/pairwise-minilm-cls", "tester/pairwise-minilm"  # one package, no wheels


def call(command: str, *arguments: str) -> Result:
    """Run `python -m kaggle_kernels COMMAND …` in this process."""
    return CliRunner().invoke(main, [command, *FAST, *arguments], catch_exceptions=False)


def content(folder) -> dict[str, str]:
    """The hash of each file that goes up."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "dataset-metadata.json"}


def size_of(*folders) -> int:
    """The bytes that go up."""
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.name != "dataset-metadata.json")


def check_whole(kaggle: KaggleServer, folders: dict) -> None:
    """Each dataset's newest version has every file as it is here."""
    for slug, folder in folders.items():
        assert kaggle.site.datasets[f"tester/{slug}"].versions[-1].sha256() == content(folder), slug


@pytest.fixture
def here(tmp_path, monkeypatch, fast_kaggle):
    """An empty current folder, and the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRWISE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return fast_kaggle


@pytest.fixture
def small(here):
    """The stand-in, and the smallest spec ready to be pushed: its folders by slug."""
    here.site.processing_calls = 0
    return here, pretend_ready(find_spec(SMALL))


def marked(name: str):
    return name if name in IN_EVERY_TEST_RUN else pytest.param(name, marks=pytest.mark.slow)


def test_there_are_specs():
    assert len(NAMES) > 10


@pytest.mark.parametrize("name", map(marked, NAMES))
def test_a_spec_goes_from_package_to_score(here, name):
    path, spec = find_spec(name), read_spec(find_spec(name))
    folders = pretend_ready(path)
    here.site.runs.append(Run(output=output_of(spec)))
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
    assert asked["text"] == (generated_folder(path) / "kernel.py").read_text()

    followed = call("status", name, "--wait")
    assert (followed.exit_code, "scored 3 of 3 rows" in followed.output) == (0, True), followed.output
    submitted = call("submit", name, "-m", f"{name}, first", "--yes")
    assert submitted.exit_code == 0, submitted.output
    [submission] = here.site.submissions
    assert (submission.kernel, submission.kernel_version) == (f"tester/{spec.slug}", 1)
    assert (submission.file_name, submission.description) == ("submission.csv", f"{name}, first")
    assert [(entry["event"], entry["kernel_version"]) for entry in ledger.read()] == [("push", 1), ("submit", 1)]

    again = call("push", name)
    assert again.exit_code == 0, again.output
    assert (here.uploaded_bytes(), len(here.site.kernels[f"tester/{spec.slug}"].versions)) == (size_of(*folders.values()), 1)


def error_of(ended: Result) -> str:
    """The one line that a command ended with, and that its exit code is 2."""
    [line] = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert (ended.exit_code, ended.output.splitlines()[-1]) == (2, line), ended.output
    return line


MENDED = [  # faults that pass, and how many more bytes than the package's went up
    (
        [
            *(Fault(call, status=500) for call in ("GetDatasetStatus", "ListDatasetFiles", "GetKernel", "DownloadDataset")),
            *(Fault(call, status=429) for call in ("StartBlobUpload", "CreateDataset", "SaveKernel")),
            Fault("IntrospectToken", status=503, times=2),
            Fault("GetDatasetStatus", seconds=0.5),
            Fault("PUT", where="model.safetensors", breaks_after_bytes=5000, status=503),
        ],
        0,
    ),
    ([Fault("CreateDataset", status=503, message="Service Unavailable")], 0),
    ([Fault("CreateDataset", loses_answer=True), Fault("SaveKernel", loses_answer=True)], 0),
    ([Fault("PUT", where="model.safetensors", breaks_after_bytes=5000)], 5000),
    ([Fault("PUT", where="model.safetensors", status=400, times=2)], 40_000),
    ([Fault("CreateDataset", loses=("model.safetensors",), cuts=("config.json",))], 20_000 + 22),
]


@pytest.mark.parametrize("faults, more_bytes", MENDED)
def test_a_fault_that_passes_is_mended_by_the_same_push(small, faults, more_bytes):
    kaggle, folders = small
    kaggle.faults += faults
    pushed = call("push", SMALL)
    assert pushed.exit_code == 0, pushed.output
    assert [fault.times for fault in faults] == [0] * len(faults)
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == size_of(*folders.values()) + more_bytes
    assert kaggle.site.kernels[KERNEL].versions[-1].pushed["datasetDataSources"] == [
        f"{DATASET}/{len(kaggle.site.datasets[DATASET].versions)}"
    ]


def denied(call: str) -> Fault:
    return Fault(call, status=403, message=f"Permission '{call}' was denied", times=99)


LASTING = [  # what goes wrong until somebody mends it; and the words by which the command says so
    ("403 at creation", lambda kaggle: kaggle.faults.append(denied("CreateDataset")), "Permission 'CreateDataset' was denied"),
    (
        "error under 200",
        lambda kaggle: kaggle.faults.append(error_under_200("CreateDataset", "Your account is not verified")),
        f"error: {DATASET}: Your account is not verified; mend that, then run this again: what went up is not sent twice",
    ),
    ("503", lambda kaggle: kaggle.faults.append(Fault("CreateDataset", status=503, times=99)), "503 Server Error"),
    ("storage", lambda kaggle: setattr(kaggle.site, "storage_bytes_allowed", 20_000), "private datasets quota is exceeded"),
    (
        "processing",
        lambda kaggle: setattr(kaggle.site, "processing_calls", 10**6),
        "blobs received after 1 s; run this again, which goes on waiting: nothing goes up twice",
    ),
    ("GPU hours", lambda kaggle: setattr(kaggle.site, "gpu_seconds_used", 10**6), "Maximum weekly GPU quota of 30.00 hours"),
    ("competition", lambda kaggle: kaggle.site.competitions.clear(), f"competition sources ['{WSDM}']: not accepted"),
    (
        "dataset source",
        lambda kaggle: kaggle.faults.append(Fault("SaveKernel", answer={"invalidDatasetSources": [f"{DATASET}/1"]})),
        f"dataset sources ['{DATASET}/1']: not accepted",
    ),
    (
        "internet",
        lambda kaggle: kaggle.faults.append(Fault("GetKernel", answer={"metadata": {"enableInternet": True}}, times=99)),
        "enable_internet is true in place of false; run push again",
    ),
]


@pytest.mark.parametrize("spoil, told", [case[1:] for case in LASTING], ids=[case[0] for case in LASTING])
def test_a_fault_that_lasts_is_one_line_and_once_mended_the_same_push_sends_nothing_twice(small, spoil, told):
    kaggle, folders = small
    spoil(kaggle)
    assert told in error_of(call("push", SMALL, "--patience-seconds", "1"))
    kaggle.faults.clear()
    mended = Site()
    kaggle.site.storage_bytes_allowed, kaggle.site.competitions = mended.storage_bytes_allowed, mended.competitions
    kaggle.site.gpu_seconds_used = 0
    for dataset in kaggle.site.datasets.values():
        dataset.versions[-1].calls_left = 0
    again = call("push", SMALL)
    assert again.exit_code == 0, again.output
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == size_of(*folders.values())
    assert [version.number for version in kaggle.site.datasets[DATASET].versions] == [1]
    assert kaggle.site.kernels[KERNEL].versions[-1].pushed["competitionDataSources"] == [WSDM]


def test_a_version_that_kaggle_could_not_process_is_told_and_followed_by_another(small):
    kaggle, folders = small
    kaggle.site.processing_ends = "FAILED"
    assert "sent twice, and still config.json was not processed" in error_of(call("push", SMALL))
    kaggle.site.processing_ends = "READY"
    again = call("push", SMALL)
    assert again.exit_code == 0, again.output
    check_whole(kaggle, folders)


def test_a_new_package_is_a_new_version_once_the_last_one_is_processed(small):
    kaggle, folders = small
    assert call("push", SMALL).exit_code == 0
    shutil.rmtree("outputs/minilm_cls")
    folders = pretend_ready(find_spec(SMALL), seed=2)
    kaggle.site.datasets[DATASET].versions[0].calls_left = 3  # somebody else's version is on its way
    pushed = call("push", SMALL)
    assert pushed.exit_code == 0, pushed.output
    check_whole(kaggle, folders)
    assert [request.status for request in kaggle.calls("CreateDatasetVersion")] == [200]
    assert kaggle.site.kernels[KERNEL].versions[-1].pushed["datasetDataSources"] == [f"{DATASET}/2"]


def test_a_push_killed_in_an_upload_goes_on_where_it_stopped_when_it_runs_again(small):
    kaggle, folders = small
    kaggle.faults.append(Fault("PUT", where="model.safetensors", breaks_after_bytes=5000, stalls=True))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-m", "kaggle_kernels", "push", SMALL, *FAST], env=environment)
    assert kaggle.stalled.wait(60)
    killed.kill()
    killed.wait()
    assert kaggle.site.datasets == {}
    again = call("push", SMALL)
    assert again.exit_code == 0, again.output
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == size_of(*folders.values())
    assert ("bytes 5000-19999/20000", 15_000) in [(r.asked["range"], r.bytes) for r in kaggle.calls("PUT")]


@pytest.fixture
def pushed(small):
    """The stand-in once the small spec was pushed; its run is yet to be said by `runs`."""
    kaggle, _ = small

    def push(**run) -> KaggleServer:
        kaggle.site.runs.append(Run(**{"output": output_of(read_spec(find_spec(SMALL))), **run}))
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
    kaggle.site.runs.append(Run(output=output_of(read_spec(find_spec(SMALL)))))
    assert call("push", SMALL, "--again").exit_code == 0
    assert call("status", SMALL, "--wait").exit_code == 0
    assert submit().exit_code == 0
    assert (kaggle.uploaded_bytes(), [s.kernel_version for s in kaggle.site.submissions]) == (sent, [2])


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
        [Fault("CreateCodeSubmission", loses_answer=True)],
        [Fault("CreateCodeSubmission", status=502)],
        [Fault(call, status=503) for call in ("GetKernelSessionStatus", "ListKernelSessionOutput", "ListSubmissions")],
        [Fault("GET", status=503, times=2)],
    ],
)
def test_one_submission_is_made_whatever_was_lost_on_the_way(pushed, faults):
    kaggle = pushed(statuses=["COMPLETE"])
    kaggle.faults += faults
    done = submit()
    assert done.exit_code == 0, done.output
    assert [fault.times for fault in faults] == [0] * len(faults)
    assert [submission.description for submission in kaggle.site.submissions] == ["first"]
    assert [entry["submission_ref"] for entry in ledger.read() if entry["event"] == "submit"] == ["1001"]
    assert "was submitted at" in error_of(submit())
