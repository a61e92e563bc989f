"""`status SPEC`: the run of the version that was pushed, whatever has been run since; with --wait, to its end."""

from pathlib import Path

from kaggle_kernels.publish.client import Kaggle, Pace, connect
from kaggle_kernels.publish.kernels import RunStatus, read_log, read_status
from kaggle_kernels.publish.push import PushRecord, require_push
from preprocess.core.errors import UserError

LAST_LINES = 20


def status(spec_path: Path, pace: Pace, wait: bool = False) -> None:
    """Print the status of the version that was pushed last; with `wait` until it has run.

    Raises:
        UserError: The run ended in an error, or has not ended within the user's patience.
    """
    pushed = require_push(spec_path)
    kaggle = connect(pace)
    try:
        if wait:
            run = wait_for_run(kaggle, pushed)
        else:
            run = read_status(kaggle, pushed.kernel, pushed.version)
    except KeyboardInterrupt:
        raise UserError("interrupted; run status again, which goes on from here") from None

    print(f"{pushed}: {run.word}, {pushed.age} after the push", flush=True)
    if run.is_over and run.word != "COMPLETE":
        # Waiting has printed the whole log.
        if not wait:
            print_log(read_log(kaggle, pushed.kernel, pushed.version)[-LAST_LINES:])
        failure = f": {run.failure}" if run.failure else ""
        raise UserError(f"{pushed}: {run.word}{failure}; {pushed.url}")
    if run.word == "COMPLETE":
        print(f'next: python -m kaggle_kernels submit {spec_path.stem} -m "MESSAGE"')


def wait_for_run(kaggle: Kaggle, pushed: PushRecord) -> RunStatus:
    """Wait until the pushed version has run, and print its log and its status as they change."""
    last_word = ""
    lines_printed = 0
    for _ in kaggle.pace.looks():
        run = read_status(kaggle, pushed.kernel, pushed.version)
        # A run that waits for a machine has no log yet.
        if run.word != "QUEUED":
            lines = read_log(kaggle, pushed.kernel, pushed.version)
            print_log(lines[lines_printed:])
            lines_printed = max(lines_printed, len(lines))
        if run.is_over:
            return run

        # Each change of the status is printed once.
        if run.word != last_word:
            print(f"{pushed}: {run.word}, {pushed.age} after the push", flush=True)
            last_word = run.word
    raise UserError(f"{pushed}: still {run.word}; run status again, which goes on waiting")


def print_log(lines: list[str]) -> None:
    """Print lines of a kernel's log, so that they cannot be taken for ours."""
    for line in lines:
        print(f"  | {line}", flush=True)
