"""The Python environment that GPTQ runs in: .venv-gptq at the root of the repository.

gptqmodel needs another numpy than the rest of the project, so the quantiser (worker.py) is a command
in an environment of its own. gptq/quantize.py calls `run_worker`, which has the Makefile make the
environment first where it is missing or older than its requirements. Nothing here imports torch.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from preprocess.core.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-gptq"
WORKER = Path(__file__).parent / "worker.py"
LAYERS_DONE = re.compile(r"Quantizing \S+ blocks .*?(?P<done>\d+)/(?P<total>\d+) \[")


def run_worker(arguments: Sequence[Path]) -> None:
    """Run the worker to its end, and show how many of the model's layers are quantised.

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
            f"{WORKER.name}: GPTQ failed with exit code {worker.returncode}: {last_line[:300]}; mend this, or "
            "write quantize: nf4 or int8, which need no GPTQ"
        )


def python_with_gptq() -> Path:
    """Return the Python of the environment that GPTQ needs, which `make` brings up to date first.

    Raises:
        UserError: The environment cannot be made; the message has the error that make printed.
    """
    python = ENVIRONMENT / "bin" / "python"
    # A link leads to another checkout's environment, which is used as it is.
    if ENVIRONMENT.is_symlink():
        return python

    target = f"{ENVIRONMENT.name}/installed"
    command = ["make", "--silent", f"--directory={ROOT}", f"PYTHON={sys.executable}", target]
    # Two runs may need the environment at the same time: one makes it, the other waits.
    with FileLock(ENVIRONMENT.with_name(f"{ENVIRONMENT.name}.lock")):
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True)

    if finished.returncode != 0:
        # pip's errors come first, then what to do; make adds a line of its own.
        errors = [line for line in finished.stderr.splitlines() if line.lower().startswith("error")]
        raise UserError(
            f"{ENVIRONMENT}: the environment for GPTQ could not be made ({' '.join(errors)[:300]}); connect to "
            "the internet and run again"
        )
    return python
