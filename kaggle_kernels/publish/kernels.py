"""One kernel on Kaggle: pushed, read back and compared field by field, its status, its log, its output."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kaggle_kernels.publish.client import UNKNOWN_TRIES, Answer, Pace, ask, call_in_words, demand, list_files, run
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, write_json

METADATA, CODE = "kernel-metadata.json", "kernel.py"
PUSHED = re.compile(r"Kernel version (\d+) successfully pushed\.\s+Please check progress at (\S+)")
REFUSED = re.compile(r"Kernel push error: (.*)")
LEFT_OUT = re.compile(r"The following are not valid (.+?) and could not be added to the kernel: (.*)")
STATUS = re.compile(r'has status "(?:\w+\.)?(\w+)"')
FAILURE = re.compile(r'Failure message: "(.*)"', re.DOTALL)
LOST = "Log stream connection"
READ_BACK = 4  # times, for what was pushed may not be shown at once


@dataclass(frozen=True)
class Kernel:
    """What a kernel is meant to be: its code, and its metadata with the owner and the datasets' versions filled in."""

    code: str
    metadata: Mapping

    @property
    def ref(self) -> str:
        """owner/slug."""
        return self.metadata["id"]


@dataclass(frozen=True)
class Status:
    """Of a kernel's newest run: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_…; the failure's message where there is one."""

    word: str
    failure: str

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.word in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")


def read_kernel(folder: Path, owner: str, versions: Mapping[str, int]) -> Kernel:
    """The built kernel in `folder` as it is to be on Kaggle: of `owner`, each of its datasets at its version."""
    metadata = read_object(folder / METADATA)
    sources = [f"{owner}/{source.split('/')[1]}" for source in metadata["dataset_sources"]]
    pinned = [f"{source}/{versions[source]}" if source in versions else source for source in sources]
    meant = {**metadata, "id": f"{owner}/{metadata['id'].split('/')[1]}", "dataset_sources": pinned}
    return Kernel((folder / CODE).read_text(encoding="utf-8"), meant)


def pull(ref: str, pace: Pace) -> Kernel | None:
    """The kernel as Kaggle has it now; None where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        answer = ask(pace, "kernels", "pull", ref, "--metadata", "--path", folder)
        if answer.is_absent:
            return None
        if answer.code or not (Path(folder) / METADATA).is_file():
            raise UserError(f"{answer.call}: {answer.reason}")
        metadata = read_object(Path(folder) / METADATA)
        return Kernel((Path(folder) / metadata["code_file"]).read_text(encoding="utf-8"), metadata)


def what_differs(meant: Kernel, there: Kernel) -> list[str]:
    """How what Kaggle has differs from what was meant, in words, field by field.

    Kaggle names the machine of the last run, which before the first is none, and may leave out what is false. A dataset that
    it names without a version is taken at its word: what was pinned is the newest version.
    """
    told = [] if there.code.rstrip() == meant.code.rstrip() else ["the code is another one"]
    for key, expected in meant.metadata.items():
        found = there.metadata.get(key)
        if key in ("id", "dataset_sources"):
            expected, found = lower_case(expected), lower_case(found)
        if expected is False and found is None:
            continue
        if key == "code_file" or (key == "machine_shape" and not found):
            continue
        if key.endswith("_sources"):
            expected, found = sorted(expected), sorted(found or [])
            if key == "dataset_sources":
                expected = [full if full in found else bare(full) if bare(full) in found else full for full in expected]
                expected.sort()
        if found != expected:
            told.append(f"{key} is {json.dumps(found)} in place of {json.dumps(expected)}")
    return told


def lower_case(names: str | list[str] | None) -> str | list[str]:
    """owner/slug as Kaggle compares them: KAGGLE_USERNAME may have the owner in capitals."""
    return names.lower() if isinstance(names, str) else [name.lower() for name in names or []]


def bare(source: str) -> str:
    """owner/slug of owner/slug/version."""
    return "/".join(source.split("/")[:2])


def push(kernel: Kernel, pace: Pace) -> tuple[int, str]:
    """Push the kernel, which starts its visible run; the version's number and page. UserError where a part is left out."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CODE).write_text(kernel.code, encoding="utf-8")
        write_json(Path(folder) / METADATA, dict(kernel.metadata))
        answer = ask(pace, "kernels", "push", "--path", folder)
    told = [f"{what} {which}: not accepted" for what, which in LEFT_OUT.findall(answer.text)]
    told += REFUSED.findall(answer.text)
    if "title does not resolve" in answer.text:
        told.append(f"the title {kernel.metadata['title']!r} makes another slug than {kernel.ref}")
    pushed = PUSHED.search(answer.text)
    if told or answer.code or not pushed:
        raise UserError(f"{kernel.ref}: {'; '.join(told) or answer.reason}; mend that, then run push again")
    return int(pushed[1]), pushed[2]


def check_pushed(kernel: Kernel, pace: Pace) -> None:
    """Raise UserError unless Kaggle has the kernel that was meant; it is given a few looks to show it."""
    told = ["Kaggle does not show it"]
    for attempt in range(READ_BACK):
        if attempt:
            pace.wait_before(attempt)
        there = pull(kernel.ref, pace)
        told = what_differs(kernel, there) if there else told
        if not told:
            return
    raise UserError(f"{kernel.ref}: was pushed, and is not what was meant: {'; '.join(told)}; run push again")


def push_calls(kernel: Kernel, folder: Path) -> list[str]:
    """The calls that pushing the kernel in `folder` and checking it make."""
    calls = (("kernels", "push", "--path", str(folder)), ("kernels", "pull", kernel.ref, "--metadata"))
    return [call_in_words(call) for call in calls]


def read_status(ref: str, pace: Pace) -> Status:
    """The status of the kernel's newest run."""
    answer = demand(pace, "kernels", "status", ref)
    found = STATUS.search(answer.text)
    if not found:
        raise UserError(f"{answer.call}: {answer.reason}")
    failure = FAILURE.search(answer.text)
    return Status(found[1], failure[1] if failure else "")


def log_lines(answer: Answer) -> list[str]:
    """The log that a call printed: Kaggle keeps it as a JSON list of pieces of text, or as text."""
    pieces = answer.values()
    if isinstance(pieces, list) and all(isinstance(piece, dict) for piece in pieces):
        return "\n".join(str(piece.get("data", "")).removesuffix("\n") for piece in pieces).splitlines()
    return answer.text.splitlines()


def follow_log(ref: str, told: int, pace: Pace) -> int:
    """Print the running session's log as it grows, without its first `told` lines; how many lines are told now.

    Returns when the session is over, the connection is lost, or nothing was logged for a while.
    """
    count = 0

    def tell(line: str) -> bool:
        nonlocal count
        if not line.startswith(LOST):
            count += 1
            if count > told:
                print(f"  | {line}", flush=True)
        return False

    run(("kernels", "logs", ref, "--follow"), stop_at=tell, silent_seconds=pace.poll_seconds * 8)
    return max(count, told)


def read_log(ref: str, pace: Pace) -> list[str]:
    """The lines of the newest run's log; none where Kaggle gives none."""
    answer = ask(pace, "kernels", "logs", ref)
    return [] if answer.code else [line for line in log_lines(answer) if line.strip()]


def download_output(ref: str, names: tuple[str, ...], out: Path, pace: Pace) -> None:
    """Put those of the newest run's files into `out`, which holds nothing else afterwards but its log.

    The command takes an error page for the file: one whose size is not the listed one is downloaded again.
    """
    sizes = list_files(pace, "kernels", ref)
    pattern = "^(" + "|".join(re.escape(name) for name in names) + ")$"
    for attempt in range(UNKNOWN_TRIES):
        if attempt:
            pace.wait_before(attempt)
        shutil.rmtree(out, ignore_errors=True)
        demand(pace, "kernels", "output", ref, "--path", str(out), "--force", "--file-pattern", pattern)
        there = {name: (out / name).stat().st_size for name in names if (out / name).is_file()}
        broken = [name for name, size in there.items() if sizes.get(name, size) != size]
        if not broken:
            return
    raise UserError(f"{ref}: {', '.join(broken)} did not arrive as listed, {UNKNOWN_TRIES} times; run this again later")


def fingerprint(kernel: Kernel) -> dict:
    """What is written down of a kernel that was pushed, and compared with the next."""
    return {"code": hashlib.sha256(kernel.code.rstrip().encode()).hexdigest(), "metadata": dict(kernel.metadata)}
