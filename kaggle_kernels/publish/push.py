"""`push SPEC`: every package of the spec as a private dataset, then the kernel with those versions of them, all read back.

What was pushed last is in outputs/SPEC/push.json; a second push finds nothing to do.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kaggle_kernels.build.bundle import build_mark, kernel_folder
from kaggle_kernels.build.ensemble_weights import measure_ensemble
from kaggle_kernels.build.packages import package_folder, spec_folder
from kaggle_kernels.build.spec import read_spec
from kaggle_kernels.publish.client import Pace, find_owner
from kaggle_kernels.publish.dataset_state import Dataset
from kaggle_kernels.publish.datasets import find_dataset, plan_dataset, publish_dataset
from kaggle_kernels.publish.kernels import CODE, Kernel, check_pushed, fingerprint, pull, push_calls, read_kernel, what_differs
from kaggle_kernels.publish.kernels import push as push_kernel
from kaggle_kernels.publish.preflight import WHEELS, credentials, preflight
from kaggle_kernels.publish.quota import check_quota
from kaggle_kernels.publish.upload import WORK
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256, write_json


def push(spec_path: Path, pace: Pace, dry_run: bool = False, again: bool = False) -> None:
    """Publish the spec's datasets and its kernel.

    Args:
        spec_path: The spec, whose packages are in outputs/.
        pace: How often and how long Kaggle is asked.
        dry_run: Only say what would be done.
        again: Push a kernel that is unchanged too, so that it runs once more.

    Raises:
        UserError: Something is wrong: every problem that can be found before is told before the first byte goes up. Also
            where the push is interrupted: the same call then goes on.
    """
    owner = check_all(spec_path, pace)
    datasets = find_datasets(spec_path, owner)
    if dry_run:
        plan(spec_path, owner, datasets, pace)
        return
    with one_at_a_time(WORK / "lock", "push"), interruptible("push"):
        published = {dataset.ref: publish_dataset(dataset, pace) for dataset in datasets}
        publish_kernel(spec_path, owner, published, pace, again)


def check_all(spec_path: Path, pace: Pace) -> str:
    """The account's name, once everything that can be checked before is as it should be; else one UserError of all problems."""
    owner, errors = "", []
    if not credentials():  # else preflight says so
        try:
            owner = find_owner(pace)
        except UserError as error:
            errors = [str(error)]
    report = preflight(spec_path, owner)
    if owner and not report.errors:
        sizes = {dataset.ref: sum(dataset.sizes().values()) for dataset in find_datasets(spec_path, owner)}
        check_quota(report, sizes, pace)
    for check in report.checks:
        print(f"checked: {check}", flush=True)
    for warning in report.warnings:
        print(f"warning: {warning}", flush=True)
    errors += report.errors
    if errors:
        raise UserError("\nerror: ".join(errors))
    return owner


def find_datasets(spec_path: Path, owner: str) -> list[Dataset]:
    """What is to be a dataset: each package, and the wheels where the spec names them."""
    spec = read_spec(spec_path)
    packages = [package_folder(package.run) for package in spec.packages]
    return [find_dataset(folder, owner) for folder in [*packages, *([WHEELS] if spec.wheels else [])]]


def plan(spec_path: Path, owner: str, datasets: list[Dataset], pace: Pace) -> None:
    """Print the calls by which a push would change something now, and check it; those that only ask are made."""
    planned = {dataset.ref: plan_dataset(dataset, pace) for dataset in datasets}
    calls = [call for calls, _ in planned.values() for call in calls]
    kernel = read_kernel(kernel_folder(spec_path), owner, {ref: version for ref, (_, version) in planned.items()})
    if calls or not is_there(kernel, last_push(spec_path), pace):
        print(f"{kernel.ref}: a new version, with {', '.join(kernel.metadata['dataset_sources'])}")
        calls += push_calls(kernel, kernel_folder(spec_path))
    print("\n".join(["a push would call:", *(f"  {call}" for call in calls)] if calls else ["a push would change nothing"]))


def publish_kernel(spec_path: Path, owner: str, published: Mapping[str, Mapping], pace: Pace, again: bool) -> None:
    """Push the spec's kernel with the published datasets' versions, unless it is there already; written down in both places."""
    versions = {ref: record["version"] for ref, record in published.items()}
    kernel = read_kernel(kernel_folder(spec_path), owner, versions)
    note, last = push_note(spec_path), last_push(spec_path)
    if not again and is_there(kernel, last, pace):
        print(f"{kernel.ref}: unchanged, version {last['version']}, {last['url']}", flush=True)
        if last["checked"]:
            return
    else:
        version, url = push_kernel(kernel, pace)
        print(f"{kernel.ref}: version {version} was pushed, {url}", flush=True)
        last = {
            "kernel": kernel.ref,
            "version": version,
            "url": url,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "datasets": dict(published),
            "fingerprint": fingerprint(kernel),
            "build": build_mark(kernel.code),
        }
        write_json(note, {**last, "checked": False})
        check_pushed(kernel, pace)
        print(f"{kernel.ref}: read back: code and metadata are as they are here", flush=True)
    fields = {"spec": spec_path.stem, "kernel": kernel.ref, "kernel_version": last["version"], "url": last["url"]}
    kernel_sha256 = sha256(kernel_folder(spec_path) / CODE)
    validated = measure_ensemble(read_spec(spec_path))
    ledger.record("push", **fields, kernel_sha256=kernel_sha256, datasets=dict(published), validation=validated)
    write_json(note, {**last, "checked": True})  # last: where the ledger lacks it, the next call goes on from here
    print(f"next: python -m kaggle_kernels status {spec_path.stem} --wait")


def is_there(kernel: Kernel, last: Mapping, pace: Pace) -> bool:
    """Whether the kernel is what was pushed last, and what Kaggle has."""
    there = pull(kernel.ref, pace) if last.get("fingerprint") == fingerprint(kernel) else None
    return there is not None and not what_differs(kernel, there)


def last_push(spec_path: Path) -> dict:
    """What is written down of the spec's last push, which may not have ended; empty where there was none."""
    note = push_note(spec_path)
    return read_object(note) if note.is_file() else {}


def push_note(spec_path: Path) -> Path:
    """Where the last push of the spec is written down."""
    return spec_folder(spec_path) / "push.json"


def read_push(spec_path: Path) -> dict:
    """The last push of the spec; UserError where there was none, or it did not end well."""
    note, values = push_note(spec_path), last_push(spec_path)
    if not values.get("checked"):
        raise UserError(
            f"{note}: {'the push did not end' if values else 'nothing was pushed'}; run push {spec_path.stem} first"
        )
    return values


@contextmanager
def one_at_a_time(lock: Path, command: str):
    """UserError where the same command runs in this folder already: both would send the same."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{lock}: another {command} runs in this folder; wait for it") from None


@contextmanager
def interruptible(command: str):
    """Ctrl-C as one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError(f"interrupted; run {command} again, which goes on from here") from None
