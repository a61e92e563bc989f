"""outputs/SPEC/push.json: the last push of a spec, which push completes, and status and submit rely on."""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kaggle_kernels.build.packages import spec_folder
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, write_json


@dataclass(frozen=True)
class PushRecord:
    """A push, written down before Kaggle gets the kernel."""

    kernel: str  # owner/slug
    fingerprint: dict  # Kernel.fingerprint() of what was pushed
    build: str  # the mark of the build, which the kernel repeats in its kernel.json
    datasets: Mapping[str, Mapping]  # version and the manifest's SHA-256, by owner/slug
    time: str  # UTC
    version_before: int  # the kernel's newest version before
    version: int | None = None  # None until Kaggle has said it
    url: str = ""
    image: str = ""  # the Docker image that Kaggle shows
    is_checked: bool = False  # whether it was read back and is what was meant

    def __str__(self) -> str:
        return f"{self.kernel} version {self.version}"

    @property
    def age(self) -> str:
        """How long ago it was, in words."""
        elapsed = datetime.now(UTC) - datetime.fromisoformat(self.time)
        minutes, seconds = divmod(int(elapsed.total_seconds()), 60)
        if minutes < 60:
            return f"{minutes} min {seconds:02d} s"
        return f"{minutes // 60} h {minutes % 60:02d} min"


def record_path(spec_path: Path) -> Path:
    """Where the last push of a spec is written down."""
    return spec_folder(spec_path) / "push.json"


def write_record(spec_path: Path, record: PushRecord) -> None:
    """Write a push down."""
    write_json(record_path(spec_path), asdict(record))


def last_push(spec_path: Path) -> PushRecord | None:
    """Read the last push of a spec, which may not have ended; None where there was none."""
    path = record_path(spec_path)
    if not path.is_file():
        return None

    # Another version of this program had other fields.
    try:
        return PushRecord(**read_object(path))
    except TypeError:
        raise UserError(f"{path}: not written by this version; remove it, and push again") from None


def require_push(spec_path: Path) -> PushRecord:
    """Read the last push of a spec; UserError where there was none, or it did not end well."""
    record = last_push(spec_path)
    if record is None or not record.is_checked:
        problem = "the push did not end" if record else "nothing was pushed"
        raise UserError(f"{record_path(spec_path)}: {problem}; run push {spec_path.stem} first")
    return record


@contextmanager
def one_at_a_time(lock: Path, command: str):
    """Raise UserError where the same command runs in this folder already, and turn Ctrl-C into one line."""
    # The system lets go of the lock when a process is killed, so that none is ever left behind.
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{lock}: another {command} runs in this folder; wait for it") from None
    except KeyboardInterrupt:
        raise UserError(f"interrupted; run {command} again, which goes on from here") from None
