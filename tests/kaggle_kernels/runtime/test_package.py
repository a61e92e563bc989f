"""A package is refused where one byte, one token or one golden answer is not what was packaged."""

import json
import threading

import pytest

from kaggle_kernels.runtime.package import PackageError, check_manifest, read_package
from tests.kaggle_kernels.packages import change_json, flip_byte, write_manifest


def change_template(folder, **changes):
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    change_json(folder / "contract.json", template={**contract["template"], **changes})


def test_a_whole_package_is_read(package_folder):
    package = read_package(package_folder)
    assert package.contract.verdicts == ("model_a", "model_b")
    assert package.model_input.__file__ == str(package_folder / "model_input.py")
    assert not (package_folder / "__pycache__").exists()


def test_files_are_hashed_at_the_same_time(package_folder, monkeypatch):
    from kaggle_kernels.runtime import package

    two = threading.Barrier(2)
    monkeypatch.setattr(package, "check_hash", lambda *_: two.wait(timeout=30))
    files = json.loads((package_folder / "manifest.json").read_text())["files"]
    assert len(files.keys() - {"dataset-metadata.json"}) == 6  # an even number: the barrier is passed by two at a time
    check_manifest(package_folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "contract.json", "model_input.py"]
)
def test_one_flipped_byte_in_any_file_is_refused(spoilt, name):
    flip_byte(spoilt / name)
    with pytest.raises(PackageError, match=f"{name}: its SHA-256 is"):
        read_package(spoilt)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_missing_file_is_refused(spoilt, name):
    (spoilt / name).unlink()
    with pytest.raises(PackageError, match=f"{name}.* missing"):
        read_package(spoilt)


def test_a_file_that_the_manifest_does_not_know_is_refused(spoilt):
    (spoilt / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(PackageError, match="adapter_model.safetensors not listed"):
        read_package(spoilt)


def test_dataset_metadata_which_kaggle_does_not_mount_may_be_absent(spoilt):
    (spoilt / "dataset-metadata.json").unlink()
    assert read_package(spoilt).contract.num_labels == 2


@pytest.mark.parametrize("part", ["start", "turn", "end"])
def test_a_template_changed_by_one_character_is_refused_at_the_golden_ids(spoilt, part):
    text = read_package(spoilt).contract.template
    change_template(spoilt, **{part: getattr(text, part).replace("\n", " ", 1)})
    write_manifest(spoilt)
    with pytest.raises(ValueError, match="golden row golden-00: token .* differs from training") as refusal:
        read_package(spoilt)
    assert type(refusal.value).__name__ == "ContractError"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model_input.py"])
def test_the_contract_refuses_what_a_new_manifest_would_hide(spoilt, name):
    (spoilt / name).write_text((spoilt / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    write_manifest(spoilt)
    with pytest.raises(PackageError, match=f"{name}: its SHA-256 is .*contract.json says"):
        read_package(spoilt)


def test_two_packages_keep_their_own_model_input(package_folder, spoilt):
    source = (spoilt / "model_input.py").read_text(encoding="utf-8").replace('MARKER = " […] "', 'MARKER = " [..] "')
    (spoilt / "model_input.py").write_text(source, encoding="utf-8")
    from kaggle_kernels.runtime.package import execute_model_input

    first, second = (execute_model_input(folder / "model_input.py") for folder in (package_folder, spoilt))
    assert (first.MARKER, second.MARKER) == (" […] ", " [..] ")
    assert first.Pair is not second.Pair
