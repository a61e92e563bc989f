"""The command `pairwise`: the chain in order, quick to start, and the same commands as `python -m …`."""

import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from kaggle_kernels.__main__ import main as kernels
from kaggle_kernels.cli import CHAIN, main

SLOW_TO_IMPORT = ("torch", "transformers", "polars", "pydantic", "yaml", "kagglesdk")


def test_help_lists_the_chain_in_the_order_of_use():
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.startswith("  ")]
    assert listed[:21] == [
        *("new", "preprocess", "check", "train", "cv", "labels", "make", "package", "wheels", "report", "sweep"),
        *("list", "build", "rehearse", "weigh", "smoke", "push", "status", "submit", "scores", "trace"),
    ]


@pytest.mark.parametrize("entry", CHAIN, ids=lambda entry: entry.name)
def test_every_command_can_be_imported_and_has_help(entry):
    done = CliRunner().invoke(main, [entry.name, "--help"])
    assert (done.exit_code, done.output.splitlines()[0].split()[:3]) == (0, ["Usage:", "pairwise", entry.name])


def test_commands_are_those_of_the_python_m_forms():
    context = click.Context(main)
    for name, command in kernels.commands.items():
        assert main.get_command(context, name) is command


def test_help_and_completion_import_nothing_slow():
    code = (
        "import click, sys; import kaggle_kernels.__main__; from kaggle_kernels.cli import main\n"
        "main(['--help'], standalone_mode=False); main.shell_complete(click.Context(main), '')\n"
        f"print(sorted(set({SLOW_TO_IMPORT!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words, incomplete, expected",
    [([], "s", ["sweep", "smoke", "status", "submit", "scores"]), (["push"], "--d", ["--dry-run"]), ([], "x", [])],
)
def test_shell_completion_of_commands_and_options(words, incomplete, expected):
    completion = ShellComplete(main, {}, "pairwise", "_PAIRWISE_COMPLETE")
    assert [item.value for item in completion.get_completions(words, incomplete)] == expected
