"""A process for the kernel, as Kaggle gives it one: limited time, no network, no repository.

`rehearse.py` calls `run_as_kaggle` on a tree that kaggle_tree.py made. fault_injection.py kills
workers meanwhile.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from kaggle_kernels.rehearsal.fault_injection import Kill, inject_faults
from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.core.errors import UserError

ROOT = Path(__file__).parents[2]

# Packages of this repository, which a kernel must not import.
PROJECT = ("preprocess", "recipes", "postprocess", "kaggle_kernels", "tests")

# Environment variables of this machine that the kernel gets too.
KEPT_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
)

# How long the kernel's own processes may live on once it has ended.
GRACE_SECONDS = 5.0
GROUP_POLL_SECONDS = 0.05

# Python executes this before the kernel. An audit hook cannot be removed, and sub-processes get it
# too, since they inherit PYTHONPATH.
SITECUSTOMIZE = f'''"""A rehearsal: no network, and nothing of the repository."""

import atexit
import gc
import signal
import sys
import time


def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        raise OSError("a kernel has no network: a name was looked up")
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        is_network = isinstance(address, tuple)  # a local socket's address is a path
        if is_network:
            raise OSError(f"a kernel has no network: it reached for {{address}}")
    if event == "import" and arguments[0].split(".")[0] in {PROJECT!r}:
        raise ImportError(f"a kernel has no repository: it imported {{arguments[0]}}")


def end_clock(*_):
    real_time = time.monotonic
    time.monotonic = lambda: real_time() + 1_000_000


sys.addaudithook(refuse)
signal.signal(signal.SIGUSR1, end_clock)  # fault_injection.py sends it

# For tests to be fast: Python would look for garbage among all that was imported, a second in each
# process. Nothing that a kernel computes depends on it.
gc.set_threshold(10_000)
atexit.register(gc.freeze)
'''


@dataclass(frozen=True)
class KernelRun:
    """A kernel that ended well: its seconds from start to end, and the faults that happened."""

    seconds: float
    kills: tuple[Kill, ...]
    clock_ended: bool = False


def find_python(python: Path | None) -> Path:
    """Return the interpreter with Kaggle's versions, by default that of .venv-kaggle."""
    if python is None:
        python = ROOT / ".venv-kaggle" / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"{python}: no such file; run `make setup`, which installs Kaggle's versions there, or give "
            "another Python with --python"
        )
    return python.absolute()


def run_as_kaggle(
    python: Path, kernel: str, root: Path, name: str, clock_seconds: float, scenario: Scenario
) -> KernelRun:
    """Run a kernel in Kaggle's tree, within its clock, and print its log line by line.

    Raises:
        UserError: It failed, or was not done within its clock; the message has its last line.
    """
    began = time.monotonic()
    process = start_kernel(python, kernel, root, scenario)

    # One thread ends the kernel when its clock runs out, another notes when it ends by itself.
    # This thread reads the log meanwhile.
    clock = threading.Timer(clock_seconds, end_group, args=(process.pid,))
    with ThreadPoolExecutor() as threads:
        try:
            clock.start()
            watcher = threads.submit(await_end, process, began)
            with inject_faults(process.pid, scenario) as injection:
                last_line = print_log(process, root, injection.read_log_line)
        finally:
            # Also after Ctrl-C: nothing of the kernel may go on.
            clock.cancel()
            end_group(process.pid)
            process.stdout.close()

    seconds = watcher.result()
    if seconds >= clock_seconds:
        raise UserError(
            f"{name}: the kernel was ended, since it was not done within its clock of "
            f"{clock_seconds:g} s (clock_seconds of the spec, or --clock); "
            f"its last line: {last_line}"
        )
    if process.returncode != 0:
        raise UserError(
            f"{name}: the kernel ended with exit code {process.returncode}: {last_line}"
        )
    return KernelRun(seconds, tuple(injection.kills), injection.clock_ended)


def start_kernel(
    python: Path, kernel: str, root: Path, scenario: Scenario
) -> subprocess.Popen[str]:
    """Start the kernel in a process group of its own, its log on `stdout`."""
    # Python imports sitecustomize.py from PYTHONPATH before it runs the script.
    site = root.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")

    script = root.parent / "kernel.py"
    script.write_text(kernel, encoding="utf-8")

    # -u: the log comes line by line. -P: the script's folder is not searched for modules.
    return subprocess.Popen(
        [str(python), "-u", "-P", str(script)],
        cwd=root / "working",
        env=make_environment(root, site, scenario),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def print_log(process: subprocess.Popen[str], root: Path, read_line: Callable[[str], None]) -> str:
    """Print the log until its end, with Kaggle's paths; return the last line that is not blank.

    `read_line` is called with each line.
    """
    last_line = ""
    for line in process.stdout:
        # Paths look as they would on Kaggle.
        line = line.replace(str(root), "/kaggle").replace(f"{root.parent}/", "")
        print(line, end="", flush=True)
        read_line(line)
        if line.strip():
            last_line = line.strip()
    return last_line


def await_end(process: subprocess.Popen[str], began: float) -> float:
    """Wait until the kernel and all processes that it started have ended.

    A process that outlives the kernel would hold its log open, and reading that would never end.

    Returns:
        How many seconds the kernel's own process ran. `began` is the time.monotonic() of its start.
    """
    process.wait()
    seconds = time.monotonic() - began

    # The other processes have GRACE_SECONDS to end by themselves.
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and is_alive(process.pid):
        time.sleep(GROUP_POLL_SECONDS)
    end_group(process.pid)
    return seconds


def is_alive(group: int) -> bool:
    """Tell whether a process of a group is still running."""
    # A dead process, a zombie, stays in its group until its parent asks for it: that takes seconds in
    # some containers, or never happens.
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_group(group: int) -> None:
    """Kill every process of a group that is still alive."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def make_environment(root: Path, site: Path, scenario: Scenario) -> dict[str, str]:
    """Make the kernel's environment variables: few of this machine's, and no way to a model hub.

    `root` stands for /kaggle, `site` holds sitecustomize.py.
    """
    # Tokens and passwords of this machine's user must not reach the kernel.
    environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "KAGGLE_ROOT": str(root),
        "HOME": str(root.parent),
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    # As the kernel's runtime and Kaggle name them.
    if scenario.devices is not None:
        environment["KAGGLE_DEVICES"] = ",".join(["cpu"] * scenario.devices)
    if scenario.is_hidden:
        environment["KAGGLE_IS_COMPETITION_RERUN"] = "1"
    return environment
