"""Fixtures for all tests. The network is blocked: sockets reach this machine only, the hubs are told to stay offline,
and the ledger is a temporary file. Properties (hypothesis) try the same examples each time."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "true",
    "PAIRWISE_LEDGER": tempfile.mkdtemp(prefix="ledger-") + "/ledger.jsonl",
}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of PyTorch that outnumber them would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from preprocess.core.quiet import prepare_imports
from tests import tiny

# What tests import stays: to look through it for garbage again and again would take seconds.
prepare_imports()
gc.set_threshold(10_000)

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# Neither chance nor the speed of a busy machine decides whether a property holds.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
atexit.register(shutil.rmtree, Path(os.environ["PAIRWISE_LEDGER"]).parent, ignore_errors=True)


def pytest_collection_finish():
    """All is imported now. Looking through it for garbage would take half a second each time, and finds none."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of tiny models with their tokenizers, by architecture and width, built on first use: tiny_models("gemma2")."""
    folder = tmp_path_factory.mktemp("models")

    def build(kind: str, width: int = 64) -> Path:
        path = folder / f"{kind}-{width}"
        return path if path.exists() else tiny.model(path, kind, width=width)

    return build


@pytest.fixture
def ledger_file(tmp_path, monkeypatch):
    """A test's own ledger; without it, a test writes to one that all tests of a process share."""
    monkeypatch.setenv("PAIRWISE_LEDGER", str(tmp_path / "ledger.jsonl"))
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def shared_data():
    """The folder of real pairs, where there is one; a test that needs it says so and is skipped elsewhere."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real pairs (../shared/data) are absent")
    return SHARED_DATA
