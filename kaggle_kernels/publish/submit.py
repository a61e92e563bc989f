"""`status SPEC` and `submit SPEC`: the pushed version followed to its end, and submitted if its output is a submission."""

import csv
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click

from kaggle_kernels.build.packages import spec_folder
from kaggle_kernels.build.spec import COMPETITIONS, Competition, Spec, read_spec
from kaggle_kernels.publish.client import UNKNOWN_TRIES, Pace, ask, check_credentials, demand, run
from kaggle_kernels.publish.kernels import (
    Kernel,
    Status,
    download_output,
    fingerprint,
    follow_log,
    pull,
    read_log,
    read_status,
    what_differs,
)
from kaggle_kernels.publish.push import interruptible, one_at_a_time, read_push
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, write_json

FILE, RECORD = "submission.csv", "kernel.json"
TAKEN = "Successfully submitted"
LAST_LINES = 20


def status(spec_path: Path, pace: Pace, wait: bool = False) -> None:
    """Print the status of the spec's kernel; with `wait` its log as it grows, until it is over.

    UserError, after the log's last lines, where it ended in an error, and where it is not over within the patience.
    """
    pushed = read_push(spec_path)
    with interruptible("status"):
        found = follow(pushed, pace) if wait else read_status(pushed["kernel"], pace)
        print(f"{in_words(pushed)}: {found.word}, {since(pushed['time'])} after the push", flush=True)
        if found.is_over and found.word != "COMPLETE":
            if not wait:
                print("\n".join(f"  | {line}" for line in read_log(pushed["kernel"], pace)[-LAST_LINES:]))
            raise UserError(f"{in_words(pushed)}: {found.word}{': ' * bool(found.failure)}{found.failure}; {pushed['url']}")
    if found.word == "COMPLETE":
        print(f'next: python -m kaggle_kernels submit {spec_path.stem} -m "MESSAGE"')


def follow(pushed: Mapping, pace: Pace) -> Status:
    """The kernel's last status, once it is over; until then changes of it and the lines of its log are printed."""
    ref, told, last = pushed["kernel"], 0, None
    for _ in pace.looks():
        found = read_status(ref, pace)
        if found.is_over:
            lines = read_log(ref, pace)
            print("\n".join(f"  | {line}" for line in lines[told:]), end="\n" * bool(lines[told:]), flush=True)
            return found
        if found != last:
            print(f"{in_words(pushed)}: {found.word}, {since(pushed['time'])} after the push", flush=True)
            last = found
        if found.word == "RUNNING":
            told = follow_log(ref, told, pace)
    raise UserError(f"{in_words(pushed)}: still {found.word}; run status again, which goes on waiting")


def in_words(pushed: Mapping) -> str:
    """The kernel and its version."""
    return f"{pushed['kernel']} version {pushed['version']}"


def since(time: str) -> str:
    """How long ago an ISO time was."""
    minutes, seconds = divmod(int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {seconds:02d} s"


def submit(spec_path: Path, message: str, pace: Pace, yes: bool = False, again: bool = False) -> None:
    """Submit the pushed version once it is complete, still the current one, and its submission.csv is one.

    Asks before, unless `yes`. UserError where something of this is not so, no submission is left today, or the version was
    submitted before and `again` was not said.
    """
    if not message.strip():
        raise UserError("-m: is blank; say what is submitted, for by its message a submission is found again")
    if not yes and not can_ask():
        raise UserError("submit asks before it submits, and there is nobody to ask: add --yes")
    spec, pushed = read_spec(spec_path), read_push(spec_path)
    competition = COMPETITIONS[spec.competition]
    with one_at_a_time(output_folder(spec_path).with_name("submit.lock"), "submit"), interruptible("submit"):
        if finish_interrupted(spec_path, competition, pushed, message, pace):
            return
        check_not_submitted(pushed, again)
        check_current(pushed, pace)
        check_output(pushed, competition, output_folder(spec_path), pace)
        check_made_by(pushed, output_folder(spec_path) / RECORD)
        listed = list_submissions(competition, pace)
        left = submissions_left(competition, listed, pace)
        print("\n".join(summary(spec, pushed, message, output_folder(spec_path), left)), flush=True)
        if not yes and not click.confirm("submit this?"):
            raise UserError("nothing was submitted")
        send(spec_path, competition, pushed, message, [row["ref"] for row in listed], pace)


def can_ask() -> bool:
    """Whether somebody sits there to answer."""
    return sys.stdin.isatty()


def output_folder(spec_path: Path) -> Path:
    """Where the visible run's output is downloaded to."""
    return spec_folder(spec_path) / "output"


def check_not_submitted(pushed: Mapping, again: bool) -> None:
    """Raise UserError where the ledger has a submission of this version, unless it is to be submitted again."""
    for entry in ledger.read():
        same = (entry.get("kernel"), entry.get("kernel_version")) == (pushed["kernel"], pushed["version"])
        is_of_this_push = entry.get("time", "") >= pushed["time"]  # a kernel made anew counts its versions from 1 again
        if entry["event"] == "submit" and same and is_of_this_push and not again:
            raise UserError(
                f"{in_words(pushed)}: was submitted at {entry['time']} as {entry['submission_ref']} ({entry['message']!r}); "
                "--again submits it once more"
            )


def check_current(pushed: Mapping, pace: Pace) -> None:
    """Raise UserError unless the pushed version is complete, and still what Kaggle shows as the kernel."""
    there = pull(pushed["kernel"], pace)
    if there is None:
        raise UserError(f"{pushed['kernel']}: is not on Kaggle any more; run push again")
    told = what_differs(Kernel(there.code, pushed["fingerprint"]["metadata"]), there)
    if fingerprint(there)["code"] != pushed["fingerprint"]["code"]:
        told.insert(0, "the code is another one")
    if told:
        raise UserError(f"{in_words(pushed)}: is not the current version: {'; '.join(told)}; run push again")
    found = read_status(pushed["kernel"], pace)
    if found.word != "COMPLETE":
        raise UserError(f"{in_words(pushed)}: {found.word}, and only a COMPLETE version can be submitted; see status --wait")


def check_output(pushed: Mapping, competition: Competition, out: Path, pace: Pace) -> None:
    """Download the run's submission.csv and kernel.json; UserError unless the first is a submission of this competition."""
    download_output(pushed["kernel"], (FILE, RECORD), out, pace)
    if not (out / FILE).is_file():
        raise UserError(f"{in_words(pushed)}: its output has no {FILE}; its log says why: status")
    with (out / FILE).open(newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    expected = ["id", *competition.columns]
    if header != expected:
        raise UserError(f"{out / FILE}: its columns are {','.join(header)!r}, {competition.slug} wants {','.join(expected)!r}")
    short = next((number for number, row in enumerate(rows, 2) if len(row) != len(expected)), None)
    if short or not rows:
        raise UserError(f"{out / FILE}: {f'line {short} is not whole' if short else 'has no rows'}; download or run it again")


def check_made_by(pushed: Mapping, record: Path) -> None:
    """Raise UserError unless kernel.json is of the pushed kernel with the pushed packages.

    Kaggle gives status and output of its newest run, whichever that is: shortly after a push perhaps still the one before.
    """
    values = read_object(record) if record.is_file() else {}
    packages = {ref.split("/")[1]: dataset["manifest"] for ref, dataset in pushed["datasets"].items()}
    ran_with = values.get("manifests") or {}
    others = [slug for slug, manifest in ran_with.items() if packages.get(slug) != manifest]
    if (values.get("settings") or {}).get("build") != pushed["build"]:
        others.insert(0, "kernel")
    if others or not ran_with:
        raise UserError(
            f"{in_words(pushed)}: the output that Kaggle has is of another {' and another '.join(others) or 'run'}; give it a "
            "minute, then status --wait and submit; if it stays, push --again"
        )


def list_submissions(competition: Competition, pace: Pace) -> list[dict]:
    """The newest 100 submissions of this account: ref, date, description, status, publicScore, privateScore."""
    answer = demand(pace, "competitions", "submissions", competition.slug, "--format", "json", "--page-size", "100")
    rows = answer.values() or []
    return [{**row, "ref": str(row["ref"])} for row in rows]


def submissions_left(competition: Competition, listed: list[dict], pace: Pace) -> int:
    """How many submissions today (UTC) still allows, by Kaggle's word and by what is listed; UserError where none."""
    today = datetime.now(UTC).date().isoformat()
    made = sum(str(row["date"]).startswith(today) and "ERROR" not in str(row["status"]) for row in listed)
    left = competition.daily_submissions - made
    answer = ask(pace, "competitions", "submission-limits", competition.slug)
    if found := re.search(r"^Remaining today: (\d+)", answer.text, re.MULTILINE):
        left = min(left, int(found[1]))
    if left < 1:
        if re.search(r"^Lifetime submissions: 0$", answer.text, re.MULTILINE):
            raise UserError(f"{competition.slug}: Kaggle allows you none: join it there, and accept its rules")
        raise UserError(f"{competition.slug}: no submission is left today ({made} listed); the day ends at 24:00 UTC")
    return left


def summary(spec: Spec, pushed: Mapping, message: str, out: Path, left: int) -> list[str]:
    """What is about to be submitted."""
    with (out / FILE).open(encoding="utf-8", errors="replace") as file:
        rows = sum(1 for _ in file) - 1
    return [
        f"{in_words(pushed)}, pushed {since(pushed['time'])} ago: {FILE} has {rows} rows in the visible run",
        *(f"  {ref} version {dataset['version']}" for ref, dataset in pushed["datasets"].items()),
        f"validation: {validation(spec, out)}",
        f"message: {message}",
        f"submissions left today: {left}",
    ]


def validation(spec: Spec, out: Path) -> str:
    """The accuracy that is known: of the visible run on Kaggle, and of each package's training."""
    known = []
    visible = (read_object(out / RECORD).get("visible") or {}) if (out / RECORD).is_file() else {}
    quality = visible.get("quality") or {}
    if "accuracy" in quality:
        known.append(
            f"accuracy {quality['accuracy']:.4f} ± {quality['standard_error']:.4f} on Kaggle, {quality['judged']} rows"
        )
    for package in spec.packages:
        metrics = Path("outputs") / package.run / "metrics.json"
        accuracy = read_object(metrics).get("accuracy") if metrics.is_file() else None
        if isinstance(accuracy, float):
            known.append(f"accuracy {accuracy:.4f} of {package.run} in training")
    return "; ".join(known) or "no accuracy is known here"


def send(spec_path: Path, competition: Competition, pushed: Mapping, message: str, known: list[str], pace: Pace) -> None:
    """Submit, and write it down. A submission whose answer was lost is found in Kaggle's list, and not made twice."""
    note = submit_note(spec_path)
    write_json(note, {"pushed": dict(pushed), "message": message, "known": known})
    place = ("-k", pushed["kernel"], "-v", str(pushed["version"]), "-f", FILE)
    arguments = ("competitions", "submit", competition.slug, *place, "-m", message)
    for attempt in range(UNKNOWN_TRIES):
        answer = run(arguments)
        check_credentials(answer)
        ref = find_new(competition, message, known, pace)
        if ref or TAKEN in answer.text:
            write_down(spec_path, competition, pushed, message, ref or "not listed yet")
            return
        if not answer.is_transient:
            break
        seconds = pace.wait_before(attempt + 1)
        print(f"  {answer.reason}; not submitted yet, tried again after {seconds:g} s", flush=True)
    if answer.code and not answer.is_transient:
        note.unlink()
        raise UserError(f"{in_words(pushed)}: Kaggle lists no new submission: {answer.reason}")
    raise UserError(
        f"{in_words(pushed)}: perhaps submitted, perhaps not: {answer.reason}; look at Kaggle's page of your submissions, and "
        "run submit again where it is not there"
    )


def find_new(competition: Competition, message: str, known: list[str], pace: Pace) -> str | None:
    """The submission with that message that was not known before; it is given a few looks to be listed."""
    for attempt in range(2):
        if attempt:
            pace.wait_before(attempt)
        for row in list_submissions(competition, pace):
            if row["ref"] not in known and str(row["description"]).split() == message.split():
                return row["ref"]
    return None


def finish_interrupted(spec_path: Path, competition: Competition, pushed: Mapping, message: str, pace: Pace) -> bool:
    """Whether a call that was interrupted did submit this version with this message.

    Whatever it submitted, of another version or with other words too, is written down now: it counts as submitted.
    """
    note = submit_note(spec_path)
    if not note.is_file():
        return False
    values = read_object(note)
    ref = find_new(competition, values["message"], values["known"], pace)
    if not ref:
        note.unlink()
        return False
    write_down(spec_path, competition, values["pushed"], values["message"], ref)
    return (values["pushed"]["version"], values["message"]) == (pushed["version"], message)


def submit_note(spec_path: Path) -> Path:
    """Where a submission that is being made is written down."""
    return spec_folder(spec_path) / "submit.json"


def write_down(spec_path: Path, competition: Competition, pushed: Mapping, message: str, ref: str) -> None:
    """A line in the ledger, and one for the user."""
    fields = {"spec": spec_path.stem, "competition": competition.slug, "message": message, "submission_ref": ref}
    ledger.record("submit", **fields, kernel=pushed["kernel"], kernel_version=pushed["version"], datasets=pushed["datasets"])
    submit_note(spec_path).unlink(missing_ok=True)
    print(f"submitted: {in_words(pushed)} to {competition.slug} as {ref}", flush=True)
