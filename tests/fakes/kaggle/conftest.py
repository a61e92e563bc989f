"""The fixture that runs the stand-in for Kaggle; the kernels' tests use it too, by way of their conftest."""

import os
import threading

import pytest

from tests.fakes.kaggle.guard import fail_on_trespass, kaggle_environment
from tests.fakes.kaggle.server import KaggleServer


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A running stand-in for Kaggle, and an environment in which clients reach it and nothing else: see server.py."""
    server = KaggleServer()
    environment = kaggle_environment(server, tmp_path / "home")
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    fail_on_trespass(server)
