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
GOLDEN_TEXTS = (  # prompt, response A and response B of each golden row
    ("What is 2 + 2?", "4", "5"),
    ("", "", ""),
    (None, None, "only B answered"),
    (" leading and trailing ", "\n\ttab\r\nwindows\r\r\n", "a  b   c"),
    ("用中文回答:天空为什么是蓝色的?", "因为瑞利散射。", "我不知道。"),
    ("日本の首都はどこですか。", "東京です。", "ｶﾀｶﾅ ｱﾘ"),
    ("ما هي عاصمة مصر؟", "القاهرة", "\u202eالإسكندرية\u202c"),
    ("מהי בירת ישראל?", "ירושלים", "תל אביב"),
    ("Какая столица России?", "Москва", "Санкт-Петербург"),
    ("प्रधानमंत्री कौन है?", "नहीं पता", "ठीक है"),
    ("emoji 🙂", "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301 é \u200b\u200d\ufeff"),
    ("lone \ud800 surrogate", "\udfff", "pair \ud83d\ude00"),
    (
        "<bos><start_of_turn>user\nignore</s><eos>",
        "<|im_start|>system<|im_end|><|endoftext|>",
        "[CLS] [SEP] [MASK] [PAD] <pad> <unk>",
    ),
    ("<|begin_of_text|><|eot_id|>", "<end_of_turn>\n<start_of_turn>model", "{prompt}"),
    ("nul \x00 bell \x07", "\x1b[31mred\x1b[0m", "\u2028 \u2029 \x85"),
    ("def f(x):\n    return x ** 2\n", "```python\nprint('A')\n```", "| a | b |\n|---|---|"),
    (SENTENCE * 300, "short", "also short"),
    ("short", SENTENCE * 300, "漢字かな交じり文。" * 800),
    (["first turn", "second turn"], ["a one", "a two"], ["b one", None]),
    (
        [f"turn {number}: {SENTENCE * 20}" for number in range(12)],
        [SENTENCE * 10] * 12,
        ["x", "", SENTENCE * 30] * 4,
    ),
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
    """Check that the base model knows the control tokens of the template that a recipe names.

    Each family of chat models has its own, such as Gemma's <start_of_turn>. Other models read them as text.

    Raises:
        UserError: One is no token of the base model.
    """
    # The author of a template that is spelled out may mean such a text.
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
    """Find the ids of the tokens by which the head label_tokens answers: one for each verdict, such as A and B.

    Each is looked up right after the template's end: a text may be another token there than alone.

    Raises:
        UserError: An answer is not one token, or two answers are the same token.
    """
    backend = tokenizer.backend_tokenizer
    end = block.resolved_template().end
    end_ids = backend.encode(end, add_special_tokens=False).ids

    answer_ids = []
    for verdict in block.verdicts:
        *ids_before, answer_id = backend.encode(end + LABELS[verdict], add_special_tokens=False).ids
        if ids_before != end_ids or answer_id in answer_ids:
            raise UserError(
                f"pairwise.template: after {end[-20:]!r} the tokenizer has no single token for the answer {LABELS[verdict]!r} "
                "alone; end the template with a line break or a control token, or use head: score"
            )
        answer_ids.append(answer_id)
    return tuple(answer_ids)


def encode_golden_rows(tokenizer, contract: Contract) -> tuple[dict, ...]:
    """Encode the twenty golden rows: awkward pairs, whose token ids must come out the same at every later stage.

    Returns:
        For each row the pair as a row of pairs.parquet, and its sequences of token ids.
    """
    rows = []
    for number, (prompt, response_a, response_b) in enumerate(GOLDEN_TEXTS):
        texts = {"prompt": prompt, "response_a": response_a, "response_b": response_b}
        rows.append({"id": f"golden-{number:02d}", **texts})
    pairs = [pair_from_row(row) for row in rows]

    golden = []
    for row, sequences in zip(rows, encode_all(pairs, tokenizer, contract), strict=True):
        golden.append({"pair": row, "ids": list(sequences)})
    return tuple(golden)


def write_contract(
    folder: Path, contract: Contract, recipe: Path, started_from: Mapping | None = None
) -> None:
    """Write contract.json and model_input.py into a run folder, which holds the tokenizer's files already.

    Args:
        folder: The run folder.
        contract: The contract. The files' hashes, and what is recorded of the run, are added.
        recipe: The recipe's file.
        started_from: The run that this one went on from, as EarlierRun describes it.

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
    """Add a line on a finished run to outputs/ledger.jsonl, where all that is made is recorded.

    Args:
        recipe: The recipe's file.
        folder: The run folder, with metrics.json and contract.json.
        pairs: The pairs file.
        recipe_sha256: The recipe's hash as the run began, which may be hours ago; by default as it is now.
        git_state: As ledger.git_state gave it then; by default as it is now.
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
