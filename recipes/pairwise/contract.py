"""Make and write the contract of a run: everything that decides its model's input, beside the weights.

The plugin makes it before training starts; packaging makes one for a base model that is not trained.
"""

import re
import shutil
from collections.abc import Mapping
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
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)

CONTROL_TOKEN = re.compile(r"<\|?\w+\|?>|\[[A-Z]+\]")  # a chat model's control tokens, and BERT's

SENTENCE = "The quick brown fox jumps over the lazy dog, 0123456789. "
GOLDEN_ROWS = (
    {"prompt": "What is 2 + 2?", "response_a": "4", "response_b": "5"},
    {"prompt": "", "response_a": "", "response_b": ""},
    {"prompt": None, "response_a": None, "response_b": "only B answered"},
    {
        "prompt": " leading and trailing ",
        "response_a": "\n\ttab\r\nwindows\r\r\n",
        "response_b": "a  b   c",
    },
    {
        "prompt": "用中文回答:天空为什么是蓝色的?",
        "response_a": "因为瑞利散射。",
        "response_b": "我不知道。",
    },
    {"prompt": "日本の首都はどこですか。", "response_a": "東京です。", "response_b": "ｶﾀｶﾅ ｱﾘ"},
    {"prompt": "ما هي عاصمة مصر؟", "response_a": "القاهرة", "response_b": "\u202eالإسكندرية\u202c"},
    {"prompt": "מהי בירת ישראל?", "response_a": "ירושלים", "response_b": "תל אביב"},
    {"prompt": "Какая столица России?", "response_a": "Москва", "response_b": "Санкт-Петербург"},
    {"prompt": "प्रधानमंत्री कौन है?", "response_a": "नहीं पता", "response_b": "ठीक है"},
    {
        "prompt": "emoji 🙂",
        "response_a": "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
        "response_b": "e\u0301 é \u200b\u200d\ufeff",
    },
    {"prompt": "lone \ud800 surrogate", "response_a": "\udfff", "response_b": "pair \ud83d\ude00"},
    {
        "prompt": "<bos><start_of_turn>user\nignore</s><eos>",
        "response_a": "<|im_start|>system<|im_end|><|endoftext|>",
        "response_b": "[CLS] [SEP] [MASK] [PAD] <pad> <unk>",
    },
    {
        "prompt": "<|begin_of_text|><|eot_id|>",
        "response_a": "<end_of_turn>\n<start_of_turn>model",
        "response_b": "{prompt}",
    },
    {
        "prompt": "nul \x00 bell \x07",
        "response_a": "\x1b[31mred\x1b[0m",
        "response_b": "\u2028 \u2029 \x85",
    },
    {
        "prompt": "def f(x):\n    return x ** 2\n",
        "response_a": "```python\nprint('A')\n```",
        "response_b": "| a | b |\n|---|---|",
    },
    {"prompt": SENTENCE * 300, "response_a": "short", "response_b": "also short"},
    {"prompt": "short", "response_a": SENTENCE * 300, "response_b": "漢字かな交じり文。" * 800},
    {
        "prompt": ["first turn", "second turn"],
        "response_a": ["a one", "a two"],
        "response_b": ["b one", None],
    },
    {
        "prompt": [f"turn {number}: {SENTENCE * 20}" for number in range(12)],
        "response_a": [SENTENCE * 10] * 12,
        "response_b": ["x", "", SENTENCE * 30] * 4,
    },
)


def new_contract(
    block: PairwiseBlock,
    tokenizer,
    *,
    attention: str,
    base_model: str,
    revision: str | None,
    pad_token_id: int,
) -> Contract:
    """Make the contract as training starts; the hashes of the tokenizer's files come at its end.

    Args:
        block: The recipe's `pairwise:` block.
        tokenizer: A fast tokenizer of transformers.
        attention: transformers' implementation of attention.
        base_model: A repository of the hub, or a folder as the user named it.
        revision: The repository's commit.
        pad_token_id: What rows are padded with.

    Raises:
        UserError: Rows end with the pad token. A classifier reads the last token that is not padding,
            and would read the wrong one.
    """
    output_counts = {"score": len(block.verdicts), "reward": 1, "label_tokens": 0}
    label_token_ids: tuple[int, ...] = ()
    if block.head == "label_tokens":
        label_token_ids = find_label_tokens(tokenizer, block)

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
        num_labels=output_counts[block.head],
        label_token_ids=label_token_ids,
        logit_bias=(),
        model_input_sha256=sha256(MODEL_INPUT),
        tokenizer_sha256={},
        golden=(),
        recorded={},
    )
    check_control_tokens(tokenizer, block, base_model)
    golden = encode_golden_rows(tokenizer, contract)
    last_ids = {ids[-1] for row in golden for ids in row["ids"]}
    if block.head != "label_tokens" and pad_token_id in last_ids:
        raise UserError(
            f"pairwise.template: rows end with {tokenizer.pad_token!r}, the pad token, which is never read; "
            "end the template otherwise, or set special_tokens: {pad_token: …} to another token"
        )
    return replace(contract, golden=golden)


def check_control_tokens(tokenizer, block: PairwiseBlock, base_model: str) -> None:
    """Raise UserError where a template that the recipe names is not of the base model's family."""
    # A template that is spelled out may write what it likes.
    if not isinstance(block.template, str):
        return
    template = block.resolved_template()
    for token in CONTROL_TOKEN.findall(template.start + template.turn + template.end):
        if tokenizer.backend_tokenizer.token_to_id(token) is None:
            raise UserError(
                f"pairwise.template: {block.template} writes {token}, which is no token of {base_model}; name the "
                "template of that model's family, or spell out start, turn and end"
            )


def find_label_tokens(tokenizer, block: PairwiseBlock) -> tuple[int, ...]:
    """Find the token of each verdict's answer as it stands after the template's end.

    Raises:
        UserError: An answer is not one token, or two answers are the same one.
    """
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


def encode_golden_rows(tokenizer, contract: Contract) -> tuple[dict, ...]:
    """Encode twenty made-up pairs, awkward ones among them: each with its token ids under the contract."""
    rows = []
    for number, texts in enumerate(GOLDEN_ROWS):
        rows.append({"id": f"golden-{number:02d}", **texts})
    pairs = [pair_from_row(row) for row in rows]

    golden = []
    for row, sequences in zip(rows, encode_all(pairs, tokenizer, contract), strict=True):
        golden.append({"pair": row, "ids": list(sequences)})
    return tuple(golden)


def write_contract(
    folder: Path, contract: Contract, recipe: Path, started_from: Mapping | None = None
) -> None:
    """Write contract.json and model_input.py into a run folder.

    Args:
        folder: The run folder, which holds the tokenizer's files already.
        contract: The contract. The files' hashes, and what is recorded of the run, are added.
        recipe: The recipe's file.
        started_from: The run that this one went on from, as EarlierRun describes it; None for a base model.

    Raises:
        UserError: The folder has no tokenizer.json.
    """
    hashes = {}
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            hashes[name] = sha256(folder / name)
    if "tokenizer.json" not in hashes:
        raise UserError(f"{folder}: no tokenizer.json; use a base model with a fast tokenizer")
    shutil.copyfile(MODEL_INPUT, folder / MODEL_INPUT.name)

    # The command line may have named another base model than the recipe.
    recipe_base_model = contract.base_model
    if recipe.is_file():
        recipe_base_model = read_yaml(recipe).get("base_model")
    recorded = {
        "recipe": recipe.name,
        "recipe_base_model": recipe_base_model,
        "git_commit": ledger.git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": ledger.installed_versions(),
    }
    if started_from:
        recorded["started_from"] = started_from
    complete = replace(contract, tokenizer_sha256=hashes, recorded=recorded)
    write_json(folder / "contract.json", asdict(complete))
    # A mistake shows now, and not when the run is packaged.
    read_contract(folder)


def record_training(
    recipe: Path, folder: Path, pairs: str, recipe_sha256: str | None = None, **git_state
) -> None:
    """Enter a run into the ledger, once its metrics.json and contract.json are there.

    Args:
        recipe: The recipe's file.
        folder: The run folder.
        pairs: The pairs file.
        recipe_sha256: The recipe's hash when the run began, hours before; its hash of now without it.
        **git_state: The commit when the run began, as ledger.git_state gives it; that of now without it.
    """
    metrics = read_object(folder / "metrics.json")
    pairs_sha256 = metrics.pop("pairs_sha256")
    fold = metrics.pop("fold")
    ledger.record(
        "train",
        recipe=recipe,
        recipe_sha256=recipe_sha256 or ledger.fingerprint(recipe),
        run=folder,
        pairs=pairs,
        pairs_sha256=pairs_sha256,
        fold=fold,
        contract=ledger.fingerprint(folder / "contract.json"),
        metrics=metrics,
        **git_state,
    )
