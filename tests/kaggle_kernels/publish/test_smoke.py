"""`smoke` against the stand-in: every call made once for real, everything deleted, a transcript without names."""

from kaggle_kernels.publish.smoke import TRANSCRIPT
from preprocess.core.files import read_json
from tests.fakes.kaggle.site import TOKEN, Run
from tests.kaggle_kernels.publish.pushes import call, error_of


def test_everything_is_tried_deleted_and_written_down_without_names(here):
    here.site.runs.append(Run(output={"files.txt": b"data.bin\nmanifest.json"}))
    done = call("smoke", "--yes")
    assert done.exit_code == 0, done.output
    assert (here.site.datasets, here.site.kernels) == ({}, {})
    [request] = here.calls("SaveKernel")
    assert (request.fields["enableGpu"], request.fields["enableInternet"]) == (False, False)

    transcript = read_json(TRANSCRIPT)
    answered = {exchange["call"].split("/")[-1] for exchange in transcript}
    assert answered >= {"CreateDataset", "CreateDatasetVersion", "SaveKernel", "ListKernelSessionOutput", "DeleteDataset"}
    text = TRANSCRIPT.read_text()
    assert "USER/SLUG/2" in text
    assert [name for name in ("tester", TOKEN, "uploads/") if name in text] == []


def test_what_was_made_is_deleted_where_the_kernel_fails(here):
    here.site.runs.append(Run(statuses=["ERROR"], failure="no such dataset"))
    assert "ERROR, expected COMPLETE: no such dataset" in error_of(call("smoke", "--yes"))
    assert (here.site.datasets, here.site.kernels) == ({}, {})


def test_nothing_is_made_where_nobody_agrees(here):
    assert error_of(call("smoke")).endswith("nothing was made")
    assert here.calls("CreateDataset") == []
