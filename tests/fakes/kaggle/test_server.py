"""The real kaggle command against the stand-in: what it prints, and how often it exits with 0 where nothing was done.

Whoever drives the command must know these lines; a new version of it may change them.
"""

import json
import subprocess
from pathlib import Path

import pytest

from kaggle_kernels.publish import client
from tests.fakes.kaggle.site import WSDM, Run

DATASET, KERNEL = "tester/tiny-package", "tester/tiny-kernel"
FILES = {"config.json": b"{}", "weights.bin": bytes(range(256)) * 40}
CREATED = (
    "Your private Dataset is being created. Please check progress at https://www.kaggle.com/datasets/tester/tiny-package\n"
)


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
    dataset = fast_kaggle.site.datasets[DATASET]
    assert (dataset.title, dataset.licence, dataset.is_private) == ("tiny-package", "apache-2.0", True)
    assert dataset.versions[0].files == FILES
    assert run_kaggle("datasets", "status", DATASET) == (0, "blobs_received", "")
    status = run_kaggle("datasets", "status", DATASET, "--format", "json")
    assert status == (0, '{"status": "ready", "current_version_number": 1}', "")
    first_page = run_kaggle("datasets", "files", "-v", "--page-size", "1", DATASET)[1]
    assert first_page == "Next Page Token = 1\nname,size,creationDate\nconfig.json,2,2026-01-01 00:00:00\n"
    assert run_kaggle("datasets", "download", "-q", "-f", "weights.bin", "-p", tmp_path, DATASET)[0] == 0
    assert (tmp_path / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert (fast_kaggle.uploaded_bytes(), fast_kaggle.uploaded_bytes("weights.bin")) == (10_242, 10_240)


def test_a_next_version_is_refused_while_the_last_is_processed_and_only_after_everything_went_up(fast_kaggle, dataset_folder):
    assert create(dataset_folder) == (0, CREATED, "")
    version = ("datasets", "version", "-m", "second", "-q", "-p", dataset_folder)
    assert run_kaggle(*version) == (1, "", "Permission 'datasets.update' was denied\n")
    assert fast_kaggle.uploaded_bytes("weights.bin") == 2 * 10_240
    dataset = fast_kaggle.site.datasets[DATASET]
    dataset.versions[0].calls_left = 0
    fast_kaggle.site.storage_bytes_allowed = 20_000
    assert run_kaggle(*version) == (0, "Dataset version creation error: Your private datasets quota is exceeded\n", "")
    fast_kaggle.site.storage_bytes_allowed = 30_000
    assert run_kaggle(*version) == (0, CREATED.replace("Your private Dataset", "Dataset version"), "")
    assert [(version.number, version.notes) for version in dataset.versions] == [(1, "Initial release"), (2, "second")]
    assert dataset.current.number == 1


INVALID = "The following are not valid {} sources and could not be added to the kernel: ['{}']"


@pytest.mark.parametrize(
    "metadata, printed, kept",
    [
        (
            {"dataset_sources": ["tester/absent"], "competition_sources": ["absent"]},
            [INVALID.format("dataset", "tester/absent"), INVALID.format("competition", "absent")],
            {"datasetDataSources": [], "competitionDataSources": []},
        ),
        ({"model_sources": ["google/gemma/transformers/absent/1"]}, [], {"modelDataSources": []}),
        ({"title": "Another Title"}, ["Your kernel title does not resolve to the specified id."], {}),
    ],
    ids=["sources", "models, of which nothing is said", "title"],
)
def test_a_push_succeeds_without_what_it_named(fast_kaggle, kernel_folder, metadata, printed, kept):
    write_kernel_metadata(kernel_folder, **metadata)
    code, lines, _ = run_kaggle("kernels", "push", "-p", kernel_folder)
    assert code == 0
    *told, pushed = lines.splitlines()
    assert [line[: len(start)] for line, start in zip(told, printed, strict=True)] == printed
    assert pushed.startswith(
        "Kernel version 1 successfully pushed.  Please check progress at https://www.kaggle.com/code/tester/"
    )
    [kernel] = fast_kaggle.site.kernels.values()
    assert {name: kernel.versions[0].pushed[name] for name in kept} == kept


def test_a_push_that_is_refused_exits_with_zero(fast_kaggle, kernel_folder):
    fast_kaggle.site.gpu_seconds_used = 30 * 3600
    said = run_kaggle("kernels", "push", "-p", kernel_folder)
    assert said == (0, "Kernel push error: Maximum weekly GPU quota of 30.00 hours reached\n", "")
    assert fast_kaggle.site.kernels == {}


def test_a_submission_is_made_and_counted(fast_kaggle, kernel_folder):
    fast_kaggle.site.runs += [Run(statuses=["COMPLETE"]), Run(statuses=["COMPLETE"], output={})]
    fast_kaggle.site.submissions_a_day = 1
    for _ in range(2):
        run_kaggle("kernels", "push", "-p", kernel_folder)
    submit = ("competitions", "submit", WSDM, "-k", KERNEL, "-f", "submission.csv", "-m", "first, of two", "-v")
    assert run_kaggle(*submit, 2) == (1, "", "The kernel version has no output file submission.csv\n")
    assert run_kaggle(*submit, 1) == (0, f"0 submissions remaining today.\nSuccessfully submitted to {WSDM}", "")
    used_up = "Your team has used its daily Submission allowance (1) today\n"
    assert run_kaggle(*submit, 1) == (1, "", used_up)
    assert run_kaggle("competitions", "submission-limits", WSDM)[1].splitlines()[-1] == "Remaining today: 0"
    [submission] = fast_kaggle.site.submissions
    assert (submission.kernel, submission.kernel_version, submission.description) == (KERNEL, 1, "first, of two")
