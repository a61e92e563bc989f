"""push, status, submit and scores against the stand-in: every spec."""

import re

import pytest

from kaggle_kernels.build.bundle import kernel_folder
from kaggle_kernels.build.spec import all_specs, find_spec, read_spec
from preprocess.competitions import COMPETITIONS
from preprocess.core import ledger
from tests.fakes.kaggle.site import Run
from tests.kaggle_kernels.publish.pushes import bytes_of, call, check_whole, output_of, pretend_ready

NAMES = [path.stem for path in all_specs()]
IN_EVERY_TEST_RUN = ("gemma2_llama3", "gemma2_lmsys")  # two packages and wheels; the other competition


@pytest.mark.parametrize(
    "name",
    [*IN_EVERY_TEST_RUN, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in IN_EVERY_TEST_RUN)],
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
    assert re.findall(r"0\.\d{4}", scores.output) == ["0.7123", "0.7045"], scores.output

    again = call("push", name)
    assert again.exit_code == 0, again.output
    assert (here.uploaded_bytes(), len(here.site.kernels[f"tester/{spec.slug}"].versions)) == (bytes_of(*folders.values()), 1)
