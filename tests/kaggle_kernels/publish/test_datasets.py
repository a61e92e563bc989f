"""A folder becomes a dataset on the stand-in, whatever goes wrong on the way."""

import random

import pytest

from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.datasets import RemoteDataset, plan_dataset, publish_dataset
from kaggle_kernels.publish.uploads import WORK, find_dataset_folder
from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from tests.fakes.kaggle.server import Fault
from tests.fakes.kaggle.site import Dataset, Version
from tests.kaggle_kernels.publish.pushes import files_of, make_folder

FAST = Pace(poll_seconds=0.02, patience_seconds=30)
REF = "tester/tiny-two"
CREATING = ("CreateDataset", "CreateDatasetVersion")


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

    make_folder(folder, config__json=b"[]")
    assert plan_dataset(connect(FAST), find_dataset_folder(folder, "tester")) == (2, True)
    assert publish(folder)["version"] == 2
    check_whole(kaggle, folder)
    assert f"{REF}: unchanged, version 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_no_dataset_is_asked_for_before_every_file_is_there(folder, kaggle, name):
    kaggle.faults.append(Fault("PUT", where=name, status=400, times=9))
    with pytest.raises(UserError, match=f"{name}: the upload was refused 3 times"):
        publish(folder)
    assert kaggle.calls("CreateDataset") == []
    kaggle.faults.clear()
    assert publish(folder)["version"] == 1
    [request] = kaggle.calls("CreateDataset")
    assert len(request.fields["files"]) == 3
    check_whole(kaggle, folder)


def test_a_version_without_a_file_or_with_a_part_of_one_is_followed_by_one_more(folder, kaggle, capsys):
    kaggle.faults.append(Fault("CreateDataset", loses=("config.json",), cuts=("model.safetensors",)))
    assert publish(folder)["version"] == 2
    check_whole(kaggle, folder)
    assert "config.json is missing, model.safetensors has 199999 bytes in place of 200000" in capsys.readouterr().out
    assert len(kaggle.calls("StartBlobUpload")) == 3 + 2, "the manifest came whole, and is not sent twice"


@pytest.mark.parametrize("ends, problem", [("READY", "is missing; run this again later"), ("FAILED", "was not processed, ")])
def test_files_that_are_lost_twice_are_one_error_and_sent_anew_by_the_next_push(folder, kaggle, ends, problem):
    kaggle.site.processing_ends = ends
    kaggle.faults += [Fault(name, loses=("config.json",)) for name in CREATING]
    with pytest.raises(UserError, match=f"{REF}: sent twice, and still config.json {problem}"):
        publish(folder)
    kaggle.site.processing_ends = "READY"
    assert publish(folder)["version"] == 3
    check_whole(kaggle, folder)


def test_a_version_is_awaited_that_is_newer_than_the_last():
    assert [RemoteDataset("ready", version, True).has_settled(2) for version in (2, 3)] == [False, True]


@pytest.mark.parametrize("has_expired", [False, True])
def test_a_refused_dataset_is_one_error_and_sent_twice_only_where_kaggle_forgot_its_files(folder, kaggle, has_expired):
    kaggle.site.storage_bytes_allowed = 1000
    with pytest.raises(UserError, match=f"{REF}: Your private datasets quota is exceeded; mend that, then run this"):
        publish(folder)
    kaggle.site.storage_bytes_allowed = 10**9
    if has_expired:
        kaggle.site.blobs.clear()
    assert publish(folder)["version"] == 1
    check_whole(kaggle, folder)
    assert len(kaggle.calls("StartBlobUpload")) == (6 if has_expired else 3)


@pytest.mark.parametrize("fault", [{"loses_answer": True}, {"status": 503}], ids=["a lost answer", "a gateway's error"])
def test_a_call_without_an_answer_makes_no_second_version(folder, kaggle, fault):
    kaggle.site.processing_calls = 2
    kaggle.faults += [Fault(name, **fault) for name in CREATING]
    for version in (1, 2):
        make_folder(folder, config__json=f"[{version}]".encode())
        if "status" in fault:
            # It was not made, which nobody can know: the next call looks first.
            with pytest.raises(UserError, match="Kaggle: CreateDataset(Version)?: 503 "):
                publish(folder)
        assert publish(folder)["version"] == version
    assert [version.number for version in kaggle.site.datasets[REF].versions] == [1, 2]
    check_whole(kaggle, folder)


def test_a_busy_dataset_and_a_slow_one_end_well(folder, kaggle):
    publish(folder)
    make_folder(folder, config__json=b"[1]")
    denied = Fault("CreateDatasetVersion", status=403, message="Permission 'datasets.update' was denied", times=4)
    kaggle.faults += [denied, Fault("GetDatasetStatus", status=429, message="Too Many Requests")]
    kaggle.site.processing_calls = 10**6
    with pytest.raises(UserError, match="blobs received after 0.2 s; run this again, which goes on waiting: nothing goes up"):
        publish(folder, Pace(0.02, 0.2))
    kaggle.site.datasets[REF].versions[-1].calls_left = 1
    sent = kaggle.uploaded_bytes()
    assert publish(folder)["version"] == 2
    assert kaggle.uploaded_bytes() == sent
    assert len(kaggle.calls("CreateDatasetVersion")) == 4 + 1


def test_a_dataset_that_is_public_gets_nothing_and_one_that_comes_out_public_is_told(folder, kaggle):
    old = Version(1, "", {"old.txt": b"old"}, 0)
    kaggle.site.datasets[REF] = Dataset(REF, "tiny-two", "other", False, [old])
    with pytest.raises(UserError, match=f"{REF}: is public on Kaggle; make it private"):
        publish(folder)
    assert kaggle.calls("StartBlobUpload") == []
    del kaggle.site.datasets[REF]
    kaggle.faults.append(Fault("GetDataset", answer={"isPrivate": False}, times=9))
    with pytest.raises(UserError, match=f"{REF}: is public on Kaggle; make it private"):
        publish(folder)
