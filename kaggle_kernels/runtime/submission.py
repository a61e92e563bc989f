"""From probabilities to a submission that is whole: every id once, in the test file's order, or an error and no file."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kaggle_kernels.runtime.settings import Settings

SMALLEST = 1e-6  # no probability is nearer to 0 or 1: log loss would punish it without end
PRIOR = {2: (0.6, 0.4), 3: (0.45, 0.25, 0.3)}  # longer, shorter, tie: the longer one wins 62 % of human verdicts


def to_competition(values: Sequence[float], of: Sequence[str], verdicts: Sequence[str]) -> list[float]:
    """Probabilities in the order `of` as probabilities of the competition's `verdicts`; what those lack is shared out."""
    kept = [values[list(of).index(verdict)] for verdict in verdicts]
    return [value / sum(kept) for value in kept]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The weighted mean of the models that scored a row; the weights need not sum to one."""
    return [sum(w * p for w, p in zip(weights, column, strict=True)) / sum(weights) for column in zip(*values, strict=True)]


def soften(values: Sequence[float], temperature: float) -> list[float]:
    """Probabilities at a temperature (above 1: less sure), each within SMALLEST of 0 and 1 at most, summing to one."""
    powers = [max(value, SMALLEST) ** (1 / temperature) for value in values]
    inner = [max(power / sum(powers), SMALLEST) for power in powers]
    return [value / sum(inner) for value in inner]


def prior(row: Mapping, verdicts: Sequence[str]) -> list[float]:
    """What to say of a row that could not be scored: the longer answer, by characters; of equal ones the first."""

    def length(value) -> int:
        return len(value or "") if value is None or isinstance(value, str) else sum(len(turn or "") for turn in value)

    longer, shorter, *tie = PRIOR[len(verdicts)]
    first = length(row["response_a"]) >= length(row["response_b"])
    return [longer, shorter, *tie] if first else [shorter, longer, *tie]


def fill_unscored(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], verdicts: Sequence[str], min_scored: float
) -> dict[str, list[float]]:
    """Probabilities of every row, in the rows' order: its score or the prior.

    Raises ValueError where fewer than the share `min_scored` were scored: a silent bad submission is worse than none.
    """
    if len(scored) < min_scored * len(rows):
        raise ValueError(
            f"{len(scored)} of {len(rows)} rows were scored, the spec's min_scored is {min_scored}; nothing is submitted"
        )
    return {row["id"]: list(scored.get(row["id"]) or prior(row, verdicts)) for row in rows}


def write_submission(path: Path, settings: Settings, probabilities: Mapping[str, Sequence[float]]) -> None:
    """Write id,winner or id and one probability a verdict; the file gets its name once `check_submission` has passed it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *settings.columns])
        for row_id, values in probabilities.items():
            answer = values if len(settings.columns) > 1 else [settings.verdicts[values.index(max(values))]]
            writer.writerow([row_id, *answer])
    check_submission(temporary, settings, list(probabilities))
    os.replace(temporary, path)


def check_submission(path: Path, settings: Settings, ids: Sequence[str]) -> None:
    """Raise ValueError unless the file has the competition's columns and every id once, in order, with a valid answer."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    if header != ["id", *settings.columns]:
        raise ValueError(f"{path}: columns {header}, expected {['id', *settings.columns]}")
    if [line[0] for line in lines] != list(ids):
        raise ValueError(f"{path}: its {len(lines)} ids are not the test file's {len(ids)} ids in their order")
    for row_id, *answer in lines:
        if len(answer) != len(settings.columns):
            raise ValueError(f"{path}: id {row_id}: {len(answer)} values, expected {len(settings.columns)}")
        if len(answer) == 1 and answer[0] not in settings.verdicts:
            raise ValueError(f"{path}: id {row_id}: {answer[0]!r}, expected one of {', '.join(settings.verdicts)}")
        if len(answer) > 1:
            values = [float(value) for value in answer]
            if not all(0 < value < 1 for value in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
                raise ValueError(f"{path}: id {row_id}: {values} are not probabilities that sum to one")


def write_scores(
    path: Path,
    verdicts: Sequence[str],
    final: Mapping[str, Sequence[float]],
    scored: Mapping[str, Sequence[float]],
    per_package: Mapping[str, tuple[Sequence[str], Mapping[str, Mapping[str, Sequence[float]]]]],
) -> None:
    """Write every probability: p_VERDICT as submitted, `scored`, and RUN_p_VERDICT_ORDER as each model gave it (null: not).

    `per_package` holds for each run its verdicts and its scores by id and order.
    """
    columns: dict[str, list] = {"id": list(final), "scored": [row_id in scored for row_id in final]}
    for at, verdict in enumerate(verdicts):
        columns[f"p_{verdict}"] = [values[at] for values in final.values()]
    for run, (order_of_logits, scores) in per_package.items():
        for order in sorted({order for by_order in scores.values() for order in by_order}):
            for at, verdict in enumerate(order_of_logits):
                found = [scores.get(row_id, {}).get(order) for row_id in final]
                columns[f"{run}_p_{verdict}_{order}"] = [None if values is None else values[at] for values in found]
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.table(columns), temporary)
    os.replace(temporary, path)


def write_record(path: Path, record: Mapping) -> None:
    """Write kernel.json."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
