"""From probabilities to a submission that is whole: every id once, in the test file's order."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kaggle_kernels.runtime.settings import Settings

# No probability is nearer to 0 or 1: log loss would punish it without end.
SMALLEST = 1e-6

# By the number of verdicts: longer, shorter, tie. The longer one wins 62 % of human verdicts.
PRIOR = {2: (0.6, 0.4), 3: (0.45, 0.25, 0.3)}


def to_competition(
    values: Sequence[float], model_verdicts: Sequence[str], verdicts: Sequence[str]
) -> list[float]:
    """Turn a model's probabilities into those of the competition's verdicts, in their order.

    A verdict that the competition does not know, such as a tie, is left out: the others' shares then
    grow to a sum of one again. Of 0.3, 0.1 and 0.6 for a tie, 0.75 and 0.25 are left.

    Args:
        values: The probabilities of a row.
        model_verdicts: The model's verdicts, in the order of the values.
        verdicts: The competition's.
    """
    kept = [values[model_verdicts.index(verdict)] for verdict in verdicts]
    total = sum(kept)
    if total == 0:  # the model is sure of the verdict that was left out
        return [1 / len(kept)] * len(kept)
    return [value / total for value in kept]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Average the probabilities of a row, a list from each model; the weights need not sum to one."""
    total_weight = sum(weights)
    number_of_verdicts = len(values[0])
    mean = [0.0] * number_of_verdicts
    for probabilities, weight in zip(values, weights, strict=True):
        for place, probability in enumerate(probabilities):
            mean[place] += weight * probability / total_weight
    return mean


def soften(values: Sequence[float], temperature: float) -> list[float]:
    """Apply a temperature: above 1, probabilities become less sure. None falls below SMALLEST."""
    powers = [max(value, SMALLEST) ** (1 / temperature) for value in values]
    total = sum(powers)

    # The bound breaks the sum of one, so it is restored once more.
    bounded = [max(power / total, SMALLEST) for power in powers]
    total = sum(bounded)
    return [value / total for value in bounded]


def count_characters(text: str | Sequence[str | None] | None) -> int:
    """Count the characters of a text, or of all its turns."""
    if text is None:
        return 0
    if isinstance(text, str):
        return len(text)

    # A conversation of LMSYS has None for a turn without an answer.
    return sum(len(turn) for turn in text if turn is not None)


def prior(row: Mapping, verdicts: Sequence[str]) -> list[float]:
    """Give a row that could not be scored probabilities, by which of its responses is longer."""
    longer, shorter, *tie = PRIOR[len(verdicts)]
    if count_characters(row["response_a"]) >= count_characters(row["response_b"]):
        return [longer, shorter, *tie]
    return [shorter, longer, *tie]


def fill_unscored(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], verdicts: Sequence[str]
) -> dict[str, list[float]]:
    """Give every row probabilities, in the rows' order: those in `scored`, or else the prior, a guess by length."""
    final = {}
    for row in rows:
        row_id = row["id"]
        if row_id in scored:
            final[row_id] = list(scored[row_id])
        else:
            final[row_id] = prior(row, verdicts)
    return final


def write_submission(
    path: Path, settings: Settings, final: Mapping[str, Sequence[float]], ids: Sequence[str]
) -> None:
    """Write submission.csv: the id of each row with its winner, or with a probability a verdict.

    Args:
        path: The file. It gets this name once its ids were read back and are right.
        settings: Name the competition's columns, verdicts and kind of answer.
        final: The probabilities by id.
        ids: The test file's, in its order.

    Raises:
        ValueError: The ids are not those of the test file. Then there is no file.
    """
    with whole_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *settings.columns])
            for row_id, probabilities in final.items():
                answer = probabilities
                if settings.answer == "winner":
                    likeliest = probabilities.index(max(probabilities))
                    answer = [settings.verdicts[likeliest]]
                writer.writerow([row_id, *answer])

        # The ids are read back from the file itself.
        check_ids(temporary, ids)


def check_ids(path: Path, ids: Sequence[str]) -> None:
    """Raise ValueError unless a submission has every id of the test file once, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        _header, *lines = csv.reader(file)
    written_ids = [line[0] for line in lines]
    if written_ids != list(ids):
        raise ValueError(
            f"{path}: its {len(written_ids)} ids are not the test file's {len(ids)} in their order"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that gets its name when the block succeeds, and is removed if not."""
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
    model_columns: Mapping[str, Mapping[str, float]],
) -> None:
    """Write scores.parquet, which tells for every row where its probabilities come from.

    Its columns are id; `scored`, which is false where the row has the prior; p_VERDICT, as submitted;
    and what each model gave, null where it did not score the row.

    Args:
        path: The file.
        verdicts: The competition's, in the order of the probabilities.
        final: The submitted probabilities, by id.
        scored: The same, but of the rows only that a model scored.
        model_columns: Each model's own probabilities by id, by the name of their column (see
            schedule.ScoringJob).
    """
    columns: dict[str, list] = {"id": list(final), "scored": [row_id in scored for row_id in final]}
    for place, verdict in enumerate(verdicts):
        columns[f"p_{verdict}"] = [values[place] for values in final.values()]
    for name, value_by_id in model_columns.items():
        columns[name] = [value_by_id.get(row_id) for row_id in final]
    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def write_record(path: Path, record: Mapping) -> None:
    """Write kernel.json."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
