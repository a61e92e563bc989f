"""Our commands against the stand-in for Kaggle: packages of any spec, of a few kilobytes, right in all but their weights."""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import save

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.memory_fit import Fit, fit_packages
from kaggle_kernels.build.packages import AS_TRAINED, package_folder
from kaggle_kernels.build.spec import read_spec
from postprocess.package import dataset_metadata
from preprocess.competitions import COMPETITIONS
from preprocess.core.files import sha256
from preprocess.model_input import Contract
from recipes.pairwise.contract import MODEL_INPUT
from tests.fakes.kaggle.server import KaggleServer
from tests.kaggle_kernels.packages import list_files, make_pushable

WHEELS = Path("outputs/wheels")
FAST = ("--poll-seconds", "0.01", "--patience-seconds", "20")
SMALL, DATASET, KERNEL = "minilm_cls", "tester/pairwise-minilm-cls", "tester/pairwise-minilm"  # one package, no wheels
WEIGHT_BYTES, HEADER_BYTES = 20_000, 80


def pretend_ready(spec_path: Path, seed: int = 1) -> dict[str, Path]:
    """Put everything that a push of the spec needs into outputs/ here; the folders that become datasets, by slug."""
    spec = read_spec(spec_path)
    packages = {fit.package.dataset: pretend_package(fit, seed) for fit in fit_packages(spec_path, spec)}
    make_pushable(spec_path, packages)
    return packages | ({spec.wheels: pretend_wheels(spec.wheels)} if spec.wheels else {})


def pretend_package(fit: Fit, seed: int) -> Path:
    """A package that is what the spec and the recipe say."""
    run, block = fit.package.run, fit.recipe.pairwise
    folder = Path("outputs") / run / "package"
    folder.mkdir(parents=True)
    shutil.copyfile(MODEL_INPUT, folder / MODEL_INPUT.name)
    contract = dict.fromkeys(Contract.__dataclass_fields__)
    contract |= {"verdicts": block.verdicts, "template": asdict(block.resolved_template())}
    contract |= {"base_model": fit.recipe.axolotl["base_model"], **{key: getattr(block, key) for key in AS_TRAINED}}
    contract["model_input_sha256"] = sha256(MODEL_INPUT)
    (folder / "contract.json").write_text(json.dumps(contract))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}}))
    (folder / "config.json").write_text(json.dumps({"model_type": fit.served.base.model_type}))
    (folder / "model.safetensors").write_bytes(weights(f"{run} {seed}"))
    write_metadata(folder, fit.package.dataset, block.package.licence)
    manifest = {"files": list_files(folder), "quantize": block.package.quantize}
    manifest["golden"] = [{"id": "first", "probabilities": [0.5, 0.5]}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def weights(seed: str) -> bytes:
    """A safetensors file of WEIGHT_BYTES."""
    content = random.Random(seed).randbytes(WEIGHT_BYTES - HEADER_BYTES)
    return save({"weight": np.frombuffer(content, dtype=np.uint8)})


def pretend_wheels(slug: str) -> Path:
    """A folder with a wheel that is none."""
    WHEELS.mkdir(parents=True)
    wheel = WHEELS / "bitsandbytes-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel" * 1000)
    facts = {"file": wheel.name, "sha256": sha256(wheel), "bytes": 5000, "name": "bitsandbytes", "version": "1"}
    (WHEELS / "wheels.json").write_text(json.dumps({"wheels": [facts]}))
    write_metadata(WHEELS, slug, "MIT")
    return WHEELS


def make_folder(folder: Path, **contents: bytes) -> Path:
    """A folder as packages are: files (`__` in a name is a dot), metadata with the placeholder, a manifest with every hash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    write_metadata(folder, "tiny-two", "apache-2.0")
    (folder / "manifest.json").write_text(json.dumps({"files": list_files(folder)}))
    return folder


def write_metadata(folder: Path, slug: str, licence: str) -> None:
    (folder / "dataset-metadata.json").write_text(json.dumps(dataset_metadata(slug, licence)))


def output_of(spec_path: Path) -> dict[str, bytes]:
    """What the kernel of the spec leaves behind: a submission of two rows, and with which packages it was made."""
    spec = read_spec(spec_path)
    columns = COMPETITIONS[spec.competition].columns
    values = ["model_a"] if len(columns) == 1 else ["0.5", "0.25", "0.25"]
    lines = [",".join(["id", *columns]), *(",".join([str(row), *values]) for row in (1, 2))]
    manifests = {package.dataset: sha256(package_folder(package.run) / "manifest.json") for package in spec.packages}
    record = json.dumps({"manifests": manifests})
    return {"submission.csv": "".join(f"{line}\n" for line in lines).encode(), "kernel.json": record.encode()}


def call(command: str, *arguments: str) -> Result:
    """Run `python -m kaggle_kernels COMMAND …` in this process."""
    return CliRunner().invoke(main, [command, *FAST, *arguments], catch_exceptions=False)


def error_of(ended: Result) -> str:
    """The one error that a command ended with; its exit code is 2."""
    [line] = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert (ended.exit_code, ended.output.splitlines()[-1]) == (2, line), ended.output
    return line.removeprefix("error: ")


def files_of(folder: Path) -> list[Path]:
    """What goes up."""
    return [path for path in folder.iterdir() if path.name != "dataset-metadata.json"]


def bytes_of(*folders: Path) -> int:
    """How much goes up."""
    return sum(path.stat().st_size for folder in folders for path in files_of(folder))


def check_whole(kaggle: KaggleServer, folders: Mapping[str, Path]) -> None:
    """Each dataset's newest version has every file as it is here."""
    for slug, folder in folders.items():
        there = kaggle.site.datasets[f"tester/{slug}"].versions[-1].sha256()
        assert there == {path.name: sha256(path) for path in files_of(folder)}, slug
