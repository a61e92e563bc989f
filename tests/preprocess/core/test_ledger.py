"""The ledger holds one whole line for each event, whatever else happens to the file, the disk or the checkout."""

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest

from preprocess.core import ledger


@pytest.fixture
def checkout(tmp_path, monkeypatch, ledger_file):
    """The current folder is a repository with one commit, of file.txt; its commit."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("file.txt").write_text("one")
    git = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "file.txt"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def test_an_entry_has_time_commit_versions_and_its_own_fields(checkout, ledger_file):
    entry = ledger.record("push", spec="demo", kernel="me/pairwise-demo", kernel_version=3)
    assert entry["time"].endswith("+00:00") and len(entry["time"]) == 25
    assert (entry["event"], entry["git_commit"], entry["git_dirty"]) == ("push", checkout, False)
    assert entry["versions"]["torch"] and entry["versions"]["kaggle"] == "2.2.4"
    assert (entry["spec"], entry["kernel"], entry["kernel_version"]) == ("demo", "me/pairwise-demo", 3)
    assert ledger.read() == [entry]
    assert ledger_file.read_text().count("\n") == 1


def test_a_changed_tree_is_dirty_unless_the_event_says_what_it_began_from(checkout):
    Path("file.txt").write_text("two")
    entries = [ledger.record("push"), ledger.record("train", git_commit="0" * 40, git_dirty=False)]
    assert [(entry["git_commit"], entry["git_dirty"]) for entry in entries] == [(checkout, True), ("0" * 40, False)]


def test_without_a_repository_or_git_the_commit_is_null(tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert ledger.record("push")["git_commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (ledger.record("push")["git_commit"], ledger.record("push")["git_dirty"]) == (None, None)


def test_by_default_it_lies_in_outputs_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PAIRWISE_LEDGER")
    assert ledger.read() == []
    entry = ledger.record("push", spec="demo")
    assert json.loads((tmp_path / "outputs" / "ledger.jsonl").read_text()) == entry


def write_fifty(number: int) -> None:
    for at in range(50):
        ledger.record("train", run=f"{number}-{at}", filler="x" * 20_000)


def test_processes_that_write_at_once_leave_every_line_whole(ledger_file, monkeypatch):
    monkeypatch.setattr(ledger, "git_state", dict)
    processes = [multiprocessing.get_context("fork").Process(target=write_fifty, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    runs = [entry["run"] for entry in ledger.read()]
    assert sorted(runs) == sorted(f"{number}-{at}" for number in range(4) for at in range(50))
    assert len({len(line) for line in ledger_file.read_text().splitlines()}) <= 2


def test_a_line_that_is_no_entry_costs_only_itself(ledger_file, capsys):
    """Line 2 is cut short by a kill, so that the next entry begins a line of its own."""
    ledger.record("push", spec="first")
    ledger.record("push", spec="second")
    ledger_file.write_text(ledger_file.read_text()[:-40])
    ledger.record("push", spec="third")
    with ledger_file.open("a") as file:
        file.write('[1]\n{}\n\n{"event": "other"}\n\x00\x00\n')
    assert [entry["spec"] for entry in ledger.read()] == ["first", "third"]
    warnings = capsys.readouterr().err.splitlines()
    assert [int(line.split(": line ")[1].split()[0]) for line in warnings] == [2, 4, 5, 7, 8]


def test_a_ledger_that_cannot_be_written_is_one_warning_and_no_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAIRWISE_LEDGER", str(tmp_path / "file" / "ledger.jsonl"))
    assert ledger.record("train", fold=0)["fold"] == 0
    assert "ledger.jsonl: cannot be written (File exists)" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_line(ledger_file, monkeypatch, capsys):
    ledger.record("push", spec="before")
    before, write = ledger_file.read_text(), ledger.os.write
    monkeypatch.setattr(ledger.os, "write", lambda file, content: write(file, content[:10]))
    ledger.record("push", spec="lost")
    assert ledger_file.read_text() == before
    assert "no room on the disk" in capsys.readouterr().err
