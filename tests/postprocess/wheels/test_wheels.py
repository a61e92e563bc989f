"""The dataset of wheels, made from tiny wheels in a folder: pip looks nowhere else."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from postprocess.wheels import build
from postprocess.wheels.__main__ import main
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import write_json
from tests.conftest import ROOT

ALPHA = "alpha_kit-1.0-cp312-cp312-manylinux_2_24_x86_64.whl"
BETA = "beta-2.0-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip sees, with two listed wheels; the list is beside it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(build, "WHEELS", tmp_path / "kaggle-wheels.txt")
    (tmp_path / "index").mkdir()
    alpha = write_wheel(tmp_path / "index" / ALPHA, "torch<3,>=2.4", "beta==2.0")
    beta = write_wheel(tmp_path / "index" / BETA)
    build.WHEELS.write_text("# a comment\n" + alpha + beta)
    return tmp_path / "index"


def write_wheel(path: Path, *requirements: str, licence: str = "MIT") -> str:
    """Write a wheel without code; its line in the list."""
    name, version, tag = path.stem.split("-", 2)
    headers = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", f"License-Expression: {licence}"]
    headers += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join([*headers, "", "A text."]))
        archive.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def run(out: Path, *options: str):
    return CliRunner().invoke(main, ["--out", str(out), *options], catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(out: Path, *options: str) -> str:
    """The one error line of a command that ends with exit code 2 and leaves nothing, or what was there before."""
    before = contents(out) if out.exists() else None
    result = run(out, *options)
    assert result.exit_code == 2, result.output
    assert (contents(out) if out.exists() else None) == before
    assert not list(out.parent.glob(".*.tmp"))
    [line] = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


def test_the_folder_holds_the_wheels_a_manifest_and_kaggles_metadata(index, tmp_path, ledger_file):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old-1.0-py3-none-any.whl").write_bytes(b"replaced with the rest of the folder")
    result = run(out)
    assert (result.exit_code, f"{out}: made" in result.output) == (0, True), result.output
    manifest = json.loads((out / "wheels.json").read_text())
    metadata = {"title": "pairwise-wheels", "id": "INSERT_OWNER/pairwise-wheels", "licenses": [{"name": "MIT"}]}
    assert json.loads((out / "dataset-metadata.json").read_text()) == metadata
    assert manifest["python"] == "3.12"
    assert {"manylinux_2_35_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64"} < set(manifest["platforms"])
    expected = []
    for name, version, file in (("alpha-kit", "1.0", ALPHA), ("beta", "2.0", BETA)):
        content = (index / file).read_bytes()
        assert (out / file).read_bytes() == content
        digest = hashlib.sha256(content).hexdigest()
        facts = {"name": name, "version": version, "file": file, "sha256": digest, "bytes": len(content), "licence": "MIT"}
        expected.append(facts)
    assert manifest["wheels"] == expected
    assert sorted(contents(out)) == [ALPHA, BETA, "dataset-metadata.json", "wheels.json"]
    [entry] = ledger.read()
    assert (entry["event"], entry["dataset"], entry["wheels"]) == ("package", "pairwise-wheels", ["alpha-kit 1.0", "beta 2.0"])
    assert entry["manifest"] == hashlib.sha256((out / "wheels.json").read_bytes()).hexdigest()


@pytest.fixture
def finished(index, tmp_path):
    """A folder that is up to date, put together without pip."""
    out = tmp_path / "out"
    shutil.copytree(index, out)
    write_json(out / "wheels.json", build.manifest_of(out))
    write_json(out / "dataset-metadata.json", {"title": "pairwise-wheels", "id": "somebody/pairwise-wheels"})
    assert build.is_current(out, "pairwise-wheels")
    return out


def test_a_second_run_does_nothing(finished, index, ledger_file):
    before = {path: path.stat().st_mtime_ns for path in [finished, *finished.iterdir()]}
    shutil.rmtree(index)
    result = run(finished)
    assert (result.exit_code, f"{finished}: up to date" in result.output) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in [finished, *finished.iterdir()]} == before
    assert ledger.read() == []


@pytest.mark.parametrize("name", [BETA, "wheels.json", "dataset-metadata.json", "zeta-1.0-py3-none-any.whl"])
def test_a_folder_is_current_while_every_file_is_as_listed(finished, name):
    (finished / name).write_bytes(b"{}")
    assert not build.is_current(finished, "pairwise-wheels")
    (finished / name).unlink()
    assert build.is_current(finished, "pairwise-wheels") == name.startswith("zeta")


def test_a_folder_is_not_current_for_another_slug_or_list(finished, index):
    assert not build.is_current(finished, "other-wheels")
    alpha, beta = build.WHEELS.read_text().splitlines()[1:]
    build.WHEELS.write_text(f"{alpha}\n{beta}\n" + write_wheel(index / "gamma-1.0-py3-none-any.whl"))
    assert not build.is_current(finished, "pairwise-wheels")
    build.WHEELS.write_text(f"{alpha}\n" + write_wheel(index / BETA, "another"))
    assert not build.is_current(finished, "pairwise-wheels")


@pytest.mark.parametrize(
    "tag", ["cp311-cp311-manylinux_2_24_x86_64", "cp312-cp312-win_amd64", "cp312-cp312-manylinux_2_36_x86_64"]
)
def test_a_wheel_that_is_missing_or_for_another_machine_is_refused(finished, index, tag):
    build.WHEELS.write_text(build.WHEELS.read_text() + write_wheel(index / f"gamma-1.0-{tag}.whl"))
    line = refused(finished)
    assert line.startswith("error: kaggle-wheels.txt: pip download for Python 3.12 on Linux failed: ERROR: ")
    assert "No matching distribution found for gamma==1.0" in line


def test_wheels_that_do_not_install_from_the_folder_alone_are_refused(index, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match="pip install for Python 3.12 on Linux failed: .* No matching distribution found for alpha-kit"
    ):
        build.check_installs(tmp_path / "empty")


def test_another_hash_or_none_is_refused(index, tmp_path):
    (index / BETA).write_bytes((index / BETA).read_bytes() + b"\0")
    line = refused(tmp_path / "out")
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in line
    assert hashlib.sha256((index / BETA).read_bytes()).hexdigest() in line
    build.WHEELS.write_text("alpha_kit==1.0\n")
    assert "Hashes are required in --require-hashes mode" in refused(tmp_path / "out")


def test_a_folder_or_file_of_something_else_is_not_replaced(index, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "thesis: holds chapter.txt, which is no wheel and would be deleted" in refused(tmp_path / "thesis")
    assert run(tmp_path / "thesis" / "chapter.txt").output.endswith("chapter.txt: this is a file; name a folder\n")
    assert contents(tmp_path / "thesis") == {"chapter.txt": b"years of work"}


def test_a_slug_that_kaggle_would_refuse_is_refused(index, tmp_path):
    assert refused(tmp_path / "out", "--slug", "short").startswith("error: --slug: 'short' cannot be a dataset's name")


def test_a_licence_gets_kaggles_name():
    licences = [[{"licence": name}] for name in ("MIT", "Apache-2.0", "Own")]
    assert [build.kaggle_licence(wheels) for wheels in licences] == ["MIT", "apache-2.0", "other"]
    assert build.kaggle_licence(licences[0] + licences[1]) == "other"


def pins_of(path: str) -> dict[str, str]:
    """The versions in a requirements file of this repository."""
    lines = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", (ROOT / path).read_text(), flags=re.MULTILINE)
    return {name.lower(): version for name, version in lines}


def test_the_committed_list_goes_with_what_is_trained_and_rehearsed_with():
    assert build.read_pins(build.WHEELS) == {"bitsandbytes": "0.50.2"}
    for requirements in ("kaggle_kernels/requirements.txt", "requirements.txt"):
        assert pins_of(requirements)["bitsandbytes"] == "0.50.2"
