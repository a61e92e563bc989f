"""`push SPEC`: every package of the spec as a private dataset, then the kernel with those versions of them, all read back.

What was pushed last is in outputs/SPEC/push.json; a second push finds nothing to do, and one after an interruption goes on.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kaggle_kernels.build.bundle import kernel_folder
from kaggle_kernels.build.ensemble_weights import measure_ensemble
from kaggle_kernels.build.packages import package_folder, spec_folder
from kaggle_kernels.build.spec import Spec, read_spec
from kaggle_kernels.publish.client import Kaggle, Pace, Refused, Unanswered, connect
from kaggle_kernels.publish.datasets import publish_dataset
from kaggle_kernels.publish.kernels import (
    CODE,
    FEW_LOOKS,
    Kernel,
    PinsRefused,
    check_pushed,
    find_differences,
    pull_kernel,
    read_kernel,
    save_kernel,
)
from kaggle_kernels.publish.preflight import WHEELS, find_problems
from kaggle_kernels.publish.uploads import WORK, DatasetFolder, find_dataset_folder
from preprocess.core import ledger
from preprocess.core.durations import format_duration
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256, write_json
from recipes.pairwise.data.teacher_labels import LOCKBOX

# Exists once Kaggle has refused owner/slug/VERSION: no push then names versions of datasets.
PINS_REFUSED = WORK / "pins-refused"


@dataclass(frozen=True)
class PushRecord:
    """A push of a kernel, as outputs/SPEC/push.json has it; written before Kaggle gets the kernel."""

    kernel: str  # owner/slug
    fingerprint: dict  # Kernel.fingerprint() of what was pushed; empty where Kaggle refused it
    datasets: Mapping[str, Mapping]  # version and the manifest's SHA-256, by owner/slug
    time: str  # UTC
    version_before: int  # the kernel's newest version before
    image: str  # the Docker image that Kaggle shows; empty where it is not known
    version: int | None = None  # None until Kaggle has said it
    is_finished: bool = False  # whether it was read back, and is in the ledger

    def __str__(self) -> str:
        return f"{self.kernel} version {self.version}"

    @property
    def url(self) -> str:
        """The kernel's page on Kaggle."""
        return f"https://www.kaggle.com/code/{self.kernel}"

    @property
    def age(self) -> str:
        """How long ago it was, in words."""
        elapsed = datetime.now(UTC) - datetime.fromisoformat(self.time)
        return format_duration(elapsed.total_seconds())


def push(
    spec_path: Path,
    pace: Pace,
    dry_run: bool = False,
    again: bool = False,
    latest_image: bool = False,
) -> None:
    """Publish the spec's datasets and its kernel; the command's --help explains the options.

    Raises:
        UserError: A check fails, all of which come before the first upload; Kaggle refuses
            something; or the push is interrupted. The same call then goes on.
    """
    kaggle = check_all(spec_path, pace)
    folders = find_dataset_folders(spec_path, kaggle.owner)
    if dry_run:
        for folder in folders:
            print(f"{folder.ref}: {folder.describe_size()}, sent unless Kaggle has them")
        print("nothing was pushed")
        return

    with one_at_a_time(WORK / "lock", "push"):
        datasets = {}
        for folder in folders:
            datasets[folder.ref] = publish_dataset(kaggle, folder)
        publish_kernel(kaggle, spec_path, datasets, again, latest_image)
    print(f"next: python -m kaggle_kernels status {spec_path.stem} --wait")


def check_all(spec_path: Path, pace: Pace) -> Kaggle:
    """Log in to Kaggle, and check all that can be checked before anything is uploaded."""
    # A failed log-in is one problem among others.
    problems = []
    kaggle = None
    try:
        kaggle = connect(pace)
    except UserError as error:
        problems.append(str(error))

    problems += find_problems(spec_path)
    if problems:
        raise UserError("\nerror: ".join(problems))
    print("checked: build, packages, agreement, secrets, rehearsal", flush=True)
    return kaggle


def find_dataset_folders(spec_path: Path, owner: str) -> list[DatasetFolder]:
    """List the folders to be published: each package's, and that of wheels if the spec names it."""
    spec = read_spec(spec_path)
    paths = [package_folder(package.run) for package in spec.packages]
    if spec.wheels:
        paths.append(WHEELS)
    return [find_dataset_folder(path, owner) for path in paths]


def publish_kernel(
    kaggle: Kaggle,
    spec_path: Path,
    datasets: Mapping[str, Mapping],
    again: bool,
    latest_image: bool,
) -> None:
    """Push the spec's kernel, which reads the published `datasets` (by owner/slug), unless Kaggle has it already.

    With `again` it is pushed in any case. `latest_image` is for push_kernel.
    """
    # The kernel names the version of each dataset, unless Kaggle has refused that before.
    versions = {}
    if not PINS_REFUSED.exists():
        versions = {ref: dataset["version"] for ref, dataset in datasets.items()}
    kernel = read_kernel(kernel_folder(spec_path), kaggle.owner, versions)

    record = find_push(kaggle, spec_path, kernel)
    if record is not None and record.is_finished and not again:
        print(f"{record}: is there, {record.url}", flush=True)
        return

    # A push that was interrupted has started its run already, and only has to be finished.
    if record is None or record.is_finished:
        record = push_kernel(kaggle, spec_path, kernel, datasets, latest_image)
    finish_push(kaggle, spec_path, kernel, record)


def find_push(kaggle: Kaggle, spec_path: Path, kernel: Kernel) -> PushRecord | None:
    """Find out whether this kernel was pushed already and Kaggle has it, so that it is not pushed twice.

    Returns:
        The record of that push, with its version also where Kaggle's answer was lost; None where
        there was no such push, or it did not take effect.
    """
    record = read_record(spec_path)
    if record is None or record.fingerprint != kernel.fingerprint():
        return None

    # Where the answer was lost, Kaggle may not show at once that the push took effect.
    answer_was_lost = record.version is None
    most_looks = FEW_LOOKS if answer_was_lost else 1
    for _ in itertools.islice(kaggle.pace.looks(), most_looks):
        shown = pull_kernel(kaggle, kernel.ref)

        # An earlier version may be of the same kernel: only a newer one is of this push.
        is_newer = shown is not None and shown.version > record.version_before
        if is_newer and not find_differences(kernel, shown):
            return replace(record, version=record.version or shown.version)
    return None


def push_kernel(
    kaggle: Kaggle,
    spec_path: Path,
    kernel: Kernel,
    datasets: Mapping[str, Mapping],
    latest_image: bool,
) -> PushRecord:
    """Push a kernel, which starts one run, and write the push down before and after.

    Raises:
        UserError: Kaggle refuses it, or its answer was lost; the next push then looks for it first.
    """
    # The image of the last push is kept, so that the hidden run gets what has been shown to work.
    last = read_record(spec_path)
    image = last.image if last and not latest_image else ""
    pinning = "latest" if latest_image else "original"
    image_keys = {"docker_image": image, "docker_image_pinning_type": pinning}
    kernel = replace(kernel, metadata={**kernel.metadata, **image_keys})

    # Should the answer be lost, a version newer than this one shows that the push took effect.
    before = pull_kernel(kaggle, kernel.ref)
    record = PushRecord(
        kernel=kernel.ref,
        fingerprint=kernel.fingerprint(),
        datasets=datasets,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version_before=before.version if before else 0,
        image=image,
    )
    write_record(spec_path, record)

    try:
        record = replace(record, version=save_kernel(kaggle, kernel))
    except Unanswered as error:
        raise UserError(
            f"{kernel.ref}: perhaps pushed, perhaps not: {error}; run push again, which looks for "
            "it first"
        ) from None
    except Refused as error:
        # The next push need not look for it.
        write_record(spec_path, replace(record, fingerprint={}))
        if isinstance(error, PinsRefused):
            PINS_REFUSED.touch()
        raise UserError(f"{kernel.ref}: {error}") from None

    write_record(spec_path, record)
    print(f"{record}: was pushed, {record.url}", flush=True)
    return record


def finish_push(kaggle: Kaggle, spec_path: Path, kernel: Kernel, record: PushRecord) -> None:
    """Read a pushed kernel back, for Kaggle may drop or change what it was given, and record it."""
    shown = check_pushed(kaggle, kernel)
    print(f"{record}: code and metadata on Kaggle are as they are here", flush=True)
    print_pins(record, shown)

    # A push is written down in the Docker image that it ran in, which the next push asks for.
    image = shown.metadata["docker_image"] or ""
    if record.image and image != record.image:
        print(f"warning: {record}: runs in {image}, not in the last push's image {record.image}")

    spec = read_spec(spec_path)
    ledger.record(
        "push",
        spec=spec_path.stem,
        kernel=record.kernel,
        kernel_version=record.version,
        url=record.url,
        kernel_sha256=sha256(kernel_folder(spec_path) / CODE),
        datasets=record.datasets,
        validation=measure_ensemble(spec),
        lockbox=read_lockbox(spec),
    )
    # Last, so that a push that is interrupted before is completed by the next one.
    write_record(spec_path, replace(record, image=image, is_finished=True))


def read_lockbox(spec: Spec) -> dict | None:
    """Read how the model of a spec scores the lockbox, which `pairwise labels` measures; None where it was not.

    Of several models there is no measurement of all together.
    """
    if len(spec.packages) > 1:
        return None
    file = package_folder(spec.packages[0].run).parent / LOCKBOX
    return read_object(file) if file.is_file() else None


def print_pins(record: PushRecord, shown: Kernel) -> None:
    """Print for each dataset whether the kernel on Kaggle names its version, and which one it reads."""
    # Kaggle may write an owner with other capitals.
    sources = [source.lower() for source in shown.metadata["dataset_sources"] or []]
    for ref, dataset in record.datasets.items():
        version = dataset["version"]
        if f"{ref}/{version}".lower() in sources:
            print(f"  {ref}: pinned to version {version}", flush=True)
        else:
            print(f"  {ref}: Kaggle names no version; the newest is {version}", flush=True)


def record_path(spec_path: Path) -> Path:
    """Where the last push of a spec is written down."""
    return spec_folder(spec_path) / "push.json"


def write_record(spec_path: Path, record: PushRecord) -> None:
    """Write a push down."""
    write_json(record_path(spec_path), asdict(record))


def read_record(spec_path: Path) -> PushRecord | None:
    """Read the last push of a spec, which may not have ended; None where there was none."""
    path = record_path(spec_path)
    if not path.is_file():
        return None
    return read_note(path, PushRecord)


def read_note(path: Path, note_type: type):
    """Read a JSON file as the dataclass that it was written from; UserError if its fields differ."""
    # Another version of this program may have written it.
    try:
        return note_type(**read_object(path))
    except TypeError:
        raise UserError(
            f"{path}: not written by this version of the program; look on Kaggle what was done, then "
            "remove the file"
        ) from None


def require_push(spec_path: Path) -> PushRecord:
    """Read the last push of a spec; UserError where there was none, or it did not end well."""
    record = read_record(spec_path)
    path = record_path(spec_path)
    if record is None:
        raise UserError(f"{path}: nothing was pushed; run push {spec_path.stem} first")
    if not record.is_finished:
        raise UserError(f"{path}: the push did not end; run push {spec_path.stem} again")
    return record


@contextmanager
def one_at_a_time(lock: Path, command: str) -> Iterator[None]:
    """Let one `command` at a time run in this folder, and end it with one line on Ctrl-C.

    Raises:
        UserError: The same command runs here already, or Ctrl-C was pressed.
    """
    # The system lets go of the lock when a process is killed, so that none is ever left behind.
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{lock}: another {command} runs in this folder; wait for it") from None
    except KeyboardInterrupt:
        raise UserError(f"interrupted; run {command} again, which goes on from here") from None
