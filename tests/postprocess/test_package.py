import json
from dataclasses import asdict
from hashlib import sha256

import pytest

from kaggle_kernels.runtime.package import read_package
from postprocess.package import trained_contracts
from preprocess.core import ledger
from preprocess.core.files import sha256 as file_sha256


def test_the_package_is_flat_and_its_manifest_lists_every_other_file(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    folder = run.folder / "package"
    manifest = json.loads((folder / "manifest.json").read_text())
    as_trained = ("contract.json", "model_input.py", "tokenizer.json", "tokenizer_config.json")
    others = ("config.json", "dataset-metadata.json", "model.safetensors", "validation_ids.json")
    assert set(manifest["files"]) == {*as_trained, *others}
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, facts in manifest["files"].items():
        assert facts == {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    for name in as_trained:
        assert (folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert asdict(read_package(folder).contract) == asdict(run.contract())


def test_the_package_holds_figures_of_the_comparison_golden_rows_and_ids_and_no_text(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    manifest = json.loads((run.folder / "package" / "manifest.json").read_text())
    assert (manifest["quantize"], manifest["dtype"], manifest["base_model"]) == ("nf4", "float16", str(run.base))
    validation = manifest["validation"]
    assert sorted(validation) == ["mean_difference", "models", "rows", "tolerance"]
    assert (validation["rows"], len(validation["models"])) == (24, 4)
    assert len(json.dumps(validation)) < 4000
    temperatures = manifest["temperature"]
    assert sorted(temperatures) == ["as_given", "both"]
    assert 0.05 <= temperatures["both"]["low"] <= temperatures["both"]["best"] <= temperatures["both"]["high"] <= 10
    golden = manifest["golden"]
    assert [row["id"] for row in golden] == [f"golden-{number:02d}" for number in range(20)]
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in golden)
    listed = json.loads((run.folder / "package" / "validation_ids.json").read_text())
    expected = sorted((f"row{number:05d}" for number in range(24)), key=lambda row_id: sha256(row_id.encode()).hexdigest())
    assert listed == {"fold": 0, "trained_on": False, "ids": expected}


def test_a_package_enters_the_ledger_with_its_contract_and_its_agreement(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    [entry] = [entry for entry in ledger.read() if entry.get("package") == str(run.folder / "package")]
    contract = file_sha256(run.folder / "contract.json")
    assert (entry["event"], entry["run"], entry["dataset"]) == ("package", str(run.folder), "tiny-package")
    assert (entry["contract"], entry["trained"], entry["quantize"]) == (contract, {str(run.folder): contract}, "nf4")
    agreement = json.loads((run.folder / "agreement.json").read_text())
    assert entry["agreement"] == {key: agreement[key] for key in ("rows", "tolerance", "mean_difference", "packaged")}


def test_the_package_of_a_mean_names_the_contract_of_each_member(tmp_path):
    members = [tmp_path / "fold-0", tmp_path / "fold-1"]
    for member in (*members, tmp_path / "mean"):
        member.mkdir()
        (member / "contract.json").write_text(member.name)
    metrics = {"members": [str(member) for member in members]}
    (tmp_path / "mean" / "metrics.json").write_text(json.dumps(metrics))
    assert trained_contracts(tmp_path / "mean") == {str(member): file_sha256(member / "contract.json") for member in members}
    assert list(trained_contracts(members[0])) == [str(members[0])]
