"""A recipe's template taken from the chat template of a base model's tokenizer, for `pairwise new`.

A conversation of two turns is rendered, and its control text is what stands between the four texts.
"""

import re
from collections.abc import Sequence

from jinja2 import TemplateError

from preprocess.core.errors import UserError
from preprocess.model_input import Template
from recipes.pairwise.config.templates import (
    NAMES,
    Chat,
    build_template,
    named_template,
    separate_texts,
)

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

    Raises:
        UserError: The tokenizer's chat template cannot be rendered, or changes the texts.
    """
    if tokenizer.chat_template:
        return derive_chat_template(tokenizer, head, verdicts)

    begin = tokenizer.cls_token or tokenizer.bos_token or ""
    # A mask token is the sign of an encoder, which is trained to guess masked words.
    is_encoder = bool(tokenizer.mask_token)
    if is_encoder:
        # Some encoders, as mmBERT, have the tokenizer of a decoder, and no separator of their own.
        separator = tokenizer.sep_token or tokenizer.eos_token
        return separate_texts(begin, separator, head)

    # A decoder that was not trained to chat: line breaks stand between the texts.
    plain_text = Chat(begin, user="", model="\n\n", end="\n")
    return build_template(plain_text, head, verdicts)


def find_template_name(template: Template, head: str, verdicts: Sequence[str]) -> str | None:
    """Find the named template that equals this one, such as "chatml"; None where there is none."""
    for name in NAMES:
        # An encoder predicts no tokens, so that this head has no template of that name.
        if name == "bert" and head == "label_tokens":
            continue
        if named_template(name, head, verdicts) == template:
            return name
    return None


def derive_chat_template(tokenizer, head: str, verdicts: Sequence[str]) -> Template:
    """Derive a recipe's template from the tokenizer's chat template.

    A reward model reads a pair as a conversation in the model's own format. The other heads read it as
    one message of a user, and then predict. From ChatML's

        <|im_start|>user FIRST-PROMPT<|im_end|> <|im_start|>assistant

    (line breaks left out) they need what stands before and after FIRST-PROMPT.
    """
    if head == "reward":
        return derive_conversation_template(tokenizer, verdicts)

    first_message = CONVERSATION[:1]
    text = render(tokenizer, first_message, generates=True)
    before_prompt, after_prompt = split_at_texts(text, TEXTS[:1])
    chat = Chat(begin="", user=before_prompt, model=after_prompt, end="")
    return build_template(chat, head, verdicts)


def derive_conversation_template(tokenizer, verdicts: Sequence[str]) -> Template:
    """Derive a reward model's template, which repeats a turn of prompt and response.

    The chat template renders a conversation of two turns. Of what stands around the four texts, the
    parts of a turn can be told. Llama-3 renders (line breaks left out; headers shortened)

        <|begin_of_text|><|user|>FIRST-PROMPT<|eot_id|><|assistant|>FIRST-RESPONSE<|eot_id|>
        <|user|>SECOND-PROMPT<|eot_id|><|assistant|>SECOND-RESPONSE<|eot_id|>

    The comments below say what each part is in this example.
    """
    text = render(tokenizer, CONVERSATION, generates=False)
    (
        before_first_prompt,  # <|begin_of_text|><|user|>
        _,
        between_turns,  # <|eot_id|><|user|>
        before_last_response,  # <|eot_id|><|assistant|>
        after_last_response,  # <|eot_id|>
    ) = split_at_texts(text, TEXTS)

    # Both prompts have the user's header before them: <|user|>. Before it stands what begins the
    # conversation, <|begin_of_text|>, or what ends the turn before, <|eot_id|>.
    user_header = common_ending(before_first_prompt, between_turns)
    begin = before_first_prompt.removesuffix(user_header)
    turn_end = between_turns.removesuffix(user_header)

    # Of the two responses, the last one's header is taken for all. A model writes its next answer
    # after such a header; Qwen3 adds empty thoughts to it, and leaves them out of earlier turns.
    chat = Chat(begin, user=user_header, model=before_last_response, end=turn_end)
    template = build_template(chat, "reward", verdicts)

    # The last turn ends like the others. What follows then ends the conversation: here nothing.
    conversation_end = after_last_response.removeprefix(turn_end)
    return Template(template.start, template.turn, conversation_end)


def render(tokenizer, conversation: Sequence[dict], generates: bool) -> str:
    """Render a conversation as text, with the tokenizer's chat template."""
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
    """Return what stands before, between and after these texts: "<u>P<m>R</s>" at P and R gives <u>, <m> and </s>.

    Raises:
        UserError: One of the texts is not there, or more than once.
    """
    parts = []
    rest = rendered
    for text in texts:
        # The part before the text, the text itself (empty if it is not there), and all after it.
        part, separator, rest = rest.partition(text)
        if not separator or text in rest:
            raise UserError(
                "its chat template leaves out or repeats a text; write the recipe by hand, with start, turn and end spelled out"
            )
        parts.append(part)
    return [*parts, rest]


def common_ending(text: str, other_text: str) -> str:
    """Return the longest ending that two texts share, in whole control tokens and whole texts between them.

    Of "<bos><user>" and "<eot><user>" that is "<user>". Letter by letter it would be "><user>".
    """
    # The pattern is in parentheses, so that the tokens stay among the pieces.
    pieces = CONTROL_TOKEN.split(text)
    other_pieces = CONTROL_TOKEN.split(other_text)
    shared = ""
    for piece, other_piece in zip(reversed(pieces), reversed(other_pieces), strict=False):
        if piece != other_piece:
            break
        shared = piece + shared
    return shared
