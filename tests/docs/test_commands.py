"""Every command line on the pages, in a fenced bash block or in the prose: it exists, and its options are known to it.

Nothing is run. Click commands are imported and asked for their options; the kaggle command, which logs in when it is
imported, is read as text.
"""

import functools
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import ROOT
from tests.docs.pages import all_pages, blocks, page_id, prose

# What every machine has, or what the pages say to install; not ours to check.
OTHER_PROGRAMS = {"cd", "cp", "eval", "export", "git", "hf", "pip", "pre-commit", "source", "unzip", "wandb"}
OTHER_MODULES = {"pytest"}
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:make|pairwise|axolotl|kaggle|python -m) [^`…]+)`")
OPTION = re.compile(r"--?[a-zA-Z][\w-]*")


@pytest.mark.parametrize("page", all_pages(), ids=page_id)
def test_commands_exist_and_know_their_options(page):
    problems = []
    for block in [*blocks(page, "bash"), *INLINE.findall(prose(page))]:
        for words in commands_in(block):
            problem = problem_of(words)
            if problem:
                problems.append(f"{shlex.join(words)}: {problem}")
    assert problems == []


@pytest.mark.parametrize(
    "page, names",
    [
        ("data", ["preprocess"]),
        ("graph", ["make"]),
        ("kernels", ["build", "weigh", "wheels"]),
        ("packaging", ["package"]),
        ("publishing", ["smoke", "push", "status", "submit", "scores"]),
        ("rehearsal", ["rehearse"]),
        ("report", ["report"]),
        ("tracking", ["sweep"]),
    ],
)
def test_every_option_is_documented(page, names):
    text = (ROOT / f"docs/{page}.md").read_text()
    group = pairwise_command()
    for name in names:
        for parameter in group.get_command(click.Context(group), name).params:
            is_option = isinstance(parameter, click.Option)
            assert not is_option or any(option in text for option in parameter.opts), f"{name} {parameter.opts}"


@pytest.mark.parametrize(
    "line, problem",
    [
        ("python -m preprocess data/train.parquet --outt x", "no option --outt"),
        ("python -m kaggle_kernels rehears demo", "no command rehears"),
        ("python -m postprocess.nothing", "no module postprocess.nothing"),
        ("cd x && A=1 make dmo\n# only words", "no target dmo"),
        ("make cv RECIPE=demo", "no variable RECIPE"),
        ("axolotl train recipes/demo.yml \\\n  --wandb-projekt x", "no option --wandb-projekt"),
        ("kaggle competitions download --competitionn x", "no option --competitionn"),
        ("frobnicate", "no such program"),
    ],
)
def test_a_wrong_command_is_noticed(line, problem):
    *_, words = commands_in(line)
    assert problem_of(words) == problem


def commands_in(block: str) -> Iterator[list[str]]:
    """The words of each command in a block of shell."""
    for line in block.replace("\\\n", " ").splitlines():
        for command in re.split(r" (?:&&|\||;) ", line):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def problem_of(words: list[str]) -> str:
    """What is wrong with a command, or nothing."""
    while ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "python" and arguments[0] != "-m":
        return "" if (ROOT / arguments[0]).exists() else f"no file {arguments[0]}"
    if program == "python":
        _, module, *options = arguments
        if module in OTHER_MODULES:
            return ""
        command = module_command(module)
        return problem_of_click(command, options) if command else f"no module {module}"
    if program == "make":
        return problem_of_make(arguments)
    if program == "axolotl":
        return problem_of_click(importlib.import_module("axolotl.cli.main").cli, arguments)
    if program == "pairwise":
        return problem_of_click(pairwise_command(), arguments)
    if program == "kaggle":
        return problem_of_kaggle(arguments)
    return "" if program in OTHER_PROGRAMS else "no such program"


def problem_of_make(arguments: list[str]) -> str:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        if is_variable and not re.search(rf"\$\((?:or \$\()?{name}\)|^{name} ", makefile, re.M):
            return f"no variable {name}"
        if not is_variable and not re.search(rf"^{name}:", makefile, re.M):
            return f"no target {name}"
    return ""


def problem_of_click(command: click.Command, arguments: list[str]) -> str:
    if isinstance(command, click.Group):
        if not arguments or arguments == ["--help"]:
            return ""
        subcommand = command.get_command(click.Context(command), arguments[0])
        if subcommand is None:
            return f"no command {arguments[0]}"
        return problem_of_click(subcommand, arguments[1:])
    known_options = {"--help"}
    for parameter in command.params:
        known_options.update(parameter.opts)
    return unknown_option(arguments, known_options)


def problem_of_kaggle(arguments: list[str]) -> str:
    literals = kaggle_literals()
    for word in arguments[:2]:
        if word not in literals:
            return f"no command {word}"
    return unknown_option(arguments[2:], literals)


def unknown_option(arguments: list[str], known_options: set[str]) -> str:
    """The first option that is not known; what comes after a lone -- belongs to another program."""
    for argument in arguments:
        if argument == "--":
            break
        option = argument.partition("=")[0]
        if OPTION.fullmatch(option) and option not in known_options:
            return f"no option {option}"
    return ""


@functools.cache
def module_command(module: str) -> click.Command | None:
    """The click command of `python -m MODULE`; None where there is no such module."""
    for name in (f"{module}.__main__", module):
        try:
            command = importlib.import_module(name).main
        except ModuleNotFoundError:
            continue
        return command if isinstance(command, click.Command) else click.Command(name)
    return None


@functools.cache
def pairwise_command() -> click.Command:
    """The console script's click group, wherever pyproject.toml says that it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["pairwise"].partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def kaggle_literals() -> set[str]:
    """Every quoted word in the kaggle command's source: its commands and options are among them."""
    source = Path(click.__file__).parents[1] / "kaggle/cli.py"  # found by its neighbour: importing kaggle logs in
    return set(re.findall(r"\"([\w-]+)\"", source.read_text()))
