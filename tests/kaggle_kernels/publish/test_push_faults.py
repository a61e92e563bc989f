"""push against a stand-in at fault: mended by the same push, or one line, exit code 2 and a second push that completes it.

What is there is never sent twice: the stand-in counts the bytes. In every test each file's hash is compared at the end.
"""

import copy
import os
import shutil
import subprocess
import sys

import pytest

from kaggle_kernels.build.spec import find_spec
from tests.conftest import ROOT
from tests.fakes.kaggle.server import Fault, error_under_200
from tests.fakes.kaggle.site import WSDM, Site
from tests.kaggle_kernels.publish.pushes import (
    DATASET,
    FAST,
    KERNEL,
    SMALL,
    bytes_of,
    call,
    check_whole,
    error_of,
    pretend_ready,
)

DENIED = "Permission 'datasets.create' was denied"
WEIGHTS, WEIGHT_BYTES, CONFIG_BYTES = "model.safetensors", 20_000, 22


def case(name: str, *values, slow: bool = True):
    """A case of a parametrised test; `make test` leaves the slow ones out."""
    return pytest.param(*values, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    "faults, more_bytes",
    [
        case(
            "each call fails once",
            [
                *(Fault(name, status=500) for name in ("GetDatasetStatus", "ListDatasetFiles", "GetKernel", "DownloadDataset")),
                *(Fault(name, status=429) for name in ("StartBlobUpload", "CreateDataset", "SaveKernel")),
                Fault("IntrospectToken", status=503, times=2),
                Fault("GetDatasetStatus", seconds=0.5),
                Fault("PUT", where=WEIGHTS, breaks_after_bytes=5000, status=503),
            ],
            0,
            slow=False,
        ),
        case("lost answers", [Fault(name, loses_answer=True) for name in ("CreateDataset", "SaveKernel")], 0),
        case("a 503 of Kaggle's own", [Fault("CreateDataset", status=503, message="Service Unavailable")], 0),
        case("a broken connection", [Fault("PUT", where=WEIGHTS, breaks_after_bytes=5000)], 5000),
        case("a refused file", [Fault("PUT", where=WEIGHTS, status=400, times=2)], 2 * WEIGHT_BYTES),
        case(
            "a file lost and one cut",
            [Fault("CreateDataset", loses=(WEIGHTS,), cuts=("config.json",))],
            WEIGHT_BYTES + CONFIG_BYTES,
        ),
    ],
)
def test_a_fault_that_passes_is_mended_by_the_same_push(small, faults, more_bytes):
    kaggle, folders = small
    kaggle.faults += copy.deepcopy(faults)
    pushed = call("push", SMALL)
    assert pushed.exit_code == 0, pushed.output
    assert [fault.call for fault in kaggle.faults if fault.times] == []
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == bytes_of(*folders.values()) + more_bytes
    [source] = kaggle.site.kernels[KERNEL].versions[-1].pushed["datasetDataSources"]
    assert source == f"{DATASET}/{len(kaggle.site.datasets[DATASET].versions)}"


def order(*faults: Fault):
    return lambda kaggle: kaggle.faults.extend(copy.deepcopy(faults))


def set_site(**values):
    return lambda kaggle: vars(kaggle.site).update(values)


@pytest.mark.parametrize(
    "spoil, told",
    [
        case(
            "error under 200",
            order(error_under_200("CreateDataset", "Your account is not verified")),
            f"error: {DATASET}: Your account is not verified; mend that, then run this again: what went up is not sent twice",
            slow=False,
        ),
        case("403", order(Fault("CreateDataset", status=403, message=DENIED, times=99)), f"{DATASET}: {DENIED}"),
        case("503", order(Fault("CreateDataset", status=503, times=99)), "503 Server Error: Service Unavailable"),
        case("storage", set_site(storage_bytes_allowed=20_000), "private datasets quota is exceeded"),
        case(
            "processing",
            set_site(processing_calls=10**6),
            "blobs received after 1 s; run this again, which goes on waiting: nothing goes up twice",
        ),
        case("GPU hours", set_site(gpu_seconds_used=10**6), "Maximum weekly GPU quota of 30.00 hours"),
        case("competition", set_site(competitions=set()), f"competition sources ['{WSDM}']: not accepted"),
        case(
            "dataset source",
            order(Fault("SaveKernel", answer={"invalidDatasetSources": [f"{DATASET}/1"]})),
            f"dataset sources ['{DATASET}/1']: not accepted",
        ),
        case(
            "internet",
            order(Fault("GetKernel", answer={"metadata": {"enableInternet": True}}, times=99)),
            "enable_internet is true in place of false; run push again",
        ),
    ],
)
def test_a_fault_that_lasts_is_one_line_and_once_mended_the_same_push_sends_nothing_twice(small, spoil, told):
    kaggle, folders = small
    spoil(kaggle)
    assert told in error_of(call("push", SMALL, "--patience-seconds", "1"))
    kaggle.faults.clear()
    whole = {name: getattr(Site(), name) for name in ("storage_bytes_allowed", "gpu_seconds_used", "competitions")}
    set_site(**whole)(kaggle)
    for dataset in kaggle.site.datasets.values():
        dataset.versions[-1].calls_left = 0
    again = call("push", SMALL)
    assert again.exit_code == 0, again.output
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == bytes_of(*folders.values())
    assert [version.number for version in kaggle.site.datasets[DATASET].versions] == [1]
    assert kaggle.site.kernels[KERNEL].versions[-1].pushed["competitionDataSources"] == [WSDM]


def test_a_push_killed_in_an_upload_goes_on_where_it_stopped_when_it_runs_again(small):
    kaggle, folders = small
    kaggle.faults.append(Fault("PUT", where=WEIGHTS, breaks_after_bytes=5000, stalls=True))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-m", "kaggle_kernels", "push", SMALL, *FAST], env=environment)
    assert kaggle.stalled.wait(60)
    killed.kill()
    killed.wait()
    assert kaggle.site.datasets == {}
    again = call("push", SMALL)
    assert again.exit_code == 0, again.output
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == bytes_of(*folders.values())
    assert ("bytes 5000-19999/20000", 15_000) in [(put.asked["range"], put.bytes) for put in kaggle.calls("PUT")]


@pytest.mark.slow
def test_a_version_that_kaggle_could_not_process_is_told_and_followed_by_another(small):
    kaggle, folders = small
    kaggle.site.processing_ends = "FAILED"
    assert "sent twice, and still config.json was not processed" in error_of(call("push", SMALL))
    kaggle.site.processing_ends = "READY"
    again = call("push", SMALL)
    assert again.exit_code == 0, again.output
    check_whole(kaggle, folders)


@pytest.mark.slow
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
