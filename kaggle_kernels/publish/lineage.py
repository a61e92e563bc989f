"""`trace SPEC|REF`: from a submission back to the raw files, step by step through the ledger, by hashes alone.

submit → push (kernel and its version) → package (its manifest) → train (its contract) → pairs (their hash) → raw files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from preprocess.core import ledger
from preprocess.core.errors import UserError

SHORT = 12  # digits of a hash that are shown where the whole of it is not needed


@dataclass(frozen=True)
class Step:
    """One step of a chain: how deep it lies, of which event, its line, and its entry; None where the chain is broken here."""

    depth: int
    event: str  # one of the ledger's, or raw
    line: str
    entry: Mapping | None = None

    @property
    def is_broken(self) -> bool:
        """Whether the ledger lacks what this step needs."""
        return self.entry is None


def print_trace(reference: str) -> None:
    """Print the chain of a spec's last submission, or of a submission or kernel (owner/slug or owner/slug/VERSION).

    UserError where the ledger has no such thing, or the chain does not reach the raw files.
    """
    steps = list(trace(ledger.read(), reference))
    for step in steps:
        print(f"{'  ' * step.depth}{'broken: ' if step.is_broken else ''}{step.line}")
    if broken := sum(step.is_broken for step in steps):
        raise UserError(f"{reference}: the chain is broken in {broken} place{'s' * (broken > 1)}, see above")


def trace(entries: Sequence[Mapping], reference: str) -> Iterator[Step]:
    """The chain of `reference`, from the newest step to the oldest."""
    submit = latest(entries, "submit", lambda entry: reference in names_of(entry))
    push = push_of(entries, submit) if submit else latest(entries, "push", lambda entry: reference in names_of(entry))
    if submit is None and push is None:
        raise UserError(
            f"{reference}: no submission and no push of it in {ledger.ledger_path()}; give a spec, the ref of a submission, or "
            "owner/slug of a kernel"
        )
    yield from chain(entries, submit, push)


def chain(entries: Sequence[Mapping], submit: Mapping | None, push: Mapping | None) -> Iterator[Step]:
    """The chain of a submission, or of a push that was not submitted."""
    if submit:
        yield Step(0, "submit", f"{stamp(submit)}{named(submit)}, {submit.get('message') or 'no message'!r}", submit)
    depth = int(submit is not None)
    if push is None:
        yield Step(depth, "push", f"no push of {named(submit)} in the ledger: was it pushed from another machine or by hand?")
        return
    yield Step(depth, "push", f"{stamp(push)}{named(push)}, kernel.py {short(push.get('kernel_sha256'))}{code(push)}", push)
    if not push.get("datasets"):
        yield Step(depth + 1, "package", f"{named(push)}: the ledger does not say with which datasets it was pushed")
    for dataset, facts in push.get("datasets", {}).items():
        yield from trace_package(entries, dataset, facts, depth + 1)


def trace_package(entries: Sequence[Mapping], dataset: str, facts: Mapping, depth: int) -> Iterator[Step]:
    """A dataset of a push, the package that it is, and the runs that this was made of."""
    manifest, name = facts.get("manifest"), f"{dataset} version {facts.get('version')}"
    entry = latest(entries, "package", lambda entry: entry.get("manifest") == manifest)
    if not manifest or entry is None:
        yield Step(depth, "package", f"{name}: no package with the manifest {short(manifest)} in the ledger; package it again")
        return
    if "wheels" in entry:
        yield Step(depth, "package", f"{stamp(entry)}{name}: {', '.join(entry['wheels'])}{code(entry)}", entry)
        return
    agreed = entry.get("agreement", {}).get("mean_difference")
    told = f", differs from training by {agreed:.4f}" if isinstance(agreed, float) else ""
    yield Step(
        depth, "package", f"{stamp(entry)}{name}: {entry.get('run')}, manifest {short(manifest)}{told}{code(entry)}", entry
    )
    for run, contract in entry.get("trained", {}).items():
        yield from trace_run(entries, run, contract, depth + 1)


def trace_run(entries: Sequence[Mapping], run: str, contract: str | None, depth: int) -> Iterator[Step]:
    """A trained run and the pairs that it was trained on."""
    entry = latest(entries, "train", lambda entry: entry.get("contract") == contract)
    if not contract or entry is None:
        yield Step(
            depth, "train", f"{run}: no training that wrote the contract {short(contract)} in the ledger; train it again"
        )
        return
    recipe, metrics = f"{entry.get('recipe')} {short(entry.get('recipe_sha256'))}", entry.get("metrics", {})
    told = ", ".join(f"{key.replace('_', ' ')} {metrics[key]:.4f}" for key in ("accuracy", "log_loss") if metrics.get(key))
    yield Step(depth, "train", f"{stamp(entry)}{run}: {recipe}, fold {entry.get('fold')}, {told}{code(entry)}", entry)
    yield from trace_pairs(entries, entry.get("pairs"), entry.get("pairs_sha256"), depth + 1)


def trace_pairs(entries: Sequence[Mapping], name: str, digest: str | None, depth: int) -> Iterator[Step]:
    """A file of pairs and its raw files; one of these may be pairs that were made earlier."""
    entry = latest(entries, "pairs", lambda entry: entry.get("pairs_sha256") == digest)
    if not digest or entry is None:
        yield Step(depth, "pairs", f"{name}: no pairs of SHA-256 {short(digest)} in the ledger; preprocess them again")
        return
    yield Step(depth, "pairs", f"{stamp(entry)}{name} {short(digest)}, {entry.get('rows', 0):,} pairs{code(entry)}", entry)
    before = entries[: entries.index(entry)]
    for raw in entry.get("sources", []):
        file, sha256 = raw.get("file"), raw.get("sha256")
        if sha256 and latest(before, "pairs", lambda entry, sha256=sha256: entry.get("pairs_sha256") == sha256):
            yield from trace_pairs(before, file, sha256, depth + 1)
        elif sha256:
            yield Step(depth + 1, "raw", f"{'raw':<34}{file}, {raw.get('rows', 0):,} rows, sha256 {sha256}", raw)
        else:
            yield Step(depth + 1, "raw", f"{file}: its SHA-256 is not known; preprocess it again")


def latest(entries: Sequence[Mapping], event: str, is_it) -> Mapping | None:
    """The newest entry of an event that is meant."""
    return next((entry for entry in reversed(entries) if entry["event"] == event and is_it(entry)), None)


def push_of(entries: Sequence[Mapping], submit: Mapping) -> Mapping | None:
    """The push of the kernel and version that were submitted."""
    return latest(entries, "push", lambda entry: kernel_of(entry) == kernel_of(submit))


def kernel_of(entry: Mapping) -> tuple[str | None, int | None]:
    """The kernel of a push or a submission, and its version."""
    return entry.get("kernel"), entry.get("kernel_version")


def names_of(entry: Mapping) -> set[str]:
    """What a push or a submission may be called."""
    spec, kernel, version, ref = (entry.get(key) for key in ("spec", "kernel", "kernel_version", "submission_ref"))
    return {str(name) for name in (spec, kernel, f"{kernel}/{version}", ref) if name is not None}


def named(entry: Mapping) -> str:
    """A kernel's name for a line."""
    return f"{entry.get('kernel')} version {entry.get('kernel_version')}"


def stamp(entry: Mapping) -> str:
    """Which event, and when."""
    return f"{entry['event']:<9}{entry.get('time', '')[:19].replace('T', ' ')} UTC  "


def code(entry: Mapping) -> str:
    """The commit of the code that did it."""
    if not entry.get("git_commit"):
        return ", commit unknown"
    return f", commit {entry['git_commit'][:SHORT]}{' and changes' * bool(entry.get('git_dirty'))}"


def short(digest: str | None) -> str:
    """The beginning of a hash."""
    return digest[:SHORT] if digest else "unknown"
