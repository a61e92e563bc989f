"""Fixtures of the kernels' tests: tiny packages, and copies of them to spoil."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kaggle_kernels.build.spec import find_spec
from kaggle_kernels.publish import client
from kaggle_kernels.runtime.scheduling import crew, worker
from tests import tiny
from tests.fakes.kaggle import forks
from tests.fakes.kaggle.guard import fail_on_trespass, kaggle_environment, refuse_unless_loopback
from tests.fakes.kaggle.server import KaggleServer
from tests.kaggle_kernels.packages import (
    WSDM,
    make_package,
    make_pushable,
    write_recipe,
    write_spec,
)
from tests.kaggle_kernels.publish.pushes import SMALL, pretend_ready
from tests.kaggle_kernels.runtime.workers import start_in_thread


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
    monkeypatch.setattr(crew, "start_process", start)
    yield
    for thread in started:
        thread.join(60)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A running stand-in for Kaggle, and an environment in which `kaggle` reaches it and nothing else: see kaggle_server.py."""
    server = KaggleServer()
    environment = kaggle_environment(server, tmp_path / "home")
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        refuse_unless_loopback(dict(os.environ), server)
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    fail_on_trespass(server)


@pytest.fixture(scope="session")
def kaggle_fork_server():
    """The socket of a process in whose forks the kaggle command starts fast; see tests/fakes/kaggle/forks.py."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        path = Path(folder) / "socket"
        server = subprocess.Popen([sys.executable, forks.__file__, "serve", path], stdin=subprocess.PIPE)
        for _ in range(6000):
            if path.exists():
                break
            time.sleep(0.01)
        yield path
        server.kill()
        server.wait()


@pytest.fixture
def fast_kaggle(kaggle, kaggle_fork_server, monkeypatch):
    """The stand-in, and our commands call the kaggle command in forks."""
    command = (sys.executable, "-S", forks.__file__, "call", str(kaggle_fork_server))
    monkeypatch.setattr(client, "COMMAND", command)
    monkeypatch.setattr(client, "die_with_parent", None)  # with it Python forks this process, and copies its page tables
    return kaggle


@pytest.fixture
def here(tmp_path, monkeypatch, fast_kaggle):
    """The stand-in; the current folder is empty, no repository, with a ledger of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRWISE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return fast_kaggle


@pytest.fixture
def small(here):
    """The stand-in, which processes datasets at once, and the smallest spec ready to be pushed: its folders by slug."""
    here.site.processing_calls = 0
    return here, pretend_ready(find_spec(SMALL))
