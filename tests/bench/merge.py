"""`make bench-merge`: merging and quantising a Gemma-2 of a billion weights, ours beside PEFT, bitsandbytes and Axolotl.

All in one run: each has a process of its own, in which importing is not counted, and starts from a cold page cache; its peak
of anonymous memory (RssAnon) is read every 20 ms. What they wrote is then compared. The base has random weights: time and
memory do not depend on them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
SHAPES = {  # about Gemma-2's proportions, a billion weights; and two layers of Gemma-2-9b's own shapes
    "1b": {"hidden_size": 1536, "intermediate_size": 9216, "num_hidden_layers": 13, "head_dim": 192},
    "9b": {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 2, "head_dim": 256},
}
HEADS = {"1b": (8, 4), "9b": (16, 8)}
VOCABULARY, RANK, ALPHA = 256_000, 64, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS = {
    "ours": "ours: merge + nf4, one pass",
    "peft32": "PEFT in float32, save, bitsandbytes",
    "peft16": "PEFT in float16, save, bitsandbytes",
    "axolotl": "axolotl merge-lora: merge alone",
}


@dataclass(frozen=True)
class Measured:
    """Seconds of the work, and the peak of the process's anonymous memory in bytes."""

    seconds: float
    peak_bytes: int


# What runs in a process of its own: each function imports what it needs, then returns the work to be timed.


def make_inputs(folder: Path, shape: str, layers: int | None) -> None:
    """Write base/ (bfloat16, in shards as the hub has them), adapter files and contract of a run in run/, without training."""
    import torch
    from transformers import AutoConfig

    from postprocess.weights.meta_model import empty_model
    from postprocess.weights.shard_writer import Planned, Stored, write_shards
    from tests.tiny import bpe_tokenizer

    heads, keys = HEADS[shape]
    sizes = {"vocab_size": VOCABULARY, "num_attention_heads": heads, "num_key_value_heads": keys, **SHAPES[shape]}
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = AutoConfig.for_model("gemma2", pad_token_id=0, bos_token_id=2, eos_token_id=1, **sizes)
    config.dtype, base, run = torch.bfloat16, folder / "base", folder / "run"
    base.mkdir(parents=True)
    run.mkdir()
    model = empty_model(config, "label_tokens")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)

    def random(name: str):
        values = (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()
        yield Stored(name, torch.bfloat16, tuple(shapes[name]), [values])

    write_shards(base, [Planned(name, (name,), 2 * size.numel()) for name, size in shapes.items()], random)
    config.architectures = [type(model).__name__]
    config.save_pretrained(base)
    bpe_tokenizer(base)
    adapter = {"base_model.model.score.weight": torch.randn(2, config.hidden_size, generator=generator) * 0.02}
    for name, size in shapes.items():
        if name.split(".")[-2] in TARGETS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = torch.randn(RANK, size[1], generator=generator) * 0.02
            adapter[f"{module}.lora_B.weight"] = torch.randn(size[0], RANK, generator=generator) * 0.02
    write_run(folder, adapter)


def write_run(folder: Path, adapter: dict) -> None:
    """Write the run folder that training would have left, and its recipe."""
    import polars as pl
    import yaml
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from recipes.pairwise.config.axolotl_keys import PLUGIN
    from recipes.pairwise.config.schema import PairwiseBlock
    from recipes.pairwise.contract import new_contract, write_contract

    base, run = folder / "base", folder / "run"
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=["score"])
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(run)
    save_file(adapter, run / "adapter_model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(run)
    block = {
        "template": "gemma",
        "budget_tokens": 128,
        "pairs": str(folder / "pairs.parquet"),
        "package": {"slug": "bench-merge"},
    }
    lora_keys = {"adapter": "lora", "lora_target_modules": TARGETS}
    recipe = {"base_model": str(base), "plugins": [PLUGIN], "output_dir": str(run), "pairwise": block, **lora_keys}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    contract = new_contract(
        PairwiseBlock.model_validate(block), tokenizer, attention="sdpa", base_model=str(base), revision=None, pad_token_id=0
    )
    write_contract(run, contract, folder / "recipe.yml")
    for file in (folder / "pairs.parquet", run / "predictions.parquet"):
        pl.DataFrame({"id": ["a"]}).write_parquet(file)


def ours(folder: Path) -> Callable[[], object]:
    """Merge and nf4 in one pass, as `python -m postprocess` does it."""
    from postprocess.quiet import silence_libraries

    from postprocess.run_folder import read_run
    from postprocess.weights.merge import quantise_in_one_pass
    from recipes.pairwise.config.schema import read_recipe

    silence_libraries()
    run = read_run(read_recipe(folder / "recipe.yml"))
    return lambda: quantise_in_one_pass(run, "nf4", folder / "ours")


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
        options = {
            "dtype": torch.float16,
            "device_map": {"": "cpu"},
            "quantization_config": quantization_config("nf4", ["score"]),
        }
        load(folder / f"{dtype_name}-merged", **options).save_pretrained(folder / dtype_name)

    return work


def axolotl(folder: Path) -> Callable[[], object]:
    """What `axolotl merge-lora` calls; it does not know the head, and quantises nothing."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    return lambda: merge_lora_sharded_efficient(folder / "base", folder / "run", folder / "axolotl", device="cpu")


def floor(folder: Path, out: Path) -> Measured:
    """Reading base and adapter and writing as many bytes as the result has, one after the other, with an fsync."""
    files = [*(folder / "base").glob("*.safetensors"), folder / "run" / "adapter_model.safetensors"]
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    block = os.urandom(2**24)
    forget(files)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as reading:
            while reading.read(2**24):
                pass
    with (folder / "floor").open("wb", buffering=0) as writing:
        for _ in range(size // len(block)):
            writing.write(block)
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - started
    (folder / "floor").unlink()
    return Measured(seconds, 0)


WORK = {
    "ours": ours,
    "peft32": lambda folder: peft(folder, "float32"),
    "peft16": lambda folder: peft(folder, "float16"),
    "axolotl": axolotl,
}


def measure(name: str, folder: Path) -> Measured:
    """Run a contender in a process of its own from a cold page cache."""
    forget([*(folder / "base").glob("*.safetensors"), *(folder / "run").glob("*.safetensors")])
    command = [sys.executable, "-m", "tests.bench.merge", "run", name, str(folder)]
    peak = 0
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}: {(folder / f'{name}.log').read_text()[-2000:]}")
    return Measured(json.loads(process.stdout.read().splitlines()[-1])["seconds"], peak)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process: what it holds beside the files that it has mapped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def forget(files: list[Path]) -> None:
    """Have the kernel drop the files' pages, so that they are read from the disk."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compared(folder: Path, ours: Path, theirs: Path) -> str:
    """How the tensors of two folders differ, in words; the numbers of a 16-bit and a quantised model are not compared."""
    import torch

    from postprocess.weights.checkpoint_reader import open_tensors

    with open_tensors(ours) as one, open_tensors(theirs) as other:
        names, others = set(one.names()), set(other.names())
        if absent := sorted(name for name in names - others if "." not in name.split(".weight")[-1]):
            return f"lacks {', '.join(absent[:3])}"
        unlike = [name for name in sorted(names & others) if not torch.equal(one.get(name), other.get(name))]
    return "the same bytes" if not unlike and names == others else f"{len(unlike)} of {len(names)} tensors differ"


@click.group()
def main() -> None:
    """Merge and quantise, side by side."""


@main.command("run", hidden=True)
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def run_contender(name: str, folder: Path) -> None:
    """One contender in this process; its seconds as the last line."""
    work = WORK[name](folder)
    started = time.perf_counter()
    work()
    print(json.dumps({"seconds": time.perf_counter() - started}))


@main.command("inputs", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("shape")
@click.argument("layers", type=int, required=False)
def inputs(folder: Path, shape: str, layers: int | None) -> None:
    """Make the base and the run."""
    make_inputs(folder, shape, layers)


@main.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="By default 13 for 1b, 2 for 9b.")
@click.option("--only", type=click.Choice(list(CONTENDERS)), multiple=True, help="By default all.")
@click.option("--folder", type=click.Path(path_type=Path), help="Work here, which takes 12 GB; by default a temporary folder.")
def compare(shape: str, layers: int | None, only: tuple[str, ...], folder: Path | None) -> None:
    """Seconds, peak memory and outputs of each contender, and the disk's floor."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        subprocess.run(
            [sys.executable, "-m", "tests.bench.merge", "inputs", str(place), shape, *([str(layers)] if layers else [])],
            check=True,
        )
        found = {name: measure(name, place) for name in only or CONTENDERS}
        if "ours" not in found:
            return
        found["floor"] = floor(place, place / "ours")
        report(found, place)
        shutil.rmtree(place / "base")


def report(found: dict[str, Measured], place: Path) -> None:
    """Print the table, and the figures as one line of JSON."""
    results = {"peft32": "float32", "peft16": "float16", "axolotl": "axolotl"}
    labels = {**CONTENDERS, "floor": "the disk: the same bytes read and written"}
    base = found["ours"]
    figures = {}
    print(f"{'':<44}{'seconds':>9}{'ours/it':>9}{'RssAnon GB':>12}{'ours/it':>9}  output beside ours")
    for name, measured in found.items():
        times, memory = base.seconds / measured.seconds, base.peak_bytes / measured.peak_bytes if measured.peak_bytes else 0
        output = compared(place, place / "ours", place / results[name]) if name in results else ""
        print(
            f"{labels[name]:<44}{measured.seconds:>9.1f}{times:>9.2f}{measured.peak_bytes / 1e9:>12.2f}{memory:>9.2f}  {output}"
        )
        figures[name] = {
            "seconds": round(measured.seconds, 1),
            "peak_gb": round(measured.peak_bytes / 1e9, 2),
            "output": output,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.merge")
