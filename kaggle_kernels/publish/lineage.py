"""`trace SPEC|REF`: from a submission back to the raw files through the ledger, by hashes alone, one table.

submit → push (kernel and its version) → package (its manifest) → train (its contract) → pairs (their hash) → raw files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from preprocess.core import ledger
from preprocess.core.errors import UserError

# Digits of a hash that are shown where the whole of it is not needed.
SHORT = 12

# A row of the table. Its last column is not wrapped, so that a hash can be copied.
ROW = "{:<24}{:<18}{:<15}{}"


@dataclass(frozen=True)
class Step:
    """One step of a chain."""

    depth: int  # how far it lies from the submission
    event: str  # its event in the ledger, or `raw`
    facts: str
    entry: Mapping | None = None  # in the ledger; None where the chain is broken here

    @property
    def is_broken(self) -> bool:
        """Whether the ledger lacks what this step needs."""
        return self.entry is None


def print_trace(reference: str) -> None:
    """Print the chain of a submission, a spec or a kernel; UserError where it does not reach the raw files."""
    steps = list(trace(ledger.read(), reference))
    print(ROW.format("step", "time (UTC)", "commit", "facts"))
    for step in steps:
        name = "  " * step.depth + ("broken: " if step.is_broken else "") + step.event
        entry = step.entry or {}
        time = entry.get("time", "")[:16].replace("T", " ")
        print(ROW.format(name, time, describe_commit(entry), step.facts))

    # The whole table first: what is known helps to find what is not.
    broken_steps = sum(step.is_broken for step in steps)
    if broken_steps:
        places = "1 place" if broken_steps == 1 else f"{broken_steps} places"
        raise UserError(f"{reference}: the chain is broken in {places}, see above")


def trace(entries: Sequence[Mapping], reference: str) -> Iterator[Step]:
    """Follow `reference` from the newest step to the oldest; UserError where the ledger does not have it."""

    def is_meant(entry: Mapping) -> bool:
        return reference in list_names(entry)

    # A spec that was pushed again after its submission stands for what was submitted.
    submit = find_latest(entries, "submit", is_meant)
    push = find_push(entries, submit) if submit else find_latest(entries, "push", is_meant)
    if submit is None and push is None:
        raise UserError(
            f"{reference}: no submission and no push of it in {ledger.ledger_path()}; give a spec, "
            "the ref of a submission, or owner/slug of a kernel"
        )
    yield from follow_chain(entries, submit, push)


def follow_chain(
    entries: Sequence[Mapping], submit: Mapping | None, push: Mapping | None
) -> Iterator[Step]:
    """Follow a submission and its push, or a push that was not submitted, back to the raw files."""
    # Each step stands one level below the step that it was needed for; a push may be the first.
    push_depth = 0
    if submit:
        message = submit.get("message") or "no message"
        yield Step(0, "submit", f"{name_kernel(submit)}, {message!r}", submit)
        push_depth = 1

    # Without its push, nobody knows which datasets a submission used: the chain ends here.
    if push is None:
        problem = f"no push of {name_kernel(submit)} in the ledger: was it pushed from elsewhere?"
        yield Step(push_depth, "push", problem)
        return

    # The kernel, then each of its datasets.
    digest = shorten(push.get("kernel_sha256"))
    yield Step(push_depth, "push", f"{name_kernel(push)}, kernel.py {digest}", push)
    for ref, dataset in (push.get("datasets") or {}).items():
        yield from follow_package(entries, ref, dataset, push_depth + 1)


def follow_package(
    entries: Sequence[Mapping], ref: str, dataset: Mapping, depth: int
) -> Iterator[Step]:
    """Follow a pushed dataset (owner/slug) to the package in it, and on to the runs in that."""
    manifest = dataset.get("manifest")
    name = f"{ref} version {dataset.get('version')}"
    entry = find_by(entries, "package", "manifest", manifest)
    if entry is None:
        problem = f"{name}: no package with the manifest {shorten(manifest)} in the ledger; package it again"
        yield Step(depth, "package", problem)
        return

    # Wheels come from a package index, and lead no further back.
    if "wheels" in entry:
        yield Step(depth, "package", f"{name}: {', '.join(entry['wheels'])}", entry)
        return

    text = f"{name}: {entry.get('run')}, manifest {shorten(manifest)}"
    difference = (entry.get("agreement") or {}).get("mean_difference")
    if difference is not None:
        text += f", differs from training by {difference:.4f}"
    # A mean of runs leads to each of them.
    yield Step(depth, "package", text, entry)
    for run, contract in (entry.get("trained") or {}).items():
        yield from follow_run(entries, run, contract, depth + 1)


def follow_run(
    entries: Sequence[Mapping], run: str, contract: str | None, depth: int
) -> Iterator[Step]:
    """Follow a trained run to the pairs that it was trained on."""
    entry = find_by(entries, "train", "contract", contract)
    if entry is None:
        problem = f"{run}: no training that wrote the contract {shorten(contract)} in the ledger; train it again"
        yield Step(depth, "train", problem)
        return

    text = f"{run}: {entry.get('recipe')} {shorten(entry.get('recipe_sha256'))}, fold {entry.get('fold')}"
    metrics = entry.get("metrics") or {}
    for key in ("accuracy", "log_loss"):
        if metrics.get(key) is not None:
            text += f", {key.replace('_', ' ')} {metrics[key]:.4f}"
    yield Step(depth, "train", text, entry)
    yield from follow_pairs(entries, entry.get("pairs"), entry.get("pairs_sha256"), depth + 1)


def follow_pairs(
    entries: Sequence[Mapping], name: str, digest: str | None, depth: int
) -> Iterator[Step]:
    """Follow a file of pairs to its raw files, one of which may be pairs that were made earlier."""
    entry = find_by(entries, "pairs", "pairs_sha256", digest)
    if entry is None:
        problem = (
            f"{name}: no pairs of SHA-256 {shorten(digest)} in the ledger; preprocess them again"
        )
        yield Step(depth, "pairs", problem)
        return

    yield Step(depth, "pairs", f"{name} {shorten(digest)}, {entry.get('rows', 0):,} pairs", entry)

    # Only what was made before, so that a loop cannot come about.
    earlier_entries = entries[: entries.index(entry)]
    for source in entry.get("sources", []):
        file, source_digest = source.get("file"), source.get("sha256")
        if find_by(earlier_entries, "pairs", "pairs_sha256", source_digest):
            yield from follow_pairs(earlier_entries, file, source_digest, depth + 1)
        elif source_digest:
            # The ledger has no entry of a raw file, and none is missing.
            facts = f"{file}, {source.get('rows', 0):,} rows, sha256 {source_digest}"
            yield Step(depth + 1, "raw", facts, entry={})
        else:
            yield Step(depth + 1, "raw", f"{file}: its SHA-256 is not known; preprocess it again")


def find_latest(
    entries: Sequence[Mapping], event: str, is_meant: Callable[[Mapping], bool]
) -> Mapping | None:
    """Find the newest entry of an event that is meant."""
    for entry in reversed(entries):
        if entry["event"] == event and is_meant(entry):
            return entry
    return None


def find_by(entries: Sequence[Mapping], event: str, key: str, value: str | None) -> Mapping | None:
    """Find the newest entry of an event that has `value` under `key`; None also where that is unknown."""
    if not value:
        return None
    return find_latest(entries, event, lambda entry: entry.get(key) == value)


def find_push(entries: Sequence[Mapping], submit: Mapping) -> Mapping | None:
    """Find the push of the kernel and version that were submitted."""
    return find_latest(entries, "push", lambda entry: name_kernel(entry) == name_kernel(submit))


def list_names(entry: Mapping) -> set[str]:
    """List what the user may call a push or a submission."""
    kernel = entry.get("kernel")
    names = {entry.get("spec"), kernel, f"{kernel}/{entry.get('kernel_version')}"}
    return names | {entry.get("submission_ref")}


def name_kernel(entry: Mapping) -> str:
    """Name the kernel of a push or a submission, with its version."""
    return f"{entry.get('kernel')} version {entry.get('kernel_version')}"


def describe_commit(entry: Mapping, digits: int = SHORT) -> str:
    """The commit of the code that did it, with a + where the tree was dirty."""
    commit = entry.get("git_commit")
    if not commit:
        return ""
    return commit[:digits] + ("+" if entry.get("git_dirty") else "")


def shorten(digest: str | None) -> str:
    """The beginning of a hash."""
    return digest[:SHORT] if digest else "unknown"
