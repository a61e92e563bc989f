import json
import shutil
from dataclasses import asdict
from hashlib import sha256

import pytest

from kaggle_kernels.runtime.package import PackageError, read_package
from postprocess.package import dataset_metadata, package, trained_contracts
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import sha256 as file_sha256


def test_the_package_is_flat_and_its_manifest_lists_every_other_file(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    folder = run.folder / "package"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [
        "config.json",
        "contract.json",
        "dataset-metadata.json",
        "model.safetensors",
        "model_input.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "validation_ids.json",
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    for name, facts in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    assert (manifest["quantize"], manifest["dtype"], manifest["base_model"]) == ("nf4", "float16", str(run.base))
    assert manifest["validation"]["rows"] == 24


def test_the_manifest_holds_figures_of_the_comparison_and_no_rows(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    validation = json.loads((run.folder / "package" / "manifest.json").read_text())["validation"]
    assert sorted(validation) == ["mean_difference", "models", "rows", "tolerance"]
    assert [sorted(line) for line in validation["models"]] == [
        [
            *("accuracy", "accuracy_as_given", "accuracy_interval", "against_recorded", "against_trained", "flip_rate"),
            *("log_loss", "log_loss_as_given", "log_loss_interval", "model", "precision"),
        ]
    ] * 4
    assert len(json.dumps(validation)) < 4000


def test_the_package_lists_the_ids_of_its_validation_rows_and_no_text(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    listed = json.loads((run.folder / "package" / "validation_ids.json").read_text())
    expected = sorted((f"row{number:05d}" for number in range(24)), key=lambda row_id: sha256(row_id.encode()).hexdigest())
    assert listed == {"fold": 0, "trained_on": False, "ids": expected}


def entry_of(package):
    """The ledger's entry of a package."""
    [entry] = [entry for entry in ledger.read() if entry.get("package") == str(package)]
    return entry


def test_a_package_enters_the_ledger_with_its_contract_and_its_agreement(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    entry, contract = entry_of(run.folder / "package"), file_sha256(run.folder / "contract.json")
    assert (entry["event"], entry["run"], entry["dataset"]) == ("package", str(run.folder), "tiny-package")
    assert (entry["contract"], entry["trained"], entry["quantize"]) == (contract, {str(run.folder): contract}, "nf4")
    agreement = json.loads((run.folder / "agreement.json").read_text())
    assert entry["agreement"] == {key: agreement[key] for key in ("rows", "tolerance", "mean_difference", "packaged")}


def test_the_package_of_a_mean_names_the_contract_of_each_member(tmp_path):
    members = [tmp_path / "fold-0", tmp_path / "fold-1"]
    for member in (*members, tmp_path / "mean"):
        member.mkdir()
        (member / "contract.json").write_text(member.name)
    told = {"average": {"members": {str(member): 0.5 for member in members}}}
    (tmp_path / "mean" / "metrics.json").write_text(json.dumps(told))
    assert trained_contracts(tmp_path / "mean") == {str(member): file_sha256(member / "contract.json") for member in members}
    assert list(trained_contracts(members[0])) == [str(members[0])]


def test_the_report_with_its_rows_stays_out_of_the_package(packaged, opened, tmp_path):
    run, _ = packaged("gemma2", quantize="nf4")
    (run.folder / "report.html").write_text("rows of the competition")
    package(opened(run), run.folder / "quantised", run.folder / "agreement.json", {"ids": []}, tmp_path / "package")
    (run.folder / "report.html").unlink()
    expected = sorted(path.name for path in (run.folder / "package").iterdir())
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == expected
    assert "report.html" not in expected


def test_contract_code_and_tokenizer_are_the_bytes_of_training(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    for name in ("contract.json", "model_input.py", "tokenizer.json", "tokenizer_config.json"):
        assert (run.folder / "package" / name).read_bytes() == (run.folder / name).read_bytes()


def test_golden_probabilities_are_those_of_the_packaged_model(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    golden = json.loads((run.folder / "package" / "manifest.json").read_text())["golden"]
    assert [row["id"] for row in golden] == [f"golden-{number:02d}" for number in range(20)]
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in golden)
    assert len({row["probabilities"][0] for row in golden}) > 15


@pytest.mark.parametrize(("kind", "quantize"), [("gemma2", "none"), ("gemma2", "nf4"), ("gemma2", "int8"), ("bert", "int8")])
def test_the_kernels_own_checks_accept_the_package(kind, quantize, packaged):
    run, _ = packaged(kind, quantize=quantize)
    assert asdict(read_package(run.folder / "package").contract) == asdict(run.contract())


def test_one_flipped_byte_is_refused(packaged, tmp_path):
    run, _ = packaged("gemma2", quantize="nf4")
    folder = shutil.copytree(run.folder / "package", tmp_path / "package")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(PackageError, match=r"model.safetensors: its SHA-256 is"):
        read_package(folder)


def test_kaggles_metadata_has_one_licence_and_an_owner_to_fill_in():
    assert dataset_metadata("gemma2-cls", "apache-2.0") == {
        "title": "gemma2-cls",
        "id": "INSERT_OWNER/gemma2-cls",
        "licenses": [{"name": "apache-2.0"}],
    }


@pytest.mark.parametrize("slug", ["a" * 5, "a" * 51])
def test_a_slug_that_kaggle_refuses_is_one_error(slug):
    with pytest.raises(UserError, match="Kaggle takes 6 to 50"):
        dataset_metadata(slug, "apache-2.0")
