"""The layout of a competition's train file, made from its entry in preprocess/competitions.py.

The columns are id, prompt, response_a, response_b, and one or several with the verdict. WSDM's layout
is that of an earlier pairs.parquet, too: there a text is a list of turns.
"""

import functools

from preprocess.competitions import Competition
from preprocess.sources.layout import Layout
from preprocess.sources.rows import (
    TEXTS,
    Judgement,
    read_json_turns,
    read_text,
    read_turns,
    read_winner,
)

# How a flag of 1 reads in CSV, in Parquet, and after a detour through floats or booleans.
FLAG_SET = ("1", "1.0", "True", "true")


def make_layout(competition: Competition) -> Layout:
    """Make the layout of a competition's train file."""
    return Layout(
        name=competition.name,
        columns=("id", *TEXTS, *competition.verdict_columns),
        verdict_columns=competition.verdict_columns,
        read_judgement=functools.partial(read_judgement, competition),
        texts_are_turns=competition.texts_are_turns,
    )


def read_judgement(competition: Competition, values: dict) -> Judgement:
    """Read a row of the competition's train file, given its values by column."""
    parse_text = read_json_turns if competition.texts_are_turns else read_turns
    winner, both_bad = read_verdict(competition, values)
    return Judgement(
        id=read_text(values.get("id")),
        prompt=parse_text(values.get("prompt")),
        response_a=parse_text(values.get("response_a")),
        response_b=parse_text(values.get("response_b")),
        winner=winner,
        both_bad=both_bad,
    )


def read_verdict(competition: Competition, values: dict) -> tuple[str, bool]:
    """Return a row's verdict, "" where it has none, and whether it calls both responses bad."""
    if competition.verdict_form == "name":
        [column] = competition.verdict_columns
        winner, is_both_bad = read_winner(values.get(column))

        # An earlier pairs.parquet has another form: the winner is "tie", and the column both_bad is
        # true; in a CSV file of it, that is the text "true".
        is_marked = values.get("both_bad") in (True, "true")
        return winner, is_both_bad or is_marked

    # Otherwise each verdict has a column of 0 and 1. Exactly one of these flags must be set.
    winners = []
    for verdict, column in zip(competition.verdicts, competition.verdict_columns, strict=True):
        if read_text(values.get(column)) in FLAG_SET:
            winners.append(verdict)
    winner = winners[0] if len(winners) == 1 else ""
    return winner, False
