"""The kaggle command is not taken at its word: a script in its place says what tests want, in milliseconds."""

import json
import sys
import time

import pytest

from kaggle_kernels.publish import client
from kaggle_kernels.publish.client import Answer, Pace, ask, demand, find_owner, list_files, run
from preprocess.core.errors import UserError

FAST = Pace(poll_seconds=0.001, patience_seconds=1)
SCRIPT = """
import json, os, sys, time
from pathlib import Path
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps({"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}) + "\\n")
number = len((here / "calls").read_text().splitlines()) - 1
answers = json.loads((here / "answers").read_text())
code, *pieces = answers[min(number, len(answers) - 1)]
for piece in pieces:
    if isinstance(piece, str):
        print(piece, end="", flush=True)
    else:
        time.sleep(piece)
sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A script in the command's place: fake([code, text or seconds, …], …) are its answers, the last one stays."""
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(client, "COMMAND", (sys.executable, "-S", str(script)))

    def answer(*answers):
        (tmp_path / "answers").write_text(json.dumps(answers))
        (tmp_path / "calls").unlink(missing_ok=True)
        return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return answer


@pytest.mark.parametrize(
    "text, is_transient",
    [
        ("429 Client Error: Too Many Requests for url: http://localhost/api/v1/x", True),
        ("HTTPSConnectionPool(host='api.kaggle.com', port=443): Max retries exceeded with url: /v1/x", True),
        ("('Connection aborted.', RemoteDisconnected('Remote end closed connection without response'))", True),
        ("HTTPSConnectionPool(host='api.kaggle.com', port=443): Read timed out. (read timeout=300)", True),
        ("Dataset me/x was not found", False),
        ("403 Client Error: Forbidden for url: http://x", False),
        ("Permission 'kernels.get' was denied", False),
    ],
)
def test_an_error_that_may_pass_is_told_from_what_is_absent(text, is_transient):
    answer = Answer((), 1, text)
    assert (answer.is_transient, answer.is_absent) == (is_transient, not is_transient)


@pytest.mark.parametrize(
    "printed, attempts, message",
    [
        ("503 Server Error: Service Unavailable", 6, "Service Unavailable; 6 attempts failed; run this again"),
        ("a message of a server", 3, '^kaggle quota "two words": a message of a server$'),
        ("Dataset me/x was not found", 1, "was not found"),
    ],
    ids=["may pass", "unknown", "clear"],
)
def test_a_call_that_fails_is_made_again_as_often_as_its_error_deserves(fake, printed, attempts, message):
    calls = fake([1, printed])
    with pytest.raises(UserError, match=message):
        demand(FAST, "quota", "two words")
    assert len(calls()) == attempts


def test_a_call_that_succeeds_at_last_is_fine(fake):
    calls = fake([1, "502 Server Error"], [1, "502 Server Error"], [0, "fine"])
    assert ask(FAST, "datasets", "status", "me/x").text == "fine"
    assert len(calls()) == 3


def test_the_owner_is_what_the_command_says(fake):
    fake([0, "Configuration values from /home/me/.config/kaggle\n- username: some-one\n- proxy: None\n"])
    assert find_owner(FAST) == "some-one"
    fake([0, "- username: None\n- proxy: None\n"])
    with pytest.raises(UserError, match="does not know your user name"):
        find_owner(FAST)


def test_a_list_is_read_from_json_between_warnings_page_after_page(fake):
    first = 'Warning: [an outdated] version\nNext Page Token = 20\n[\n  {"name": "a", "size": 1}\n]\nmore'
    calls = fake([0, first], [0, '[{"name": "b", "size": 2}]'])
    assert list_files(FAST, "datasets", "me/x") == {"a": 1, "b": 2}
    assert [call["words"][-2:] for call in calls()] == [["--format", "json"], ["--page-token", "20"]]
    assert Answer((), 0, "No submissions found").values() is None


def test_lines_come_as_they_are_printed_and_a_progress_bar_is_lines_too(fake):
    fake([0, "one\ntw", "o\n", " 10%\r 20%\r", "\n", "la\u00dft"])
    seen = []
    run(("x",), stop_at=seen.append)
    assert seen == ["one", "two", " 10%", " 20%", "la\u00dft"]


def test_a_line_can_stop_the_command_as_ctrl_c_does(fake):
    fake([0, "first\n", "stop here\n", 30, "never\n"])
    began = time.monotonic()
    answer = run(("x",), stop_at=lambda line: line == "stop here")
    assert time.monotonic() - began < 10
    assert answer.code is None
    assert "KeyboardInterrupt" in answer.text
    assert "never" not in answer.text


def test_a_command_that_falls_silent_is_ended_and_may_pass(fake):
    fake([0, "first\n", 30])
    answer = run(("x",), silent_seconds=0.5)
    assert (answer.code, answer.reason, answer.is_transient) == (None, "it said nothing for 0.5 s and was ended", True)


def test_the_command_is_not_told_to_be_verbose_and_keeps_its_notes_where_it_is_told_to(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("VERBOSE", "1")
    monkeypatch.setenv("VERBOSE_OUTPUT", "true")
    calls = fake([0])
    run(("datasets", "create"), tmp_path, tmp_path / "state")
    [call] = calls()
    assert (call["words"], call["folder"]) == (["--no-warn", "datasets", "create"], str(tmp_path))
    assert call["environment"]["TMPDIR"] == str(tmp_path / "state")
    assert call["environment"].keys() & {"VERBOSE", "VERBOSE_OUTPUT"} == set()


def test_looks_come_less_often_and_end_with_the_patience(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    assert list(Pace(poll_seconds=10, patience_seconds=300).looks()) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert slept == [10, 15, 22.5, 33.75, 50.625, 75.9375, 80]
    assert list(Pace(poll_seconds=10, patience_seconds=0).looks()) == [0]
