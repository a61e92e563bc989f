"""The layout of HelpSteer3's preferences: a context of messages, two responses, and a grade from -3 to 3.

The grade becomes a soft vote: -3 (response1 is much better) gives all votes to A, 3 all to B, and each
step between them a sixth. A grade of 0 is a tie. Rows have no id, and get a hash of their texts.
"""

from preprocess.sources.layout import Layout
from preprocess.sources.messages import name_row, read_conversation
from preprocess.sources.rows import Judgement, judge_by_share

MOST_PREFERENCE = 3


def read_judgement(values: dict) -> Judgement:
    """Read a row: two responses to the last message of a conversation, and a grade from -3 (A) to 3 (B)."""
    context = values.get("context")
    prompt, response_a = read_conversation(context, values.get("response1"))
    _, response_b = read_conversation(context, values.get("response2"))
    row_id = name_row(values, prompt, response_a, response_b)

    # A row without a grade has no winner, and is rejected unless it is for the pool.
    preference = read_preference(values.get("overall_preference"))
    if preference is None:
        return Judgement(row_id, prompt, response_a, response_b, winner="")

    # The grades -3, -2, … 3 are the shares 6/6, 5/6, … 0/6 of the votes on A.
    share_a = (MOST_PREFERENCE - preference) / (2 * MOST_PREFERENCE)
    return judge_by_share(row_id, prompt, response_a, response_b, share_a)


def read_preference(value: object) -> float | None:
    """Return a grade, or None for a value that is no number from -3 to 3."""
    try:
        preference = float(value)
    except (TypeError, ValueError):
        return None

    # NaN compares with nothing, so that it is refused as well.
    is_grade = -MOST_PREFERENCE <= preference <= MOST_PREFERENCE
    return preference if is_grade else None


LAYOUT = Layout(
    name="HelpSteer3",
    columns=("context", "response1", "response2", "overall_preference"),
    verdict_columns=("overall_preference",),
    read_judgement=read_judgement,
)
