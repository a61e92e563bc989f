r"""Lists of chat messages become turns: the form in which most preference data sets hold conversations.

A message is {"role", "content"} or {"from", "value"}; its content is a text, or a list of parts of which
each is a text. A transcript of HH-RLHF ("\n\nHuman: … \n\nAssistant: …") is read as such a list. The layouts
chosen_rejected.py, arena.py and helpsteer.py use this.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from preprocess.model_input import clean
from preprocess.sources.rows import UnusableRow, read_text

# Names that data sets give to the two sides of a chat.
USER_ROLES = ("user", "human")
ASSISTANT_ROLES = ("assistant", "gpt", "model")
ROLES = ("system", *USER_ROLES, *ASSISTANT_ROLES)

# Where a turn of a transcript begins.
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT_START = "\n\nHuman:"

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


def read_conversation(prompt: object, answer: object) -> tuple[list[str], list[str]]:
    """Read a conversation from a prompt and one of its answers.

    Args:
        prompt: What stands before the answer: a text, a transcript or a list of messages; None for nothing.
        answer: The answer alone, or the whole conversation in one of the same forms.

    Returns:
        The user's turns and the assistant's turns.
    """
    # `answer` is a whole conversation if it has a message of the user. Otherwise it is the last
    # message of one that begins with `prompt`.
    messages = _read_messages(answer, role_of_text="assistant")
    is_answer_only = all(message.role in ASSISTANT_ROLES for message in messages)
    if is_answer_only:
        messages = _read_messages(prompt, role_of_text="user") + messages

    turns = _group_into_turns(messages)
    user_turns = [turn.prompt for turn in turns]
    assistant_turns = [turn.answer or "" for turn in turns]
    return user_turns, assistant_turns


def _read_messages(value: object, role_of_text: str) -> list[_Message]:
    """Read the chat messages of a value.

    Args:
        value: A list of messages, a transcript, or a text, which is one message; null is none.
        role_of_text: Who has written a plain text: user or assistant.

    Raises:
        UnusableRow: The value is something else.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        if value.startswith(TRANSCRIPT_START):
            return _split_transcript(value)
        return [_Message(role_of_text, clean(value))]
    if not isinstance(value, list):
        raise UnusableRow("not a list of chat messages")

    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise UnusableRow("not a list of chat messages")

        # ShareGPT's files call the two keys "from" and "value".
        role = message.get("role", message.get("from"))
        if role not in ROLES:
            raise UnusableRow("not a list of chat messages")
        content = message.get("content", message.get("value"))
        messages.append(_Message(role, _read_content(content)))
    return messages


def _split_transcript(transcript: str) -> list[_Message]:
    """Split a transcript into messages at the names of the speakers, Human and Assistant."""
    # A pattern with a group keeps what it matches there. So "\n\nHuman: Hi\n\nAssistant: Hello" is
    # split into "", "Human", " Hi", "Assistant", " Hello": nothing, then a name and a text in turn.
    _, *pieces = SPEAKER.split(transcript)
    speakers = pieces[0::2]
    texts = pieces[1::2]

    messages = []
    for speaker, text in zip(speakers, texts, strict=True):
        role = "user" if speaker == "Human" else "assistant"
        messages.append(_Message(role, clean(text.strip())))
    return messages


def _read_content(content: object) -> str:
    """Return the text of a message, which may be in several parts."""
    if content is None or isinstance(content, str):
        return clean(content)
    if not isinstance(content, list):
        raise UnusableRow("not a list of chat messages")

    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise UnusableRow("not a list of chat messages")
        if part.get("type", "text") != "text":
            raise UnusableRow("holds an image or another part that is no text")
        texts.append(read_text(part.get("text")))
    return "\n\n".join(texts)


def _group_into_turns(messages: list[_Message]) -> list[_Turn]:
    """Join messages to turns of one prompt and one answer.

    Messages of one side that follow each other are joined by a blank line, and a system message becomes
    the beginning of the next prompt.
    """
    # For example, these five messages become two turns:
    #     system: S, user: U1, user: U2, assistant: A1, user: U3
    #     prompt "S\n\nU1\n\nU2" with answer "A1", prompt "U3" without an answer
    turns: list[_Turn] = []
    system_text = ""
    for message in messages:
        # The user has spoken last, and the assistant has not answered yet.
        is_answer_due = len(turns) > 0 and turns[-1].answer is None

        if message.role == "system":
            system_text += f"{message.content}\n\n"
        elif message.role in USER_ROLES and is_answer_due:
            turns[-1].prompt += f"\n\n{message.content}"
        elif message.role in USER_ROLES:
            turns.append(_Turn(system_text + message.content))
            system_text = ""
        elif is_answer_due:
            turns[-1].answer = message.content
        elif turns:
            turns[-1].answer += f"\n\n{message.content}"
        else:
            # The conversation begins with the assistant.
            turns.append(_Turn(system_text, message.content))
    return turns


def name_row(values: dict, *texts: list[str]) -> str:
    """Return a row's id, or a hash of its texts where the file has none."""
    row_id = read_text(values.get("id"))
    if row_id:
        return row_id
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:ID_DIGITS]
