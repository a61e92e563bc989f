"""No test may reach Kaggle: the guard refuses every environment from which a request could leave this machine."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.fakes.kaggle.guard import (
    ReachesOut,
    check_environment,
    check_resolution,
    fail_on_trespass,
    kaggle_environment,
    refuse_unless_loopback,
)
from tests.fakes.kaggle.server import KaggleServer


@pytest.fixture
def environment(tmp_path):
    """A server that nobody asks, and the environment made for it."""
    server = KaggleServer()
    yield kaggle_environment(server, tmp_path / "home"), server
    server.server_close()


def changed(**changes) -> dict[str, str]:
    """The environment of the fixture with variables changed, or taken away by None."""
    return {name: value for name, value in (os.environ | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"KAGGLE_API_ENVIRONMENT": None}, "KAGGLE_API_ENVIRONMENT is None: every value but LOCALHOST is the real site"),
        ({"http_proxy": None}, "http_proxy is None and not the stand-in's http://127.0.0.1:"),
        ({"NO_PROXY": "*"}, "NO_PROXY is '\\*' and must be empty"),
        ({"ALL_PROXY": "socks5://192.0.2.1"}, "ALL_PROXY is set"),
        ({"WANDB_API_KEY": "0"}, "WANDB_API_KEY is set"),
        ({"KAGGLE_API_TOKEN": "KGAT_0"}, "KAGGLE_API_TOKEN is not the stand-in's"),
        ({"PATH": "/nowhere"}, "kaggle on the PATH is not"),
        ({}, r"home/\.kaggle holds credentials"),
    ],
)
def test_an_environment_that_lets_requests_out_is_refused(environment, tmp_path, changes, message):
    variables, server = environment
    check_environment(variables, server)
    if not changes:
        (tmp_path / "home" / ".kaggle").mkdir()
    spoilt = {name: value for name, value in (variables | changes).items() if value is not None}
    with pytest.raises(ReachesOut, match=message):
        check_environment(spoilt, server)


def test_credentials_of_the_person_who_runs_the_tests_are_left_out(monkeypatch, tmp_path, environment):
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ALL_PROXY"):
        monkeypatch.setenv(name, "theirs")
    assert "theirs" not in kaggle_environment(environment[1], tmp_path / "another home").values()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"KAGGLE_API_ENVIRONMENT": None}, "kagglesdk would ask https://api.kaggle.com, not http://localhost"),
        ({"https_proxy": "", "HTTPS_PROXY": ""}, "https://www.kaggle.com would be asked by way of None"),
    ],
)
def test_the_commands_own_library_is_asked_where_it_would_go(kaggle, changes, message):
    with pytest.raises(ReachesOut, match=message):
        check_resolution(changed(**changes), kaggle)
    assert (kaggle.requests, kaggle.trespasses) == ([], [])


def test_a_test_does_not_start_where_a_request_could_leave(kaggle):
    another = SimpleNamespace(url=kaggle.url, requests=[])
    with pytest.raises(ReachesOut, match="a request to http://localhost did not arrive at"):
        check_resolution(changed(), another)
    with pytest.raises(pytest.fail.Exception, match="not started, a request could leave this machine: no_proxy is 'x'"):
        refuse_unless_loopback(changed(no_proxy="x"), kaggle)


def test_another_host_is_refused_and_fails_the_test_at_its_end(kaggle):
    asked = "import requests; print(requests.get('http://example.org/x').status_code); requests.get('https://example.org/')"
    ended = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "403\n"
    assert "Tunnel connection failed: 403" in ended.stderr
    assert kaggle.trespasses == ["GET http://example.org/x", "CONNECT example.org:443"]
    with pytest.raises(pytest.fail.Exception, match="requests for another host than localhost: "):
        fail_on_trespass(kaggle)
    kaggle.trespasses.clear()
