"""The processes of one run: which of them speaks, and how all of them end where the recipe or the data is at fault."""

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import posthog
from axolotl.telemetry.manager import TelemetryManager

from preprocess.core.errors import UserError
from preprocess.model_input import ContractError

# No part of DeepSpeed takes that long to compile.
LONGEST_COMPILATION_SECONDS = 900.0

# Of loggers that are not below its own Axolotl prints warnings only.
LOG = logging.getLogger("axolotl.pairwise")


def is_first_on_machine() -> bool:
    """Return whether this is the first process on its machine, the one that prints and writes for all."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def stop(error: Exception, recipe: Path | None = None) -> None:
    """End this process with exit code 2; the first one on each machine says why, in one line that names the recipe."""
    if is_first_on_machine():
        message = str(error)
        if recipe is not None and str(recipe) not in message:
            message = f"{recipe}: {message}"
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def stopping_on_errors(recipe: Path | None = None) -> Iterator[None]:
    """Turn a UserError or ContractError of the block inside into one line and exit code 2, see stop."""
    try:
        yield
    except (UserError, ContractError) as error:
        stop(error, recipe)


def end_without_telemetry() -> None:
    """Let this process end at once, whatever Axolotl's telemetry still has to send.

    At exit the telemetry's sender is stopped first, and then its queue is waited for: without a network a process with an
    event left would wait for ever. What has not been sent by then is lost.
    """
    atexit.unregister(TelemetryManager.get_instance().shutdown)
    if posthog.default_client is not None:
        atexit.unregister(posthog.default_client.join)


def check_compiler_locks() -> None:
    """Raise UserError where a process was killed while it compiled a part of DeepSpeed.

    It leaves a lock, and PyTorch would wait without a word, and without end, for the process to remove it.
    """
    # PyTorch's own names: ~/.cache/torch_extensions/py312_cu130/cpu_adam/lock.
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in sorted(Path(folder).rglob("lock")):
        age_seconds = time.time() - lock.stat().st_mtime
        if age_seconds > LONGEST_COMPILATION_SECONDS:
            raise UserError(
                f"{lock}: left {age_seconds / 60:.0f} minutes ago by a process that was killed while it compiled "
                f"DeepSpeed's {lock.parent.name}; this run would wait for it without end; delete the file"
            )
