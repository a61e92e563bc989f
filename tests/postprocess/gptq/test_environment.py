"""The environment that GPTQ runs in, and the worker that runs in it."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from postprocess.gptq import environment
from postprocess.gptq.environment import make_environment, python_with_gptq, run_worker
from preprocess.core.errors import UserError


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """worker(source) lets that Python source stand in for the worker, in this environment."""

    def put(source: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(source)
        monkeypatch.setattr(environment, "WORKER", script)
        monkeypatch.setattr(environment, "python_with_gptq", lambda: Path(sys.executable))

    return put


def test_a_worker_that_fails_is_one_line_with_its_last_one(worker):
    worker("print('first')\nraise ValueError('not\\rthis much')")
    with pytest.raises(UserError, match=r"^worker.py: GPTQ ended with 1: this much; quantize: nf4 or int8 needs no GPTQ$"):
        run_worker([])


def test_the_layers_that_are_done_are_shown(worker, capfd):
    worker(
        "import sys\nfor n in (0, 1, 2): sys.stderr.write(f'\\rQuantizing model.layers blocks : {n}0%|#| {n}/2 [00:01<00:01]')"
    )
    run_worker([])
    shown = capfd.readouterr().err
    assert "quantising: 100%" in shown and "2/2" in shown


@pytest.fixture
def makings(monkeypatch):
    """The environments that were made, by a stand-in that takes a moment; `fails` lets it fail."""

    class Makings(list):
        fails = False

    makings = Makings()

    def stand_in(folder: Path, requirements: Path) -> None:
        time.sleep(0.2)
        makings.append(folder)
        if makings.fails:
            raise UserError("no network")
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environment, "make_environment", stand_in)
    return makings


@pytest.fixture
def requirements(tmp_path):
    """A requirements file with its lock; neither is installed."""
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / "requirements.txt").write_text("torch==0.0.1\n")
    return tmp_path / "requirements.txt"


def test_the_environment_is_made_where_it_is_missing_half_made_or_old(makings, requirements, tmp_path):
    folder = tmp_path / "environment"
    makings.fails = True
    with pytest.raises(UserError, match="no network"):
        python_with_gptq(folder, requirements)
    makings.fails = False
    assert python_with_gptq(folder, requirements) == folder / "bin" / "python"
    assert len(makings) == 2
    python_with_gptq(folder, requirements)
    assert len(makings) == 2
    for number, changed in enumerate((requirements, requirements.with_suffix(".lock")), 3):
        os.utime(folder / "installed", (1e9, 1e9))
        for file in tmp_path.glob("requirements.*"):
            os.utime(file, (2e9, 2e9) if file == changed else (1, 1))
        python_with_gptq(folder, requirements)
        assert len(makings) == number


def test_of_two_runs_one_makes_the_environment_and_the_other_waits(makings, requirements, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(python_with_gptq, tmp_path / "environment", requirements) for _ in range(2)]
        assert [run.result(timeout=30) for run in runs] == [tmp_path / "environment" / "bin" / "python"] * 2
    assert len(makings) == 1


def test_a_broken_environment_is_emptied_and_what_pip_says_is_told(requirements, tmp_path, monkeypatch):
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("broken")
    (folder / "installed").touch()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"requirements.lock: could not be installed into .*torch==0.0.1.*`make setup`"):
        make_environment(folder, requirements)
    assert not (folder / "installed").exists()
