"""The layout of preference data sets: a chosen and a rejected answer, as texts or as chat messages.

A text answers the column prompt. A list of chat messages ({"role", "content"}, or {"from", "value"}) may
hold the whole conversation, or only the answer to the prompt. Which answer becomes A is drawn by a hash
of the id, so that the side tells nothing about the winner; a row without an id gets a hash of its texts.
"""

import hashlib
import json
from dataclasses import dataclass

from preprocess.model_input import clean
from preprocess.sources.layout import Layout
from preprocess.sources.rows import Judgement, UnusableRow, read_text
from preprocess.sources.tables import Table

# Names that data sets give to the two sides of a chat.
USER_ROLES = ("user", "human")
ASSISTANT_ROLES = ("assistant", "gpt", "model")
ROLES = ("system", *USER_ROLES, *ASSISTANT_ROLES)

# 64 bits of a SHA-256.
ID_DIGITS = 16


@dataclass(frozen=True)
class _Message:
    role: str
    content: str


@dataclass
class _Turn:
    """A turn of a conversation; `answer` is None until the assistant has spoken."""

    prompt: str
    answer: str | None = None


def read_judgement(values: dict) -> Judgement:
    """Read a row, whose chosen and rejected answers must be answers to the same prompt."""
    prompt_column = values.get("prompt")
    prompt, chosen_answer = read_conversation(prompt_column, values.get("chosen"))
    other_prompt, rejected_answer = read_conversation(prompt_column, values.get("rejected"))
    if prompt != other_prompt:
        raise UnusableRow("chosen and rejected answer different prompts")

    # The same texts get the same id, so that a row is drawn the same side in every file.
    row_id = read_text(values.get("id"))
    if not row_id:
        texts = json.dumps([prompt, chosen_answer, rejected_answer])
        row_id = hashlib.sha256(texts.encode()).hexdigest()[:ID_DIGITS]

    # In half of the rows, by a hash of the id, the rejected answer is response A.
    digest = hashlib.sha256(f"side of {row_id}".encode("utf-8", "replace")).digest()
    if digest[0] % 2 == 1:
        return Judgement(row_id, prompt, rejected_answer, chosen_answer, winner="model_b")
    return Judgement(row_id, prompt, chosen_answer, rejected_answer, winner="model_a")


def read_conversation(prompt: object, answer: object) -> tuple[list[str], list[str]]:
    """Read a prompt with one of its answers.

    Returns:
        The user's turns and the assistant's turns.
    """
    # Without a message of the user, the answer is no whole conversation.
    messages = _read_messages(answer, role_of_text="assistant")
    is_answer_only = all(message.role in ASSISTANT_ROLES for message in messages)
    if is_answer_only:
        messages = _read_messages(prompt, role_of_text="user") + messages

    turns = _group_into_turns(messages)
    user_turns = [turn.prompt for turn in turns]
    assistant_turns = [turn.answer or "" for turn in turns]
    return user_turns, assistant_turns


def _read_messages(value: object, role_of_text: str) -> list[_Message]:
    """Return the chat messages of a value: a text is one message of the given role, null is none."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [_Message(role_of_text, clean(value))]
    if not isinstance(value, list):
        raise UnusableRow("not a list of chat messages")

    messages = []
    for item in value:
        if not isinstance(item, dict):
            raise UnusableRow("not a list of chat messages")

        # ShareGPT's files call the two keys "from" and "value".
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        is_text = content is None or isinstance(content, str)
        if role not in ROLES or not is_text:
            raise UnusableRow("not a list of chat messages")
        messages.append(_Message(role, clean(content)))
    return messages


def _group_into_turns(messages: list[_Message]) -> list[_Turn]:
    """Join messages to turns of one prompt and one answer; a system message starts the next prompt."""
    turns: list[_Turn] = []
    system_text = ""

    for message in messages:
        is_answer_due = len(turns) > 0 and turns[-1].answer is None

        if message.role == "system":
            system_text += f"{message.content}\n\n"

        elif message.role in USER_ROLES:
            # Two messages of the user in a row are one prompt.
            if is_answer_due:
                turns[-1].prompt += f"\n\n{message.content}"
            else:
                turns.append(_Turn(system_text + message.content))
                system_text = ""

        elif is_answer_due:
            turns[-1].answer = message.content
        # Two messages of the assistant in a row are one answer.
        elif turns:
            turns[-1].answer += f"\n\n{message.content}"
        # The conversation begins with the assistant.
        else:
            turns.append(_Turn(system_text, message.content))

    return turns


def _list_required_columns(table: Table) -> tuple[str, ...]:
    """Return the columns that a file needs: chats may hold the prompt, texts do not."""
    if table.holds_text("chosen"):
        return ("prompt", "chosen", "rejected")
    return ("chosen", "rejected")


LAYOUT = Layout(
    name="chosen/rejected",
    columns=("prompt", "chosen", "rejected"),
    verdict_columns=(),
    read_judgement=read_judgement,
    required_columns=_list_required_columns,
)
