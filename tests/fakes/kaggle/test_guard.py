"""No test may reach Kaggle: the guard refuses every environment from which a request could leave this machine."""

import pytest
import requests

from tests.fakes.kaggle.guard import fail_on_trespass, kaggle_environment, refuse_unless_loopback


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("KAGGLE_API_ENVIRONMENT", "TEST", "KAGGLE_API_ENVIRONMENT is not LOCALHOST"),
        ("KAGGLE_API_TOKEN", "KGAT_0", "KAGGLE_API_TOKEN is not the stand-in's"),
        ("https_proxy", "http://192.0.2.1", "https://www.kaggle.com would be asked by way of http://192.0.2.1"),
        ("no_proxy", "*", "http://localhost would be asked by way of None"),
    ],
)
def test_an_environment_that_lets_requests_out_is_refused(kaggle, monkeypatch, name, value, message):
    refuse_unless_loopback(kaggle)
    monkeypatch.setenv(name, value)
    with pytest.raises(pytest.fail.Exception, match=message):
        refuse_unless_loopback(kaggle)


def test_credentials_of_the_person_who_runs_the_tests_are_left_out(kaggle, monkeypatch, tmp_path):
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ALL_PROXY"):
        monkeypatch.setenv(name, "theirs")
    assert "theirs" not in kaggle_environment(kaggle, tmp_path / "another home").values()


def test_another_host_is_refused_and_fails_the_test_at_its_end(kaggle):
    assert requests.get("http://example.org/x", timeout=10).status_code == 403
    with pytest.raises(requests.exceptions.ProxyError, match="Tunnel connection failed: 403"):
        requests.get("https://example.org/", timeout=10)
    assert kaggle.trespasses == ["GET http://example.org/x", "CONNECT example.org:443"]
    with pytest.raises(pytest.fail.Exception, match="requests for another host than localhost: "):
        fail_on_trespass(kaggle)
    kaggle.trespasses.clear()
