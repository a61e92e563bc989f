"""Faults: which workers are killed, in which order, what is printed and kept; on kernels that are a few lines of Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kaggle_kernels.rehearsal.fault_injection import Kill, check_happened, find_workers
from kaggle_kernels.rehearsal.sandbox import run_as_kaggle
from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.core.errors import UserError

# Three workers, each started again when it dies, until there were DEATHS deaths.
KERNEL = """
import multiprocessing
import time
from multiprocessing.connection import wait
from pathlib import Path


def work(number):
    Path("/proc/self/comm").write_text(f"worker {number}")
    time.sleep(600)


def start(number):
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(number,))
    process.start()
    return process


if __name__ == "__main__":
    workers, deaths = [start(0), start(1), start(2)], []
    while len(deaths) < DEATHS:
        wait([worker.sentinel for worker in workers])
        for number, worker in enumerate(workers):
            if not worker.is_alive():
                deaths.append((number, worker.exitcode))
                workers[number] = start(number)
    print("deaths", deaths)
    for worker in workers:
        worker.kill()
"""


def run(tmp_path, scenario, deaths, kernel=KERNEL):
    root = tmp_path / "sandbox" / "kaggle"
    (root / "working").mkdir(parents=True)
    kernel = kernel.replace("DEATHS", str(deaths))
    return run_as_kaggle(Path(sys.executable), kernel, root, "test", 500, scenario)


def test_workers_are_killed_in_turn_and_each_kill_is_printed_and_kept(tmp_path, capfd):
    done = run(tmp_path, Scenario(kill_every=2), deaths=4)
    printed = capfd.readouterr().out
    assert [kill.worker for kill in done.kills[:4]] == [0, 1, 2, 0]
    assert "deaths [(0, -9), (1, -9), (2, -9), (0, -9)]" in printed
    first = done.kills[0]
    assert f"[rehearsal] killed worker {first.worker} (pid {first.pid}) after {first.seconds} s\n" in printed
    assert all(kill.seconds >= 2 * number for number, kill in enumerate(done.kills, start=1))


def test_every_worker_is_killed_for_good_once_the_log_says_that_so_many_rows_are_scored(tmp_path, capfd):
    progress = 'for rows in (1, 2, 4): print(f"demo, as_given: {rows} of 10 rows, 41.3 rows/s", flush=True); time.sleep(1)'
    kernel = KERNEL.replace("    while len(deaths)", f"    {progress}\n    while len(deaths)")
    done = run(tmp_path, Scenario(lose_all_at=0.4), deaths=6, kernel=kernel)
    assert {kill.worker for kill in done.kills} == {0, 1, 2}
    assert len(done.kills) >= 6
    printed = capfd.readouterr().out
    assert "killed" not in printed[: printed.index("4 of 10 rows")]


def test_the_clock_ends_once_the_log_says_that_so_many_rows_are_scored_in_all_passes(tmp_path, capfd):
    kernel = """
import time
began = time.monotonic()
for rows in (5, 9, 2, 4):
    print(f"demo, as_given: {rows} of 9 rows, 41.3 rows/s")
    time.sleep(1)
    print("seconds", time.monotonic() - began > 1_000_000)
"""
    done = run(tmp_path, Scenario(end_clock_at=11), deaths=0, kernel=kernel)
    assert done.clock_ended
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("seconds")] == ["seconds False"] * 2 + ["seconds True"] * 2


def test_workers_of_another_kernel_are_not_found():
    code = "open('/proc/self/comm', 'w').write('worker 0'); print('named', flush=True); import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"named\n"
        assert find_workers(os.getpid()) == {0: worker.pid}
        assert find_workers(worker.pid) == {}
        worker.kill()
    assert find_workers(os.getpid()) == {}


def test_a_fault_that_did_not_happen_is_an_error():
    with pytest.raises(UserError, match="--kill-every: the kernel ended after 12 s and no worker was killed"):
        check_happened(Scenario(kill_every=20), (), False, 12.4)
    with pytest.raises(UserError, match="--lose-all-at: no worker was alive"):
        check_happened(Scenario(lose_all_at=0.5), (), False, 60)
    with pytest.raises(UserError, match="--end-clock-at: the log never said that 40 rows were scored"):
        check_happened(Scenario(end_clock_at=40), (), False, 60)
    check_happened(Scenario(kill_every=20, lose_all_at=0.5), (Kill(0, 7, 20.0),), False, 60)
