"""Exactly the files that a package is defined to have go up, each checked for its kind."""

import json

import pytest

from kaggle_kernels.publish.package_files import check_package, check_wheels
from tests.kaggle_kernels.packages import change_json, flip_byte, write_manifest
from tests.kaggle_kernels.publish.pushes import pretend_wheels


def test_a_package_of_the_tests_and_of_wheels_is_sound(package_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRWISE_LEDGER", str(tmp_path / "ledger.jsonl"))
    assert check_package(package_folder) == []
    assert check_wheels(pretend_wheels("pairwise-wheels")) == []


@pytest.mark.parametrize(
    "name", ["train.parquet", ".netrc", "kaggle.json", "pytorch_model.bin", "helper.py", "adapter.pkl", "notes.txt", "x.zip"]
)
def test_a_file_that_no_package_is_defined_to_have_is_refused_though_the_manifest_lists_it(spoilt, name):
    (spoilt / name).write_text("x")
    write_manifest(spoilt)
    assert check_package(spoilt) == [f"{spoilt / name}: no file that a package is defined to have; remove it"]


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
            "model.safetensors: no sound safetensors file",
        ),
        (
            lambda folder: (folder / "model.safetensors").open("ab").write(b"rows"),
            "model.safetensors: no sound safetensors file",
        ),
        (lambda folder: (folder / "model_input.py").write_text("import os"), "model_input.py: not the file that the model was"),
        (lambda folder: change_json(folder / "contract.json", rows=[1]), "contract.json: rows: extra inputs are not permitted"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json: lacks model_type"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (
            lambda folder: (folder / "validation_ids.json").write_text('{"rows": []}'),
            "validation_ids.json: fold: field required",
        ),
        (lambda folder: change_json(folder / "dataset-metadata.json", data=1), "dataset-metadata.json: data: extra inputs are"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(spoilt, spoil, problem):
    spoil(spoilt)
    write_manifest(spoilt)
    [told] = check_package(spoilt)
    assert told.startswith(f"{spoilt}/{problem}")


def test_what_differs_from_the_manifest_is_told_by_name(spoilt):
    flip_byte(spoilt / "tokenizer.json")
    (spoilt / "folder").mkdir()
    (spoilt / "added_tokens.json").write_text("{}")
    (spoilt / "tokenizer_config.json").unlink()
    assert [problem.removeprefix(f"{spoilt}/").split(",")[0].split(";")[0] for problem in check_package(spoilt)] == [
        "tokenizer.json: changed since it was made",
        "tokenizer_config.json: missing",
        "added_tokens.json: not in manifest.json",
        "folder: not in manifest.json",
    ]


def test_a_file_that_every_package_has_is_missed_though_the_manifest_lacks_it(spoilt):
    (spoilt / "model_input.py").unlink()
    (spoilt / "model.safetensors").unlink()
    write_manifest(spoilt)
    assert check_package(spoilt) == [
        f"{spoilt}/model_input.py: missing, but every package has it; make the folder again",
        f"{spoilt}: no model*.safetensors; make the folder again",
    ]


def test_a_manifest_that_lists_nothing_is_one_line(spoilt):
    (spoilt / "manifest.json").write_text(json.dumps({"files": ["a"]}))
    assert check_package(spoilt) == [
        f"{spoilt}/manifest.json: files: input should be a valid dictionary; make the folder again"
    ]
