"""`submit SPEC`: the pushed version submitted, once, if it is complete and has written a submission.

outputs/SPEC/submit.json exists from before a submission's call until it is in the ledger. The next call finds it, and looks on
Kaggle for that submission before it makes one.
"""

import itertools
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
from kagglesdk.competitions.types.competition_api_service import (
    ApiCreateCodeSubmissionRequest,
    ApiListSubmissionsRequest,
    ApiSubmission,
)

from kaggle_kernels.build.packages import spec_folder
from kaggle_kernels.build.spec import read_spec
from kaggle_kernels.publish.client import Kaggle, Pace, Refused, Unanswered, ask, connect
from kaggle_kernels.publish.kernels import FEW_LOOKS, download_output, pull_kernel, read_status
from kaggle_kernels.publish.push import PushRecord, one_at_a_time, read_note, require_push
from preprocess.competitions import COMPETITIONS
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, write_json

FILE = "submission.csv"
RECORD = "kernel.json"
SUBMISSIONS_LISTED = 100


@dataclass(frozen=True)
class Submission:
    """A submission that is to be made, or may have been made: outputs/SPEC/submit.json."""

    competition: str  # its slug
    kernel: str  # owner/slug
    version: int  # the kernel's
    datasets: Mapping[str, Mapping]  # as PushRecord has them
    message: str  # by which it is found in Kaggle's list where its ref was lost
    refs_before: list[int]  # of all submissions before it

    def is_of(self, pushed: PushRecord, message: str) -> bool:
        """Whether it is a submission of that kernel's version, with that message."""
        wanted = (pushed.kernel, pushed.version, message)
        return (self.kernel, self.version, self.message) == wanted


def submit(
    spec_path: Path, message: str, pace: Pace, yes: bool = False, again: bool = False
) -> None:
    """Submit the version of a spec's kernel that was pushed last; --help explains the options.

    Raises:
        UserError: The version has not run to its end, wrote no submission, or was submitted before;
            the user does not confirm; or Kaggle refuses it.
    """
    if not message.strip():
        raise UserError(
            "-m: the message is blank; say what is submitted: by its message a submission is found in Kaggle's list"
        )
    if not yes and not can_ask():
        raise UserError("submit asks before it submits, and there is nobody to ask: add --yes")

    pushed = require_push(spec_path)
    kaggle = connect(pace)
    with one_at_a_time(spec_folder(spec_path) / "submit.lock", "submit"):
        # An interrupted call may have submitted just this: then nothing is left to do.
        earlier = finish_interrupted(kaggle, spec_path)
        if earlier is None or not earlier.is_of(pushed, message):
            submit_pushed(kaggle, spec_path, pushed, message, yes, again)


def can_ask() -> bool:
    """Whether a person can answer a question: the input is a terminal."""
    return sys.stdin.isatty()


def finish_interrupted(kaggle: Kaggle, spec_path: Path) -> Submission | None:
    """Record the submission of an earlier call of submit that was interrupted, if Kaggle has it.

    Returns:
        The submission; None where no call was interrupted, or before it had submitted anything.
    """
    note = note_path(spec_path)
    if not note.is_file():
        return None

    # Kaggle may show late what it has just taken.
    submission = read_note(note, Submission)
    for _ in itertools.islice(kaggle.pace.looks(), FEW_LOOKS):
        ref = find_ref(kaggle, submission)
        if ref is not None:
            record_submission(spec_path, submission, ref)
            return submission

    note.unlink()
    return None


def find_ref(kaggle: Kaggle, submission: Submission) -> int | None:
    """Find the ref of a submission in Kaggle's list; None where it is not listed."""
    for listed in list_submissions(kaggle, submission.competition):
        # Kaggle may change the spaces in a message.
        is_same_message = (listed.description or "").split() == submission.message.split()
        if is_same_message and listed.ref not in submission.refs_before:
            return listed.ref
    return None


def submit_pushed(
    kaggle: Kaggle, spec_path: Path, pushed: PushRecord, message: str, yes: bool, again: bool
) -> None:
    """Check the pushed version and its output, ask the user, and submit it (see `submit`)."""
    # The cheapest check first, the download last.
    competition = COMPETITIONS[read_spec(spec_path).competition]
    if not again:
        check_not_submitted(pushed)
    check_complete(kaggle, pushed)
    check_output(kaggle, pushed, spec_folder(spec_path) / "output")

    # Kaggle allows few submissions a day: the user sees what this one would be.
    print(f"{pushed}, pushed {pushed.age} ago, to {competition.slug}")
    for ref, dataset in pushed.datasets.items():
        print(f"  {ref} version {dataset['version']}")
    dates = [listed.date.date() for listed in list_submissions(kaggle, competition.slug)]
    made_today = dates.count(datetime.now(UTC).date())
    print(f"submissions of today (UTC): {made_today} of {competition.daily_submissions}")
    print(f"message: {message}")
    if not yes and not click.confirm("submit this?"):
        raise UserError("nothing was submitted")

    # Where the answer is lost, a ref that is new in Kaggle's list will be this submission's.
    refs_before = [listed.ref for listed in list_submissions(kaggle, competition.slug)]
    submission = Submission(
        competition=competition.slug,
        kernel=pushed.kernel,
        version=pushed.version,
        datasets=pushed.datasets,
        message=message,
        refs_before=refs_before,
    )
    ref = send(kaggle, spec_path, submission)
    record_submission(spec_path, submission, ref)


def check_not_submitted(pushed: PushRecord) -> None:
    """Raise UserError where the ledger has a submission of the pushed version."""
    for entry in ledger.read():
        if entry["event"] != "submit":
            continue

        # A kernel that was deleted and made anew counts its versions from 1 again: an entry from
        # before the push is of another kernel.
        is_same_kernel = entry["kernel"] == pushed.kernel and entry["time"] >= pushed.time
        if is_same_kernel and entry["kernel_version"] == pushed.version:
            raise UserError(
                f"{pushed}: was submitted at {entry['time']} as {entry['submission_ref']} "
                f"({entry['message']!r}); --again submits it once more"
            )


def check_complete(kaggle: Kaggle, pushed: PushRecord) -> None:
    """Check that Kaggle has the version that was pushed, and has run it to its end."""
    shown = pull_kernel(kaggle, pushed.kernel, pushed.version)
    if shown is None:
        raise UserError(f"{pushed.kernel}: is not on Kaggle any more; run push again")

    # A kernel that was deleted and made anew counts its versions from 1 again.
    if shown.fingerprint()["code"] != pushed.fingerprint["code"]:
        raise UserError(
            f"{pushed}: is not what was pushed: Kaggle shows other code; run push again"
        )

    run = read_status(kaggle, pushed.kernel, pushed.version)
    if run.word != "COMPLETE":
        raise UserError(
            f"{pushed}: {run.word}, and only a COMPLETE version can be submitted; see status --wait"
        )


def check_output(kaggle: Kaggle, pushed: PushRecord, out: Path) -> None:
    """Download a run's output, and check that it is a submission made with the pushed packages.

    The kernel itself has checked submission.csv. But Kaggle may have given it other versions of its
    datasets, and may give out the output of another version: kernel.json has the packages' hashes.

    Raises:
        UserError: A file is missing, or the output is of other packages.
    """
    download_output(kaggle, pushed.kernel, pushed.version, (FILE, RECORD), out)
    for name in (FILE, RECORD):
        if not (out / name).is_file():
            raise UserError(f"{pushed}: its output has no {name}; its log says why: status")

    # The hash of each package's manifest. kernel.json names a dataset by its slug alone, the push by
    # owner/slug.
    pushed_hashes = {}
    for ref, dataset in pushed.datasets.items():
        slug = ref.split("/")[1]
        pushed_hashes[slug] = dataset["manifest"]

    read_hashes = read_object(out / RECORD).get("manifests") or {}
    differing = []
    for slug, manifest_hash in read_hashes.items():
        if pushed_hashes.get(slug) != manifest_hash:
            differing.append(slug)

    # A kernel.json that names no package was not written by the kernel that was pushed.
    if not read_hashes:
        differing.append("run")
    if differing:
        raise UserError(
            f"{pushed}: the output that Kaggle has is of another {' and '.join(differing)}; wait a minute, "
            "then run status --wait and submit again; if that does not help, run push --again"
        )


def list_submissions(kaggle: Kaggle, competition: str) -> list[ApiSubmission]:
    """List the newest submissions of this account to a competition (its slug), the newest first."""
    request = ApiListSubmissionsRequest()
    request.competition_name = competition
    request.page_size = SUBMISSIONS_LISTED
    answer = ask(kaggle.pace, kaggle.competitions.list_submissions, request)
    return answer.submissions or []


def send(kaggle: Kaggle, spec_path: Path, submission: Submission) -> int:
    """Submit a kernel's version, by one call that is never repeated.

    Returns:
        The submission's ref on Kaggle.

    Raises:
        UserError: Kaggle refuses it, or its answer was lost; then the next call of submit looks
            for it first.
    """
    request = ApiCreateCodeSubmissionRequest()
    request.competition_name = submission.competition
    request.kernel_owner, request.kernel_slug = submission.kernel.split("/")
    request.kernel_version = submission.version
    request.file_name = FILE
    request.submission_description = submission.message

    # Written before the call, so that a later submit can find what a killed one has sent.
    note = note_path(spec_path)
    write_json(note, asdict(submission))
    name = f"{submission.kernel} version {submission.version}"
    try:
        return kaggle.competitions.create_code_submission(request).ref
    except Refused as error:
        # It is certain that nothing was submitted.
        note.unlink()
        raise UserError(f"{name}: not submitted: {error}") from None
    except Unanswered as error:
        raise UserError(
            f"{name}: perhaps submitted, perhaps not: {error}; run submit again, which looks for "
            "it first"
        ) from None


def note_path(spec_path: Path) -> Path:
    """Where a submission that is being made is written down."""
    return spec_folder(spec_path) / "submit.json"


def record_submission(spec_path: Path, submission: Submission, ref: int) -> None:
    """Write a submission into the ledger, and tell the user."""
    ledger.record(
        "submit",
        spec=spec_path.stem,
        competition=submission.competition,
        message=submission.message,
        submission_ref=str(ref),
        kernel=submission.kernel,
        kernel_version=submission.version,
        datasets=submission.datasets,
    )
    # After the ledger: a call that is killed between them finds the note, and writes the line again.
    note_path(spec_path).unlink(missing_ok=True)
    print(
        f"submitted: {submission.kernel} version {submission.version} to {submission.competition} "
        f"as {ref}",
        flush=True,
    )
