"""A folder becomes a dataset by the real kaggle command against the stand-in, whatever goes wrong on the way."""

import json
import random

import pytest

from kaggle_kernels.publish.client import Answer, Pace
from kaggle_kernels.publish.dataset_state import Remote
from kaggle_kernels.publish.datasets import find_dataset, plan_dataset, publish_dataset
from kaggle_kernels.publish.upload import WORK, has_arrived, stale_notes, upload
from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from tests.fakes.kaggle.server import Fault
from tests.fakes.kaggle.site import Dataset, Version

FAST = Pace(poll_seconds=0.02, patience_seconds=30)
WEIGHTS = random.Random(1).randbytes(2_000_000)


def make_folder(folder, slug="tiny-two", manifest="manifest.json", **contents):
    """A folder as packages and wheels are: files, metadata with the placeholder, a manifest with every file's hash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    metadata = {"title": slug, "id": f"INSERT_OWNER/{slug}", "licenses": [{"name": "apache-2.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata))
    listed = [path for path in sorted(folder.iterdir()) if path.name != manifest]
    files = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in listed}
    (folder / manifest).write_text(json.dumps({"files": files}))
    return folder


def hashes(folder):
    """What a dataset of the folder holds."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "dataset-metadata.json"}


@pytest.fixture
def folder(tmp_path, monkeypatch, fast_kaggle):
    """A package of 2 MB in the current folder; Kaggle processes it at once."""
    monkeypatch.chdir(tmp_path)
    fast_kaggle.site.processing_calls = 0
    return make_folder(tmp_path / "outputs/two/package", model__safetensors=WEIGHTS, config__json=b"{}")


def publish(folder):
    return publish_dataset(find_dataset(folder, "tester"), FAST)


def current(kaggle, ref="tester/tiny-two"):
    return kaggle.site.datasets[ref].current


def test_new_then_unchanged_then_a_new_version(folder, kaggle, capsys):
    kaggle.site.processing_calls = 1
    made = publish(folder)
    assert made == {"version": 1, "manifest": sha256(folder / "manifest.json")}
    there = kaggle.site.datasets["tester/tiny-two"]
    assert (there.is_private, there.licence) == (True, "apache-2.0")
    assert current(kaggle).sha256() == hashes(folder)
    assert "INSERT_OWNER" in (folder / "dataset-metadata.json").read_text(), "only the copy that is sent has the owner"
    assert not (WORK / "tiny-two").exists()
    assert publish(folder) == made
    assert len(kaggle.calls("StartBlobUpload")) == 3
    make_folder(folder, config__json=b"[]")
    assert plan_dataset(find_dataset(folder, "tester"), FAST)[1] == 2
    assert publish(folder)["version"] == 2
    assert current(kaggle).sha256() == hashes(folder)
    assert "tester/tiny-two: unchanged, version 1" in capsys.readouterr().out


def test_a_version_without_a_file_or_with_a_part_of_one_is_followed_by_one_more(folder, kaggle, capsys):
    kaggle.faults.append(Fault("CreateDataset", loses=("config.json",), cuts=("model.safetensors",)))
    assert publish(folder)["version"] == 2
    assert current(kaggle).sha256() == hashes(folder)
    assert "config.json is missing, model.safetensors has 1999999 bytes in place of 2000000" in capsys.readouterr().out
    assert len(kaggle.calls("StartBlobUpload")) == 3 + 2, "the manifest came whole, and is not sent twice"


@pytest.mark.parametrize("ends, problem", [("READY", "is missing; run this again later"), ("FAILED", "was not processed, ")])
def test_files_that_are_lost_twice_are_one_error_and_sent_anew_by_the_next_push(folder, kaggle, ends, problem):
    kaggle.site.processing_ends = ends
    kaggle.faults += [Fault(call, loses=("config.json",)) for call in ("CreateDataset", "CreateDatasetVersion")]
    with pytest.raises(UserError, match=f"tester/tiny-two: sent twice, and still config.json {problem}"):
        publish(folder)
    assert not (WORK / "tiny-two").exists()
    kaggle.site.processing_ends = "READY"
    assert publish(folder)["version"] == 3
    assert current(kaggle).sha256() == hashes(folder)


def test_a_version_is_awaited_that_is_newer_than_the_last():
    assert [Remote("ready", version).is_settled(2) for version in (2, 3)] == [False, True]


def test_a_file_that_could_not_be_sent_stops_the_dataset_without_it(folder, kaggle, capsys):
    kaggle.faults.append(Fault("PUT", status=400))
    assert publish(folder)["version"] == 1
    assert len(kaggle.calls("CreateDataset")) == 1
    assert current(kaggle).sha256() == hashes(folder)
    failed, *others = dict.fromkeys(request.asked["name"] for request in kaggle.calls("PUT"))
    assert [kaggle.uploaded_bytes(name) for name in others] == [(folder / name).stat().st_size for name in others]
    assert f"{failed} could not be sent; sent again after 0.02 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "left_out, failed, is_odd_again, stale",
    [
        ({"a"}, set(), False, {"a"}),
        ({"a"}, {"a"}, False, {"a"}),
        ({"b"}, {"a"}, False, {"a", "b", "c"}),
        (set(), {"a"}, False, set()),
        (set(), set(), True, {"a", "b", "c"}),
    ],
)
def test_one_file_that_fails_is_sent_anew_and_all_are_where_another_fails_next(left_out, failed, is_odd_again, stale):
    assert stale_notes(("a", "b", "c"), left_out, failed, is_odd_again) == stale


@pytest.mark.parametrize("notes_expire", [False, True])
def test_a_refused_dataset_is_one_error_and_sent_twice_only_where_kaggle_forgot_its_files(folder, kaggle, notes_expire):
    kaggle.site.storage_bytes_allowed = 1000
    with pytest.raises(UserError, match="tester/tiny-two: Your private datasets quota is exceeded; mend that, then run this"):
        publish(folder)
    kaggle.site.storage_bytes_allowed = 10**9
    if notes_expire:
        kaggle.site.blobs.clear()
    assert publish(folder)["version"] == 1
    assert current(kaggle).sha256() == hashes(folder)
    assert (len(kaggle.calls("StartBlobUpload")) > 3) is notes_expire


def test_a_dataset_that_was_made_though_we_stopped_the_command_is_found(folder, kaggle):
    dataset, stopped = find_dataset(folder, "tester"), Answer((), None, "Upload unsuccessful: config.json")
    assert not has_arrived(dataset, None, stopped, FAST)
    kaggle.faults.append(Fault("CreateDataset", loses=("config.json",)))
    upload(dataset, None, FAST)
    assert has_arrived(dataset, None, stopped, FAST)
    assert not has_arrived(dataset, Remote("ready", 1), stopped, FAST)


def test_an_answer_that_is_lost_is_no_reason_for_another_version(folder, kaggle):
    kaggle.faults += [Fault(call, loses_answer=True) for call in ("CreateDataset", "CreateDatasetVersion")]
    kaggle.site.processing_calls = 2
    assert publish(folder)["version"] == 1
    make_folder(folder, config__json=b"[1]")
    assert publish(folder)["version"] == 2
    assert [version.number for version in kaggle.site.datasets["tester/tiny-two"].versions] == [1, 2]
    assert current(kaggle).sha256() == hashes(folder)


def test_a_busy_dataset_and_a_slow_one_end_well(folder, kaggle):
    publish(folder)
    make_folder(folder, config__json=b"[1]")
    kaggle.faults += [
        Fault("CreateDatasetVersion", status=403, message="Permission 'datasets.update' was denied", times=4),
        Fault("CreateDatasetVersion", status=503, message="Service Unavailable"),
        Fault("GetDatasetStatus", status=429, message="Too Many Requests"),
    ]
    kaggle.site.processing_calls = 10**6
    with pytest.raises(UserError, match="blobs received after 0.1 s; run this again, which goes on waiting: nothing goes up"):
        publish_dataset(find_dataset(folder, "tester"), Pace(0.02, 0.1))
    kaggle.site.datasets["tester/tiny-two"].versions[-1].calls_left = 1
    sent = kaggle.uploaded_bytes()
    assert publish(folder)["version"] == 2
    assert kaggle.uploaded_bytes() == sent
    assert len(kaggle.calls("CreateDatasetVersion")) == 4 + 1 + 1
    assert current(kaggle).sha256() == hashes(folder)


def test_a_dataset_that_is_public_gets_nothing_and_one_that_comes_out_public_is_told(folder, kaggle):
    old = Version(1, "", {"old.txt": b"old"}, 0)
    kaggle.site.datasets["tester/tiny-two"] = Dataset("tester/tiny-two", "tiny-two", "other", False, [old])
    with pytest.raises(UserError, match="tester/tiny-two: is public on Kaggle; make it private"):
        publish(folder)
    assert kaggle.calls("StartBlobUpload") == []
    del kaggle.site.datasets["tester/tiny-two"]
    kaggle.faults.append(Fault("GetDatasetMetadata", answer={"info": {"isPrivate": False}}, times=9))
    with pytest.raises(UserError, match="tester/tiny-two: is public on Kaggle; make it private"):
        publish(folder)
