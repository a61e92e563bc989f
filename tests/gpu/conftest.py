"""Proofs that need a GPU: `make test-gpu`. Where there is none, one line says how many were not run.

Figures that a proof measures are printed as one table at the end and written to outputs/gpu.json, with the date and the
versions that they depend on.
"""

import importlib.metadata
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from preprocess.core.files import write_json
from tests.postprocess.conftest import made, packaged

__all__ = ["made", "packaged"]  # fixtures: runs as training leaves them, and their packages

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "axolotl", "deepspeed", "triton")
MEASURED: list[dict] = []


def pytest_collection_modifyitems(config, items):
    """Skip every proof of this folder where CUDA is absent."""
    if torch.cuda.is_available():
        return

    proofs = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in proofs:
        item.add_marker(pytest.mark.skip(reason=f"no GPU: {len(proofs)} proofs not run"))


@pytest.fixture
def measure():
    """measure("tokens a second, nf4", 4711.0) adds a line to the table."""

    def add(name: str, value: float | str) -> None:
        MEASURED.append({"measured": name, "value": value})
        write_table()  # at once: a run that is cut short keeps what it measured

    return add


@pytest.fixture
def gpu_memory():
    """A GPU that is empty when a proof begins, and again when it has ended."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda
    torch.cuda.empty_cache()


@pytest.fixture
def room(tmp_path_factory):
    """A folder for tens of gigabytes, removed at once."""
    folder = tmp_path_factory.mktemp("large")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def matrix_rate():
    """Multiply-adds times two a second, of float16 matrices of 8,192 by 8,192: what this GPU can do at best."""
    size, products = 8192, 20
    left, right = torch.randn(2, size, size, device="cuda", dtype=torch.float16)
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(products):
        left @ right
    torch.cuda.synchronize()
    return products * 2 * size**3 / (time.perf_counter() - began)


def pytest_terminal_summary(terminalreporter):
    """Print what was measured."""
    if not MEASURED:
        return

    facts = write_table()
    terminalreporter.write_line(f"\n{facts['gpu']}, {facts['date']}, {facts['versions']}")
    for line in MEASURED:
        terminalreporter.write_line(f"{line['measured']:<72} {line['value']}")


def write_table() -> dict:
    """Write outputs/gpu.json: what was measured until now, on which GPU, when and with which versions."""
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in LIBRARIES},
        "measured": MEASURED,
    }
    Path("outputs").mkdir(exist_ok=True)
    write_json(Path("outputs/gpu.json"), facts)
    return facts


def version_of(library: str) -> str:
    """The installed version, or "absent"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
