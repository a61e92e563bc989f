"""The layout of the LMSYS competition: turns as JSON lists, and a column of 0 and 1 for each verdict."""

import json

from preprocess.model_input import VERDICTS
from preprocess.sources.layout import Layout
from preprocess.sources.rows import TEXTS, Judgement, UnusableRow, read_text, read_turns

# How a flag of 1 reads in CSV, in Parquet, and after a detour through floats or booleans.
FLAG_SET = ("1", "1.0", "True", "true")


def read_judgement(values: dict) -> Judgement:
    """Read a row, whose texts are JSON lists of turns, in which a turn may be null."""
    verdicts = []
    for verdict in VERDICTS:
        flag = read_text(values.get(f"winner_{verdict}"))
        if flag in FLAG_SET:
            verdicts.append(verdict)

    # Exactly one of the three flags must be set.
    winner = verdicts[0] if len(verdicts) == 1 else ""
    return Judgement(
        id=read_text(values.get("id")),
        prompt=read_json_turns(values.get("prompt")),
        response_a=read_json_turns(values.get("response_a")),
        response_b=read_json_turns(values.get("response_b")),
        winner=winner,
    )


def read_json_turns(value: object) -> list[str]:
    """Return the turns of a JSON list, or of a list that is parsed already; null and "" hold none."""
    if value is None or value == "":
        return []

    # Parquet and JSONL can hold real lists.
    if not isinstance(value, list):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError, TypeError):
            raise UnusableRow("not a JSON list of turns") from None
    if not isinstance(value, list):
        raise UnusableRow("not a JSON list of turns")
    return read_turns(value)


VERDICT_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")

LAYOUT = Layout(
    name="LMSYS",
    columns=("id", *TEXTS, *VERDICT_COLUMNS),
    verdict_columns=VERDICT_COLUMNS,
    read_judgement=read_judgement,
)
