"""Fixtures that run the stand-in for Kaggle; the kernels' tests use them too, by way of their conftest."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kaggle_kernels.publish import client
from tests.fakes.kaggle import forks
from tests.fakes.kaggle.guard import fail_on_trespass, kaggle_environment, refuse_unless_loopback
from tests.fakes.kaggle.server import KaggleServer


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A running stand-in for Kaggle, and an environment in which `kaggle` reaches it and nothing else: see server.py."""
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
