"""A kernel in a process of its own, as Kaggle runs it: Kaggle's tree, its clock, no network, nothing of this repository.

Faults can be brought about meanwhile; see faults.py.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from kaggle_kernels.build.spec import COMPETITIONS, Spec
from kaggle_kernels.rehearsal.adversarial_rows import TEXTS
from kaggle_kernels.rehearsal.fault_injection import Faults, Kill, sabotaged
from preprocess.core.errors import UserError

ROOT = Path(__file__).parents[2]
PROJECT = ("preprocess", "recipes", "postprocess", "kaggle_kernels", "tests")
KEPT_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
)
GRACE_SECONDS = 5.0  # for the kernel's own processes to end once it has ended

# Python executes this before the kernel. An audit hook cannot be taken out again, and sub-processes inherit it.
SITECUSTOMIZE = f'''"""A rehearsal: no network, and nothing of the repository."""

import sys


def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        raise OSError("a kernel has no network: a name was looked up")
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        raise OSError(f"a kernel has no network: it reached for {{arguments[1]}}")
    if event == "import" and arguments[0].split(".")[0] in {PROJECT!r}:
        raise ImportError(f"a kernel has no repository: it imported {{arguments[0]}}")


sys.addaudithook(refuse)
'''


@dataclass(frozen=True)
class Run:
    """A kernel that ended well: seconds from the start of its process to its end, and the workers that were killed."""

    seconds: float
    kills: tuple[Kill, ...]


def find_python(python: Path | None) -> Path:
    """The interpreter of the environment with Kaggle's versions."""
    python = python or ROOT / ".venv-kaggle" / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"{python}: absent; `make setup` makes the environment with Kaggle's versions"
        )
    return python.absolute()


def lay_out(
    root: Path,
    spec: Spec,
    packages: dict[str, Path],
    suffix: str,
    test_rows: pl.DataFrame,
    train_file: Path | None = None,
) -> None:
    """Make /kaggle below `root`: packages as links, dataset-metadata.json left out as Kaggle does, verdicts left out.

    The train file is a link. The test file is a CSV for the suffix ".csv", else Parquet.
    """
    for dataset, package in packages.items():
        folder = root / "input" / "datasets" / "owner" / dataset
        folder.mkdir(parents=True)
        for path in package.iterdir():
            if path.name != "dataset-metadata.json":
                (folder / path.name).symlink_to(path.absolute())
    folder = root / "input" / "competitions" / COMPETITIONS[spec.competition].slug
    folder.mkdir(parents=True)
    shown = test_rows.select("id", *TEXTS)
    if suffix == ".csv":
        shown.write_csv(folder / "test.csv")
    else:
        shown.write_parquet(folder / "test.parquet")
    if train_file:
        (folder / f"train{train_file.suffix}").symlink_to(train_file.absolute())
    (root / "working").mkdir()


def run_as_kaggle(
    python: Path,
    kernel: str,
    root: Path,
    name: str,
    *,
    clock_seconds: float,
    devices: int | None = None,
    is_hidden: bool = False,
    faults: Faults | None = None,
) -> Run:
    """Run the kernel's text and print its log line by line; a UserError where it fails or is not done within its clock.

    `devices` is a number of CPU workers; None leaves the choice to the kernel. With `is_hidden` it is told
    that this is the hidden run.
    """
    site, script = root.parent / "site", root.parent / "kernel.py"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    script.write_text(kernel, encoding="utf-8")
    began = time.monotonic()
    process = subprocess.Popen(
        [str(python), "-u", "-P", str(script)],
        cwd=root / "working",
        env=kaggle_environment(root, site, devices, is_hidden),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()
    clock = threading.Timer(clock_seconds, lambda: (late.set(), end_group(process.pid)))
    ended: list[float] = []
    follower = threading.Thread(
        target=lambda: (process.wait(), ended.append(time.monotonic()), await_group(process.pid))
    )
    last = ""
    try:
        clock.start()
        follower.start()
        with sabotaged(process.pid, faults) as kills:
            for line in process.stdout:
                line = line.replace(str(root), "/kaggle").replace(f"{root.parent}/", "")
                print(line, end="", flush=True)
                last = line.strip() or last
    finally:
        clock.cancel()
        end_group(process.pid)
        follower.join()
        process.stdout.close()
    if late.is_set():
        raise UserError(
            f"{name}: the kernel was ended, for it was not done within its clock of {clock_seconds:g} s (clock_seconds of the "
            f"spec, or --clock); its last line: {last}"
        )
    if process.returncode:
        raise UserError(f"{name}: the kernel ended with exit code {process.returncode}: {last}")
    return Run(ended[0] - began, tuple(kills))


def kaggle_environment(
    root: Path, site: Path, devices: int | None = None, is_hidden: bool = False
) -> dict[str, str]:
    """The kernel's environment variables: nothing of ours but the path, root and devices, and the hubs told to stay offline."""
    kept = {key: os.environ[key] for key in KEPT_ENVIRONMENT if key in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    folders = {
        "KAGGLE_ROOT": str(root),
        "HOME": str(root.parent),
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    workers = {"KAGGLE_DEVICES": ",".join(["cpu"] * devices)} if devices else {}
    hidden = {"KAGGLE_IS_COMPETITION_RERUN": "1"} if is_hidden else {}
    return {**kept, **offline, **folders, **workers, **hidden}


def await_group(group: int) -> None:
    """Give the processes of a group GRACE_SECONDS to end, then end them."""
    until = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.05)
    end_group(group)


def end_group(group: int) -> None:
    """Kill every process of a group that there still is."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
