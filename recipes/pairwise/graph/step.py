"""`python -m recipes.pairwise.graph.step LOG --gpus N -- COMMAND…`: run one step of the graph; recipes/Snakefile calls it.

The command's output goes to LOG. Beside it, LOG with the ending .json says which command ran, and for how many seconds.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from filelock import FileLock, Timeout

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import write_json

GPU_LOCKS = Path("outputs/.graph")
LINES_SHOWN_OF_FAILURE = 15
SECONDS_BETWEEN_TRIES = 1.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--gpus", type=click.IntRange(min=0), default=0, help="Number of GPUs to run on.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@exits_with_2
def main(log: Path, gpus: int, command: tuple[str, ...]) -> None:
    """Run COMMAND on so many free GPUs of this machine, with its output in LOG."""
    name = log.stem
    command_text = " ".join(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    # On a terminal this line is overwritten by the one with the seconds.
    if sys.stdout.isatty():
        print(f"{name:<12} …            {command_text}", end="\r", flush=True)

    with claimed_gpus(gpus) as environment:
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            exit_code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        seconds = round(time.monotonic() - started, 1)

    write_json(
        log.with_suffix(".json"),
        {"command": command_text, "seconds": seconds, "exit_code": exit_code},
    )
    if exit_code != 0:
        # The cause mostly stands at the end, and the log is in no terminal's history.
        last_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(last_lines[-LINES_SHOWN_OF_FAILURE:]))
        raise UserError(
            f"{name}: `{command_text}` ended with exit code {exit_code}; its whole output is in {log}"
        )
    print(f"{name:<12} {seconds:>6.1f} s     {command_text}", flush=True)


@contextlib.contextmanager
def claimed_gpus(count: int) -> Iterator[dict[str, str]]:
    """Wait for `count` GPUs that no other step of this machine holds, and hold them; on a cluster, hold none.

    Yields:
        The environment for the step's command, in which CUDA shows these GPUs only.
    """
    environment = dict(os.environ)
    # On a cluster, the scheduler has given this job its GPUs already.
    is_cluster_job = "SLURM_JOB_ID" in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ
    if count == 0 or is_cluster_job:
        yield environment
        return

    GPU_LOCKS.mkdir(parents=True, exist_ok=True)
    # A process that is killed leaves no lock behind: the system frees it with the process.
    with contextlib.ExitStack() as locks:
        claimed = claim_free_gpus(count, locks)
        while len(claimed) < count:
            time.sleep(SECONDS_BETWEEN_TRIES)
            claimed += claim_free_gpus(count - len(claimed), locks)

        environment["CUDA_VISIBLE_DEVICES"] = ",".join(claimed)
        yield environment


def claim_free_gpus(most: int, locks: contextlib.ExitStack) -> list[str]:
    """Lock GPUs that nobody holds, each by a file such as outputs/.graph/gpu-0.lock; return their numbers."""
    claimed: list[str] = []
    for gpu in visible_gpus():
        if len(claimed) == most:
            break
        # With timeout=0, a lock that is held already raises Timeout at once, and the next GPU is tried.
        # So do the locks that this process took in an earlier call.
        with contextlib.suppress(Timeout):
            locks.enter_context(FileLock(GPU_LOCKS / f"gpu-{gpu}.lock", timeout=0))
            claimed.append(gpu)
    return claimed


def visible_gpus() -> list[str]:
    """List the numbers of the GPUs that this process may use; without a driver there are none."""
    # The user may have set some GPUs aside.
    chosen_by_user = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen_by_user is not None:
        return [gpu for gpu in chosen_by_user.split(",") if gpu]

    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return listing.split()


if __name__ == "__main__":
    main()
