"""The layout of PPE's votes, which has WSDM's columns under other names."""

from preprocess.competitions import COMPETITIONS
from preprocess.sources import competition
from preprocess.sources.layout import Layout
from preprocess.sources.rows import Judgement

# The column of WSDM for each column of PPE.
WSDM_COLUMNS = {
    "question_id": "id",
    "prompt": "prompt",
    "response_1": "response_a",
    "response_2": "response_b",
    "winner": "winner",
}


def read_judgement(values: dict) -> Judgement:
    """Read a row of PPE, in which model_a wrote response_1."""
    renamed = {column: values.get(ppe_column) for ppe_column, column in WSDM_COLUMNS.items()}
    return competition.read_judgement(COMPETITIONS["wsdm"], renamed)


LAYOUT = Layout(
    name="PPE",
    columns=tuple(WSDM_COLUMNS),
    verdict_columns=("winner",),
    read_judgement=read_judgement,
)
