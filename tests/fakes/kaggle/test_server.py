"""The real kaggle command against the stand-in: what it prints, and how often it exits with 0 where nothing was done.

Whoever drives the command must know these lines; a new version of it may change them.
"""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from kaggle_kernels.publish import client
from tests.fakes.kaggle.server import Fault, error_under_200
from tests.fakes.kaggle.site import WSDM, Run

DATASET, KERNEL = "tester/tiny-package", "tester/tiny-kernel"
FILES = {"config.json": b"{}", "weights.bin": bytes(range(256)) * 40}
CREATED = (
    "Your private Dataset is being created. Please check progress at https://www.kaggle.com/datasets/tester/tiny-package\n"
)
CREATE = "http://localhost/api/v1/datasets.DatasetApiService/CreateDataset"
PUSHED = "Kernel version 1 successfully pushed.  Please check progress at https://www.kaggle.com/code/tester/tiny-kernel\n"


def run_kaggle(*arguments, command: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run `kaggle`: its exit code, standard output and standard error, which without -q has progress bars."""
    words = [*(command or client.COMMAND), *map(str, arguments)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def dataset_folder(tmp_path) -> Path:
    """A folder as `kaggle datasets create` wants it."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    metadata = {"id": DATASET, "title": "tiny-package", "licenses": [{"name": "apache-2.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture
def kernel_folder(tmp_path) -> Path:
    """A folder as `kaggle kernels push` wants it."""
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "kernel.py").write_text("print(1)\n")
    write_kernel_metadata(folder)
    return folder


def write_kernel_metadata(folder: Path, **changes) -> None:
    metadata = {"id": KERNEL, "title": "Tiny Kernel", "code_file": "kernel.py", "language": "python", "kernel_type": "script"}
    metadata |= {"is_private": True, "enable_gpu": True, "enable_internet": False, "machine_shape": "NvidiaTeslaT4"}
    metadata |= {"competition_sources": [WSDM], **changes}
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata))


def create(folder: Path) -> tuple[int, str, str]:
    return run_kaggle("datasets", "create", "-p", folder, "-q")


def test_a_dataset_goes_up_is_processed_and_comes_back(fast_kaggle, dataset_folder, tmp_path):
    code, printed, _ = run_kaggle("datasets", "create", "-p", dataset_folder, command=("kaggle",))  # the command itself, once
    assert (code, printed.splitlines()[-1] + "\n") == (0, CREATED)
    assert "Upload successful: weights.bin (10KB)\n" in printed
    dataset = fast_kaggle.site.datasets[DATASET]
    assert (dataset.title, dataset.licence, dataset.is_private) == ("tiny-package", "apache-2.0", True)
    assert dataset.versions[0].sha256() == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert run_kaggle("datasets", "status", DATASET) == (0, "blobs_received", "")
    status = run_kaggle("datasets", "status", DATASET, "--format", "json")
    assert status == (0, '{"status": "ready", "current_version_number": 1}', "")
    listed = "name,size,creationDate\nconfig.json,2,2026-01-01 00:00:00\nweights.bin,10240,2026-01-01 00:00:00\n"
    assert run_kaggle("datasets", "files", "-v", DATASET) == (0, listed, "")
    code, printed, _ = run_kaggle("datasets", "download", "-q", "-f", "weights.bin", "-p", tmp_path, DATASET)
    assert code == 0
    assert (tmp_path / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert (fast_kaggle.uploaded_bytes(), fast_kaggle.uploaded_bytes("weights.bin")) == (10_242, 10_240)


def test_a_next_version_is_refused_while_the_last_is_processed_and_only_after_everything_went_up(fast_kaggle, dataset_folder):
    fast_kaggle.site.processing_calls = 1
    assert create(dataset_folder) == (0, CREATED, "")
    version = ("datasets", "version", "-m", "second", "-q", "-p", dataset_folder)
    assert run_kaggle(*version) == (1, "", "Permission 'datasets.update' was denied\n")
    assert fast_kaggle.uploaded_bytes("weights.bin") == 2 * 10_240
    fast_kaggle.site.datasets[DATASET].versions[0].calls_left = 0
    assert run_kaggle(*version) == (0, CREATED.replace("Your private Dataset", "Dataset version"), "")
    assert [(v.number, v.notes) for v in fast_kaggle.site.datasets[DATASET].versions] == [(1, "Initial release"), (2, "second")]
    assert fast_kaggle.site.datasets[DATASET].current.number == 1


def test_the_files_command_shows_twenty_and_names_the_next_page(fast_kaggle, dataset_folder):
    for number in range(25):
        (dataset_folder / f"part-{number:02d}").write_bytes(b"x")
    fast_kaggle.site.processing_calls = 0
    create(dataset_folder)
    code, printed, _ = run_kaggle("datasets", "files", "-v", DATASET)
    assert (code, len(printed.splitlines()), printed.splitlines()[0]) == (0, 22, "Next Page Token = 20")
    rest = run_kaggle("datasets", "files", "-v", "--page-token", "20", DATASET)[1]
    assert [line.split(",")[0] for line in rest.splitlines()[1:]] == [*(f"part-{n}" for n in range(19, 25)), "weights.bin"]


@pytest.mark.parametrize(
    "fault, ended, files",
    [
        (error_under_200("CreateDataset", "no"), (0, "Dataset creation error: no\n", ""), None),
        (Fault("CreateDataset", status=503, message="busy"), (1, "", "busy\n"), None),
        (Fault("CreateDataset", status=502), (1, "", f"502 Server Error: Bad Gateway for url: {CREATE}\n"), None),
        (
            Fault("CreateDataset", status=429, headers={"Retry-After": "0"}),
            (0, CREATED, f"Request failed: 429 Client Error: Too Many Requests for url: {CREATE}. Will retry in 0.0 seconds\n"),
            {"config.json": 2, "weights.bin": 10_240},
        ),
        (Fault("GetDatasetStatus", status=500), (0, CREATED, ""), {"config.json": 2, "weights.bin": 10_240}),
        (Fault("PUT", where="weights.bin", status=400), (0, CREATED, ""), {"config.json": 2}),
        (Fault("CreateDataset", loses=("config.json",)), (0, CREATED, ""), {"weights.bin": 10_240}),
        (Fault("CreateDataset", cuts=("config.json",)), (0, CREATED, ""), {"config.json": 1, "weights.bin": 10_240}),
    ],
)
def test_what_create_says_of_each_fault(fast_kaggle, dataset_folder, fault, ended, files):
    fast_kaggle.faults.append(fault)
    assert create(dataset_folder) == ended
    dataset = fast_kaggle.site.datasets.get(DATASET)
    assert (dataset and {name: len(content) for name, content in dataset.versions[0].files.items()}) == files
    assert fault.times == 0


def test_what_create_says_with_zero_where_it_did_nothing_or_not_all(fast_kaggle, dataset_folder):
    (dataset_folder / "sub").mkdir()
    code, printed, _ = run_kaggle("datasets", "create", "-p", dataset_folder)
    assert (code, "Skipping folder: sub; use '--dir-mode' to upload folders\n" in printed) == (0, True)
    taken = 'The requested title "tiny-package" is already in use by a dataset. Please choose another title.'
    assert create(dataset_folder) == (0, f"Dataset creation error: {taken}\n", "")
    assert fast_kaggle.uploaded_bytes() == 10_242
    fast_kaggle.site.storage_bytes_allowed = 20_000
    fast_kaggle.site.datasets[DATASET].versions[0].calls_left = 0
    said = run_kaggle("datasets", "version", "-q", "-m", "second", "-p", dataset_folder)
    assert said == (0, "Dataset version creation error: Your private datasets quota is exceeded\n", "")
    assert len(fast_kaggle.site.datasets[DATASET].versions) == 1


def test_a_dataset_whose_making_was_not_heard_of_is_made_and_called_a_failure(fast_kaggle, dataset_folder):
    fast_kaggle.faults.append(Fault("CreateDataset", loses_answer=True))
    code, printed, errors = create(dataset_folder)
    assert (code, printed) == (
        0,
        'Dataset creation error: The requested title "tiny-package" is already in use by a dataset.\n',
    )
    assert "Will retry in 0.8 seconds" in errors
    assert fast_kaggle.site.datasets[DATASET].versions[0].files == FILES


def test_a_connection_that_breaks_is_tried_again_from_the_first_byte(fast_kaggle, dataset_folder):
    fast_kaggle.faults.append(Fault("PUT", where="weights.bin", breaks_after_bytes=1000))
    assert create(dataset_folder) == (0, CREATED, "")
    assert [(r.asked["range"], r.bytes) for r in fast_kaggle.calls("PUT") if r.asked["name"] == "weights.bin"] == [
        ("", 1000),
        ("", 10_240),
    ]
    assert fast_kaggle.site.datasets[DATASET].versions[0].files == FILES


def test_an_upload_that_ends_in_503_goes_on_where_it_stopped(fast_kaggle, dataset_folder):
    fast_kaggle.faults.append(Fault("PUT", where="weights.bin", breaks_after_bytes=1000, status=503))
    code, printed, _ = run_kaggle("datasets", "create", "-p", dataset_folder)
    assert (code, "Already uploaded 999 bytes. Will resume upload at 1000.\n" in printed) == (0, True)
    assert [(r.asked["range"], r.bytes, r.status) for r in fast_kaggle.calls("PUT") if r.asked["name"] == "weights.bin"] == [
        ("", 1000, 503),
        ("bytes */10240", 0, 308),
        ("bytes 1000-10239/10240", 9240, 200),
    ]
    assert fast_kaggle.site.datasets[DATASET].versions[0].files == FILES


def test_a_kernel_is_pushed_read_back_followed_and_its_output_fetched(fast_kaggle, kernel_folder, tmp_path):
    assert run_kaggle("kernels", "push", "-p", kernel_folder) == (0, PUSHED, "")
    pushed = fast_kaggle.site.kernels[KERNEL].versions[0].pushed
    assert (pushed["text"], pushed["isPrivate"], pushed["enableGpu"]) == ("print(1)\n", True, True)
    assert (pushed["enableInternet"], pushed["machineShape"]) == (False, "NvidiaTeslaT4")
    assert run_kaggle("kernels", "pull", "-m", "-p", tmp_path / "pulled", KERNEL)[0] == 0
    pulled = json.loads((tmp_path / "pulled" / "kernel-metadata.json").read_text())
    assert {name: pulled[name] for name in ("id", "enable_gpu", "enable_internet", "machine_shape", "competition_sources")} == {
        "id": KERNEL,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "competition_sources": [WSDM],
    }
    assert run_kaggle("kernels", "status", KERNEL)[1] == f'{KERNEL} has status "KernelWorkerStatus.QUEUED"\n'
    assert run_kaggle("kernels", "logs", "-f", KERNEL) == (0, "scored 3 of 3 rows\nwrote submission.csv\n", "")
    assert run_kaggle("kernels", "status", KERNEL)[1] == f'{KERNEL} has status "KernelWorkerStatus.COMPLETE"\n'
    code, printed, _ = run_kaggle("kernels", "output", "-p", tmp_path / "output", KERNEL)
    assert (code, (tmp_path / "output" / "submission.csv").read_text()) == (0, "id,winner\n1,model_a\n")
    assert (tmp_path / "output" / "tiny-kernel.log").read_text() == "scored 3 of 3 rows\nwrote submission.csv\n"


INVALID = "The following are not valid {} sources and could not be added to the kernel: ['{}']\n"


@pytest.mark.parametrize(
    "metadata, printed, kept",
    [
        (
            {"dataset_sources": ["tester/absent"], "competition_sources": ["absent"], "kernel_sources": ["tester/absent"]},
            INVALID.format("dataset", "tester/absent")
            + INVALID.format("competition", "absent")
            + INVALID.format("kernel", "tester/absent")
            + PUSHED,
            {"datasetDataSources": [], "competitionDataSources": [], "kernelDataSources": []},
        ),
        ({"model_sources": ["google/gemma/transformers/absent/1"]}, PUSHED, {"modelDataSources": []}),
        (
            {"title": "Another Title"},
            "Your kernel title does not resolve to the specified id. This may result in surprising behavior. We suggest making "
            "your title something that resolves to the specified id. See https://en.wikipedia.org/wiki/Clean_URL#Slug for more "
            "information on how slugs are determined." + "\n" + PUSHED.replace("tiny-kernel", "another-title"),
            {},
        ),
    ],
    ids=["sources", "models, of which nothing is said", "title"],
)
def test_a_push_succeeds_without_what_it_named(fast_kaggle, kernel_folder, metadata, printed, kept):
    write_kernel_metadata(kernel_folder, **metadata)
    assert run_kaggle("kernels", "push", "-p", kernel_folder) == (0, printed, "")
    [kernel] = fast_kaggle.site.kernels.values()
    assert {name: kernel.versions[0].pushed[name] for name in kept} == kept


def test_a_push_that_is_refused_exits_with_zero(fast_kaggle, kernel_folder):
    fast_kaggle.faults.append(error_under_200("SaveKernel", "Maximum batch GPU session count of 2 reached"))
    said = run_kaggle("kernels", "push", "-p", kernel_folder)
    assert said == (0, "Kernel push error: Maximum batch GPU session count of 2 reached\n", "")
    fast_kaggle.site.gpu_seconds_used = 30 * 3600
    assert run_kaggle("quota", "-v")[1].splitlines()[1] == "GPU,30.00h,0.00h,30.00h,2026-01-03T00:00:00"
    said = run_kaggle("kernels", "push", "-p", kernel_folder)
    assert said == (0, "Kernel push error: Maximum weekly GPU quota of 30.00 hours reached\n", "")
    assert fast_kaggle.site.kernels == {}


def test_a_kernel_that_fails_says_why_and_exits_with_zero(fast_kaggle, kernel_folder):
    fast_kaggle.site.runs.append(Run(statuses=["ERROR"], failure="out of memory"))
    run_kaggle("kernels", "push", "-p", kernel_folder)
    said = f'{KERNEL} has status "KernelWorkerStatus.ERROR"\nFailure message: "out of memory"\n'
    assert run_kaggle("kernels", "status", KERNEL) == (0, said, "")
    assert run_kaggle("kernels", "status", "tester/absent")[0] == 1


def test_a_submission_is_made_scored_and_counted(fast_kaggle, kernel_folder):
    fast_kaggle.site.runs += [Run(statuses=["COMPLETE"]), Run(statuses=["COMPLETE"], output={})]
    fast_kaggle.site.scores.append(("0.701", "0.698"))
    fast_kaggle.site.scoring_calls, fast_kaggle.site.submissions_a_day = 1, 1
    for _ in range(2):
        run_kaggle("kernels", "push", "-p", kernel_folder)
    submit = ("competitions", "submit", WSDM, "-k", KERNEL, "-f", "submission.csv", "-m", "first, of two", "-v")
    assert run_kaggle(*submit, 2) == (1, "", "The kernel version has no output file submission.csv\n")
    done = f"0 submissions remaining today.\nSuccessfully submitted to {WSDM}"
    assert run_kaggle(*submit, 1) == (0, done, "")
    header, row = "ref,fileName,date,description,status,publicScore,privateScore\n", "1001,submission.csv,2026-01-01 00:01:00,"
    listing = ("competitions", "submissions", "-v", WSDM)
    assert run_kaggle(*listing) == (0, f'{header}{row}"first, of two",SubmissionStatus.PENDING,,\n', "")
    assert run_kaggle(*listing) == (0, f'{header}{row}"first, of two",SubmissionStatus.COMPLETE,0.701,0.698\n', "")
    used_up = "Your team has used its daily Submission allowance (1) today\n"
    assert run_kaggle(*submit, 1) == (1, "", used_up)
    assert run_kaggle("competitions", "submission-limits", WSDM)[1].splitlines()[-1] == "Remaining today: 0"
    [submission] = fast_kaggle.site.submissions
    assert (submission.kernel, submission.kernel_version, submission.description) == (KERNEL, 1, "first, of two")


def test_kernels_datasets_competitions_and_their_files_are_listed(fast_kaggle, kernel_folder, dataset_folder):
    fast_kaggle.site.processing_calls = 0
    create(dataset_folder)
    run_kaggle("kernels", "push", "-p", kernel_folder)
    assert run_kaggle("kernels", "list", "-m", "-v")[1].splitlines()[1] == f"{KERNEL},Tiny Kernel,tester,2026-01-01 00:00:00,0"
    assert run_kaggle("datasets", "list", "-m", "-v")[1].splitlines()[1].startswith(f"{DATASET},tiny-package,10242,")
    assert run_kaggle("competitions", "files", "-v", WSDM)[1].splitlines()[1] == "test.parquet,3,2026-01-01 00:00:00"
    assert WSDM in run_kaggle("competitions", "list", "-v")[1]


def test_a_wrong_token_is_no_login(fast_kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "another")
    code, printed, _ = run_kaggle("datasets", "status", DATASET)
    assert (code, "kaggle auth login" in printed) == (1, True)
    assert {request.call for request in fast_kaggle.requests} == {"IntrospectToken"}


def test_an_output_file_that_is_an_error_page_is_kept_as_the_file(fast_kaggle, kernel_folder, tmp_path):
    fast_kaggle.site.runs.append(Run(statuses=["COMPLETE"]))
    run_kaggle("kernels", "push", "-p", kernel_folder)
    fast_kaggle.faults.append(Fault("GET", where="submission.csv", status=503))
    assert run_kaggle("kernels", "output", "-p", tmp_path / "output", KERNEL)[0] == 0
    assert (tmp_path / "output" / "submission.csv").read_text() == "<html></html>"
