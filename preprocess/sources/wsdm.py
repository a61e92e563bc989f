"""The layout of the WSDM Cup: id, prompt, response_a, response_b, winner (model_a, model_b or tie).

A text is one turn; a list of texts, as in an earlier pairs.parquet, is a conversation of several. PPE's
votes have the same columns under other names.
"""

from preprocess.sources.layout import Layout
from preprocess.sources.rows import Judgement, read_text, read_turns, read_winner

# The column of WSDM for each column of PPE.
PPE_COLUMNS = {
    "question_id": "id",
    "prompt": "prompt",
    "response_1": "response_a",
    "response_2": "response_b",
    "winner": "winner",
}


def read_judgement(values: dict) -> Judgement:
    """Read a row, which has the columns of a Judgement already."""
    winner, both_bad = read_winner(values.get("winner"))
    return Judgement(
        id=read_text(values.get("id")),
        prompt=read_turns(values.get("prompt")),
        response_a=read_turns(values.get("response_a")),
        response_b=read_turns(values.get("response_b")),
        winner=winner,
        both_bad=both_bad or values.get("both_bad") in (True, "true"),
    )


def read_ppe_judgement(values: dict) -> Judgement:
    """Read a row of PPE, in which model_a wrote response_1."""
    renamed = {column: values.get(ppe_column) for ppe_column, column in PPE_COLUMNS.items()}
    return read_judgement(renamed)


LAYOUT = Layout(
    name="WSDM",
    columns=("id", "prompt", "response_a", "response_b", "winner"),
    verdict_columns=("winner",),
    read_judgement=read_judgement,
)
PPE_LAYOUT = Layout(
    name="PPE",
    columns=tuple(PPE_COLUMNS),
    verdict_columns=("winner",),
    read_judgement=read_ppe_judgement,
)
