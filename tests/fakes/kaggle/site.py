"""What the stand-in Kaggle remembers: plain dataclasses that tests read, and set to say what will happen next."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

OWNER, TOKEN = "tester", "stand-in-token"
WSDM, LMSYS = "wsdm-cup-multilingual-chatbot-arena", "lmsys-chatbot-arena"


@dataclass
class Blob:
    """A file on its way up: `content` grows with each PUT, `received_bytes` counts every byte that ever came."""

    token: str
    name: str
    size: int
    content: bytearray = field(default_factory=bytearray)
    received_bytes: int = 0

    @property
    def complete(self) -> bool:
        return len(self.content) == self.size


@dataclass
class Version:
    """A dataset's version. It is processed until `calls_left` status calls were answered."""

    number: int
    files: dict[str, bytes]
    calls_left: int
    ends: str = "READY"

    @property
    def status(self) -> str:
        return "BLOBS_RECEIVED" if self.calls_left > 0 else self.ends

    def sha256(self) -> dict[str, str]:
        """The hash of each file by name."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}


@dataclass
class Dataset:
    """A dataset and its versions, the newest last."""

    ref: str
    licence: str
    is_private: bool
    versions: list[Version] = field(default_factory=list)

    @property
    def current(self) -> Version | None:
        """What Kaggle shows: the newest version that is ready."""
        return next((version for version in reversed(self.versions) if version.status == "READY"), None)

    def find(self, number: int | None) -> Version | None:
        """The version of that number, without one the current version."""
        return next((v for v in self.versions if v.number == number), None) if number else self.current


@dataclass
class Run:
    """What a kernel version will do: each status call gives the next of `statuses`, the last one stays."""

    statuses: list[str] = field(default_factory=lambda: ["QUEUED", "RUNNING", "COMPLETE"])
    log: list[str] = field(default_factory=lambda: ["scored 3 of 3 rows\n", "wrote submission.csv\n"])
    output: dict[str, bytes] = field(default_factory=lambda: {"submission.csv": b"id,winner\n1,model_a\n"})
    failure: str = ""

    @property
    def over(self) -> bool:
        return self.statuses[0] in {"COMPLETE", "ERROR"}


@dataclass
class KernelVersion:
    """One push: the request as it came, and its run."""

    number: int
    pushed: dict
    run: Run


@dataclass
class Kernel:
    """A kernel and its versions, the newest last."""

    ref: str
    versions: list[KernelVersion] = field(default_factory=list)


@dataclass
class Submission:
    """A submission; only one that is COMPLETE shows its scores."""

    ref: int
    competition: str
    kernel: str
    kernel_version: int
    file_name: str
    description: str
    public_score: str
    private_score: str
    status: str = "COMPLETE"
    day: str = "2026-01-01"


@dataclass
class Site:
    """Everything the stand-in knows. Tests read it, and set what it will do next."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    submissions: list[Submission] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)  # clear it, and uploads that are on their way have expired
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of blobs
    competitions: set[str] = field(default_factory=lambda: {WSDM, LMSYS})
    runs: list[Run] = field(default_factory=list)  # of the next pushes, in order; then Run()
    scores: list[tuple[str, str]] = field(default_factory=list)  # of the next submissions: public, private
    processing_calls: int = 1
    processing_ends: str = "READY"  # or FAILED
    takes_pins: bool = True  # owner/slug/VERSION as a kernel's dataset source
    docker_image: str = "kaggle/image:1"
    submissions_a_day: int = 5
