"""`push` by the real kaggle command against the stand-in."""

import json
import random

import pytest
from click.testing import CliRunner

from kaggle_kernels import publish
from kaggle_kernels.__main__ import main
from kaggle_kernels.build import build
from preprocess.files import sha256
from tests.kaggle_kernels.packages import WSDM, write_recipe

FAST = ("--poll-seconds", "0.05", "--patience-seconds", "60")


def make_folder(folder, slug, manifest, **contents):
    """A folder as packages and wheels are: files, metadata with the placeholder, a manifest with every file's hash."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    metadata = {"title": slug, "id": f"INSERT_OWNER/{slug}", "licenses": [{"name": "apache-2.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata))
    files = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}
    (folder / manifest).write_text(json.dumps({"files": files}))
    return folder


@pytest.fixture
def spec(tmp_path, monkeypatch, kaggle):
    """A spec with a package and wheels, its kernel built, in the current folder."""
    monkeypatch.chdir(tmp_path)
    weights = random.Random(1).randbytes(3_000_000)
    make_folder(tmp_path / "outputs/two/package", "tiny-two", "manifest.json", model__safetensors=weights, config__json=b"{}")
    make_folder(tmp_path / "outputs/wheels", "tiny-wheels", "wheels.json", a__whl=b"wheel")
    write_recipe(tmp_path, "two", "tiny-two")
    path = tmp_path / "specs" / "test.yml"
    path.parent.mkdir()
    path.write_text(WSDM + "wheels: tiny-wheels\n")
    build(path)
    return path


def call(command, spec, *options):
    return CliRunner().invoke(main, [command, str(spec), *options, *FAST])


def test_first(spec, kaggle):
    result = call("push", spec)
    print(result.output)
    assert result.exit_code == 0
    n = len(kaggle.requests)
    result = call("push", spec)
    print(result.output)
    print([r.call for r in kaggle.requests[n:]])
    for w in (("--wait",), ()):
        result = call("status", spec, *w)
        print(result.output)
    result = call("submit", spec, "-m", "hello", "--yes")
    print(result.output, result.exception)
    result = call("submit", spec, "-m", "hello", "--yes")
    print(result.output, result.exception)
    result = call("push", spec, "--dry-run")
    print(result.output, result.exception)
    assert 0
