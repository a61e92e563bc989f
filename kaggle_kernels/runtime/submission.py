"""From probabilities to a submission that is whole: every id once, in the test file's order, or an error and no file."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kaggle_kernels.runtime.settings import Settings

SMALLEST = 1e-6  # no probability is nearer to 0 or 1: log loss would punish it without end
PRIOR = {2: (0.6, 0.4), 3: (0.45, 0.25, 0.3)}  # longer, shorter, tie: the longer one wins 62 % of human verdicts


@dataclass(frozen=True)
class ModelScores:
    """A model's probabilities, by id and then by order of the responses, in its verdicts' order."""

    verdicts: Sequence[str]
    by_id: Mapping[str, Mapping[str, Sequence[float]]]


def to_competition(values: Sequence[float], of: Sequence[str], verdicts: Sequence[str]) -> list[float]:
    """Probabilities in the order `of` as probabilities of the competition's `verdicts`; what those lack is shared out."""
    kept = [values[list(of).index(verdict)] for verdict in verdicts]
    if not sum(kept):  # all was said of a tie, which the competition does not know
        return [1 / len(kept)] * len(kept)
    return [value / sum(kept) for value in kept]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The weighted mean of the models that scored a row; the weights need not sum to one."""
    return [sum(w * p for w, p in zip(weights, column, strict=True)) / sum(weights) for column in zip(*values, strict=True)]


def soften(values: Sequence[float], temperature: float) -> list[float]:
    """Probabilities at a temperature (above 1: less sure), each within SMALLEST of 0 and 1 at most, summing to one."""
    powers = [max(value, SMALLEST) ** (1 / temperature) for value in values]
    inner = [max(power / sum(powers), SMALLEST) for power in powers]
    return [value / sum(inner) for value in inner]


def is_first_longer(row: Mapping) -> bool:
    """Whether a row's first answer has as many characters as its second, or more, over all turns."""

    def length(value) -> int:
        return len(value or "") if value is None or isinstance(value, str) else sum(len(turn or "") for turn in value)

    return length(row["response_a"]) >= length(row["response_b"])


def prior(row: Mapping, verdicts: Sequence[str]) -> list[float]:
    """What to say of a row that could not be scored: the longer answer, by characters; of equal ones the first."""
    longer, shorter, *tie = PRIOR[len(verdicts)]
    return [longer, shorter, *tie] if is_first_longer(row) else [shorter, longer, *tie]


def describe_shortfall(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], min_scored: float
) -> str | None:
    """Say how many rows were scored, where it is a smaller share than `min_scored`, else None."""
    scored_rows = sum(row["id"] in scored for row in rows)
    if scored_rows >= min_scored * len(rows):
        return None
    return f"{scored_rows} of {len(rows)} rows were scored, the spec's min_scored is {min_scored}"


def fill_unscored(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], verdicts: Sequence[str]
) -> dict[str, list[float]]:
    """Give every row probabilities, in the rows' order: its score, or else the prior."""
    final = {}
    for row in rows:
        values = scored.get(row["id"])
        final[row["id"]] = prior(row, verdicts) if values is None else list(values)
    return final


def write_submission(
    path: Path, settings: Settings, probabilities: Mapping[str, Sequence[float]], ids: Sequence[str] | None = None
) -> None:
    """Write id,winner or id and one probability a verdict; the file gets its name once `check_submission` has passed it.

    `ids` are the test file's, in its order, read again; without them it is checked against those of `probabilities`. Where
    a check fails, no file is left.
    """
    check_probabilities(probabilities, settings.verdicts)
    with whole_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *settings.columns])
            for row_id, values in probabilities.items():
                answer = values if len(settings.columns) > 1 else [settings.verdicts[values.index(max(values))]]
                writer.writerow([row_id, *answer])
        check_submission(temporary, settings, list(probabilities) if ids is None else ids)


def check_probabilities(probabilities: Mapping[str, Sequence[float]], verdicts: Sequence[str]) -> None:
    """Raise ValueError at a row without one probability a verdict, each above 0 and below 1, summing to one."""
    for row_id, values in probabilities.items():
        whole = len(values) == len(verdicts) and all(0 < value < 1 for value in values)
        if not whole or not math.isclose(sum(values), 1, abs_tol=1e-6):
            raise ValueError(
                f"id {row_id}: {list(values)} are not probabilities that sum to one, one for each of {', '.join(verdicts)}; "
                "nothing is submitted"
            )


def check_submission(path: Path, settings: Settings, ids: Sequence[str]) -> None:
    """Raise ValueError unless the file has the competition's columns and every id once, in order, with a valid answer."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    if header != ["id", *settings.columns]:
        raise ValueError(f"{path}: columns {header}, expected {['id', *settings.columns]}")
    check_order(path, [line[0] if line else "" for line in lines], ids)
    for row_id, *answer in lines:
        if len(answer) != len(settings.columns):
            raise ValueError(f"{path}: id {row_id}: {len(answer)} values, expected {len(settings.columns)}")
        if len(answer) == 1 and answer[0] not in settings.verdicts:
            raise ValueError(f"{path}: id {row_id}: {answer[0]!r}, expected one of {', '.join(settings.verdicts)}")
    if len(settings.columns) > 1:
        check_probabilities({row_id: [float(value) for value in answer] for row_id, *answer in lines}, settings.verdicts)


def check_order(path: Path, found: Sequence[str], ids: Sequence[str]) -> None:
    """Raise ValueError at the first id that is not the test file's at that place."""
    if len(found) != len(ids) or list(found) != list(ids):
        size = min(len(found), len(ids))
        at = next((at for at in range(size) if found[at] != ids[at]), size)
        here = f"row {at + 1} has {found[at]!r}" if at < len(found) else f"row {at + 1} is missing"
        there = repr(ids[at]) if at < len(ids) else "no more"
        raise ValueError(
            f"{path}: its {len(found)} ids are not the test file's {len(ids)} ids in their order: {here}, expected {there}"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes that name when the block succeeds and is removed when it fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_scores(
    path: Path,
    verdicts: Sequence[str],
    final: Mapping[str, Sequence[float]],
    scored: Mapping[str, Sequence[float]],
    models: Mapping[str, ModelScores],
) -> None:
    """Write scores.parquet with every probability.

    Its columns are id, p_VERDICT as submitted, `scored` (else that is the prior), and
    RUN_p_VERDICT_ORDER as each model gave it, null where it did not score the row.

    Args:
        path: The file.
        verdicts: The competition's.
        final: The submitted probabilities by id.
        scored: Has the ids of the rows that a model scored.
        models: What each run's model gave.
    """
    columns: dict[str, list] = {"id": list(final), "scored": [row_id in scored for row_id in final]}
    for place, verdict in enumerate(verdicts):
        columns[f"p_{verdict}"] = [values[place] for values in final.values()]

    for run, model in models.items():
        orders = {order for by_order in model.by_id.values() for order in by_order}
        for order in sorted(orders):
            values_by_row = [model.by_id.get(row_id, {}).get(order) for row_id in final]
            for place, verdict in enumerate(model.verdicts):
                columns[f"{run}_p_{verdict}_{order}"] = [
                    None if values is None else values[place] for values in values_by_row
                ]

    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def write_record(path: Path, record: Mapping) -> None:
    """Write kernel.json."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
