"""The layout of the WSDM Cup: id, prompt, response_a, response_b, winner (model_a, model_b or tie).

A text is one turn; a list of texts, as in an earlier pairs.parquet, is a conversation of several.
"""

from preprocess.sources.layout import Layout
from preprocess.sources.rows import Judgement, read_text, read_turns


def read_judgement(values: dict) -> Judgement:
    """Read a row, which has the columns of a Judgement already."""
    return Judgement(
        id=read_text(values.get("id")),
        prompt=read_turns(values.get("prompt")),
        response_a=read_turns(values.get("response_a")),
        response_b=read_turns(values.get("response_b")),
        winner=read_text(values.get("winner")),
    )


LAYOUT = Layout(
    name="WSDM",
    columns=("id", "prompt", "response_a", "response_b", "winner"),
    verdict_columns=("winner",),
    read_judgement=read_judgement,
)
