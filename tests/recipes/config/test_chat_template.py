"""A recipe's template is the text that the base model's own chat template writes."""

import pytest
from transformers import AutoTokenizer

from preprocess.core.errors import UserError
from recipes.pairwise.config.chat_template import derive_template, find_template_name
from recipes.pairwise.config.templates import QUESTION, SECTIONS

VERDICTS = ("model_a", "model_b")


def chat_template(begin: str, message: str, generation: str) -> str:
    """A chat template: what it begins with, each message, and what asks the model to write the next one."""
    loop = "{% for m in messages %}" + message + "{% endfor %}"
    return begin + loop + "{% if add_generation_prompt %}" + generation + "{% endif %}"


LLAMA3_MESSAGE = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
LLAMA3_GENERATION = "<|start_header_id|>assistant<|end_header_id|>\n\n"
CHAT_TEMPLATES = {
    "gemma": chat_template(
        "{{ bos_token }}",
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "llama3": chat_template("<|begin_of_text|>", LLAMA3_MESSAGE, LLAMA3_GENERATION),
    "chatml": chat_template("", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
    "phi4": chat_template("", "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "qwen3": chat_template(
        "",
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "system": chat_template(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday<|eot_id|>", LLAMA3_MESSAGE, LLAMA3_GENERATION
    ),
    "mistral": chat_template(
        "<s>", "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}", ""
    ),
}


def tokenizer_with(tiny_models, chat_template: str | None, kind: str = "gemma2"):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models(kind))
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_one_turn_reads_as_the_models_own(name, tiny_models):
    tokenizer = tokenizer_with(tiny_models, CHAT_TEMPLATES[name])
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]

    reward = derive_template(tokenizer, "reward", VERDICTS)
    text = reward.start + reward.turn.format(prompt="What?", response="That.") + reward.end
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)

    score = derive_template(tokenizer, "score", VERDICTS)
    question = [{"role": "user", "content": SECTIONS + QUESTION}]
    own_text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert score.start + score.turn + score.end == own_text


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("head", ["score", "label_tokens"])
def test_a_template_of_ours_is_named(name, head, tiny_models):
    template = derive_template(tokenizer_with(tiny_models, CHAT_TEMPLATES[name]), head, VERDICTS)
    # Qwen3's differs in the last answer alone, which only a reward model reads.
    expected = {"qwen3": "chatml", "system": None, "mistral": None}.get(name, name)
    assert find_template_name(template, head, VERDICTS) == expected


@pytest.mark.parametrize(
    ("kind", "head", "expected"),
    [
        ("bert", "score", ("[CLS]", "{prompt}[SEP]{response_a}[SEP]{response_b}[SEP]", "")),
        ("bert", "reward", ("[CLS]", "{prompt}[SEP]{response}[SEP]", "")),
        ("gemma2", "reward", ("<bos>", "{prompt}\n\n{response}\n", "")),
    ],
)
def test_without_a_chat_template_the_special_tokens_part_the_texts(kind, head, expected, tiny_models):
    template = derive_template(tokenizer_with(tiny_models, None, kind), head, VERDICTS)
    assert (template.start, template.turn, template.end) == expected


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ raise_exception('no assistant here') }}", r"cannot be rendered \(no assistant here\)"),
        ("{{ messages[0].content }}", "leaves out or repeats a text"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(chat_template, message, tiny_models):
    with pytest.raises(UserError, match=message):
        derive_template(tokenizer_with(tiny_models, chat_template), "reward", VERDICTS)
