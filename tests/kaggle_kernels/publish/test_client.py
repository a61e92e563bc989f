"""A call of Kaggle's API: credentials as the kaggle command finds them, errors told apart, an end within the time limits."""

import json
import socket
import time
from types import SimpleNamespace

import pytest
from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetStatusRequest

from kaggle_kernels.publish import client, uploads
from kaggle_kernels.publish.client import Pace, Refused, ask, connect, list_all
from preprocess.core.errors import UserError
from tests.fakes.kaggle.server import Fault
from tests.fakes.kaggle.site import TOKEN, Dataset, Version
from tests.kaggle_kernels.publish.pushes import call

FAST = Pace(poll_seconds=0.001, patience_seconds=5)


@pytest.fixture
def dataset(kaggle):
    """The stand-in with a dataset, which it has processed; the request for its status."""
    kaggle.site.datasets["tester/tiny"] = Dataset("tester/tiny", "other", True, [Version(1, {}, 0)])
    request = ApiGetDatasetStatusRequest()
    request.owner_slug, request.dataset_slug = "tester", "tiny"
    return request


OAUTH = {"refresh_token": "r", "access_token": "a", "username": "four", "access_token_expiration": "2100-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    "path, content, owner",
    [
        (".kaggle/access_token", TOKEN, "tester"),
        (".kaggle/kaggle.json", json.dumps({"username": "one", "key": "k"}), "one"),
        (".config/kaggle/kaggle.json", json.dumps({"username": "two", "key": "k"}), "two"),
        ("elsewhere/kaggle.json", json.dumps({"username": "three", "key": "k"}), "three"),
        (".kaggle/credentials.json", json.dumps(OAUTH), "four"),
    ],
)
def test_credentials_are_found_where_the_kaggle_command_looks(kaggle, tmp_path, monkeypatch, path, content, owner):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(UserError, match="no credentials that Kaggle takes: run `kaggle auth login`, or put a token"):
        connect(FAST)
    if path.startswith("elsewhere"):
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home/elsewhere"))
    file = tmp_path / "home" / path
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert connect(FAST).owner == owner


def test_a_token_comes_before_a_key_and_what_kaggle_refuses_is_one_line_without_it(kaggle, dataset, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "other")
    monkeypatch.setenv("KAGGLE_KEY", "secret-of-a-test")
    assert connect(FAST).owner == "tester"
    monkeypatch.setenv("KAGGLE_API_TOKEN", "revoked")
    account = connect(FAST)
    assert account.owner == "other"
    with pytest.raises(UserError, match="^Kaggle does not take these credentials .*: run `kaggle auth login`") as error:
        ask(FAST, account.datasets.get_dataset_status, dataset)
    assert "secret-of-a-test" not in str(error.value)


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 502}, {"loses_answer": True}])
def test_a_question_is_repeated_where_the_connection_or_kaggle_fails(kaggle, dataset, fault):
    account = connect(FAST)
    kaggle.faults.append(Fault("GetDatasetStatus", times=3, **fault))
    assert ask(FAST, account.datasets.get_dataset_status, dataset).status.name == "READY"
    assert len(kaggle.calls("GetDatasetStatus")) == 4


def test_a_refusal_is_not_repeated_and_says_kaggles_words(kaggle, dataset):
    account = connect(FAST)
    dataset.dataset_slug = "other"
    with pytest.raises(Refused, match="^Dataset tester/other was not found$"):
        ask(FAST, account.datasets.get_dataset_status, dataset)
    assert len(kaggle.calls("GetDatasetStatus")) == 1


def test_looks_come_less_often_and_end_with_the_patience(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    assert list(Pace(poll_seconds=10, patience_seconds=300).looks()) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert slept == [10, 15, 22.5, 33.75, 50.625, 75.9375, 80]
    assert list(Pace(poll_seconds=10, patience_seconds=0).looks()) == [0]


@pytest.mark.parametrize("command", [["scores"], ["push", "minilm_cls"]])
def test_against_a_black_hole_a_command_ends_with_one_line_for_it(here, monkeypatch, command):
    """A server that takes connections and never answers, with time limits of a tenth of a second."""
    assert client.REPEAT_SECONDS + client.CONNECT_SECONDS + client.ANSWER_SECONDS <= 120
    for module in (client, uploads):
        monkeypatch.setattr(module, "TIMEOUT", (0.1, 0.1))
        monkeypatch.setattr(module, "REPEAT_SECONDS", 0.3)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        ended = call(*command)
    assert ended.exit_code == 2
    line = "error: Kaggle: IntrospectToken: no answer within 30 s; check the network, then run this again"
    assert ended.output.splitlines().count(line) == 1
    assert time.monotonic() - started < 30


def test_a_list_is_read_page_by_page_and_a_page_that_names_itself_is_the_last():
    pages = {None: ([1, 2], "second"), "second": ([3], "third"), "third": ([], "third")}
    request = SimpleNamespace(page_token=None)

    def answer(request):
        items, next_page = pages[request.page_token]
        return SimpleNamespace(files=items, next_page_token=next_page)

    assert list_all(FAST, answer, request, "files") == [1, 2, 3]
    assert request.page_token == "third"
