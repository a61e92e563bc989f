"""The folders stay what Kaggle's own command takes: driven once over them, as docs/publishing.md says."""

import subprocess
import sys
from pathlib import Path

from kaggle_kernels.build.bundle import kernel_folder
from kaggle_kernels.build.spec import find_spec
from preprocess.competitions import COMPETITIONS
from tests.fakes.kaggle.site import Run
from tests.kaggle_kernels.publish.pushes import DATASET, KERNEL, SMALL, check_whole, output_of

COMPETITION = COMPETITIONS["wsdm"].slug


def kaggle_command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-m", "kaggle", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kaggles_own_command_publishes_and_submits_the_same_folders(small):
    kaggle, folders = small
    kaggle.site.runs.append(Run(statuses=["COMPLETE"], output=output_of(find_spec(SMALL))))
    [package] = folders.values()
    kernel = kernel_folder(find_spec(SMALL))
    for file in (package / "dataset-metadata.json", kernel / "kernel-metadata.json"):
        file.write_text(file.read_text().replace("INSERT_OWNER", "tester"))

    assert "is being created" in kaggle_command("datasets", "create", "-p", str(package))
    check_whole(kaggle, folders)
    assert kaggle.site.datasets[DATASET].is_private
    assert "Kernel version 1 successfully pushed" in kaggle_command("kernels", "push", "-p", str(kernel))
    [version] = kaggle.site.kernels[KERNEL].versions
    assert version.pushed["text"] == Path(kernel / "kernel.py").read_text()
    assert (version.pushed["datasetDataSources"], version.pushed["enableInternet"]) == ([DATASET], False)
    submit = ("competitions", "submit", COMPETITION, "-k", KERNEL, "-v", "1", "-f", "submission.csv", "-m", "by hand")
    kaggle_command(*submit)
    assert [submission.description for submission in kaggle.site.submissions] == ["by hand"]
