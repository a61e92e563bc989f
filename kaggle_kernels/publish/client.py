"""The kaggle command, run in a process of its own and never taken at its word: its exit code is 0 on many failures.

It finds its credentials itself, in its own environment. Nothing here reads them, and only lines about files and versions are
printed. Raises UserError for what the user can mend.
"""

import codecs
import ctypes
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocess.core.errors import UserError

COMMAND = (sys.executable, "-P", "-m", "kaggle")  # requirements.txt's, whatever else PATH has
LOUD = ("VERBOSE", "VERBOSE_OUTPUT")  # with these it prints the headers of its requests, the token among them
SILENT_SECONDS = 900  # uploads print their progress; between their own retries is no longer pause than two minutes
PR_SET_PDEATHSIG = 1
PRCTL = getattr(ctypes.CDLL(None), "prctl", None)
TRIES, UNKNOWN_TRIES = 6, 3
TRANSIENT = re.compile(
    r"\b(429|5\d\d) (Client|Server) Error|too many requests|internal (server )?error|unavailable|bad gateway|gateway time-?out|"
    r"max retries exceeded|connection ?error|connection (was )?(aborted|broken|refused|reset)|remote ?disconnected|"
    r"timed out|name resolution",
    re.IGNORECASE,
)
ABSENT = re.compile(r"\b40[34]\b|not found|forbidden|denied", re.IGNORECASE)  # 403: Kaggle tells nobody what others own
NO_CREDENTIALS = re.compile(r"authentication required|invalid credentials|\b401 client error|unauthori[sz]ed", re.IGNORECASE)
HOW_TO_LOG_IN = "run `kaggle auth login`, or put a token of kaggle.com/settings/api into KAGGLE_API_TOKEN"


@dataclass(frozen=True)
class Pace:
    """How often Kaggle is asked, and for how long in all."""

    poll_seconds: float = 15
    patience_seconds: float = 3600

    def looks(self) -> Iterator[int]:
        """Numbers from 0, each after a pause that grows from poll_seconds to eight times that, until the patience is over."""
        until, pause, number = time.monotonic() + self.patience_seconds, self.poll_seconds, 0
        while True:
            yield number
            if time.monotonic() + pause > until:
                return
            time.sleep(pause)
            pause, number = min(pause * 1.5, self.poll_seconds * 8), number + 1

    def wait_before(self, attempt: int) -> float:
        """Sleep before another attempt, the second being attempt 1; the seconds."""
        seconds = min(self.poll_seconds * 2 ** (attempt - 1), self.poll_seconds * 8)
        time.sleep(seconds)
        return seconds


@dataclass(frozen=True)
class Answer:
    """What a call printed, both streams together, and its exit code: None where it was stopped or fell silent."""

    arguments: tuple[str, ...]
    code: int | None
    text: str

    @property
    def is_transient(self) -> bool:
        """Whether it failed in a way that may pass."""
        return self.code is None or (self.code != 0 and bool(TRANSIENT.search(self.text)))

    @property
    def is_absent(self) -> bool:
        """Whether it failed because there is no such thing, or none that this account may see."""
        return bool(self.code) and not self.is_transient and bool(ABSENT.search(self.text))

    @property
    def reason(self) -> str:
        """Its last line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else f"it printed nothing, and ended with exit code {self.code}"

    @property
    def call(self) -> str:
        """The call, as one would type it."""
        return call_in_words(self.arguments)

    def values(self) -> dict | list | None:
        """The JSON that it printed, whatever stands before and after; None where there is none."""
        for match in re.finditer(r"^[\[{]", self.text, re.MULTILINE):
            try:
                return json.JSONDecoder().raw_decode(self.text[match.start() :])[0]
            except json.JSONDecodeError:
                continue
        return None


def call_in_words(arguments: Sequence[str]) -> str:
    """A call of the command, as one would type it."""
    return "kaggle " + " ".join(f'"{word}"' if " " in word else word for word in arguments)


def ask(pace: Pace, *arguments: str) -> Answer:
    """Call the command, which changes nothing or may be called twice: again where the connection or Kaggle failed.

    The command does not tell a server's error that has a message from other errors: those too are tried again, but not as
    often. UserError where the connection still fails after TRIES.
    """
    for attempt in range(TRIES):
        answer = run(arguments)
        check_credentials(answer)
        if answer.code == 0 or answer.is_absent:
            return answer
        if not answer.is_transient and attempt + 1 >= UNKNOWN_TRIES:
            return answer
        if attempt + 1 < TRIES:
            seconds = pace.wait_before(attempt + 1)
            print(f"  {answer.call}: {answer.reason}; tried again after {seconds:g} s", flush=True)
    raise UserError(f"{answer.call}: {answer.reason}; {TRIES} attempts failed; run this again later")


def demand(pace: Pace, *arguments: str) -> Answer:
    """As `ask`; UserError where the command failed."""
    answer = ask(pace, *arguments)
    if answer.code:
        raise UserError(f"{answer.call}: {answer.reason}")
    return answer


def pages(pace: Pace, *arguments: str) -> Iterator[Answer]:
    """The answers to a call that lists something in JSON, page after page."""
    token = None
    while True:
        answer = demand(pace, *arguments, "--format", "json", *(("--page-token", token) if token else ()))
        yield answer
        following = re.search(r"^Next Page Token = (\S+)$", answer.text, re.MULTILINE)
        if not following or following[1] == token:
            return
        token = following[1]


def list_files(pace: Pace, kind: str, ref: str) -> dict[str, int]:
    """The bytes of each file, by name, of a dataset's current version (datasets) or of a kernel's last output (kernels)."""
    files = {}
    for answer in pages(pace, kind, "files", ref, "--page-size", "100"):
        values = answer.values()
        if not isinstance(values, list):
            raise UserError(f"{answer.call}: {answer.reason}; expected a list of files")
        files |= {file["name"]: int(file["size"]) for file in values}
    return files


def check_credentials(answer: Answer) -> None:
    """Raise UserError where the command found none, or none that Kaggle takes."""
    if answer.code and NO_CREDENTIALS.search(answer.text):
        raise UserError(f"the kaggle command has no credentials that Kaggle takes: {HOW_TO_LOG_IN}")


def find_owner(pace: Pace) -> str:
    """The name of the account whose credentials the command finds; UserError where it finds none."""
    found = re.search(r"^- username: (\S+)$", ask(pace, "config", "view").text, re.MULTILINE)
    if not found or found[1] == "None":
        raise UserError(f"the kaggle command does not know your user name: {HOW_TO_LOG_IN}")
    return found[1]


def run(
    arguments: Sequence[str],
    folder: Path | None = None,
    state: Path | None = None,
    stop_at: Callable[[str], bool] = lambda line: False,
    silent_seconds: float = SILENT_SECONDS,
) -> Answer:
    """Call the command once, in `folder`; `state` is where it keeps what it knows of its uploads.

    Each line is handed to `stop_at` as soon as it is there; where that is true, the command is interrupted, as by Ctrl-C. It
    is ended where it says nothing for `silent_seconds`.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LOUD} | {"PYTHONUNBUFFERED": "1"}
    if state:
        environment["TMPDIR"] = str(state)  # uploads are remembered in TMPDIR/.kaggle/uploads
    command = [*COMMAND, "--no-warn", *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=die_with_parent, **streams)
    lines, stopped = [], False
    try:
        for line in read_lines(process.stdout, silent_seconds):
            lines.append(line)
            if not stopped and stop_at(line):
                stopped = True
                process.send_signal(signal.SIGINT)
        code = process.wait()
    except TimeoutError:
        lines.append(f"it said nothing for {silent_seconds:g} s and was ended")
        code = None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return Answer(tuple(arguments), None if stopped else code, "\n".join(lines))


def die_with_parent() -> None:
    """In the child: end where this process is killed, for the next call would send the same files beside it (Linux only)."""
    if PRCTL:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_lines(stream, silent_seconds: float) -> Iterator[str]:
    """The stream's lines as they come; a progress bar's states are lines too. TimeoutError after so long a silence."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    rest = ""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(silent_seconds):
                raise TimeoutError
            content = os.read(stream.fileno(), 65536)
            *lines, rest = re.split(r"[\r\n]+", rest + decode(content, final=not content))
            yield from (line for line in lines if line.strip())
            if not content:
                if rest.strip():
                    yield rest
                return
