"""The layout of Arena's votes (33k, 100k and 140k): two conversations, each with the messages of one model.

The id is question_id in earlier releases; the verdict both_bad was "tie (bothbad)". The release of 55,000
has LMSYS's layout.
"""

from preprocess.sources.layout import Layout
from preprocess.sources.messages import read_conversation
from preprocess.sources.rows import Judgement, UnusableRow, read_text, read_winner
from preprocess.sources.tables import Table


def read_judgement(values: dict) -> Judgement:
    """Read a row: two whole conversations, in which the user must have written the same."""
    prompt, response_a = read_conversation(None, values.get("conversation_a"))
    other_prompt, response_b = read_conversation(None, values.get("conversation_b"))
    if prompt != other_prompt:
        raise UnusableRow("the two conversations have different prompts")

    winner, both_bad = read_winner(values.get("winner"))
    return Judgement(
        id=read_text(values.get("id")) or read_text(values.get("question_id")),
        prompt=prompt,
        response_a=response_a,
        response_b=response_b,
        winner=winner,
        both_bad=both_bad,
    )


def _list_required_columns(table: Table) -> tuple[str, ...]:
    """Return the columns that a file needs: the id has one of two names."""
    id_column = "question_id" if "question_id" in table.columns else "id"
    return (id_column, "conversation_a", "conversation_b", "winner")


LAYOUT = Layout(
    name="Arena",
    columns=("id", "conversation_a", "conversation_b", "winner"),
    verdict_columns=("winner",),
    read_judgement=read_judgement,
    required_columns=_list_required_columns,
)
