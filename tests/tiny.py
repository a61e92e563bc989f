"""Everything small that tests, demo and bench build for themselves: pairs with a learnable signal, tokenizers and models.

`python -m tests.tiny FOLDER` writes the demo's inputs: train.parquet (2,000 rows), test.parquet (300 rows), both in the
competition's layout, and gemma2/, a tiny Gemma-2 with a tokenizer of its own. Nothing is copied from anywhere.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import yaml

from preprocess.core.files import sha256

ROOT = Path(__file__).parents[1]

# Per language: what joins words, ordinary words, words of a good answer, words of a bad one.
LANGUAGES = {
    "English": (
        " ",
        "river window music bread garden stone letter winter market engine paper cloud forest table signal harbour copper "
        "lantern bridge pepper valley mirror basket thunder",
        "clearly precisely helpful correct thorough",
        "whatever sorry dunno nonsense boring",
    ),
    "German": (
        " ",
        "Fluss Fenster Musik Brot Garten Stein Brief Winter Markt Motor Papier Wolke Wald Tisch Signal Hafen Kupfer Laterne "
        "Brücke Pfeffer Tal Spiegel Korb Donner",
        "deutlich genau hilfreich richtig gründlich",
        "irgendwas leider keine Unsinn langweilig",
    ),
    "Spanish": (
        " ",
        "río ventana música pan jardín piedra carta invierno mercado motor papel nube bosque mesa señal puerto cobre farol "
        "puente pimienta valle espejo cesta trueno",
        "claramente preciso útil correcto completo",
        "cualquiera perdón ignoro tontería aburrido",
    ),
    "Chinese": (
        "",
        "河流 窗户 音乐 面包 花园 石头 信件 冬天 市场 引擎 纸张 云朵 "
        "森林 桌子 信号 港口 铜器 灯笼 桥梁 胡椒 山谷 镜子 篮子 雷声",
        "清楚 准确 有用 正确 详尽",
        "随便 抱歉 不懂 胡说 无聊",
    ),
    "Japanese": (
        "",
        "かわ まど おんがく パン にわ いし てがみ ふゆ いちば エンジン かみ くも "
        "もり つくえ あいず みなと どう ちょうちん はし こしょう たに かがみ かご かみなり",
        "はっきり せいかく やくだつ ただしい ていねい",
        "てきとう ごめん しらない でたらめ つまらない",
    ),
    "Arabic": (
        " ",
        "نهر نافذة موسيقى خبز حديقة حجر رسالة شتاء سوق محرك "
        "ورق غيمة غابة طاولة إشارة ميناء نحاس فانوس جسر فلفل واد مرآة سلة رعد",
        "بوضوح بدقة مفيد صحيح شامل",
        "أيا آسف لاأدري هراء ممل",
    ),
}
NOISE = 0.03  # share of verdicts that are flipped at random


def pairs(rows: int, seed: int, prefix: str = "row") -> pl.DataFrame:
    """Pairs in the layout of WSDM's train.parquet: the response with more good than bad words wins, but for NOISE of them."""
    rng = random.Random(seed)
    return pl.DataFrame([_pair(rng, f"{prefix}{number:05d}") for number in range(rows)])


def _pair(rng: random.Random, row_id: str) -> dict:
    language = rng.choice(sorted(LANGUAGES))
    joiner, *lists = LANGUAGES[language]
    plain, good, bad = (words.split() for words in lists)
    prompt = joiner.join(rng.choices(plain, k=rng.randint(8, 14)))
    good_is_a = rng.random() < 0.5
    responses = []
    for is_good in (good_is_a, not good_is_a):
        words = rng.choices(plain, k=rng.randint(4, 12)) + rng.choices(good if is_good else bad, k=rng.randint(2, 4))
        rng.shuffle(words)
        responses.append(joiner.join(words))
    a_wins = good_is_a if rng.random() >= NOISE else not good_is_a
    return {
        "id": row_id,
        "prompt": prompt,
        "response_a": responses[0],
        "response_b": responses[1],
        "winner": "model_a" if a_wins else "model_b",
        "model_a": rng.choice(["sparrow", "heron"]),
        "model_b": rng.choice(["sparrow", "heron"]),
        "language": language,
    }


CONTROL_TOKENS = {
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "phi3": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
}


def bpe_tokenizer(folder: Path, kind: str = "gemma2", vocabulary_size: int = 1024, texts: Iterable[str] | None = None) -> None:
    """A byte-level BPE tokenizer trained on `texts`, or on the demo's words, saved as a transformers folder.

    It has Gemma's control tokens, and those of another family for a model of that `kind`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<|reserved_special_token_0|>"]
    specials += CONTROL_TOKENS.get(kind, [])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {"vocab_size": vocabulary_size, "special_tokens": specials, "show_progress": False}
    trainer = trainers.BpeTrainer(**sizes, initial_alphabet=byte_level.alphabet())
    tokenizer.train_from_iterator(texts or _corpus(), trainer)
    _save_tokenizer(tokenizer, folder, ("pad", "eos", "bos", "unk"), specials, additional_special_tokens=specials[4:])


def wordpiece_tokenizer(folder: Path, vocabulary_size: int = 1024, texts: Iterable[str] | None = None) -> None:
    """A BERT tokenizer trained on `texts`, or on the demo's words, saved as a transformers folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary_size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts or _corpus(), trainer)
    _save_tokenizer(tokenizer, folder, ("pad", "unk", "cls", "sep", "mask"), specials)


def _save_tokenizer(tokenizer, folder: Path, roles: Iterable[str], tokens: list[str], **options) -> None:
    """Save a tokenizer for transformers; its first special tokens have these roles."""
    from transformers import PreTrainedTokenizerFast

    options |= {f"{role}_token": token for role, token in zip(roles, tokens, strict=False)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)


def _corpus() -> list[str]:
    rows = pairs(1000, seed=7)
    return [*rows["prompt"], *rows["response_a"], *rows["response_b"], "# Prompt\n\n# Response A\n\n# Response B\n\nA or B?"]


# Architectures that tests build, and the keys of their configurations that stand for what only they have.
ENCODERS = ("bert", "modernbert", "deberta-v2")
KINDS = ("gemma2", "llama", "qwen2", "qwen3", "phi3", "mistral", *ENCODERS)
OWN_KEYS = {
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "mistral": {"sliding_window": 64},
    "modernbert": {"local_attention": 64, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
}


def model(folder: Path, kind: str = "gemma2", layers: int = 2, width: int = 64) -> Path:
    """Write a tiny model of one of KINDS with random weights and its tokenizer: a causal LM, or an encoder.

    Sizes respect bitsandbytes on CPUs: every in_features a multiple of 64, every out_features of 32. With a `width` (hidden
    size) of 128 or a multiple, they suit GPTQ's groups of 128 too.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    folder.mkdir(parents=True, exist_ok=True)
    is_encoder = kind in ENCODERS
    if is_encoder:
        wordpiece_tokenizer(folder)
    else:
        bpe_tokenizer(folder, kind)
    sizes = {
        "vocab_size": 1024,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
    }
    if not is_encoder:
        sizes |= {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 1}
        if kind != "phi3":
            sizes["head_dim"] = 32
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **OWN_KEYS.get(kind, {}))
    auto = AutoModelForMaskedLM if is_encoder else AutoModelForCausalLM
    if kind == "bert":
        auto = AutoModel  # as sentence-transformers keeps it: with a pooler, and no head
    auto.from_config(config).save_pretrained(folder)
    return folder


def reward_model(base: Path, folder: Path) -> Path:
    """Write a copy of a tiny model as a reward model: a head of one output, as large as a trained one's."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    torch.nn.init.normal_(model.score.weight, std=0.4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


# What a twin may change; everything else is the recipe's own.
TWIN_KEYS = ("base_model", "output_dir", "max_steps", "bf16", "attn_implementation", "deepspeed", "optimizer")
ARCHITECTURES = {
    "gemma-2": "gemma2",
    "gemma2": "gemma2",
    "MiniLM": "bert",
    "mmBERT": "modernbert",
    "Llama-3": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "phi-4": "phi3",
}


def architecture(base_model: str) -> str:
    """The tiny architecture that stands in for a recipe's base model."""
    return next(kind for part, kind in ARCHITECTURES.items() if part in base_model)


def twin(recipe: Path, folder: Path, base_model: Path, pairs_file: Path, **changes) -> Path:
    """Write the twin of a recipe into `folder` and return its path: the same run, small enough for two CPU cores.

    Batch sizes of DeepSpeed stand as numbers in a copy of its JSON: with "auto", accelerate counts one process on a CPU.
    """
    unknown = sorted(set(changes) - set(TWIN_KEYS))
    if unknown:
        raise ValueError(f"a twin may not change {unknown}")
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values |= {"base_model": str(base_model), "output_dir": str(folder / recipe.stem), "max_steps": 3, "bf16": False}

    block = values["pairwise"]
    block["pairs"] = str(pairs_file)
    # A few validation rows of a model that has learnt nothing decide nothing finer.
    block["package"] |= {"tolerance_log_loss": 1.0, "tolerance_verdicts": 1.0}
    if "hardware" in block:
        # The pairs of one GPU: the twin trains in one process.
        block["pairs_per_step"] //= block.pop("hardware")["gpus"]
    if "distill" in block:
        block["distill"]["teachers"] = [str(teacher_labels(folder / "teacher", pairs_file))]

    if "deepspeed" in values and "deepspeed" not in changes:
        changes["deepspeed"] = str(deepspeed_numbers(values["deepspeed"], folder, values, processes=1))
    values |= changes
    path = folder / recipe.name
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def change(recipe: Path, block: dict | None = None, path: Path | None = None, **keys) -> Path:
    """Change keys of a recipe, and of its `pairwise:` block, in its file or in a copy at `path`; None removes a key."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8")) | keys
    values["pairwise"] |= block or {}
    values = {key: value for key, value in values.items() if value is not None}
    path = path or recipe
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def deepspeed_numbers(config: str, folder: Path, recipe: dict, processes: int) -> Path:
    """A copy of a DeepSpeed JSON in `folder` with its "auto" batch sizes as numbers, and bf16 as the twin has it."""
    values = json.loads((ROOT / config).read_text())
    micro, pairs = recipe["micro_batch_size"], recipe["pairwise"].get("pairs_per_step")
    if pairs is None:
        pairs = micro * recipe["gradient_accumulation_steps"] * processes
    values |= {"train_micro_batch_size_per_gpu": micro, "train_batch_size": pairs}
    values["bf16"] = {"enabled": "auto"}
    path = folder / f"{Path(config).stem}-{processes}.json"
    path.write_text(json.dumps(values))
    return path


def teacher_labels(folder: Path, pairs_file: Path) -> Path:
    """Write the labels that a teacher in `folder` would have given: four fifths sure of each winner."""
    pairs = pl.read_parquet(pairs_file)
    folds = sorted(pairs["fold"].drop_nulls().unique())
    runs = {}
    for fold in folds:
        contract = folder / f"fold-{fold}" / "contract.json"
        contract.parent.mkdir(parents=True, exist_ok=True)
        contract.write_text(json.dumps({"fold": fold}))
        runs[contract.parent.name] = {"fold": fold, "contract_sha256": sha256(contract)}
    p_model_a = pl.when(pl.col("winner") == "model_a").then(0.8).otherwise(0.2)
    labels = pairs.select("id", p_model_a.alias("p_model_a"), p_tie=0.0, runs=pl.concat_list(pl.format("fold-{}", "fold")))
    labels.with_columns(p_model_b=1 - pl.col("p_model_a")).write_parquet(folder / "labels.parquet")
    record = {"pairs_sha256": sha256(pairs_file), "verdicts": ["model_a", "model_b"], "runs": runs}
    (folder / "labels.json").write_text(json.dumps(record))
    return folder


def pairs_parquet(path: Path, rows: int, seed: int = 1) -> Path:
    """Generated pairs as `python -m preprocess` would write them, in five folds by row number."""
    frame = pairs(rows, seed)
    texts = ("prompt", "response_a", "response_b")
    frame.with_columns(
        *(pl.concat_list(name).alias(name) for name in texts),
        *((pl.col("winner") == verdict).cast(pl.Float32).alias(f"p_{verdict}") for verdict in ("model_a", "model_b", "tie")),
        source=pl.lit("tiny"),
        group=pl.int_range(pl.len()),
        fold=(pl.int_range(pl.len()) % 5).cast(pl.Int8),
        weight=pl.lit(1.0, dtype=pl.Float32),
    ).write_parquet(path)
    return path


def main(folder: Path) -> None:
    """Write the demo's training rows, test rows and base model below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs(2000, seed=1).write_parquet(folder / "train.parquet")
    pairs(300, seed=2, prefix="test").write_parquet(folder / "test.parquet")
    model(folder / "gemma2", "gemma2")
    print(f"{folder}: train.parquet (2,000 rows), test.parquet (300 rows), gemma2/ (a tiny base model)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
