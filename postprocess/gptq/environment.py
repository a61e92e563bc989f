"""The environment that GPTQ runs in, .venv-gptq at the root of the repository: made once, used as a command.

It is whole while its file `installed` is newer than the requirements, which is what the Makefile asks too. Starts fast:
nothing here imports torch.
"""

import contextlib
import fcntl
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from tqdm import tqdm

from preprocess.core.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-gptq"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
WORKER = Path(__file__).parent / "worker.py"
PROGRESS = re.compile(r"Quantizing \S+ blocks .*?(\d+)/(\d+) \[")


def run_worker(arguments: Sequence[Path]) -> None:
    """Run the worker, showing how many of the model's layers are done. Its failure is a UserError with its last line."""
    command = [python_with_gptq(), WORKER, *arguments]
    last = "nothing was printed"
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        ) as worker,
        tqdm(desc="quantising", unit=" layers", file=sys.stderr) as bar,
    ):
        for line in worker.stdout:  # text mode ends a line at a carriage return too, with which progress is rewritten
            if found := PROGRESS.search(line):
                bar.total = int(found[2])
                bar.update(int(found[1]) - bar.n)
            elif line.strip():
                last = line.strip()
    if worker.returncode:
        raise UserError(
            f"{WORKER.name}: GPTQ ended with {worker.returncode}: {last[:300]}; quantize: nf4 or int8 needs no GPTQ"
        )


def python_with_gptq(environment: Path = ENVIRONMENT, requirements: Path = REQUIREMENTS) -> Path:
    """The environment's Python; the environment is made first where it is absent, half-made or older than `requirements`."""
    python, installed = environment / "bin" / "python", environment / "installed"
    with only_one(requirements):
        if not installed.is_file() or installed.stat().st_mtime < requirements.stat().st_mtime:
            click.echo(f"installing {requirements.name} into {environment} (about 1 minute and 2 GB, once)")
            make_environment(python, requirements)
            installed.touch()
    return python


def make_environment(python: Path, requirements: Path) -> None:
    """Create the environment of `python`, emptied first, and install `requirements` into it; UserError where that fails."""
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--requirement", requirements]
    for command in ([sys.executable, "-m", "venv", "--clear", python.parents[1]], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            errors = [line for line in told if line.lower().startswith("error")] or told or ["nothing was printed"]
            raise UserError(
                f"{requirements}: could not be installed into {python.parents[1]} ({errors[-1][:200]}); connect to the "
                "internet and run again, or `make setup`"
            )


@contextlib.contextmanager
def only_one(file: Path) -> Iterator[None]:
    """Hold a lock on `file`, so that of several processes one makes the environment and the others wait for it."""
    with file.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
