"""No test may reach Kaggle: nobody's credentials are used, and every other host is refused."""

import pytest
import requests

from tests.fakes.kaggle.guard import fail_on_trespass, kaggle_environment


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
