"""The part of the training bench that needs a GPU: 9B and 14B shapes with random weights, LoRA and QLoRA.

Accuracy needs trained weights; pairs a second, memory and the share of the matrix rate do not. Each
switch is turned on alone, so that its line beside the first one says what it brings.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

import click
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from preprocess.core.errors import exits_with_2
from preprocess.core.files import read_yaml, write_json
from recipes.pairwise.config.recipe_files import find_recipe
from recipes.pairwise.memory.base_model import GIB, read_records
from tests import tiny
from tests.bench.processes import in_process
from tests.bench.train import work
from tests.bench.train.contenders import SLOW_IMPORTS, train_with_ours

RESULTS = Path("outputs/bench/train_shapes.json")
HELD_OUT = 8  # pairs; random weights have nothing to show on them
MATRIX = 8192  # rows and columns of the products whose rate is the measure
VOCABULARY = 16_384  # of a tokenizer that is trained on the rows: the models' own are not here

# The recipe of each shape, and the family whose control tokens its template has.
FAMILIES = {"gemma2_reward": "gemma2", "qwen2_5_14b_cls": "qwen2"}

# One GPU, a reward head, everything off that a switch may turn on.
PLAIN = {
    "deepspeed": None,
    "group_by_length": None,
    "gradient_checkpointing": False,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": None,
    "pairwise": {"head": "reward", "orders": None, "hardware": None, "pairs_per_step": 8},
}
ADAPTERS = {
    "LoRA": {"adapter": "lora"},
    "QLoRA": {
        "adapter": "qlora",
        "load_in_4bit": True,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["score"]},
    },
}
LIGER = "axolotl.integrations.liger.LigerPlugin"
SWITCHES = {
    "all off": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "grouped by length": {"group_by_length": True},
    "token budget": {"pairwise": {"tokens_per_micro_batch": 2**17}},
    "padding-free": {"pairwise": {"padding_free": True}},
    "flash-attention": {"attn_implementation": "flash_attention_2"},
    "Liger's kernels": {
        "plugins": ["recipes.pairwise.plugin.PairwisePlugin", LIGER],
        "liger_rope": True,
        "liger_rms_norm": True,
        "liger_glu_activation": True,
    },
}


def write_inputs(folder: Path, recipe: str, pairs: Path, trained: int) -> None:
    """Write the rows, and base/: random bf16 weights of a recipe's base model, and a tokenizer of the rows' texts."""
    values = read_yaml(find_recipe(recipe))
    sizes = read_records()[values["base_model"]]["config"]
    config = AutoConfig.for_model(**sizes, num_labels=1, pad_token_id=0, dtype=torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="4GB")

    # With the small vocabulary of the tests' tokenizer all rows would be as long as they may be.
    rows = work.draw_rows(pairs, trained, HELD_OUT)
    texts = []
    for column in ("prompt", "response_a", "response_b"):
        texts += rows[column].list.join("\n").to_list()
    tiny.bpe_tokenizer(folder / "base", FAMILIES[recipe], VOCABULARY, texts)
    work.write_rows(folder, rows, values["pairwise"] | {"head": "reward"})


def measure_matrix_rate() -> float:
    """Return operations a second of large bf16 products, the fastest of several."""
    left = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda")
    fastest = float("inf")
    for _ in range(10):
        started = work.read_clock()
        left @ left
        fastest = min(fastest, work.read_clock() - started)
    return 2 * MATRIX**3 / fastest


def measure_switches(folder: Path, recipe: str, adapters: list[str], switches: list[str]) -> dict:
    """Train with each adapter, everything off and then with one switch on; each in a process.

    Returns:
        The figures, see work.Measured, by adapter and switch; an error's text where one failed.
    """
    figures = {}
    for adapter in adapters:
        for switch in switches:
            name = f"{adapter}, {switch}"
            changes = merge_keys(PLAIN, ADAPTERS[adapter], SWITCHES[switch])

            try:
                run = in_process(train_with_ours, folder, changes, recipe, imports=SLOW_IMPORTS)
                figures[name] = asdict(run)
            # What memory cannot hold, or a kernel that is not installed, is a figure too.
            except (Exception, SystemExit) as error:
                figures[name] = f"{type(error).__name__}: {error}"
            print(f"{recipe}, {name}: done", flush=True)
    return figures


def merge_keys(*parts: dict) -> dict:
    """Merge keys of a recipe, and those of its `pairwise:` block."""
    merged = {}
    block = {}
    for part in parts:
        merged |= part
        block |= part.get("pairwise", {})
    return merged | {"pairwise": block}


def format_table(figures: dict, matrix_rate: float) -> str:
    """Return one shape's figures as a Markdown table."""
    lines = [
        "| switch | pairs a second | padding | memory, GiB | share of the matrix rate |",
        "|---|---|---|---|---|",
    ]
    for name, run in figures.items():
        if isinstance(run, str):
            lines.append(f"| {name} | failed: {run.splitlines()[0]} | | | |")
            continue

        speed = run["pairs"] / run["seconds"]
        utilisation = run["operations"] / run["seconds"] / matrix_rate
        memory = run["peak_bytes"] / GIB
        padding = run["padding"]
        lines.append(f"| {name} | {speed:.2f} | {padding:.2f} | {memory:.1f} | {utilisation:.2f} |")
    return "\n".join(lines)


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default="data/pairs.parquet")
@click.option("--trained", default=64, show_default=True, help="Pairs of a run.")
@exits_with_2
def main(pairs: Path, trained: int) -> None:
    """Write outputs/bench/train_shapes.json and print it as tables."""
    if not torch.cuda.is_available():
        print("9B and 14B shapes with LoRA and QLoRA: not run, there is no GPU")
        return

    results = {"matrix_rate": in_process(measure_matrix_rate)}
    for recipe in FAMILIES:
        # One shape's weights are gone before the next one's are written.
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            in_process(write_inputs, folder, recipe, pairs, trained)
            results[recipe] = measure_switches(folder, recipe, list(ADAPTERS), list(SWITCHES))
        write_json(RESULTS, results)
        print(f"{recipe}\n{format_table(results[recipe], results['matrix_rate'])}", flush=True)


if __name__ == "__main__":
    main()
