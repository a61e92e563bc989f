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


def test_a_worker_that_fails_is_one_line_with_its_last_one(tmp_path, monkeypatch, capfd):
    script = tmp_path / "worker.py"
    done = r"\rQuantizing model.layers blocks : 50%|#| 1/2 [00:01<00:01]"
    script.write_text(f"print('first')\nprint('{done}')\nraise ValueError('not\\rthis much')")
    monkeypatch.setattr(environment, "WORKER", script)
    monkeypatch.setattr(environment, "python_with_gptq", lambda: Path(sys.executable))
    with pytest.raises(UserError, match=r"^worker.py: GPTQ ended with 1: this much; quantize: nf4 or int8 needs no GPTQ$"):
        run_worker([])
    assert "1/2" in capfd.readouterr().err


@pytest.fixture
def makings(monkeypatch):
    """The environments that were made, by a stand-in that takes a moment."""
    makings = []

    def stand_in(folder: Path, requirements: Path) -> None:
        time.sleep(0.2)
        makings.append(folder)
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environment, "make_environment", stand_in)
    return makings


@pytest.fixture
def requirements(tmp_path):
    """A requirements file with its lock; neither is installed."""
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / "requirements.txt").write_text("torch==0.0.1\n")
    return tmp_path / "requirements.txt"


def test_the_environment_is_made_where_it_is_missing_or_older_than_its_requirements(makings, requirements, tmp_path):
    folder = tmp_path / "environment"
    assert python_with_gptq(folder, requirements) == folder / "bin" / "python"
    python_with_gptq(folder, requirements)
    assert len(makings) == 1
    for number, changed in enumerate((requirements, requirements.with_suffix(".lock")), 2):
        os.utime(folder / "installed", (1e9, 1e9))
        for file in tmp_path.glob("requirements.*"):
            os.utime(file, (2e9, 2e9) if file == changed else (1, 1))
        python_with_gptq(folder, requirements)
        assert len(makings) == number


def test_of_two_runs_one_makes_the_environment_and_the_other_waits(makings, requirements, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(python_with_gptq, tmp_path / "environment", requirements) for _ in range(2)]
        assert [run.result(timeout=300) for run in runs] == [tmp_path / "environment" / "bin" / "python"] * 2
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
