"""The layout of preference data sets: a chosen and a rejected answer, as texts, chat messages or transcripts.

A text answers the column prompt. Chat messages and transcripts may hold the whole conversation, or only
the answer to the prompt. Which answer becomes A is drawn by a hash of the id, so that the side tells
nothing about the winner; a row without an id gets a hash of its texts.

UltraFeedback has score_chosen and score_rejected, which become soft votes.
"""

import hashlib
import math

from preprocess.sources.layout import Layout
from preprocess.sources.messages import TRANSCRIPT_START, name_row, read_conversation
from preprocess.sources.rows import Judgement, UnusableRow, judge_by_share
from preprocess.sources.tables import Table

SCORES = ("score_chosen", "score_rejected")


def read_judgement(values: dict) -> Judgement:
    """Read a row: a chosen and a rejected answer, which must be answers to the same prompt.

    Which of the two becomes response A is drawn by the row's id.
    """
    prompt_column = values.get("prompt")
    prompt, chosen_answer = read_conversation(prompt_column, values.get("chosen"))
    other_prompt, rejected_answer = read_conversation(prompt_column, values.get("rejected"))
    if prompt != other_prompt:
        raise UnusableRow("chosen and rejected answer different prompts")

    # A row without an id is named by its texts, so that it has the same id, and hence the same side
    # of A and B, in every file.
    row_id = name_row(values, prompt, chosen_answer, rejected_answer)
    chosen_share = read_chosen_share(values)

    # The rejected answer is response A where the first byte of a hash of the id is odd: in half of
    # the rows.
    digest = hashlib.sha256(f"side of {row_id}".encode("utf-8", "replace")).digest()
    is_rejected_first = digest[0] % 2 == 1
    if is_rejected_first:
        return judge_by_share(row_id, prompt, rejected_answer, chosen_answer, 1 - chosen_share)
    return judge_by_share(row_id, prompt, chosen_answer, rejected_answer, chosen_share)


def read_chosen_share(values: dict) -> float:
    """Return the share of votes that the chosen answer gets.

    It is 1, but for a row with scores. There it is the probability of Bradley and Terry's model
    that the chosen answer wins, 1 / (1 + exp(-difference)): 0.5 for equal scores, 0.73 for one
    more.

    Raises:
        UnusableRow: A score is not a finite number.
    """
    has_scores = all(values.get(name) not in (None, "") for name in SCORES)
    if not has_scores:
        return 1.0

    try:
        difference = float(values["score_chosen"]) - float(values["score_rejected"])
    except (TypeError, ValueError):
        raise UnusableRow("scores are not numbers") from None
    if not math.isfinite(difference):
        raise UnusableRow("scores are not numbers")

    # The same function as above, in a form in which no large difference overflows.
    return (1 + math.tanh(difference / 2)) / 2


def _list_required_columns(table: Table) -> tuple[str, ...]:
    """Return the columns that a file needs: chats and transcripts hold the prompt, texts do not."""
    # The first row shows which of them the file has; a broken line of JSONL shows nothing.
    first_row = next(table.rows(("chosen",)))
    values = first_row.values or {}
    answer = values.get("chosen")
    is_text = isinstance(answer, str) and not answer.startswith(TRANSCRIPT_START)
    if is_text:
        return ("prompt", "chosen", "rejected")
    return ("chosen", "rejected")


LAYOUT = Layout(
    name="chosen/rejected",
    columns=("prompt", "chosen", "rejected"),
    verdict_columns=(),
    read_judgement=read_judgement,
    required_columns=_list_required_columns,
)
