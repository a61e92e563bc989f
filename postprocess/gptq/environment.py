"""The Python environment that GPTQ runs in: .venv-gptq at the root of the repository.

gptqmodel needs another numpy than the rest of the project, so the quantiser (worker.py) is a command
in an environment of its own. gptq/quantize.py calls `run_worker`, which makes the environment first
where it is missing. `make setup` makes the same one: both take it for complete while its file
`installed` is newer than requirements.txt and requirements.lock. Nothing here imports torch.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from filelock import FileLock
from tqdm import tqdm

from preprocess.core.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-gptq"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
WORKER = Path(__file__).parent / "worker.py"
LAYERS_DONE = re.compile(r"Quantizing \S+ blocks .*?(?P<done>\d+)/(?P<total>\d+) \[")


def run_worker(arguments: Sequence[Path]) -> None:
    """Run the worker to its end, and show how many of the model's layers are quantised.

    Args:
        arguments: The worker's command line, see worker.py.

    Raises:
        UserError: The worker failed; the message has the last line that it printed.
    """
    worker = subprocess.Popen(
        [python_with_gptq(), WORKER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    last_line = "nothing was printed"

    with worker, tqdm(desc="quantising", unit=" layers", file=sys.stderr) as bar:
        # The worker's own progress bar rewrites its line with carriage returns; in text mode, each of
        # them ends a line here.
        for line in worker.stdout:
            progress = LAYERS_DONE.search(line)
            if progress:
                bar.total = int(progress["total"])
                bar.update(int(progress["done"]) - bar.n)
            elif line.strip():
                last_line = line.strip()

    if worker.returncode != 0:
        raise UserError(
            f"{WORKER.name}: GPTQ ended with {worker.returncode}: {last_line[:300]}; quantize: nf4 or int8 needs no GPTQ"
        )


def python_with_gptq(environment: Path = ENVIRONMENT, requirements: Path = REQUIREMENTS) -> Path:
    """Return the environment's Python, once the environment is complete.

    Args:
        environment: The environment's folder.
        requirements: What is installed into it, in pip's format, with its lock beside it.

    Raises:
        UserError: The environment cannot be made.
    """
    installed = environment / "installed"

    # Two runs may need the environment at the same time: one makes it, the other waits.
    with FileLock(environment.with_name(f"{environment.name}.lock")):
        if not is_complete(installed, requirements):
            click.echo(
                f"installing {requirements.stem}.lock into {environment} (about 1 minute and 2 GB, once)"
            )
            make_environment(environment, requirements)
            installed.touch()

    return environment / "bin" / "python"


def is_complete(installed: Path, requirements: Path) -> bool:
    """Whether the environment was completed after its requirements last changed."""
    if not installed.is_file():
        return False

    for source in (requirements, requirements.with_suffix(".lock")):
        if source.stat().st_mtime > installed.stat().st_mtime:
            return False
    return True


def make_environment(environment: Path, requirements: Path) -> None:
    """Create an environment, emptied of what a half-made one left, and install its requirements.

    Args:
        environment: The environment's folder.
        requirements: A file that pins torch; the lock beside it pins everything else, with hashes.

    Raises:
        UserError: The environment is a link, or a command failed; the message then has the last error
            that it printed.
    """
    # Emptying a link would empty what another checkout uses.
    if environment.is_symlink():
        raise UserError(
            f"{environment}: is a link, and the environment behind it is not that of {requirements}; remove the link"
        )

    python = environment / "bin" / "python"
    pip_install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    lock = requirements.with_suffix(".lock")
    commands = [
        [sys.executable, "-m", "venv", "--clear", environment],
        # torch comes alone, in the build that suits the machine: the lock leaves it out.
        [*pip_install, torch_pin(requirements)],
        [*pip_install, "--no-deps", "--require-hashes", "--requirement", lock],
    ]

    for command in commands:
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            error = last_error(finished.stderr + finished.stdout)
            raise UserError(
                f"{lock}: could not be installed into {environment} ({error[:200]}); "
                "connect to the internet and run again, or `make setup`"
            )


def torch_pin(requirements: Path) -> str:
    """Find the line of a requirements file that pins torch."""
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line
    raise ValueError(f"{requirements}: no line torch==VERSION")


def last_error(output: str) -> str:
    """Find the last line of a command's output that names an error, else its last line."""
    last_line = "nothing was printed"
    last_error_line = None
    for line in output.splitlines():
        if line.strip():
            last_line = line
        if line.lower().startswith("error"):
            last_error_line = line

    return last_error_line or last_line
