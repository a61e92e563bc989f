"""push against a stand-in at fault: mended by the same push, or one line, exit code 2 and a second push that completes it.

What is there is never sent twice: the stand-in counts the bytes. In every test each file's hash is compared at the end.
"""

import os
import subprocess
import sys

from tests.conftest import ROOT
from tests.fakes.kaggle.server import Fault
from tests.kaggle_kernels.publish.pushes import DATASET, FAST, KERNEL, SMALL, bytes_of, call, check_whole, error_of

DENIED = "Permission 'datasets.create' was denied"
WEIGHTS = "model.safetensors"


def test_calls_that_fail_once_are_mended_by_the_same_push(small):
    kaggle, folders = small
    reads = ("GetDatasetStatus", "ListDatasetFiles", "GetKernel", "DownloadDataset")
    kaggle.faults += [Fault(name, status=500) for name in reads]
    kaggle.faults += [Fault(name, status=429) for name in ("StartBlobUpload", "CreateDataset", "SaveKernel")]
    kaggle.faults += [
        Fault("IntrospectToken", status=503, times=2),
        Fault("GetDatasetStatus", seconds=0.5),
        Fault("PUT", where=WEIGHTS, breaks_after_bytes=5000, status=503),
        Fault("SaveKernel", loses_answer=True),
    ]
    pushed = call("push", SMALL)
    assert pushed.exit_code == 0, pushed.output
    assert [fault.call for fault in kaggle.faults if fault.times] == []
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == bytes_of(*folders.values())
    [source] = kaggle.site.kernels[KERNEL].versions[-1].pushed["datasetDataSources"]
    assert source == f"{DATASET}/1"


def test_a_fault_that_lasts_is_one_line_and_once_mended_the_same_push_sends_nothing_twice(small):
    kaggle, folders = small
    kaggle.faults.append(Fault("CreateDataset", status=403, message=DENIED, times=99))
    assert f"{DATASET}: {DENIED}" in error_of(call("push", SMALL, "--patience-seconds", "1"))
    kaggle.faults.clear()
    second = call("push", SMALL)
    assert second.exit_code == 0, second.output
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == bytes_of(*folders.values())
    assert [version.number for version in kaggle.site.datasets[DATASET].versions] == [1]


def test_a_push_killed_in_an_upload_goes_on_where_it_stopped_when_it_runs_again(small):
    kaggle, folders = small
    kaggle.faults.append(Fault("PUT", where=WEIGHTS, breaks_after_bytes=5000, stalls=True))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-m", "kaggle_kernels", "push", SMALL, *FAST], env=environment)
    assert kaggle.stalled.wait(60)
    killed.kill()
    killed.wait(10)
    assert kaggle.hung_up.wait(10), "the kaggle command ends with us"
    assert kaggle.site.datasets == {}
    second = call("push", SMALL)
    assert second.exit_code == 0, second.output
    check_whole(kaggle, folders)
    assert kaggle.uploaded_bytes() == bytes_of(*folders.values())
    assert ("bytes 5000-19999/20000", 15_000) in [(put.asked["range"], put.bytes) for put in kaggle.calls("PUT")]
