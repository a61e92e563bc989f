"""`make bench-kernel`: rows a second of the kernel beside two usual ways to score, on the same rows, and beside the floor.

(a) transformers' text-classification pipeline, batches of 8 in the file's order; (b) rows sorted by length, batches of 4 padded
to their longest, as the public notebooks of the LMSYS competition do; ours: the kernel with a worker for each core. All read
the same token ids, which is checked by their probabilities; making the ids counts, loading does not. Each run is a process of
its own; the runs alternate and the fastest of each counts, since other work on the machine only ever adds to a time.

The floor is what the model's floating-point operations on the rows' own tokens take at the machine's matrix rate: two for each
weight of a layer, and the attention's, of a decoder the half that is not masked.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import polars as pl

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import write_json
from tests import tiny
from tests.bench.__main__ import realistic_rows

ROOT = Path(__file__).parents[2]
VOCABULARY = 16_384
TOLERANCE = 1e-4
GEMMA = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "attn_logit_softcapping": None}
SHAPES = {  # the models, and how many times --rows of them are scored
    "MiniLM": ("bert", 1.0, {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}),
    "tiny Gemma-2": (
        "gemma2",
        4.0,
        GEMMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32},
    ),
    "small Gemma-2": (
        "gemma2",
        0.4,
        GEMMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64},
    ),
}
HEADS = {"tiny Gemma-2": (2, 1), "small Gemma-2": (8, 4)}
CONTENDERS = {
    "a": "(a) transformers pipeline, batches of 8, unsorted",
    "b": "(b) sorted, batches of 4, padded to the longest",
    "ours": "ours",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run: seconds, probabilities of the first verdict by id, and the share of the computed tokens that is padding."""

    seconds: float
    probabilities: dict[str, float]
    padding: float


# What runs in a process of its own imports what it needs, so that the command's own process has neither torch nor its threads.


def make_folder(folder: Path, name: str, rows: pl.DataFrame, base: Path | None, budget: int) -> None:
    """Write base/, package/ and rows.parquet of a model into `folder`."""
    from transformers import AutoConfig

    from tests.kaggle_kernels.packages import make_package

    kind, times, sizes = SHAPES[name]
    folder.mkdir(parents=True)
    wanted = max(int(len(rows) * times), 1)
    repeated = pl.concat([rows] * (wanted // len(rows) + 1)).head(wanted)
    repeated.with_columns(id=pl.format("{}-{}", pl.col("id"), pl.int_range(pl.len()))).write_parquet(folder / "rows.parquet")
    if base is None:
        texts = [text or "" for column in ("prompt", "response_a", "response_b") for text in rows[column]]
        tokenizer = tiny.wordpiece_tokenizer if kind == "bert" else tiny.bpe_tokenizer
        base = folder / "base"
        base.mkdir()
        tokenizer(base, vocabulary_size=VOCABULARY, texts=texts)
        if name in HEADS:
            heads, keys = HEADS[name]
            sizes = sizes | {
                "num_attention_heads": heads,
                "num_key_value_heads": keys,
                "query_pre_attn_scalar": sizes["head_dim"],
            }
        AutoConfig.for_model(kind, **{"vocab_size": VOCABULARY, **sizes}).save_pretrained(base)
    template, pretrained = "bert" if kind == "bert" else "gemma", (base / "model.safetensors").is_file()
    make_package(folder / "package", base, template=template, budget_tokens=budget, pretrained=pretrained)


def opened(folder: Path):
    """The package, its model as transformers loads it, and its pairs."""
    from transformers import AutoModelForSequenceClassification

    from kaggle_kernels.runtime.package import read_package

    package = read_package(folder / "package")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "package").eval()
    return (
        package,
        model,
        [package.model_input.pair_from_row(row) for row in pl.read_parquet(folder / "rows.parquet").to_dicts()],
    )


def pipeline(folder: Path) -> Callable[[], Measured]:
    """transformers' pipeline with all defaults but the batch size; it makes a row's ids when it comes to the row."""
    import torch
    from transformers import AutoTokenizer, TextClassificationPipeline

    package, model, pairs = opened(folder)
    lengths = []

    class OfPairs(TextClassificationPipeline):
        def preprocess(self, pair, **_):
            [ids] = package.model_input.encode(pair, package.tokenizer, package.contract)
            lengths.append(len(ids))
            return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}

    pipe = OfPairs(model=model, tokenizer=AutoTokenizer.from_pretrained(folder / "package"), device="cpu")
    first = model.config.id2label[0]
    pipe(pairs[:8], batch_size=8, top_k=None)
    lengths.clear()

    def work() -> Measured:
        began = time.perf_counter()
        told = pipe(pairs, batch_size=8, top_k=None)
        seconds = time.perf_counter() - began
        found = {
            pair.id: next(each["score"] for each in scores if each["label"] == first)
            for pair, scores in zip(pairs, told, strict=True)
        }
        return Measured(seconds, found, padding_of(lengths, 8))

    return work


def notebook(folder: Path) -> Callable[[], Measured]:
    """Rows sorted by length, four at a time."""
    import torch
    from transformers import AutoTokenizer

    package, model, pairs = opened(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "package")

    def score(chosen) -> Measured:
        began = time.perf_counter()
        encoded = package.model_input.encode_all(chosen, package.tokenizer, package.contract)
        by_length = sorted(range(len(chosen)), key=lambda at: -len(encoded[at][0]))
        found = {}
        with torch.no_grad():
            for start in range(0, len(by_length), 4):
                batch = by_length[start : start + 4]
                inputs = tokenizer.pad({"input_ids": [encoded[at][0] for at in batch]}, return_tensors="pt")
                values = model(**inputs).logits.softmax(-1)[:, 0].tolist()
                found |= {chosen[at].id: value for at, value in zip(batch, values, strict=True)}
        seconds = time.perf_counter() - began
        return Measured(seconds, found, padding_of([len(encoded[at][0]) for at in by_length], 4))

    score(pairs[:4])
    return lambda: score(pairs)


def padding_of(lengths: list[int], batch_size: int) -> float:
    """The share of padding in batches of consecutive rows."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def ours(folder: Path, tokens_per_batch: int, workers: int) -> Callable[[], Measured]:
    """The kernel, in one order; making the ids, which it does beside loading, is measured apart and added."""
    from kaggle_kernels.build.spec import Spec, settings_of
    from kaggle_kernels.runtime.main import run_kernel
    from kaggle_kernels.runtime.models.scoring import make_requests
    from kaggle_kernels.runtime.package import read_package
    from tests.kaggle_kernels.packages import settings_for

    package = read_package(folder / "package")
    model_type = json.loads((folder / "package" / "config.json").read_text())["model_type"]
    spec = Spec(title="Bench", competition="wsdm", packages=[{"run": "bench", "dataset": "bench-model"}], clock_seconds=36_000)
    settings = settings_of("bench", spec, [settings_for("bench", "bench-model", model_type=model_type)])
    settings = dataclasses.replace(settings, orders=("as_given",), tokens_per_batch=tokens_per_batch)
    kaggle = Path(tempfile.mkdtemp(dir=folder))
    for path in (kaggle / "working", kaggle / "input" / settings.competition, kaggle / "input" / "bench-model"):
        path.mkdir(parents=True)
    for path in (folder / "package").iterdir():
        (kaggle / "input" / "bench-model" / path.name).symlink_to(path)
    rows = pl.read_parquet(folder / "rows.parquet")
    rows.select("id", "prompt", "response_a", "response_b").write_parquet(
        kaggle / "input" / settings.competition / "test.parquet"
    )
    os.environ["KAGGLE_ROOT"] = str(kaggle)

    def work() -> Measured:
        pairs = [package.model_input.pair_from_row(row) for row in rows.to_dicts()]
        began = time.perf_counter()
        make_requests(package.model_input, package.tokenizer, package.contract, pairs, settings.orders)
        encoding = time.perf_counter() - began
        run_kernel(settings, ["cpu"] * workers)
        [done] = json.loads((kaggle / "working" / "kernel.json").read_text())["passes"]
        scores = pl.read_parquet(kaggle / "working" / "scores.parquet")
        found = dict(scores.select("id", "p_model_a").iter_rows())
        return Measured(done["seconds"] + encoding, found, done["padding"])

    return work


def floor(folder: Path) -> float:
    """Floating-point operations of the model on the rows' own tokens."""
    package, model, pairs = opened(folder)
    config, layers = model.config, [name for name, _ in model.named_parameters() if ".layers." in name or ".layer." in name]
    weights = sum(model.get_parameter(name).numel() for name in layers if model.get_parameter(name).dim() == 2)
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) * config.num_attention_heads
    seen = 1.0 if config.model_type == "bert" else 0.5
    encoded = package.model_input.encode_all(pairs, package.tokenizer, package.contract)
    lengths = [len(ids) for [ids] in encoded]
    attention = 4.0 * width * config.num_hidden_layers * seen * sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention


def matrix_rate(repeats: int = 5) -> float:
    """The machine's floating-point operations a second: the best torch.mm of float32 over several large shapes, all threads."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 512, 2048), (8192, 384, 1536), (1024, 4096, 4096)):
        one, other = torch.randn(rows, inner), torch.randn(inner, columns)
        torch.mm(one, other)
        for _ in range(repeats):
            began = time.perf_counter()
            torch.mm(one, other)
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - began))
    return best


def in_process(*arguments: str) -> dict:
    """The last line that a command of this module prints, as JSON."""
    done = subprocess.run([sys.executable, "-m", "tests.bench.kernel", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@click.group(invoke_without_command=True)
@click.option(
    "--pairs", type=click.Path(path_type=Path), help="A file with prompt, response_a, response_b; by default generated."
)
@click.option("--base", type=click.Path(path_type=Path), help="MiniLM's folder; by default random weights of its shape.")
@click.option("--rows", default=200, show_default=True, help="Of MiniLM; the tiny Gemma-2 scores 4 times, the small one 0.4.")
@click.option("--budget", default=512, show_default=True, help="Tokens of a row.")
@click.option("--tokens-per-batch", default=2048, show_default=True, help="Of ours.")
@click.option("--workers", default=os.cpu_count(), show_default=True, help="Of ours.")
@click.option("--rounds", default=3, show_default=True, help="Of each; the fastest counts.")
@click.option("--model", "models", type=click.Choice(list(SHAPES)), multiple=True, help="By default all.")
@click.pass_context
@exits_with_2
def main(
    context: click.Context,
    pairs: Path | None,
    base: Path | None,
    rows: int,
    budget: int,
    tokens_per_batch: int,
    workers: int,
    rounds: int,
    models: tuple[str, ...],
) -> None:
    """Write outputs/bench/kernel.json and print it as a table."""
    if context.invoked_subcommand:
        return
    table = read_rows(pairs, rows)
    print(f"rows: {pairs or 'generated'}; MiniLM: {base or 'random weights of its shape'}; {budget} tokens a row", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in models or SHAPES:
            folder = Path(temporary) / name.replace(" ", "-")
            table.write_parquet(Path(temporary) / "pairs.parquet")
            told = [str(base)] if base and name == "MiniLM" else []
            in_process("inputs", str(folder), name, str(Path(temporary) / "pairs.parquet"), str(budget), *told)
            results.append({"model": name, **compare(folder, rounds, tokens_per_batch, workers)})
            print(as_table(results[-1]), flush=True)
    write_json(Path("outputs/bench/kernel.json"), {"pairs": str(pairs), "base": str(base), "results": results})
    worst = max(each["difference"] for result in results for each in result["contenders"].values())
    if worst > TOLERANCE:
        raise UserError(f"probabilities differ by {worst:.1e}, more than {TOLERANCE}: not the same work was measured")


def read_rows(pairs: Path | None, rows: int) -> pl.DataFrame:
    """So many rows, of a file those that a fixed seed draws."""
    if pairs is None:
        return realistic_rows(rows)
    if not pairs.is_file():
        raise UserError(f"--pairs {pairs}: no such file")
    found = pl.read_parquet(pairs)
    for column in ("prompt", "response_a", "response_b"):
        if column not in found.columns:
            raise UserError(f"--pairs {pairs}: no column {column}; expected the competition's layout or preprocess's")
        if found[column].dtype == pl.List(pl.String):
            found = found.with_columns(pl.col(column).list.join("\n"))
    return found.select("id", "prompt", "response_a", "response_b").sample(min(rows, len(found)), seed=0)


def compare(folder: Path, rounds: int, tokens_per_batch: int, workers: int) -> dict:
    """Every contender's fastest run, their differences from (b) and the share of the matrix rate that they reach."""
    options = {"ours": [str(tokens_per_batch), str(workers)]}
    runs: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    rates = []
    for _ in range(rounds):
        rates.append(in_process("rate")["rate"])
        for name in CONTENDERS:
            runs[name].append(Measured(**in_process("run", name, str(folder), *options.get(name, []))))
    operations, rate = in_process("floor", str(folder))["operations"], max(rates)
    best = {name: min(found, key=lambda each: each.seconds) for name, found in runs.items()}
    reference = best["b"].probabilities
    contenders = {
        name: {
            "seconds": round(each.seconds, 2),
            "rows_per_second": round(len(reference) / each.seconds, 2),
            "ours_times_as_fast": round(each.seconds / best["ours"].seconds, 2),
            "difference": max(abs(each.probabilities[row_id] - value) for row_id, value in reference.items()),
            "padding": round(each.padding, 4),
            "share_of_matrix_rate": round(operations / rate / each.seconds, 3),
            "all_seconds": [round(run.seconds, 2) for run in runs[name]],
        }
        for name, each in best.items()
    }
    return {"rows": len(reference), "operations": operations, "matrix_rate": rate, "contenders": contenders}


def as_table(result: dict) -> str:
    """One model's figures."""
    floor_seconds = result["operations"] / result["matrix_rate"]
    lines = [
        f"\n{result['model']}, {result['rows']} rows; floor {floor_seconds:.1f} s at {result['matrix_rate'] / 1e9:.0f} GFLOP/s",
        f"{'':<52}{'seconds':>8}{'rows/s':>8}{'ours/it':>8}{'padding':>9}{'of floor':>9}{'differs':>9}",
    ]
    for name, each in result["contenders"].items():
        lines.append(
            f"{CONTENDERS[name]:<52}{each['seconds']:>8.1f}{each['rows_per_second']:>8.1f}{each['ours_times_as_fast']:>8.2f}"
            f"{each['padding']:>9.3f}{each['share_of_matrix_rate']:>9.2f}{each['difference']:>9.0e}"
        )
    return "\n".join(lines)


@main.command("inputs", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("pairs", type=click.Path(path_type=Path))
@click.argument("budget", type=int)
@click.argument("base", type=click.Path(path_type=Path), required=False)
def inputs(folder: Path, name: str, pairs: Path, budget: int, base: Path | None) -> None:
    """Make a model's package and its rows."""
    make_folder(folder, name, pl.read_parquet(pairs), base, budget)
    print("{}")


@main.command("run", hidden=True)
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("options", type=int, nargs=-1)
def run_contender(name: str, folder: Path, options: tuple[int, ...]) -> None:
    """One contender in this process; what it measured as the last line."""
    work = {"a": pipeline, "b": notebook, "ours": ours}[name](folder, *options)
    print(json.dumps(dataclasses.asdict(work())))


@main.command("floor", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def tell_floor(folder: Path) -> None:
    """The operations that a model's rows take."""
    print(json.dumps({"operations": floor(folder)}))


@main.command("rate", hidden=True)
def tell_rate() -> None:
    """The machine's matrix rate."""
    print(json.dumps({"rate": matrix_rate()}))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.kernel")
