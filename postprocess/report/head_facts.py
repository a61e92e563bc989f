"""Collect the facts in the head of the page: where the model comes from and how it was trained.

`page.render_page` calls `collect_facts`. The facts are those of contract.json and metrics.json.
"""

import re

from postprocess.report.run_data import RunData, training_record

HASH_DIGITS = 12  # of a commit or a SHA-256, enough to tell them apart
Fact = tuple[str, str]


def collect_facts(run: RunData) -> list[Fact]:
    """Collect name and value of each fact, leaving out those that the run does not record."""
    facts = [
        *model_facts(run),
        *row_facts(run),
        *training_facts(run),
    ]
    return [(name, value) for name, value in facts if value]


def model_facts(run: RunData) -> list[Fact]:
    """Say what the model is: recipe, base model, commit, date, head, token budget."""
    contract = run.first_contract
    record = training_record(contract)

    # A base model from a hub has a revision, one from a folder has none.
    base_model = contract.get("base_model", "")
    revision = contract.get("revision")
    if revision:
        base_model = f"{base_model} at {revision[:HASH_DIGITS]}"

    # An ISO time, such as 2026-11-25T09:43:39+00:00.
    created = record.get("created", "")
    created = created.replace("T", " ").replace("+00:00", " UTC")

    # The verdicts of the run, since a contract of an earlier version does not name them.
    head = ""
    if contract:
        head = f"{contract.get('head')}, {len(run.verdicts)} verdicts"
    tokens = ""
    if contract.get("budget_tokens"):
        tokens = f"{contract['budget_tokens']:,} a row"

    return [
        ("recipe", record.get("recipe", "")),
        ("base model", base_model),
        ("git commit", ", ".join(find_commits(run))),
        ("trained", created),
        ("head", head),
        ("tokens", tokens),
    ]


def find_commits(run: RunData) -> list[str]:
    """Find the commits that the folds were trained at, shortened, with -dirty where it applies."""
    commits = set()
    for contract in run.contracts.values():
        commit = training_record(contract).get("git_commit")
        if commit:
            commits.add(re.sub(r"^(\w{12})\w+", r"\1", commit))
    return sorted(commits)


def row_facts(run: RunData) -> list[Fact]:
    """Say which rows were measured, and how many the model was trained on."""
    # The fold of a run that was trained on all rows is "all".
    folds = set()
    training_rows = set()
    for fold_metrics in run.metrics.values():
        if "fold" in fold_metrics:
            folds.add(str(fold_metrics["fold"]))
        if fold_metrics.get("training_rows"):
            training_rows.add(fold_metrics["training_rows"])

    fold_label = "fold held out" if len(folds) == 1 else "folds"
    fold_text = ", ".join(sorted(folds, key=lambda fold: (len(fold), fold)))  # 10 comes after 9
    if folds == {"all"}:
        fold_text = "none"

    measured = ""
    if run.predictions is not None:
        measured = f"{len(run.predictions.rows):,}"

    # The folds of a cross-validation differ a little in their numbers of rows.
    trained_on = ""
    if training_rows:
        trained_on = f"{min(training_rows):,}"
    if len(training_rows) > 1:
        trained_on = f"{trained_on} to {max(training_rows):,}"

    return [
        (fold_label, fold_text),
        ("rows measured", measured),
        ("rows trained on", trained_on),
    ]


def training_facts(run: RunData) -> list[Fact]:
    """Say how long the training took, and with which data and versions of libraries."""
    metrics = run.first_metrics
    steps = ""
    if metrics.get("steps"):
        steps = f"{metrics['steps']:,}"

    # All folds together.
    seconds = 0.0
    for fold_metrics in run.metrics.values():
        seconds += fold_metrics.get("seconds_training", 0)
    duration = ""
    if seconds > 0:
        duration = format_duration(seconds)

    # A library that was not installed at the training is recorded as absent.
    versions = training_record(run.first_contract).get("versions", {})
    installed = []
    for library, version in versions.items():
        if version != "absent":
            installed.append(f"{library} {version}")

    return [
        ("steps", steps),
        ("training took", duration),
        ("pairs", metrics.get("pairs_sha256", "")[:HASH_DIGITS]),
        ("versions", ", ".join(installed)),
    ]


def format_duration(seconds: float) -> str:
    """Write a duration as 1 h 5 min, 7 min or 24 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    if minutes >= 2:
        return f"{minutes} min"
    return f"{seconds:.0f} s"
