"""`status SPEC` and `submit SPEC`: the pushed version followed to its end, and submitted if its output is a submission.

Kaggle is asked for the pushed version itself, whatever has been run since.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from kagglesdk.competitions.types.competition_api_service import (
    ApiCreateCodeSubmissionRequest,
    ApiGetSubmissionLimitsRequest,
    ApiListSubmissionsRequest,
    ApiSubmission,
)

from kaggle_kernels.build.packages import spec_folder
from kaggle_kernels.build.spec import COMPETITIONS, Competition, Spec, read_spec
from kaggle_kernels.publish.client import Kaggle, Pace, Refused, Unanswered, ask, connect
from kaggle_kernels.publish.kernels import (
    Kernel,
    RunStatus,
    download_output,
    find_differences,
    pull_kernel,
    read_log,
    read_status,
)
from kaggle_kernels.publish.push_record import PushRecord, one_at_a_time, require_push
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, write_json

FILE = "submission.csv"
RECORD = "kernel.json"

LAST_LINES = 20
SUBMISSIONS_LISTED = 100


@dataclass(frozen=True)
class Submission:
    """A submission that is to be made, or may have been made: outputs/SPEC/submit.json."""

    version: int  # the kernel's
    message: str  # by which it is found in Kaggle's list where its ref was lost
    refs_before: list[int]  # of all submissions before it


def status(spec_path: Path, pace: Pace, wait: bool = False) -> None:
    """Print the status of the pushed version; with `wait`, its log too, until it is over.

    Raises:
        UserError: It ended in an error, after the log's last lines; or it is not over within the patience.
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
        if not wait:
            print_log(read_log(kaggle, pushed.kernel, pushed.version)[-LAST_LINES:])
        failure = f": {run.failure}" if run.failure else ""
        raise UserError(f"{pushed}: {run.word}{failure}; {pushed.url}")
    if run.word == "COMPLETE":
        print(f'next: python -m kaggle_kernels submit {spec_path.stem} -m "MESSAGE"')


def wait_for_run(kaggle: Kaggle, pushed: PushRecord) -> RunStatus:
    """Wait until the pushed version has run, and print changes of its status and new lines of its log."""
    last_word = ""
    lines_printed = 0
    for _ in kaggle.pace.looks():
        run = read_status(kaggle, pushed.kernel, pushed.version)
        # The log of a run that waits is empty.
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


def submit(
    spec_path: Path, message: str, pace: Pace, yes: bool = False, again: bool = False
) -> None:
    """Submit the pushed version once it is complete and its submission.csv is one.

    Raises:
        UserError: The version is not complete, or was submitted before; its output is no submission; or none is
            left today.
    """
    if not message.strip():
        raise UserError(
            "-m: is blank; say what is submitted, for by its message a submission is found again"
        )
    if not yes and not can_ask():
        raise UserError("submit asks before it submits, and there is nobody to ask: add --yes")

    spec = read_spec(spec_path)
    competition = COMPETITIONS[spec.competition]
    pushed = require_push(spec_path)
    kaggle = connect(pace)
    out = spec_folder(spec_path) / "output"
    with one_at_a_time(spec_folder(spec_path) / "submit.lock", "submit"):
        if finish_interrupted(kaggle, spec_path, competition, pushed, message):
            return
        check_not_submitted(pushed, again)
        check_complete(kaggle, pushed)
        check_output(kaggle, pushed, competition, out)
        check_made_by(pushed, out / RECORD)

        # A submission of the day is spent for good: the user sees before what it would be.
        print_summary(spec, pushed, message, out)
        check_allowance(kaggle, competition)
        if not yes and not click.confirm("submit this?"):
            raise UserError("nothing was submitted")

        # What is in the list already is not this one, also with the same message.
        refs_before = [listed.ref for listed in list_submissions(kaggle, competition)]
        submission = Submission(pushed.version, message, refs_before)
        ref = send(kaggle, spec_path, competition, pushed, submission)
        record_submission(spec_path, competition, pushed, submission, ref)


def can_ask() -> bool:
    """Whether a person can answer a question: the input is a terminal."""
    return sys.stdin.isatty()


def check_not_submitted(pushed: PushRecord, again: bool) -> None:
    """Raise UserError where the ledger has a submission of this version, unless it is to be submitted again."""
    for entry in ledger.read():
        kernel_version = (entry.get("kernel"), entry.get("kernel_version"))
        is_same = entry["event"] == "submit" and kernel_version == (pushed.kernel, pushed.version)
        # A kernel that was made anew counts its versions from 1 again.
        is_of_this_push = entry.get("time", "") >= pushed.time
        if is_same and is_of_this_push and not again:
            raise UserError(
                f"{pushed}: was submitted at {entry['time']} as {entry['submission_ref']} "
                f"({entry['message']!r}); --again submits it once more"
            )


def check_complete(kaggle: Kaggle, pushed: PushRecord) -> None:
    """Raise UserError unless Kaggle has the pushed version as it was pushed, and has run it."""
    shown = pull_kernel(kaggle, pushed.kernel, pushed.version)
    if shown is None:
        raise UserError(f"{pushed.kernel}: is not on Kaggle any more; run push again")

    # Only the hash of the pushed code is known here.
    problems = find_differences(Kernel(shown.code, pushed.fingerprint["metadata"]), shown)
    if shown.fingerprint()["code"] != pushed.fingerprint["code"]:
        problems.insert(0, "the code is another one")
    if problems:
        raise UserError(f"{pushed}: is not what was pushed: {'; '.join(problems)}; run push again")

    run = read_status(kaggle, pushed.kernel, pushed.version)
    if run.word != "COMPLETE":
        raise UserError(
            f"{pushed}: {run.word}, and only a COMPLETE version can be submitted; see status --wait"
        )


def check_output(kaggle: Kaggle, pushed: PushRecord, competition: Competition, out: Path) -> None:
    """Download the run's submission.csv and kernel.json; UserError unless the first is a submission."""
    download_output(kaggle, pushed.kernel, pushed.version, (FILE, RECORD), out)
    path = out / FILE
    if not path.is_file():
        raise UserError(f"{pushed}: its output has no {FILE}; its log says why: status")

    # Three rows of the visible test file.
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    expected = ["id", *competition.columns]
    if header != expected:
        raise UserError(
            f"{path}: its columns are {','.join(header)!r}, {competition.slug} wants "
            f"{','.join(expected)!r}"
        )
    if len(rows) == 1:
        raise UserError(f"{path}: has no rows; download or run it again")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(expected):
            raise UserError(f"{path}: line {number} is not whole; download or run it again")


def check_made_by(pushed: PushRecord, path: Path) -> None:
    """Raise UserError unless kernel.json is of the pushed kernel with the pushed packages."""
    # A kernel writes down which build it is, and which packages it found.
    record = read_object(path) if path.is_file() else {}
    manifests_pushed = {}
    for ref, dataset in pushed.datasets.items():
        manifests_pushed[ref.split("/")[1]] = dataset["manifest"]

    others = []
    if (record.get("settings") or {}).get("build") != pushed.build:
        others.append("kernel")
    manifests_run = record.get("manifests") or {}
    for slug, manifest in manifests_run.items():
        if manifests_pushed.get(slug) != manifest:
            others.append(slug)

    if others or not manifests_run:
        names = " and another ".join(others or ["run"])
        raise UserError(
            f"{pushed}: the output that Kaggle has is of another {names}; give it a minute, then "
            "status --wait and submit; if it stays, push --again"
        )


def list_submissions(kaggle: Kaggle, competition: Competition) -> list[ApiSubmission]:
    """List the newest submissions of this account, the newest first."""
    request = ApiListSubmissionsRequest()
    request.competition_name = competition.slug
    request.page_size = SUBMISSIONS_LISTED
    answer = ask(kaggle.pace, kaggle.competitions.list_submissions, request)
    return answer.submissions or []


def check_allowance(kaggle: Kaggle, competition: Competition) -> None:
    """Print how many submissions Kaggle allows today (UTC); UserError where none."""
    request = ApiGetSubmissionLimitsRequest()
    request.competition_name = competition.slug
    try:
        limits = ask(kaggle.pace, kaggle.competitions.get_submission_limits, request)
    except Refused as error:
        # Kaggle has the last word when the submission is made.
        print(f"submissions left today: not known ({error})")
        return

    # An account that has not joined is allowed none in all.
    if limits.num_allowed_now < 1 and limits.num_total == 0:
        raise UserError(
            f"{competition.slug}: Kaggle allows you none: join it there, and accept its rules"
        )
    if limits.num_allowed_now < 1:
        raise UserError(
            f"{competition.slug}: no submission is left today; the day ends at 24:00 UTC"
        )
    print(f"submissions left today: {limits.num_allowed_now}", flush=True)


def print_summary(spec: Spec, pushed: PushRecord, message: str, out: Path) -> None:
    """Print what is about to be submitted."""
    rows = (out / FILE).read_text(encoding="utf-8", errors="replace").count("\n") - 1
    print(f"{pushed}, pushed {pushed.age} ago: {FILE} has {rows} rows in the visible run")
    for ref, dataset in pushed.datasets.items():
        print(f"  {ref} version {dataset['version']}")
    print(f"validation: {describe_validation(spec, out)}")
    print(f"message: {message}")


def describe_validation(spec: Spec, out: Path) -> str:
    """Say which accuracy is known: of the visible run on Kaggle, and of each package's training."""
    lines = []
    quality = (read_object(out / RECORD).get("visible") or {}).get("quality") or {}
    if "accuracy" in quality:
        lines.append(
            f"accuracy {quality['accuracy']:.4f} ± {quality['standard_error']:.4f} on Kaggle, "
            f"{quality['judged']} rows"
        )
    for package in spec.packages:
        path = Path("outputs") / package.run / "metrics.json"
        accuracy = read_object(path).get("accuracy") if path.is_file() else None
        if accuracy is not None:
            lines.append(f"accuracy {accuracy:.4f} of {package.run} in training")
    return "; ".join(lines) or "no accuracy is known here"


def send(
    kaggle: Kaggle,
    spec_path: Path,
    competition: Competition,
    pushed: PushRecord,
    submission: Submission,
) -> int:
    """Submit once; the submission's ref on Kaggle, or UserError where it refuses or its answer is lost."""
    request = ApiCreateCodeSubmissionRequest()
    request.competition_name = competition.slug
    request.kernel_owner, request.kernel_slug = pushed.kernel.split("/")
    request.kernel_version = submission.version
    request.file_name = FILE
    request.submission_description = submission.message

    # Before the call, so that a killed process leaves a trace.
    note = note_path(spec_path)
    write_json(note, vars(submission))
    try:
        method = kaggle.competitions.create_code_submission
        answer = ask(kaggle.pace, method, request, changes_something=True)
    except Refused as error:
        # It is certain that nothing was submitted.
        note.unlink()
        raise UserError(f"{pushed}: not submitted: {error}") from None
    except Unanswered as error:
        # Asking again could make a second submission.
        for _ in kaggle.pace.few_looks():
            ref = find_lost_submission(kaggle, competition, submission)
            if ref is not None:
                return ref
        raise UserError(
            f"{pushed}: perhaps submitted, perhaps not: {error}; run submit again, which looks for "
            "it first"
        ) from None
    return answer.ref


def find_lost_submission(
    kaggle: Kaggle, competition: Competition, submission: Submission
) -> int | None:
    """Look in Kaggle's list for a submission whose answer was lost; its ref, or None where it is not there."""
    for listed in list_submissions(kaggle, competition):
        # Kaggle trims a message.
        is_same = (listed.description or "").split() == submission.message.split()
        if is_same and listed.ref not in submission.refs_before:
            return listed.ref
    return None


def finish_interrupted(
    kaggle: Kaggle, spec_path: Path, competition: Competition, pushed: PushRecord, message: str
) -> bool:
    """Finish an interrupted call of submit: look for its submission on Kaggle, and record it.

    Returns:
        Whether that submission is the one asked for now, so that none is left to make.
    """
    # The note exists from before a submission's call until it is in the ledger.
    note = note_path(spec_path)
    if not note.is_file():
        return False

    # A minute or more has passed since: one look will do.
    interrupted = Submission(**read_object(note))
    ref = find_lost_submission(kaggle, competition, interrupted)
    if ref is None:
        note.unlink()
        return False

    record_submission(spec_path, competition, pushed, interrupted, ref)
    is_same_version = interrupted.version == pushed.version
    return is_same_version and interrupted.message == message


def note_path(spec_path: Path) -> Path:
    """Where a submission that is being made is written down."""
    return spec_folder(spec_path) / "submit.json"


def record_submission(
    spec_path: Path, competition: Competition, pushed: PushRecord, submission: Submission, ref: int
) -> None:
    """Write a submission into the ledger, and tell the user."""
    ledger.record(
        "submit",
        spec=spec_path.stem,
        competition=competition.slug,
        message=submission.message,
        submission_ref=str(ref),
        kernel=pushed.kernel,
        kernel_version=submission.version,
        datasets=pushed.datasets,
    )
    # After the ledger: a call that is killed between them finds the note, and writes the line again.
    note_path(spec_path).unlink(missing_ok=True)
    print(
        f"submitted: {pushed.kernel} version {submission.version} to {competition.slug} as {ref}",
        flush=True,
    )
