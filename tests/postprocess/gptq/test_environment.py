"""The environment that GPTQ runs in, and the worker that runs in it."""

import sys
from pathlib import Path

import pytest

from postprocess.gptq import environment
from postprocess.gptq.environment import python_with_gptq, run_worker
from preprocess.core.errors import UserError


def test_a_worker_that_fails_is_one_line_with_its_last_one(tmp_path, monkeypatch, capfd):
    script = tmp_path / "worker.py"
    done = r"\rQuantizing model.layers blocks : 50%|#| 1/2 [00:01<00:01]"
    script.write_text(f"print('first')\nprint('{done}')\nraise ValueError('not\\rthis much')")
    monkeypatch.setattr(environment, "WORKER", script)
    monkeypatch.setattr(environment, "python_with_gptq", lambda: Path(sys.executable))
    with pytest.raises(UserError, match=r"^worker.py: GPTQ failed with exit code 1: this much; mend this, or write"):
        run_worker([])
    assert "1/2" in capfd.readouterr().err


@pytest.fixture
def makefile(tmp_path, monkeypatch):
    """A Makefile whose environment is made by a stand-in, and that of no other."""
    rule = ".venv-gptq/installed: requirements.txt\n\t@mkdir -p .venv-gptq && cat $< >> $@\n"
    (tmp_path / "Makefile").write_text(rule)
    (tmp_path / "requirements.txt").write_text("torch\n")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "ENVIRONMENT", tmp_path / ".venv-gptq")
    return tmp_path / "Makefile"


def test_the_environment_is_made_once_by_make_and_nothing_is_printed_of_one_that_is_there(makefile, tmp_path, capfd):
    for _ in range(2):
        assert python_with_gptq() == tmp_path / ".venv-gptq" / "bin" / "python"
    assert (tmp_path / ".venv-gptq" / "installed").read_text() == "torch\n"
    assert capfd.readouterr() == ("", "")


def test_an_environment_that_cannot_be_made_is_one_line_with_what_pip_says(makefile):
    makefile.write_text(".venv-gptq/installed:\n\t@echo 'ERROR: no torch' >&2; echo 'error: see install.log' >&2; exit 2\n")
    message = r"venv-gptq: .* could not be made \(ERROR: no torch error: see install.log\); connect to the internet"
    with pytest.raises(UserError, match=message):
        python_with_gptq()


def test_an_environment_of_another_checkout_is_left_as_it_is(makefile, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / ".venv-gptq").symlink_to(tmp_path / "other")
    assert python_with_gptq() == tmp_path / ".venv-gptq" / "bin" / "python"
    assert not (tmp_path / "other" / "installed").exists()
