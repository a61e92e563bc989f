"""A recipe's template taken from the chat template of a base model's tokenizer, for `pairwise new`.

A conversation of two turns is rendered, and its control text is what stands between the four texts.
"""

import re
from collections.abc import Sequence

from jinja2 import TemplateError

from preprocess.core.errors import UserError
from preprocess.model_input import Template
from recipes.pairwise.config.templates import NAMES, Chat, build_template, named_template

# Texts that no template contains, and that none cuts or trims.
TEXTS = ("FIRST-PROMPT", "FIRST-RESPONSE", "SECOND-PROMPT", "SECOND-RESPONSE")
CONVERSATION = [
    {"role": "user", "content": TEXTS[0]},
    {"role": "assistant", "content": TEXTS[1]},
    {"role": "user", "content": TEXTS[2]},
    {"role": "assistant", "content": TEXTS[3]},
]

# A control token is never divided: <|im_end|>, <bos>, [INST], [/INST]
CONTROL_TOKEN = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")


def derive_template(tokenizer, head: str, verdicts: Sequence[str]) -> Template:
    """Derive the template of a recipe from a base model's tokenizer.

    Args:
        tokenizer: The base model's, of transformers.
        head: score, label_tokens or reward.
        verdicts: The verdicts that the model is to tell apart.

    Raises:
        UserError: The tokenizer's chat template cannot be rendered, or changes the texts.
    """
    begin = tokenizer.cls_token or tokenizer.bos_token or ""
    if tokenizer.chat_template:
        return derive_chat_template(tokenizer, head, verdicts)
    if tokenizer.mask_token:
        # An encoder. Some have the tokenizer of a decoder and no separator of their own, as mmBERT.
        return separate_texts(begin, tokenizer.sep_token or tokenizer.eos_token, head)
    return build_template(Chat(begin, "", "\n\n", "\n"), head, verdicts)


def find_template_name(template: Template, head: str, verdicts: Sequence[str]) -> str | None:
    """Find the name of the template of ours that is the same text; None where there is none."""
    for name in NAMES:
        is_possible = name != "bert" or head != "label_tokens"
        if is_possible and named_template(name, head, verdicts) == template:
            return name
    return None


def separate_texts(begin: str, separator: str, head: str) -> Template:
    """Build an encoder's template: the texts, each with a separator behind it."""
    names = ["prompt", "response"] if head == "reward" else ["prompt", "response_a", "response_b"]
    turn = ""
    for name in names:
        turn += f"{{{name}}}{separator}"
    return Template(begin, turn, "")


def derive_chat_template(tokenizer, head: str, verdicts: Sequence[str]) -> Template:
    """Derive a template from the tokenizer's chat template, so that one turn reads as the model's own.

    For a reward model that is the whole conversation. The other heads need only what stands before
    and after the user's words, where the model begins to answer.
    """
    if head == "reward":
        return derive_conversation_template(tokenizer, verdicts)

    only_prompt = CONVERSATION[:1]
    text = render(tokenizer, only_prompt, generates=True)
    before_prompt, before_answer = split_at_texts(text, TEXTS[:1])
    return build_template(Chat("", before_prompt, before_answer, ""), head, verdicts)


def derive_conversation_template(tokenizer, verdicts: Sequence[str]) -> Template:
    """Derive a reward model's template, which repeats a turn of prompt and response.

    Llama-3 renders the conversation as (line breaks left out; headers shortened)

        <|begin_of_text|><|user|>FIRST-PROMPT<|eot_id|><|assistant|>FIRST-RESPONSE<|eot_id|>
        <|user|>SECOND-PROMPT<|eot_id|><|assistant|>SECOND-RESPONSE<|eot_id|>

    Here `begin` is <|begin_of_text|>, the user's header is <|user|>, the model's header is
    <|eot_id|><|assistant|>, and a turn ends with <|eot_id|>.
    """
    text = render(tokenizer, CONVERSATION, generates=False)
    parts = split_at_texts(text, TEXTS)
    before_first_prompt, _, between_turns, before_last_response, after_last_response = parts

    # What stands before both prompts is the user's header.
    user_header = common_ending(before_first_prompt, between_turns)
    begin = before_first_prompt.removesuffix(user_header)
    turn_end = between_turns.removesuffix(user_header)

    # The model's header before the last response counts: Qwen3 writes empty thoughts there, and not
    # before earlier ones.
    chat = Chat(begin, user_header, before_last_response, turn_end)
    template = build_template(chat, "reward", verdicts)

    # Each turn has its own end. What follows after the last one ends the conversation.
    end = after_last_response.removeprefix(turn_end)
    return Template(template.start, template.turn, end)


def render(tokenizer, conversation: Sequence[dict], generates: bool) -> str:
    """Render a conversation with the tokenizer's chat template; `generates` adds the head of an answer."""
    try:
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generates
        )
    except (TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"its chat template cannot be rendered ({reason}); write the recipe by hand, with start, turn and end spelled out"
        ) from None


def split_at_texts(rendered: str, texts: Sequence[str]) -> list[str]:
    """Return what stands before, between and after texts that are rendered once each, in their order."""
    parts = []
    rest = rendered
    for text in texts:
        # A text that stands there twice could not be told from the template's own words.
        part, separator, rest = rest.partition(text)
        if not separator or text in rest:
            raise UserError(
                "its chat template leaves out or repeats a text; write the recipe by hand, with start, turn and end spelled out"
            )
        parts.append(part)
    return [*parts, rest]


def common_ending(text: str, other_text: str) -> str:
    """Return the longest ending that two texts share, without cutting a control token in two."""
    pieces = CONTROL_TOKEN.split(text)
    other_pieces = CONTROL_TOKEN.split(other_text)
    shared = ""
    for piece, other_piece in zip(reversed(pieces), reversed(other_pieces), strict=False):
        if piece != other_piece:
            break
        shared = piece + shared
    return shared
