"""Fixtures of the kernels' tests: tiny packages, and copies of them to spoil."""

import shutil
import threading

import pytest

from kaggle_kernels.build.spec import find_spec
from kaggle_kernels.runtime.scheduling import worker, worker_handle
from tests import tiny
from tests.fakes.kaggle import conftest as stand_in
from tests.kaggle_kernels.packages import WSDM, make_package, make_pushable, write_recipe, write_spec
from tests.kaggle_kernels.publish.pushes import SMALL, pretend_ready
from tests.kaggle_kernels.runtime.workers import start_in_thread

# The stand-in for Kaggle, for every test of the kernels.
kaggle = stand_in.kaggle


@pytest.fixture(scope="session")
def package_folder(tiny_models, tmp_path_factory):
    """A two-verdict package. Read only."""
    return make_package(tmp_path_factory.mktemp("packages") / "two", tiny_models("gemma2"))


@pytest.fixture(scope="session")
def three_verdict_folder(tiny_models, tmp_path_factory):
    """A three-verdict package with the verdicts in an order of its own. Read only."""
    verdicts = ("tie", "model_b", "model_a")
    return make_package(tmp_path_factory.mktemp("packages") / "three", tiny_models("gemma2"), verdicts, seed=2)


@pytest.fixture
def spoilt(package_folder, tmp_path):
    """A copy of the two-verdict package that a test may change."""
    return shutil.copytree(package_folder, tmp_path / "spoilt")


@pytest.fixture
def workplace(tmp_path, monkeypatch, package_folder):
    """A current folder with a spec, its built kernel, its package in outputs/two/package and a test file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(package_folder, tmp_path / "outputs" / "two" / "package")
    write_recipe(tmp_path, "two", "tiny-two")
    tiny.pairs(30, seed=4).sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "test.parquet")
    return write_spec(tmp_path, WSDM)


@pytest.fixture
def pushable(workplace, tmp_path):
    """The workplace with an agreement and a rehearsal that passed: its spec."""
    make_pushable(workplace, {"tiny-two": tmp_path / "outputs" / "two" / "package"})
    return workplace


@pytest.fixture
def workers_in_threads(monkeypatch):
    """Kernels that run in this process have threads in place of worker processes: the same work without their start.

    They load one after the other, since loading changes PyTorch's defaults for every thread, and none outlives its test.
    """
    load_on, loading, started = worker.load_on, threading.Lock(), []

    def load_alone(*arguments):
        with loading:
            return load_on(*arguments)

    def start(task):
        process, connection = start_in_thread(task)
        started.append(process.thread)
        return process, connection

    monkeypatch.setattr(worker, "load_on", load_alone)
    monkeypatch.setattr(worker_handle, "start_process", start)
    yield
    for thread in started:
        thread.join(60)


@pytest.fixture
def here(tmp_path, monkeypatch, kaggle):
    """The stand-in; the current folder is empty, no repository, with a ledger of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRWISE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return kaggle


@pytest.fixture
def small(here):
    """The stand-in, which processes datasets at once, and the smallest spec ready to be pushed: its folders by slug."""
    here.site.processing_calls = 0
    return here, pretend_ready(find_spec(SMALL))
