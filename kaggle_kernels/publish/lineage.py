"""`trace SPEC|REF`: from a submission back to the raw files through the ledger, by hashes alone, one table.

submit → push (kernel and its version) → package (its manifest) → train (its contract) → pairs (their hash) → raw files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from preprocess.core import ledger
from preprocess.core.errors import UserError

# A row of the table. Its last column is not wrapped, so that a hash can be copied.
ROW = "{:<24}{:<18}{:<15}{}"


@dataclass(frozen=True)
class Step:
    """One step of the chain from a submission back to the raw files; a row of the table."""

    depth: int  # how far it lies from the submission
    event: str  # the ledger's name for it, or `raw` for a raw file
    facts: str
    entry: Mapping = field(default_factory=dict)  # the ledger's; a raw file has none
    is_broken: bool = False  # the ledger does not have what this step should be


def print_trace(reference: str) -> None:
    """Print the chain from a submission back to the raw files, a line for each step (see `trace`).

    Raises:
        UserError: The ledger does not have it, or the chain does not reach the raw files.
    """
    steps = trace(ledger.read(), reference)
    print(ROW.format("step", "time (UTC)", "commit", "facts"))
    for step in steps:
        mark = "broken: " if step.is_broken else ""
        name = "  " * step.depth + mark + step.event

        # From 2026-11-28T14:57:03+00:00 to 2026-11-28 14:57
        time_to_the_minute = step.entry.get("time", "")[:16]
        time = time_to_the_minute.replace("T", " ")
        print(ROW.format(name, time, shorten_commit(step.entry, 12), step.facts))

    # After the whole table, whose other rows help to find what is missing.
    if any(step.is_broken for step in steps):
        raise UserError(f"{reference}: the chain is broken, see above")


def trace(entries: Sequence[Mapping], reference: str) -> list[Step]:
    """Trace a submission, or a kernel that was only pushed, back to the raw files.

    Args:
        entries: The ledger's entries, the oldest first.
        reference: A spec, a kernel (owner/slug or owner/slug/VERSION), or the ref of a submission.
            The newest submission of that name counts, or else the newest push.

    Raises:
        UserError: There is neither.
    """
    submission = find_named(entries, "submit", reference)
    if submission is not None:
        return follow_submission(entries, submission)

    push = find_named(entries, "push", reference)
    if push is not None:
        return follow_push(entries, push, depth=0)

    raise UserError(
        f"{reference}: no submission and no push of it in {ledger.ledger_path()}; give a spec, "
        "the ref of a submission, or owner/slug of a kernel"
    )


def follow_submission(entries: Sequence[Mapping], submission: Mapping) -> list[Step]:
    """Follow a submission to the push of the same kernel version, and on to the raw files."""
    kernel = name_kernel(submission)
    first_step = Step(0, "submit", f"{kernel}, {submission['message']!r}", submission)

    # The spec may have been pushed again since: only the version that was submitted counts.
    push = find_push(entries, submission)
    if push is None:
        problem = f"no push of {kernel}: was it pushed from elsewhere?"
        return [first_step, Step(1, "push", problem, is_broken=True)]
    return [first_step, *follow_push(entries, push, depth=1)]


def follow_push(entries: Sequence[Mapping], push: Mapping, depth: int) -> list[Step]:
    """Follow a pushed kernel to the packages in its datasets, and on to the raw files.

    Args:
        entries: The ledger's entries, the oldest first.
        push: The entry of the push. It names the datasets that the kernel reads:
            {"datasets": {"owner/slug": {"version": 3, "manifest": SHA-256 of its manifest.json}}}
        depth: How far the push lies from the submission.

    Returns:
        The push, and behind it the steps of each dataset.
    """
    steps = [Step(depth, "push", name_kernel(push), push)]
    for ref, dataset in push["datasets"].items():
        steps += follow_dataset(entries, ref, dataset, depth + 1)
    return steps


def follow_dataset(
    entries: Sequence[Mapping], ref: str, dataset: Mapping, depth: int
) -> list[Step]:
    """Follow a dataset to the package that was uploaded as it, and to the runs that this was made of.

    The package is found by the SHA-256 of its manifest, which the push wrote down with the dataset's version.
    """
    name = f"{ref} version {dataset['version']}"
    package = find_entry(entries, "package", "manifest", dataset["manifest"])
    if package is None:
        problem = f"{name}: no package with its manifest"
        return [Step(depth, "package", problem, is_broken=True)]

    run_or_wheels = package.get("run", "wheels")
    steps = [Step(depth, "package", f"{name}: {run_or_wheels}", package)]

    # A package names the SHA-256 of each run's contract; a mean of runs has several. Wheels were not
    # trained, and lead no further.
    contract_by_run = package.get("trained") or {}
    for run, contract in contract_by_run.items():
        steps += follow_run(entries, run, contract, depth + 1)
    return steps


def follow_run(
    entries: Sequence[Mapping], run: str, contract: str | None, depth: int
) -> list[Step]:
    """Follow a run to its pairs, and to the earlier run from whose weights it started, if there is one.

    The run is found by the SHA-256 of its contract.json, which training wrote.
    """
    training = find_entry(entries, "train", "contract", contract)
    if training is None:
        problem = f"{run}: no training that wrote its contract"
        return [Step(depth, "train", problem, is_broken=True)]

    facts = f"{run}: {training['recipe']}, fold {training.get('fold')}"
    metrics = training.get("metrics") or {}
    if metrics.get("accuracy") is not None:
        facts += f", accuracy {metrics['accuracy']:.4f}, log loss {metrics['log_loss']:.4f}"
    steps = [Step(depth, "train", facts, training)]
    pairs_file = training.get("pairs")
    pairs_sha256 = training.get("pairs_sha256")
    steps += follow_pairs(entries, pairs_file, pairs_sha256, depth + 1)

    # Only earlier trainings are searched, so that no run can lead back to itself.
    start = training.get("started_from")
    if start:
        earlier_entries = entries[: entries.index(training)]
        steps += follow_run(earlier_entries, start["run"], start["contract"], depth + 1)
    return steps


def follow_pairs(
    entries: Sequence[Mapping], name: str, pairs_sha256: str | None, depth: int
) -> list[Step]:
    """Follow a file of pairs to the raw files that preprocessing made it from.

    A source of that preprocessing is a raw file, or a file of pairs that was preprocessed earlier.
    """
    preprocessing = find_entry(entries, "pairs", "pairs_sha256", pairs_sha256)
    if preprocessing is None:
        problem = f"{name}: no preprocessing that made this file"
        return [Step(depth, "pairs", problem, is_broken=True)]
    steps = [Step(depth, "pairs", f"{name}, {preprocessing['rows']:,} pairs", preprocessing)]

    # Only what was made earlier is searched, so that no file can lead back to itself.
    earlier_entries = entries[: entries.index(preprocessing)]
    for source in preprocessing["sources"]:
        file = source["file"]
        sha256 = source.get("sha256")
        if find_entry(earlier_entries, "pairs", "pairs_sha256", sha256):
            steps += follow_pairs(earlier_entries, file, sha256, depth + 1)
        elif sha256:
            facts = f"{file}, {source['rows']:,} rows, sha256 {sha256}"
            steps.append(Step(depth + 1, "raw", facts))
        else:
            problem = f"{file}: its SHA-256 is not known; preprocess it again"
            steps.append(Step(depth + 1, "raw", problem, is_broken=True))
    return steps


def find_entry(
    entries: Sequence[Mapping], event: str, key: str, value: str | None
) -> Mapping | None:
    """Find the ledger's newest entry of an event that has `value` under `key`, if there is one."""
    # What was never written down is in no entry: None would match an entry without the key.
    if not value:
        return None
    for entry in reversed(entries):
        if entry["event"] == event and entry.get(key) == value:
            return entry
    return None


def find_named(entries: Sequence[Mapping], event: str, name: str) -> Mapping | None:
    """Find the ledger's newest push or submission of that name, if there is one (see `trace`)."""
    for entry in reversed(entries):
        if entry["event"] != event:
            continue

        kernel_version = f"{entry['kernel']}/{entry['kernel_version']}"
        names = (entry["spec"], entry["kernel"], kernel_version, entry.get("submission_ref"))
        if name in names:
            return entry
    return None


def find_push(entries: Sequence[Mapping], submission: Mapping) -> Mapping | None:
    """Find the push of the kernel and version that were submitted."""
    return find_named(entries, "push", f"{submission['kernel']}/{submission['kernel_version']}")


def name_kernel(entry: Mapping) -> str:
    """Name the kernel of a push or a submission, with its version."""
    return f"{entry['kernel']} version {entry['kernel_version']}"


def shorten_commit(entry: Mapping, digits: int) -> str:
    """Shorten the commit of the code that made an entry, with a + where the tree was dirty."""
    commit = entry.get("git_commit") or ""
    return commit[:digits] + ("+" if entry.get("git_dirty") else "")
