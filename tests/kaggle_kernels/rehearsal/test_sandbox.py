"""The process that a kernel runs in: what it sees, what it may reach, and that nothing of it outlives it or its clock."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import psutil
import pytest

from kaggle_kernels.rehearsal import sandbox
from kaggle_kernels.rehearsal.kaggle_tree import lay_out_tree
from kaggle_kernels.rehearsal.sandbox import SITECUSTOMIZE, make_environment, run_as_kaggle
from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.core.errors import UserError
from tests import tiny
from tests.kaggle_kernels.rehearsal.layouts import SPEC

PYTHON = Path(sys.executable)


@pytest.fixture
def root(tmp_path):
    """A folder that stands for /kaggle."""
    (tmp_path / "sandbox" / "kaggle" / "working").mkdir(parents=True)
    return tmp_path / "sandbox" / "kaggle"


def run(root, kernel, clock_seconds=500):
    return run_as_kaggle(PYTHON, kernel, root, "test", clock_seconds, Scenario())


def has_ended(pid, within=60.0):
    """Whether a process is gone; one that was killed may take a moment on a busy machine."""
    deadline = time.monotonic() + within
    try:
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass
    return True


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_kernel_sees_neither_verdicts_nor_models_nor_the_metadata(tmp_path, suffix, package_folder):
    rows = tiny.pairs(3, seed=4).with_columns(scored=True)
    lay_out_tree(tmp_path / "kaggle", SPEC, {"tiny-two": package_folder}, suffix, rows)
    shown = [str(path.relative_to(tmp_path / "kaggle" / "input")) for path in (tmp_path / "kaggle").rglob("test.*")]
    assert shown == [f"competitions/wsdm-cup-multilingual-chatbot-arena/test{suffix}"]
    read = pl.read_csv if suffix == ".csv" else pl.read_parquet
    assert read(tmp_path / "kaggle" / "input" / shown[0]).columns == ["id", "prompt", "response_a", "response_b", "scored"]
    mounted = {path.name for path in (tmp_path / "kaggle" / "input" / "datasets" / "owner" / "tiny-two").iterdir()}
    assert mounted == {path.name for path in package_folder.iterdir()} - {"dataset-metadata.json"}


@pytest.mark.parametrize(
    "code, message",
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "a kernel has no network: a name was looked up"),
        ("import socket; socket.socket().connect(('127.0.0.1', 9))", "a kernel has no network: it reached for"),
        ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))", "a kernel has no network"),
        ("import preprocess", "a kernel has no repository: it imported preprocess"),
        ("import os; assert os.environ['HF_HUB_OFFLINE'] == '1'; import kaggle_kernels.runtime", "it imported kaggle_kernels"),
    ],
)
def test_a_rehearsed_kernel_reaches_neither_network_nor_repository(tmp_path, code, message):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = make_environment(tmp_path, tmp_path, Scenario())
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr


def test_the_log_has_kaggles_paths_and_the_seconds_are_measured(root, capsys):
    done = run(root, "import os; print('at', os.getcwd())")
    assert capsys.readouterr().out == "at /kaggle/working\n"
    assert 0 < done.seconds < 500
    assert done.kills == ()


def test_a_kernel_that_fails_is_an_error_with_its_last_line(root):
    with pytest.raises(UserError) as raised:
        run(root, "raise ValueError('no rows')")
    assert str(raised.value) == "test: the kernel ended with exit code 1: ValueError: no rows"


WITH_A_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
"""


def test_a_kernel_that_is_over_its_clock_is_ended_with_all_its_processes(root, monkeypatch):
    # Its time is up as soon as it has told of its child, however long that took.
    clock = SimpleNamespace(start=lambda: None, cancel=lambda: None)
    monkeypatch.setattr(sandbox.threading, "Timer", lambda seconds, end, args: vars(clock).update(end=end, args=args) or clock)
    monkeypatch.setattr("builtins.print", lambda line, **_: (lines.append(line), clock.end(*clock.args)))
    lines = []
    message = "test: the kernel was ended, since it was not done within its clock of 0.01 s .*; its last line: "
    with pytest.raises(UserError, match=message) as raised:
        run(root, WITH_A_CHILD + "time.sleep(600)", clock_seconds=0.01)
    [line] = lines
    assert str(raised.value).endswith(f"its last line: {line.strip()}")
    assert [has_ended(int(pid)) for pid in line.split()] == [True, True]


def test_what_a_kernel_leaves_behind_is_ended(root, capfd, monkeypatch):
    monkeypatch.setattr("kaggle_kernels.rehearsal.sandbox.GRACE_SECONDS", 0.1)
    run(root, WITH_A_CHILD)
    _, child = capfd.readouterr().out.split()
    assert has_ended(int(child))


def test_a_dead_process_that_nobody_has_waited_for_is_not_alive():
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    assert sandbox.is_alive(process.pid)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not sandbox.is_alive(process.pid)
    process.wait()


def test_an_interrupted_rehearsal_leaves_no_kernel_behind(root, monkeypatch):
    pids = []

    def interrupt(line, **_):
        pids.append(int(line))
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(root, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    assert [has_ended(pid) for pid in pids] == [True]


def test_the_environment_has_the_devices_and_the_kind_of_run_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_DEVICES", "cuda:7")
    monkeypatch.setenv("SECRET", "x")
    environment = make_environment(tmp_path, tmp_path / "site", Scenario())
    assert environment.keys().isdisjoint({"KAGGLE_DEVICES", "KAGGLE_IS_COMPETITION_RERUN", "SECRET"})
    assert environment["PATH"] == os.environ["PATH"]
    environment = make_environment(tmp_path, tmp_path / "site", Scenario(devices=3, hostile=True))
    assert (environment["KAGGLE_DEVICES"], environment["KAGGLE_IS_COMPETITION_RERUN"]) == ("cpu,cpu,cpu", "1")
