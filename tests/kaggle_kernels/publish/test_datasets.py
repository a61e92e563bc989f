"""A folder becomes a dataset on the stand-in, whatever goes wrong on the way."""

import random

import pytest

from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.datasets import RemoteDataset, publish_dataset
from kaggle_kernels.publish.uploads import WORK, find_dataset_folder
from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from tests.fakes.kaggle.server import Fault, error_under_200
from tests.fakes.kaggle.site import Dataset, Version
from tests.kaggle_kernels.publish.pushes import files_of, make_folder

FAST = Pace(poll_seconds=0.02, patience_seconds=30)
REF = "tester/tiny-two"


@pytest.fixture
def folder(tmp_path, monkeypatch, kaggle):
    """A package of 200 KB in the current folder; Kaggle processes it at once."""
    monkeypatch.chdir(tmp_path)
    kaggle.site.processing_calls = 0
    weights = random.Random(1).randbytes(200_000)
    return make_folder(tmp_path / "outputs/two/package", model__safetensors=weights, config__json=b"{}")


def publish(folder, pace=FAST):
    return publish_dataset(connect(pace), find_dataset_folder(folder, "tester"))


def check_whole(kaggle, folder):
    """The dataset's current version is the folder."""
    assert kaggle.site.datasets[REF].current.sha256() == {path.name: sha256(path) for path in files_of(folder)}


def test_new_then_unchanged_then_a_new_version(folder, kaggle, capsys):
    kaggle.site.processing_calls = 1
    made = publish(folder)
    assert made == {"version": 1, "manifest": sha256(folder / "manifest.json")}
    assert (kaggle.site.datasets[REF].is_private, kaggle.site.datasets[REF].licence) == (True, "apache-2.0")
    check_whole(kaggle, folder)
    assert not (WORK / "tiny-two").exists()
    assert publish(folder) == made
    assert len(kaggle.calls("StartBlobUpload")) == 3
    assert f"{REF}: unchanged, version 1" in capsys.readouterr().out

    make_folder(folder, config__json=b"[]")
    assert publish(folder)["version"] == 2
    check_whole(kaggle, folder)


FILES_LOST = {"loses": ("config.json",), "cuts": ("model.safetensors",)}


@pytest.mark.parametrize(
    "fault, problem, files_sent_again",
    [
        (Fault("PUT", where="config.json", status=400), "config.json: the upload was refused", 1),
        (Fault("CreateDataset", status=503), "Kaggle: CreateDataset: 503 ", 0),
        (error_under_200("CreateDataset", "Your quota is exceeded"), "Your quota is exceeded; mend that, then run this", 0),
        (Fault("CreateDataset", **FILES_LOST), "config.json is missing, model.safetensors has 199999 bytes in place of", 2),
    ],
    ids=["a refused file", "no answer", "an error under 200", "lost files"],
)
def test_a_fault_is_one_error_and_the_next_push_sends_only_what_is_lacking(folder, kaggle, fault, problem, files_sent_again):
    kaggle.faults.append(fault)
    with pytest.raises(UserError, match=problem):
        publish(folder)
    publish(folder)
    check_whole(kaggle, folder)
    assert len(kaggle.calls("StartBlobUpload")) == 3 + files_sent_again


@pytest.mark.parametrize("name", ["CreateDataset", "CreateDatasetVersion"])
def test_a_lost_answer_makes_no_second_version(folder, kaggle, name):
    kaggle.site.processing_calls = 2
    if name == "CreateDatasetVersion":
        publish(folder)
        make_folder(folder, config__json=b"[1]")
    kaggle.faults.append(Fault(name, loses_answer=True))
    with pytest.raises(UserError, match=f"Kaggle: {name}: no connection, or it broke off"):
        publish(folder)
    publish(folder)
    check_whole(kaggle, folder)
    assert len(kaggle.calls(name)) == 1


def test_a_version_that_cannot_be_processed_is_sent_anew(folder, kaggle):
    kaggle.site.processing_ends = "FAILED"
    with pytest.raises(UserError, match="config.json was not processed, "):
        publish(folder)
    kaggle.site.processing_ends = "READY"
    assert publish(folder)["version"] == 2
    check_whole(kaggle, folder)


def test_files_that_kaggle_forgot_are_sent_anew(folder, kaggle):
    kaggle.faults.append(error_under_200("CreateDataset", "no"))
    with pytest.raises(UserError):
        publish(folder)
    kaggle.site.blobs.clear()
    with pytest.raises(UserError, match="A file's token is unknown, .*; run this again, which sends every file anew"):
        publish(folder)
    publish(folder)
    check_whole(kaggle, folder)


def test_a_version_is_awaited_that_is_newer_than_the_last():
    assert [RemoteDataset("ready", version, True).has_settled(2) for version in (2, 3)] == [False, True]


def test_a_busy_dataset_and_a_slow_one_end_well(folder, kaggle):
    publish(folder)
    make_folder(folder, config__json=b"[1]")
    kaggle.faults.append(Fault("CreateDatasetVersion", status=403, message="Permission 'datasets.update' was denied"))
    with pytest.raises(UserError, match="was denied; perhaps another version is still processed: run this again"):
        publish(folder)
    kaggle.site.processing_calls = 10**6
    with pytest.raises(UserError, match="blobs received after 0.2 s; run this again, which goes on waiting: nothing goes up"):
        publish(folder, Pace(0.02, 0.2))
    kaggle.site.datasets[REF].versions[-1].calls_left = 1
    sent = kaggle.uploaded_bytes()
    assert publish(folder)["version"] == 2
    assert kaggle.uploaded_bytes() == sent


def test_a_dataset_that_is_public_gets_nothing_and_one_that_comes_out_public_is_told(folder, kaggle):
    old = Version(1, {"old.txt": b"old"}, 0)
    kaggle.site.datasets[REF] = Dataset(REF, "other", False, [old])
    with pytest.raises(UserError, match=f"{REF}: is public on Kaggle; make it private"):
        publish(folder)
    assert kaggle.calls("StartBlobUpload") == []
    del kaggle.site.datasets[REF]
    kaggle.faults.append(Fault("GetDataset", answer={"isPrivate": False}, times=9))
    with pytest.raises(UserError, match=f"{REF}: is public on Kaggle; make it private"):
        publish(folder)
