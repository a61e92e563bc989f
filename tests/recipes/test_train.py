"""`pairwise train`: which launcher, and that our line of error is the last one."""

import sys

import pytest
from click.testing import CliRunner

from preprocess.core.errors import UserError
from recipes.pairwise import train
from recipes.pairwise.config.recipe_files import find_recipe
from tests.conftest import ROOT

TALKS = (
    "import sys\n"
    "for line in ('\\r10%', '\\r20%', '\\n', 'error: a.yml: wrong\\n', 'Traceback …\\n', 'error: a.yml: wrong\\n'):\n"
    "    sys.stderr.write(line)\n"
    "sys.exit({code})"
)


def test_one_device_needs_no_launcher_and_several_take_torchrun():
    assert train.launcher_options(1) == ["--launcher", "python"]
    assert train.launcher_options(4) == ["--launcher", "torchrun", "--", "--nproc_per_node", "4"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ((), False),
        (("--base-model", "x"), False),
        (("--launcher", "accelerate"), True),
        (("--launcher=torchrun",), True),
        (("--sweep", "s.yml"), True),
        (("--use-ray",), True),
    ],
)
def test_a_launcher_that_the_user_names_is_left_alone(options, expected):
    assert train.chooses_launcher(options) is expected


def test_what_a_launcher_prints_below_the_error_is_held_back(capfd):
    exit_code, error_line = train.run_until_error([sys.executable, "-c", TALKS.format(code=1)])
    assert (exit_code, error_line) == (1, "error: a.yml: wrong")
    assert capfd.readouterr().err == "\r10%\r20%\n"


def test_a_run_that_ends_well_loses_no_line(capfd):
    assert train.run_until_error([sys.executable, "-c", TALKS.format(code=0)]) == (0, None)
    assert capfd.readouterr().err.count("error: a.yml: wrong\n") == 2


def test_with_several_devices_the_last_line_is_ours(monkeypatch):
    monkeypatch.setattr(train, "count_devices", lambda: 2)
    monkeypatch.setattr(train, "run_until_error", lambda command: (1, "error: a.yml: wrong"))
    done = CliRunner().invoke(train.main, ["demo", "--max-steps", "1"])
    assert done.exit_code == 2
    assert done.stdout == (
        f"running: axolotl train {find_recipe('demo')} --max-steps 1 --launcher torchrun -- --nproc_per_node 2\n"
    )
    assert done.stderr == "error: a.yml: wrong\n"


def test_a_recipe_is_found_by_its_name_or_its_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert str(find_recipe("demo")) == str(find_recipe("recipes/demo.yml")) == "recipes/demo.yml"
    with pytest.raises(UserError, match="demmo: no such recipe; there are demo, gemma2_causal"):
        find_recipe("demmo")
