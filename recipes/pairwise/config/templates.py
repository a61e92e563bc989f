"""The templates that recipes name: how a prompt and its responses stand in the words of a chat model, for each head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from preprocess.model_input import Template

TemplateName = Literal["gemma", "llama3", "chatml", "phi4", "bert"]  # what a recipe may name
SECTIONS = "# Prompt\n{prompt}\n\n# Response A\n{response_a}\n\n# Response B\n{response_b}\n\n"
QUESTION = "Which response would a person prefer, A or B?"
# label_tokens: the answer that stands for each verdict
LABELS = {"model_a": "A", "model_b": "B", "tie": "C"}
ANSWERS = {2: " Answer with A or B.", 3: " Answer with A, with B, or with C if neither."}


@dataclass(frozen=True)
class Chat:
    """A chat model's control text: before everything, before the user's words, after them, and after the model's."""

    begin: str
    user: str
    model: str
    end: str


CHATS = {
    "gemma": Chat(
        "<bos>", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"
    ),
    "llama3": Chat(
        "<|begin_of_text|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    # Without the system turn that Qwen2.5's own template begins with: it says who the model is, and costs 20 tokens a row.
    "chatml": Chat("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "phi4": Chat(
        "", "<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>", "<|im_end|>"
    ),
}
NAMES = get_args(TemplateName)


def named_template(name: str, head: str, verdicts: Sequence[str]) -> Template:
    """The template `name` for a head: both answers under headings and a question, or for reward the conversation itself."""
    if name == "bert":
        return separate_texts("[CLS]", "[SEP]", head)
    return build_template(CHATS[name], head, verdicts)


def separate_texts(begin: str, separator: str, head: str) -> Template:
    """Build an encoder's template, which has no turns: a separator follows each text."""
    # A reward model reads one response at a time.
    turn = f"{{prompt}}{separator}{{response_a}}{separator}{{response_b}}{separator}"
    if head == "reward":
        turn = f"{{prompt}}{separator}{{response}}{separator}"
    return Template(begin, turn, "")


def build_template(chat: Chat, head: str, verdicts: Sequence[str]) -> Template:
    """Put a pair into the words of a chat model."""
    if head == "reward":
        return Template(chat.begin, f"{chat.user}{{prompt}}{chat.model}{{response}}{chat.end}", "")

    question = QUESTION
    if head == "label_tokens":
        question += ANSWERS[len(verdicts)]
    return Template(chat.begin + chat.user, SECTIONS, question + chat.model)
