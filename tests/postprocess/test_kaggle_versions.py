"""Packages of every architecture, made with this environment's versions, loaded and scored with those of Kaggle's image."""

import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

KAGGLE_PYTHON = ROOT / ".venv-kaggle" / "bin" / "python"
KINDS, HEADS, FORMATS = ("gemma2", "llama", "qwen2", "bert"), ("score", "label_tokens", "reward"), ("none", "nf4", "int8")
# Architecture, head, quantize, adapter, verdicts: each of architecture, head and quantize with each of the others.
SQUARE = """
gemma2 score none merged 2
gemma2 label_tokens int8 merged 2
gemma2 reward nf4 merged 2
gemma2 score nf4 unmerged 2
llama score int8 merged 3
llama label_tokens nf4 merged 2
llama reward none merged 2
qwen2 score nf4 merged 2
qwen2 label_tokens none merged 3
qwen2 reward int8 merged 2
qwen2 reward nf4 unmerged 2
bert score nf4 merged 3
bert reward none merged 2
bert score int8 merged 2
"""
IN_KAGGLES_VERSIONS = """
import importlib.metadata, json, sys
import torch
from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.models.scoring import score

torch.set_num_threads(1)
KINDS = {"Linear4bit": "nf4", "Linear8bitLt": "int8", "GptqLinear": "gptq"}
request = json.load(sys.stdin)
found = {"versions": {name: importlib.metadata.version(name) for name in request["libraries"]}, "packages": []}
for folder in request["folders"]:
    package = read_package(folder)  # its token ids of the golden rows are those of training
    model = load_model(folder, package.contract, "cpu", torch.float16)
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in package.contract.golden]
    scores = score(model, package.model_input, package.tokenizer, package.contract, pairs, orders=("as_given",))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {type(module).__name__ for module in base.modules()}
    found["packages"].append({
        "model_type": base.config.model_type,
        "head": package.contract.head,
        "quantised": next((kind for layer, kind in KINDS.items() if layer in layers), "none"),
        "adapter": "unmerged" if hasattr(model, "peft_config") else "merged",
        "verdicts": len(package.contract.verdicts),
        "probabilities": [scores[pair.id]["as_given"] for pair in pairs],
    })
print(json.dumps(found))
"""


def square_cases() -> list[tuple[str, str, str, str, int]]:
    """The table SQUARE as tuples."""
    rows = [line.split() for line in SQUARE.strip().splitlines()]
    return [(kind, head, quantize, adapter, int(verdicts)) for kind, head, quantize, adapter, verdicts in rows]


def other_cases() -> list[tuple[str, str, str, str, int]]:
    """Every architecture, head and format that the table leaves out, and what is left of ties and unmerged adapters."""
    square = {case[:3] for case in square_cases() if case[3] == "merged"}
    every = set(itertools.product(KINDS, HEADS, FORMATS)) - set(itertools.product(["bert"], ["label_tokens"], FORMATS))
    others = [(*case, "merged", 2) for case in sorted(every - square)]
    return [*others, ("gemma2", "score", "nf4", "merged", 3), ("llama", "score", "nf4", "unmerged", 2)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(square_cases(), id="square"), pytest.param(other_cases(), id="others", marks=pytest.mark.slow)],
)
def cases(request):
    return request.param


@pytest.fixture(scope="module")
def folders(cases, packaged):
    """The package of each case. One thread: two, on cores that are busy, take several times as long for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [package(packaged, *case) for case in cases]
    finally:
        torch.set_num_threads(threads)


def package(packaged, kind: str, head: str, quantize: str, adapter: str, verdicts: int) -> Path:
    more = {"qlora": True, "adapter": adapter} if adapter == "unmerged" else {}
    names = ("model_a", "model_b", "tie")[:verdicts]
    run, _ = packaged(kind, head=head, quantize=quantize, verdicts=names, tolerance=0.5, rows=8, **more)
    return run.folder / "package"


@pytest.fixture(scope="module")
def found(folders):
    return in_kaggles_versions(folders)


def in_kaggles_versions(folders: list[Path]) -> dict:
    """What Kaggle's versions make of the packages: versions, and for each its kind and the golden rows' probabilities."""
    if not KAGGLE_PYTHON.exists():
        pytest.skip("no .venv-kaggle; `make test` creates it from kaggle_kernels/requirements.txt")
    libraries = ["transformers", "peft", "tokenizers", "safetensors", "accelerate", "bitsandbytes"]
    request = {"folders": [str(folder) for folder in folders], "libraries": libraries}
    done = subprocess.run(
        [KAGGLE_PYTHON, "-c", IN_KAGGLES_VERSIONS],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_was_loaded_with_the_versions_of_kaggles_image_is_what_the_table_says(cases, found):
    assert found["versions"] == {
        "transformers": "5.0.0",
        "peft": "0.19.1",
        "tokenizers": "0.22.2",
        "safetensors": "0.7.0",
        "accelerate": "1.13.0",
        "bitsandbytes": "0.50.2",
    }
    names = ("model_type", "head", "quantised", "adapter", "verdicts")
    assert [tuple(package[name] for name in names) for package in found["packages"]] == cases


def test_packages_give_the_same_probabilities_in_kaggles_versions(cases, folders, found):
    for folder, case, package in zip(folders, cases, found["packages"], strict=True):
        golden = json.loads((folder / "manifest.json").read_text())["golden"]
        assert len(golden) == 20
        assert len({tuple(row["probabilities"]) for row in golden}) > 10, f"{case}: golden rows that tell nothing"
        for row, probabilities in zip(golden, package["probabilities"], strict=True):
            pairs = zip(row["probabilities"], probabilities, strict=True)
            assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in pairs), (case, row, probabilities)
