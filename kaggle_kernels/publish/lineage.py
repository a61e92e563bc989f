"""`trace SPEC|REF`: from a submission back to the raw files through the ledger, by hashes alone, one table.

submit → push (kernel and its version) → package (its manifest) → train (its contract) → pairs (their hash) → raw files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from preprocess.core import ledger
from preprocess.core.errors import UserError

# A row of the table. Its last column is not wrapped, so that a hash can be copied.
ROW = "{:<24}{:<18}{:<15}{}"


@dataclass(frozen=True)
class Step:
    """One step of a chain."""

    depth: int  # how far it lies from the submission
    event: str  # its event in the ledger, or `raw`
    facts: str
    entry: Mapping | None  # what the ledger says of it; None where the chain is broken here


def print_trace(reference: str) -> None:
    """Print the chain of a submission, a spec or a kernel; UserError where it does not reach the raw files."""
    steps = trace(ledger.read(), reference)
    print(ROW.format("step", "time (UTC)", "commit", "facts"))
    for step in steps:
        entry = step.entry or {}
        mark = "broken: " if step.entry is None else ""
        name = "  " * step.depth + mark + step.event
        time = entry.get("time", "")[:16].replace("T", " ")
        print(ROW.format(name, time, shorten_commit(entry, 12), step.facts))

    # The whole table first: what is known helps to find what is not.
    if any(step.entry is None for step in steps):
        raise UserError(f"{reference}: the chain is broken, see above")


def trace(entries: Sequence[Mapping], reference: str) -> list[Step]:
    """Follow the newest submission or push of that name back to the raw files; UserError where there is none."""
    submit = find_named(entries, "submit", reference)
    push = find_named(entries, "push", reference)
    if submit is None and push is None:
        raise UserError(
            f"{reference}: no submission and no push of it in {ledger.ledger_path()}; give a spec, "
            "the ref of a submission, or owner/slug of a kernel"
        )
    if submit is None:
        return follow_push(entries, push, depth=0)

    # A spec that was pushed again after its submission stands for what was submitted.
    kernel = name_kernel(submit)
    steps = [Step(0, "submit", f"{kernel}, {submit['message']!r}", submit)]
    push = find_push(entries, submit)
    if push is None:
        steps.append(Step(1, "push", f"no push of {kernel}: was it pushed from elsewhere?", None))
        return steps
    return steps + follow_push(entries, push, depth=1)


def follow_push(entries: Sequence[Mapping], push: Mapping, depth: int) -> list[Step]:
    """Follow a push to the packages in its datasets, and on to the raw files."""
    steps = [Step(depth, "push", name_kernel(push), push)]
    for ref, dataset in push["datasets"].items():
        name = f"{ref} version {dataset['version']}"
        package = find_entry(entries, "package", "manifest", dataset["manifest"])
        if package is None:
            steps.append(Step(depth + 1, "package", f"{name}: no package with its manifest", None))
            continue

        # Wheels were not trained: they lead no further.
        steps.append(Step(depth + 1, "package", f"{name}: {package.get('run', 'wheels')}", package))
        trained = package.get("trained") or {}
        for run, contract in trained.items():
            steps += follow_run(entries, run, contract, depth + 2)
    return steps


def follow_run(
    entries: Sequence[Mapping], run: str, contract: str | None, depth: int
) -> list[Step]:
    """Follow a trained run to the pairs that it was trained on."""
    training = find_entry(entries, "train", "contract", contract)
    if training is None:
        return [Step(depth, "train", f"{run}: no training that wrote its contract", None)]

    facts = f"{run}: {training['recipe']}, fold {training.get('fold')}"
    metrics = training.get("metrics") or {}
    if metrics.get("accuracy") is not None:
        facts += f", accuracy {metrics['accuracy']:.4f}, log loss {metrics['log_loss']:.4f}"
    steps = [Step(depth, "train", facts, training)]
    pairs, pairs_sha256 = training.get("pairs"), training.get("pairs_sha256")
    steps += follow_pairs(entries, pairs, pairs_sha256, depth + 1)

    # The run that this one went on from, among what was made before, so that a loop cannot come about.
    earlier = training.get("started_from")
    if earlier:
        earlier_entries = entries[: entries.index(training)]
        steps += follow_run(earlier_entries, earlier["run"], earlier["contract"], depth + 1)
    return steps


def follow_pairs(
    entries: Sequence[Mapping], name: str, digest: str | None, depth: int
) -> list[Step]:
    """Follow a file of pairs to its raw files, one of which may be pairs that were made earlier."""
    pairs = find_entry(entries, "pairs", "pairs_sha256", digest)
    if pairs is None:
        return [Step(depth, "pairs", f"{name}: no preprocessing that made this file", None)]

    steps = [Step(depth, "pairs", f"{name}, {pairs['rows']:,} pairs", pairs)]
    # Only what was made before, so that a loop cannot come about.
    earlier_entries = entries[: entries.index(pairs)]
    for source in pairs["sources"]:
        file, file_digest = source["file"], source.get("sha256")
        if find_entry(earlier_entries, "pairs", "pairs_sha256", file_digest):
            steps += follow_pairs(earlier_entries, file, file_digest, depth + 1)
        elif file_digest:
            facts = f"{file}, {source['rows']:,} rows, sha256 {file_digest}"
            steps.append(Step(depth + 1, "raw", facts, entry={}))
        else:
            problem = f"{file}: its SHA-256 is not known; preprocess it again"
            steps.append(Step(depth + 1, "raw", problem, None))
    return steps


def find_entry(
    entries: Sequence[Mapping], event: str, key: str, value: str | None
) -> Mapping | None:
    """Find the newest entry of an event that has `value` under `key`; None also where that is unknown."""
    for entry in reversed(entries):
        if entry["event"] == event and value and entry.get(key) == value:
            return entry
    return None


def find_named(entries: Sequence[Mapping], event: str, name: str) -> Mapping | None:
    """Find the newest push or submission of a spec, a kernel (owner/slug[/VERSION]), or a submission's ref."""
    for entry in reversed(entries):
        kernel = entry.get("kernel")
        kernel_version = f"{kernel}/{entry.get('kernel_version')}"
        names = (entry.get("spec"), kernel, kernel_version, entry.get("submission_ref"))
        if entry["event"] == event and name in names:
            return entry
    return None


def find_push(entries: Sequence[Mapping], submit: Mapping) -> Mapping | None:
    """Find the push of the kernel and version that were submitted."""
    return find_named(entries, "push", f"{submit['kernel']}/{submit['kernel_version']}")


def name_kernel(entry: Mapping) -> str:
    """Name the kernel of a push or a submission, with its version."""
    return f"{entry['kernel']} version {entry['kernel_version']}"


def shorten_commit(entry: Mapping, digits: int) -> str:
    """Shorten the commit of the code that made an entry, with a + where the tree was dirty."""
    commit = entry.get("git_commit") or ""
    return commit[:digits] + ("+" if entry.get("git_dirty") else "")
