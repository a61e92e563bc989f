"""`smoke` against the stand-in: every call made once for real, everything deleted."""

from tests.fakes.kaggle.site import Run
from tests.kaggle_kernels.publish.pushes import call, error_of


def test_everything_is_tried_and_deleted(here):
    here.site.runs.append(Run(output={"files.txt": b"data.bin\nmanifest.json"}))
    done = call("smoke", "--yes")
    assert done.exit_code == 0, done.output
    assert (here.site.datasets, here.site.kernels) == ({}, {})
    [request] = here.calls("SaveKernel")
    assert (request.asked["enableGpu"], request.asked["enableInternet"]) == (False, False)

    [source] = request.asked["datasetDataSources"]
    assert source.endswith("/2")
    calls_made = {request.call for request in here.requests}
    assert calls_made >= {"CreateDataset", "CreateDatasetVersion", "ListKernelSessionOutput", "DeleteDataset", "DeleteKernel"}


def test_what_was_made_is_deleted_where_the_kernel_fails(here):
    here.site.runs.append(Run(statuses=["ERROR"], failure="no such dataset"))
    assert "ERROR, expected COMPLETE: no such dataset" in error_of(call("smoke", "--yes"))
    assert (here.site.datasets, here.site.kernels) == ({}, {})


def test_nothing_is_made_where_nobody_agrees(here):
    assert error_of(call("smoke")).endswith("nothing was made")
    assert here.calls("CreateDataset") == []
