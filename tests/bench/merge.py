"""`make bench-merge`: merging and quantising a Gemma-2 of a billion weights, ours beside PEFT, bitsandbytes and Axolotl.

All in one run: each has a process of its own, in which importing is not counted, and starts from a cold page cache; its peak
of anonymous memory (RssAnon) is read every 20 ms. What they wrote is then compared. The base has random weights: time and
memory do not depend on them.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import psutil

from tests.bench import SIZE_NAMES
from tests.bench.processes import fresh_process, in_process

SHAPES = {  # SIZE_NAMES; about Gemma-2's proportions, a billion weights, and two layers of Gemma-2-9b's own shapes
    "1b": (1536, 9216, 13, 8, 4, 192),
    "9b": (3584, 14336, 2, 16, 8, 256),
}
VOCABULARY = 256_000
RANK = 64
BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Measured:
    """Seconds of the work, and the peak of the process's anonymous memory in bytes."""

    seconds: float
    peak_bytes: int


# What runs in a process of its own: each function imports what it needs, so that memory is of that alone.


def make_inputs(folder: Path, shape: str, layers: int | None = None) -> None:
    """Write base/ (bfloat16, in shards as the hub has them), and in run/ what training would have left, with its recipe."""
    import polars as pl
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from recipes.pairwise.config.schema import read_recipe
    from recipes.pairwise.contract import new_contract, write_contract
    from tests.postprocess.runs import DECODER_TARGETS, TWO, recipe_file
    from tests.tiny import bpe_tokenizer

    base, run = folder / "base", folder / "run"
    sizes = dict(zip(SIZE_NAMES, SHAPES[shape], strict=True))
    if layers:
        sizes["num_hidden_layers"] = layers
    config = AutoConfig.for_model("gemma2", vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=2, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="2GB")
    bpe_tokenizer(base)

    adapter = {"base_model.model.score.weight": torch.randn(2, config.hidden_size) * 0.02}
    for name, weight in model.named_parameters():
        if name.split(".")[-2] in DECODER_TARGETS:
            outputs, inputs = weight.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
            adapter[f"{module}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=DECODER_TARGETS, task_type="SEQ_CLS", modules_to_save=["score"])
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(run)
    save_file(adapter, run / "adapter_model.safetensors")

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(run)
    keys = {"adapter": "lora", "lora_target_modules": DECODER_TARGETS}
    recipe = recipe_file(folder, base, "gemma2", TWO, "score", keys)
    block = read_recipe(recipe).pairwise
    contract = new_contract(block, tokenizer, attention="sdpa", base_model=str(base), revision=None, pad_token_id=0)
    write_contract(run, contract, recipe)
    (run / "metrics.json").write_text("{}")
    for file in (folder / "pairs.parquet", run / "predictions.parquet"):
        pl.DataFrame({"id": ["a"]}).write_parquet(file)


def ours(folder: Path) -> Callable[[], object]:
    """Merge to float16, then nf4 of it, as `python -m postprocess` does it."""
    from postprocess.run_folder import read_run
    from postprocess.weights.merge import merge
    from postprocess.weights.quantise_run import quantise_merged
    from recipes.pairwise.config.schema import read_recipe

    run = read_run(read_recipe(folder / "recipe.yml"))

    def work() -> None:
        merge(run, folder / "ours-merged")
        quantise_merged(run, folder / "ours-merged", "nf4", folder / "ours")

    return work


def one_pass(folder: Path) -> Callable[[], object]:
    """Merge and quantise each weight at once, as it is done for a base whose adapter stays apart."""
    from postprocess.run_folder import read_run
    from postprocess.weights.bnb_quantize import quantization_config
    from postprocess.weights.merge import Form, merge
    from recipes.pairwise.config.schema import read_recipe

    run = read_run(read_recipe(folder / "recipe.yml"))
    form = Form(quantization_config("nf4", ["score"]))
    return lambda: merge(run, folder / "one-pass", form)


def peft(folder: Path, dtype_name: str) -> Callable[[], object]:
    """PEFT's merge_and_unload with the model in `dtype_name`, saved in float16, loaded again in nf4, saved."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from postprocess.weights.bnb_quantize import quantization_config

    def load(where: Path, **options):
        return AutoModelForSequenceClassification.from_pretrained(where, num_labels=2, pad_token_id=0, **options)

    def work() -> None:
        model = load(folder / "base", dtype=getattr(torch, dtype_name))
        merged = PeftModel.from_pretrained(model, folder / "run").merge_and_unload().half()
        merged.save_pretrained(folder / f"{dtype_name}-merged")
        del model, merged
        nf4 = quantization_config("nf4", ["score"])
        quantised = load(folder / f"{dtype_name}-merged", dtype=torch.float16, device_map="cpu", quantization_config=nf4)
        quantised.save_pretrained(folder / dtype_name)

    return work


def axolotl(folder: Path) -> Callable[[], object]:
    """What `axolotl merge-lora` calls; it does not know the head, and quantises nothing."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    return lambda: merge_lora_sharded_efficient(folder / "base", folder / "run", folder / "axolotl", device="cpu")


def measure_floor(folder: Path) -> float:
    """Seconds for reading base and adapter and writing as many bytes as our result has, one after the other, with an fsync."""
    files = [*(folder / "base").glob("*.safetensors"), folder / "run" / "adapter_model.safetensors"]
    size = sum(file.stat().st_size for file in (folder / "ours").glob("*.safetensors"))
    block = os.urandom(BLOCK_BYTES)
    forget(files)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as reading:
            while reading.read(BLOCK_BYTES):
                pass
    with (folder / "floor").open("wb", buffering=0) as writing:
        for _ in range(size // len(block)):
            writing.write(block)
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - started
    (folder / "floor").unlink()
    return seconds


@dataclass(frozen=True)
class Contender:
    """One line of the table: its title, what prepares its work, and the folder of its result, which is compared with ours."""

    title: str
    prepare: Callable[[Path], Callable[[], object]]
    result: str


CONTENDERS = {
    "ours": Contender("ours: merge, save, nf4", ours, "ours"),
    "one_pass": Contender("ours: nf4 in one pass, nothing else saved", one_pass, "one-pass"),
    "peft32": Contender("PEFT in float32, save, bitsandbytes", partial(peft, dtype_name="float32"), "float32"),
    "peft16": Contender("PEFT in float16, save, bitsandbytes", partial(peft, dtype_name="float16"), "float16"),
    "axolotl": Contender("axolotl merge-lora: merge alone", axolotl, "axolotl"),
}


def run_contender(name: str, folder: Path) -> float:
    """Seconds of one contender's work in this process; importing does not count."""
    work = CONTENDERS[name].prepare(folder)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(name: str, folder: Path) -> Measured:
    """Run a contender in a process of its own from a cold page cache."""
    forget([*(folder / "base").glob("*.safetensors"), *(folder / "run").glob("*.safetensors")])
    peak_bytes = 0
    with fresh_process() as process:
        watched = psutil.Process(process.submit(os.getpid).result())
        seconds = process.submit(run_contender, name, folder)
        while not seconds.done():
            memory = watched.memory_info()
            peak_bytes = max(peak_bytes, memory.rss - memory.shared)  # RssAnon: what is not a mapped file's
            time.sleep(0.02)
    return Measured(seconds.result(), peak_bytes)


def forget(files: list[Path]) -> None:
    """Have the kernel drop the files' pages, so that they are read from the disk."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compared(ours: Path, theirs: Path) -> str:
    """How the tensors of two folders differ, in words."""
    import torch

    from postprocess.weights.checkpoint_reader import open_tensors

    with open_tensors(ours) as our_tensors, open_tensors(theirs) as their_tensors:
        our_names, their_names = set(our_tensors.names()), set(their_tensors.names())
        # What bitsandbytes adds to a weight has a name of more parts.
        absent = sorted(name for name in our_names - their_names if "." not in name.split(".weight")[-1])
        if absent:
            return f"lacks {', '.join(absent[:3])}"
        differing = 0
        for name in our_names & their_names:
            differing += not torch.equal(our_tensors.get(name), their_tensors.get(name))
    if differing or our_names != their_names:
        return f"{differing} of {len(our_names)} tensors differ"
    return "the same bytes"


@click.group()
def main() -> None:
    """Merge and quantise, side by side."""


@main.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="By default 13 for 1b, 2 for 9b.")
@click.option("--only", type=click.Choice(list(CONTENDERS)), multiple=True, help="By default all.")
def compare(shape: str, layers: int | None, only: tuple[str, ...]) -> None:
    """Seconds, peak memory and outputs of each contender, and the disk's floor, in a temporary folder (12 GB, see TMPDIR)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_process(make_inputs, folder, shape, layers)
        measured = {name: measure(name, folder) for name in only or CONTENDERS}
        if "ours" in measured:
            report(measured, folder)


def report(measured: dict[str, Measured], folder: Path) -> None:
    """Print the table."""
    ours = measured["ours"]
    print(f"{'':<44}{'seconds':>9}{'ours/it':>9}{'RssAnon GB':>12}{'ours/it':>9}  output beside ours")
    for name, run in measured.items():
        contender = CONTENDERS[name]
        times = ours.seconds / run.seconds
        memory = ours.peak_bytes / run.peak_bytes
        gigabytes = run.peak_bytes / 1e9
        output = compared(folder / "ours", folder / contender.result) if run is not ours else ""
        print(f"{contender.title:<44}{run.seconds:>9.1f}{times:>9.2f}{gigabytes:>12.2f}{memory:>9.2f}  {output}")

    floor_seconds = measure_floor(folder)
    times = ours.seconds / floor_seconds
    print(f"{'the disk: the same bytes read and written':<44}{floor_seconds:>9.1f}{times:>9.2f}")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.merge")
