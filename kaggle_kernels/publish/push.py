"""`push SPEC`: every package of the spec as a private dataset, then the kernel with those versions of them, all read back.

What was pushed last is in outputs/SPEC/push.json; a second push finds nothing to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from kaggle_kernels.build.bundle import build_mark, kernel_folder
from kaggle_kernels.build.ensemble_weights import measure_ensemble
from kaggle_kernels.build.packages import package_folder
from kaggle_kernels.build.spec import read_spec
from kaggle_kernels.publish.client import Kaggle, Pace, connect
from kaggle_kernels.publish.datasets import plan_dataset, publish_dataset
from kaggle_kernels.publish.kernels import (
    CODE,
    Kernel,
    PinsRefused,
    check_pushed,
    find_differences,
    pull_kernel,
    push_kernel,
    read_kernel,
)
from kaggle_kernels.publish.preflight import WHEELS, check_gpu_hours, preflight
from kaggle_kernels.publish.push_record import PushRecord, last_push, one_at_a_time, write_record
from kaggle_kernels.publish.uploads import WORK, DatasetFolder, find_dataset_folder
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256, write_json

# Whether Kaggle takes owner/slug/VERSION; absent until it was tried.
PINS = WORK / "pins.json"


@dataclass(frozen=True)
class PushOptions:
    """What the user may choose of a push, as the command's --help explains it."""

    dry_run: bool = False
    again: bool = False
    latest_image: bool = False


def push(spec_path: Path, pace: Pace, options: PushOptions) -> None:
    """Publish the spec's datasets and its kernel.

    Raises:
        UserError: Something is wrong; every problem that can be found before is told before the first byte goes up. Also
            where the push is interrupted: the same call then goes on.
    """
    kaggle = check_all(spec_path, pace)
    folders = find_dataset_folders(spec_path, kaggle.owner)
    if options.dry_run:
        plan(kaggle, spec_path, folders)
        return

    with one_at_a_time(WORK / "lock", "push"):
        published = {}
        for folder in folders:
            published[folder.ref] = publish_dataset(kaggle, folder)
        publish_kernel(kaggle, spec_path, published, options)


def check_all(spec_path: Path, pace: Pace) -> Kaggle:
    """Log in and check everything that can be checked before; UserError with all problems together."""
    errors = []
    kaggle = None
    try:
        kaggle = connect(pace)
    except UserError as error:
        errors.append(str(error))

    # Without an account everything else is checked all the same.
    report = preflight(spec_path, kaggle.owner if kaggle else "")
    if kaggle:
        check_gpu_hours(kaggle, report)
    for check in report.checks:
        print(f"checked: {check}", flush=True)
    for warning in report.warnings:
        print(f"warning: {warning}", flush=True)

    errors.extend(report.errors)
    if errors:
        raise UserError("\nerror: ".join(errors))
    return kaggle


def find_dataset_folders(spec_path: Path, owner: str) -> list[DatasetFolder]:
    """List what is to be a dataset: each package, and the wheels where the spec names them."""
    spec = read_spec(spec_path)
    paths = [package_folder(package.run) for package in spec.packages]
    if spec.wheels:
        paths.append(WHEELS)
    return [find_dataset_folder(path, owner) for path in paths]


def plan(kaggle: Kaggle, spec_path: Path, folders: list[DatasetFolder]) -> None:
    """Print what a push would change now."""
    versions = {}
    has_new_dataset = False
    for folder in folders:
        versions[folder.ref], is_new = plan_dataset(kaggle, folder)
        has_new_dataset = has_new_dataset or is_new

    # A kernel names its datasets' versions, so that a new one makes a new kernel.
    kernel = read_kernel(kernel_folder(spec_path), kaggle.owner, versions, are_pins_tried())
    if has_new_dataset or find_last_version(kaggle, kernel, last_push(spec_path)) is None:
        sources = ", ".join(kernel.metadata["dataset_sources"])
        print(f"{kernel.ref}: a new version, with {sources}")
    else:
        print("a push would change nothing")


def publish_kernel(
    kaggle: Kaggle, spec_path: Path, published: Mapping[str, Mapping], options: PushOptions
) -> None:
    """Push the spec's kernel with the published datasets, by owner/slug, unless it is there already."""
    built = kernel_folder(spec_path)
    versions = {ref: dataset["version"] for ref, dataset in published.items()}
    kernel = read_kernel(built, kaggle.owner, versions, are_pins_tried())
    last = last_push(spec_path)
    last_version = find_last_version(kaggle, kernel, last)

    # A push whose answer was lost has started the run that was asked for.
    was_lost = last_version is not None and last.version is None
    if last_version is None or (options.again and not was_lost):
        image = last.image if last and not options.latest_image else ""
        kernel = choose_image(kernel, image, options.latest_image)
        record = push_once(kaggle, spec_path, kernel, published)
    else:
        record = replace(last, version=last_version)
        print(f"{kernel.ref}: unchanged, version {record.version}, {record.url}", flush=True)
        if record.is_checked:
            return

    # Kaggle may drop or change what it was given.
    shown = check_pushed(kaggle, kernel)
    print(f"{kernel.ref}: read back: code and metadata are as they are here", flush=True)
    print_sources(shown, versions)
    record = replace(record, image=shown.metadata["docker_image"] or "")

    ledger.record(
        "push",
        spec=spec_path.stem,
        kernel=record.kernel,
        kernel_version=record.version,
        url=record.url,
        kernel_sha256=sha256(built / CODE),
        datasets=dict(published),
        validation=measure_ensemble(read_spec(spec_path)),
    )
    # Last: where the ledger lacks the push, the next call goes on from here.
    write_record(spec_path, replace(record, is_checked=True))
    print(f"next: python -m kaggle_kernels status {spec_path.stem} --wait")


def push_once(
    kaggle: Kaggle, spec_path: Path, kernel: Kernel, published: Mapping[str, Mapping]
) -> PushRecord:
    """Push a kernel, and write it down before and after; the record with its version."""
    # The version before tells a push whose answer is lost from none.
    before = pull_kernel(kaggle, kernel.ref)
    record = PushRecord(
        kernel=kernel.ref,
        fingerprint=kernel.fingerprint(),
        build=build_mark(kernel.code),
        datasets=dict(published),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version_before=before.version if before else 0,
        url=f"https://www.kaggle.com/code/{kernel.ref}",
    )
    write_record(spec_path, record)

    # A refusal of the datasets' versions is remembered for every spec.
    try:
        version, url = push_kernel(kaggle, kernel, record.version_before)
    except PinsRefused:
        write_json(PINS, {"accepted": False})
        raise

    # Kaggle has it: from here on a killed push is completed, not repeated.
    record = replace(record, version=version, url=url)
    write_record(spec_path, record)
    print(f"{kernel.ref}: version {version} was pushed, {url}", flush=True)
    return record


def are_pins_tried() -> bool:
    """Whether datasets are named with their version: until Kaggle has refused that."""
    return not PINS.is_file() or read_object(PINS).get("accepted") is not False


def choose_image(kernel: Kernel, image: str, is_latest: bool) -> Kernel:
    """Pin the Docker image of the last push (empty: not known), so that the hidden run gets what has been shown to work."""
    pinning = "latest" if is_latest else "original"
    metadata = {**kernel.metadata, "docker_image_pinning_type": pinning}
    if image:
        metadata["docker_image"] = image
    return replace(kernel, metadata=metadata)


def find_last_version(kaggle: Kaggle, kernel: Kernel, last: PushRecord | None) -> int | None:
    """Find the version that the last push made, if it was of this kernel and Kaggle still has it."""
    if last is None or last.fingerprint != kernel.fingerprint():
        return None

    # It may have been deleted or changed on Kaggle's page since.
    shown = pull_kernel(kaggle, kernel.ref)
    if shown is None or find_differences(kernel, shown):
        return None

    # The answer was lost: the newest version is that push only where it is newer than what was there.
    if last.version is None and shown.version <= last.version_before:
        return None
    return last.version or shown.version


def print_sources(shown: Kernel, versions: Mapping[str, int]) -> None:
    """Say which version of each dataset the kernel has, and whether Kaggle confirms it."""
    # Kaggle may write an owner with other capitals.
    sources = [source.lower() for source in shown.metadata["dataset_sources"] or []]
    for ref, version in versions.items():
        if f"{ref}/{version}".lower() in sources:
            print(f"  {ref}: pinned to version {version}", flush=True)
        else:
            print(f"  {ref}: Kaggle names no version; the newest is {version}", flush=True)
