"""The contract of a run: what its model was trained with, written once beside the weights with the code that made its ids."""

import re
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import preprocess.model_input as model_input
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, read_yaml, sha256, write_json
from preprocess.model_input import Contract, encode_all, pair_from_row, read_contract
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.config.templates import LABELS

MODEL_INPUT = Path(model_input.__file__)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")

CONTROL = re.compile(r"<\|?\w+\|?>|\[[A-Z]+\]")  # a chat model's control tokens, and BERT's

LONG = "The quick brown fox jumps over the lazy dog, 0123456789. "
GOLDEN_ROWS = (
    {"prompt": "What is 2 + 2?", "response_a": "4", "response_b": "5"},
    {"prompt": "", "response_a": "", "response_b": ""},
    {"prompt": None, "response_a": None, "response_b": "only B answered"},
    {"prompt": " leading and trailing ", "response_a": "\n\ttab\r\nwindows\r\r\n", "response_b": "a  b   c"},
    {"prompt": "用中文回答:天空为什么是蓝色的?", "response_a": "因为瑞利散射。", "response_b": "我不知道。"},
    {"prompt": "日本の首都はどこですか。", "response_a": "東京です。", "response_b": "ｶﾀｶﾅ ｱﾘ"},
    {"prompt": "ما هي عاصمة مصر؟", "response_a": "القاهرة", "response_b": "\u202eالإسكندرية\u202c"},
    {"prompt": "מהי בירת ישראל?", "response_a": "ירושלים", "response_b": "תל אביב"},
    {"prompt": "Какая столица России?", "response_a": "Москва", "response_b": "Санкт-Петербург"},
    {"prompt": "प्रधानमंत्री कौन है?", "response_a": "नहीं पता", "response_b": "ठीक है"},
    {"prompt": "emoji 🙂", "response_a": "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "response_b": "e\u0301 é \u200b\u200d\ufeff"},
    {"prompt": "lone \ud800 surrogate", "response_a": "\udfff", "response_b": "pair \ud83d\ude00"},
    {
        "prompt": "<bos><start_of_turn>user\nignore</s><eos>",
        "response_a": "<|im_start|>system<|im_end|><|endoftext|>",
        "response_b": "[CLS] [SEP] [MASK] [PAD] <pad> <unk>",
    },
    {"prompt": "<|begin_of_text|><|eot_id|>", "response_a": "<end_of_turn>\n<start_of_turn>model", "response_b": "{prompt}"},
    {"prompt": "nul \x00 bell \x07", "response_a": "\x1b[31mred\x1b[0m", "response_b": "\u2028 \u2029 \x85"},
    {
        "prompt": "def f(x):\n    return x ** 2\n",
        "response_a": "```python\nprint('A')\n```",
        "response_b": "| a | b |\n|---|---|",
    },
    {"prompt": LONG * 300, "response_a": "short", "response_b": "also short"},
    {"prompt": "short", "response_a": LONG * 300, "response_b": "漢字かな交じり文。" * 800},
    {"prompt": ["first turn", "second turn"], "response_a": ["a one", "a two"], "response_b": ["b one", None]},
    {
        "prompt": [f"turn {number}: {LONG * 20}" for number in range(12)],
        "response_a": [LONG * 10] * 12,
        "response_b": ["x", "", LONG * 30] * 4,
    },
)


def new_contract(
    block: PairwiseBlock, tokenizer, *, attention: str, base_model: str, revision: str | None, pad_token_id: int
) -> Contract:
    """The contract as training starts: all that decides the ids, golden rows included, without the tokenizer's hashes.

    A base model in a folder is named as the user named it; hub models by repository and revision. Raises UserError where
    rows end with the pad token: a classifier reads the last token that is not padding, and would read the wrong one.
    """
    outputs = {"score": len(block.verdicts), "reward": 1, "label_tokens": 0}
    contract = Contract(
        head=block.head,
        verdicts=block.verdicts,
        template=block.resolved_template(),
        budget_tokens=block.budget_tokens,
        truncation=block.truncation,
        pad_token_id=pad_token_id,
        attention=attention,
        softcap=block.softcap,
        base_model=base_model,
        revision=revision,
        num_labels=outputs[block.head],
        label_token_ids=label_tokens(tokenizer, block) if block.head == "label_tokens" else (),
        logit_bias=(),
        model_input_sha256=sha256(MODEL_INPUT),
        tokenizer_sha256={},
        golden=(),
        recorded={},
    )
    check_control_tokens(tokenizer, block, base_model)
    golden = golden_rows(tokenizer, contract)
    ends = {ids[-1] for row in golden for ids in row["ids"]}
    if block.head != "label_tokens" and pad_token_id in ends:
        raise UserError(
            f"pairwise.template: rows end with {tokenizer.pad_token!r}, the pad token, which is never read; "
            "end the template otherwise, or set special_tokens: {pad_token: …} to another token"
        )
    return replace(contract, golden=golden)


def check_control_tokens(tokenizer, block: PairwiseBlock, base_model: str) -> None:
    """Raise UserError where a template that the recipe names is not of the base model's family."""
    template = block.resolved_template()
    controls = CONTROL.findall(template.start + template.turn + template.end)
    absent = [text for text in controls if tokenizer.backend_tokenizer.token_to_id(text) is None]
    if absent and isinstance(block.template, str):
        raise UserError(
            f"pairwise.template: {block.template} writes {absent[0]}, which is no token of {base_model}; name the template of "
            "that model's family, or spell out start, turn and end"
        )


def label_tokens(tokenizer, block: PairwiseBlock) -> tuple[int, ...]:
    """The token of each verdict's answer as it stands after the template's end; a UserError where that is not one token."""
    backend = tokenizer.backend_tokenizer
    end = block.resolved_template().end
    end_ids = backend.encode(end, add_special_tokens=False).ids

    answer_ids = []
    for verdict in block.verdicts:
        *ids_before, answer_id = backend.encode(end + LABELS[verdict], add_special_tokens=False).ids
        if ids_before != end_ids or answer_id in answer_ids:
            raise UserError(
                f"pairwise.template: the answer {LABELS[verdict]!r} is not one token of its own after {end[-20:]!r}; end the "
                "template with a line break or a control token, or use head: score"
            )
        answer_ids.append(answer_id)
    return tuple(answer_ids)


def golden_rows(tokenizer, contract: Contract) -> tuple[dict, ...]:
    """Twenty synthetic pairs, awkward ones among them, with the token ids that they have under the contract."""
    rows = [{"id": f"golden-{number:02d}", **row} for number, row in enumerate(GOLDEN_ROWS)]
    ids = encode_all([pair_from_row(row) for row in rows], tokenizer, contract)
    return tuple({"pair": row, "ids": list(sequences)} for row, sequences in zip(rows, ids, strict=True))


def write_contract(folder: Path, contract: Contract, recipe: Path) -> None:
    """Complete `contract` with the hashes of the tokenizer's files in `folder`, and write it there with model_input.py."""
    hashes = {name: sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}
    if "tokenizer.json" not in hashes:
        raise UserError(f"{folder}: no tokenizer.json; use a base model with a fast tokenizer")
    shutil.copyfile(MODEL_INPUT, folder / MODEL_INPUT.name)
    recorded = {
        "recipe": recipe.name,
        "recipe_base_model": read_yaml(recipe).get("base_model") if recipe.is_file() else contract.base_model,
        "git_commit": ledger.git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": ledger.installed_versions(),
    }
    complete = replace(contract, tokenizer_sha256=hashes, recorded=recorded)
    write_json(folder / "contract.json", asdict(complete))
    read_contract(folder)


def record_training(recipe: Path, folder: Path, pairs: str, **begun_from) -> None:
    """Enter a run into the ledger, once its metrics.json and contract.json are there.

    `begun_from` are the recipe's hash and the commit when it began: hours later both may be others.
    """
    metrics = read_object(folder / "metrics.json")
    ledger.record(
        "train",
        recipe=recipe,
        recipe_sha256=begun_from.pop("recipe_sha256", None) or ledger.fingerprint(recipe),
        run=folder,
        pairs=pairs,
        pairs_sha256=metrics.pop("pairs_sha256"),
        fold=metrics.pop("fold"),
        contract=ledger.fingerprint(folder / "contract.json"),
        metrics=metrics,
        **begun_from,
    )
