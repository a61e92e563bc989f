"""`make bench-kernel`: rows a second of the kernel beside two usual ways to score, on the same rows, and beside the floor.

(a) transformers' text-classification pipeline, batches of 8 in the file's order; (b) rows sorted by length, batches of 4 padded
to their longest, as the public notebooks of the LMSYS competition do; ours: the kernel with a worker for each core. All read
the same token ids, which is checked by their probabilities; making the ids counts, loading does not. Each run is a process of
its own; the runs alternate and the fastest of each counts, since other work on the machine only ever adds to a time.

The floor is what the model's floating-point operations on the rows' own tokens take at the machine's matrix rate: two for each
weight of a layer, and the attention's, of a decoder the half that is not masked.
"""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import polars as pl

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import read_json, write_json
from tests import tiny
from tests.bench import SIZE_NAMES
from tests.bench.processes import in_process
from tests.bench.rows import realistic_rows

VOCABULARY = 16_384
BUDGET_TOKENS = 512
TOKENS_PER_BATCH = 2048
TOLERANCE = 1e-4
RATE_REPEATS = 5
ROUNDS = 3
TEXTS = ("prompt", "response_a", "response_b")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model with random weights: its type, how many times --rows of them it scores, and its SIZE_NAMES."""

    model_type: str
    rows_factor: float
    sizes: tuple[int, ...]


SHAPES = {
    "MiniLM": Shape("bert", 1.0, (384, 1536, 6, 12)),
    "tiny Gemma-2": Shape("gemma2", 4.0, (64, 128, 2, 2, 1, 32)),
    "small Gemma-2": Shape("gemma2", 0.4, (512, 2048, 8, 8, 4, 64)),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run: seconds, probabilities of the first verdict by id, and the share of the computed tokens that is padding."""

    seconds: float
    probabilities: dict[str, float]
    padding: float


# What runs in a process of its own imports what it needs, so that the command's own process has neither torch nor its threads.


def make_folder(folder: Path, name: str, rows: pl.DataFrame, base: Path | None, budget: int = BUDGET_TOKENS) -> None:
    """Write base/, package/ and rows.parquet of a model into `folder`; with a `base`, its tokenizer and weights are used."""
    from transformers import AutoConfig

    from tests.kaggle_kernels.packages import make_package

    shape = SHAPES[name]
    folder.mkdir(parents=True)
    row_count = max(int(len(rows) * shape.rows_factor), 1)
    repeated = pl.concat([rows] * (row_count // len(rows) + 1)).head(row_count)
    repeated.with_columns(id=pl.format("{}-{}", "id", pl.int_range(pl.len()))).write_parquet(folder / "rows.parquet")

    if base is None:
        base = folder / "base"
        base.mkdir()
        texts = [text or "" for column in TEXTS for text in rows[column]]
        write_tokenizer = tiny.wordpiece_tokenizer if shape.model_type == "bert" else tiny.bpe_tokenizer
        write_tokenizer(base, vocabulary_size=VOCABULARY, texts=texts)
        sizes = dict(zip(SIZE_NAMES, shape.sizes, strict=False))
        if shape.model_type == "gemma2":
            sizes |= {"query_pre_attn_scalar": sizes["head_dim"], "attn_logit_softcapping": None}
            sizes |= {"eos_token_id": 1, "bos_token_id": 2}
        config = AutoConfig.for_model(shape.model_type, vocab_size=VOCABULARY, pad_token_id=0, **sizes)
        config.save_pretrained(base)
    has_weights = (base / "model.safetensors").is_file()
    template = "bert" if shape.model_type == "bert" else "gemma"
    make_package(folder / "package", base, template=template, budget_tokens=budget, pretrained=has_weights)


def load(folder: Path):
    """The package, its model as transformers loads it, and its pairs."""
    from transformers import AutoModelForSequenceClassification

    from kaggle_kernels.runtime.package import read_package

    package = read_package(folder / "package")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "package").eval()
    pairs = [package.model_input.pair_from_row(row) for row in pl.read_parquet(folder / "rows.parquet").to_dicts()]
    return package, model, pairs


def pipeline(folder: Path) -> Measured:
    """Score with transformers' pipeline, all defaults but the batch size; it makes a row's ids when it comes to the row."""
    import torch
    from transformers import AutoTokenizer, TextClassificationPipeline

    package, model, pairs = load(folder)
    lengths = []

    class OfPairs(TextClassificationPipeline):
        def preprocess(self, pair, **_):
            [ids] = package.model_input.encode(pair, package.tokenizer, package.contract)
            lengths.append(len(ids))
            return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}

    classify = OfPairs(model=model, tokenizer=AutoTokenizer.from_pretrained(folder / "package"), device="cpu")
    classify(pairs[:8], batch_size=8, top_k=None)
    lengths.clear()

    started = time.perf_counter()
    scores_of_pairs = classify(pairs, batch_size=8, top_k=None)
    seconds = time.perf_counter() - started

    probabilities = {}
    for pair, scores in zip(pairs, scores_of_pairs, strict=True):
        by_label = {score["label"]: score["score"] for score in scores}
        probabilities[pair.id] = by_label[model.config.id2label[0]]
    return Measured(seconds, probabilities, padding_of(lengths, 8))


def notebook(folder: Path) -> Measured:
    """Score the rows sorted by length, four at a time."""
    import torch
    from transformers import AutoTokenizer

    package, model, pairs = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "package")

    def score(some_pairs) -> Measured:
        started = time.perf_counter()
        encoded = package.model_input.encode_all(some_pairs, package.tokenizer, package.contract)
        ids_by_row = {pair.id: ids for pair, [ids] in zip(some_pairs, encoded, strict=True)}
        longest_first = sorted(ids_by_row, key=lambda row_id: -len(ids_by_row[row_id]))
        probabilities = {}
        for start in range(0, len(longest_first), 4):
            batch = longest_first[start : start + 4]
            inputs = tokenizer.pad({"input_ids": [ids_by_row[row_id] for row_id in batch]}, return_tensors="pt")
            values = model(**inputs).logits.softmax(-1)[:, 0].tolist()
            probabilities.update(zip(batch, values, strict=True))
        seconds = time.perf_counter() - started
        lengths = [len(ids_by_row[row_id]) for row_id in longest_first]
        return Measured(seconds, probabilities, padding_of(lengths, 4))

    with torch.no_grad():
        score(pairs[:4])
        return score(pairs)


def padding_of(lengths: list[int], batch_size: int) -> float:
    """The share of padding in batches of consecutive rows."""
    padded_tokens = 0
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        padded_tokens += max(batch) * len(batch)
    return 1 - sum(lengths) / padded_tokens


def ours(folder: Path, tokens_per_batch: int = TOKENS_PER_BATCH, workers: int | None = None) -> Measured:
    """Score with the kernel, in one order, by default with a worker for each core.

    Making the ids, which it does beside loading, is measured apart and added.
    """
    from kaggle_kernels.build.spec import Spec, settings_of
    from kaggle_kernels.runtime.main import run_kernel
    from kaggle_kernels.runtime.models.scoring import make_requests
    from kaggle_kernels.runtime.package import read_package
    from tests.kaggle_kernels.packages import settings_for

    package = read_package(folder / "package")
    spec = Spec(title="Bench", competition="wsdm", packages=[{"run": "bench", "dataset": "bench-model"}], clock_seconds=36_000)
    settings = settings_of("bench", spec, [settings_for("bench", "bench-model")])
    settings = dataclasses.replace(settings, orders=("as_given",), tokens_per_batch=tokens_per_batch)

    # A tree like Kaggle's.
    kaggle = Path(tempfile.mkdtemp(dir=folder))
    (kaggle / "working").mkdir()
    (kaggle / "input" / settings.competition).mkdir(parents=True)
    shutil.copytree(folder / "package", kaggle / "input" / "bench-model")
    rows = pl.read_parquet(folder / "rows.parquet").select("id", *TEXTS)
    rows.write_parquet(kaggle / "input" / settings.competition / "test.parquet")
    os.environ["KAGGLE_ROOT"] = str(kaggle)

    pairs = [package.model_input.pair_from_row(row) for row in rows.to_dicts()]
    started = time.perf_counter()
    make_requests(package.model_input, package.tokenizer, package.contract, pairs, settings.orders)
    encoding_seconds = time.perf_counter() - started

    run_kernel(settings, ["cpu"] * (workers or os.cpu_count()))
    [model_pass] = read_json(kaggle / "working" / "kernel.json")["passes"]
    padding = 1 - model_pass["tokens"] / model_pass["computed_tokens"]
    scores = pl.read_parquet(kaggle / "working" / "scores.parquet")
    probabilities = dict(scores.select("id", "p_model_a").iter_rows())
    return Measured(model_pass["seconds"] + encoding_seconds, probabilities, padding)


CONTENDERS = {
    "(a) transformers pipeline, batches of 8, unsorted": pipeline,
    "(b) sorted, batches of 4, padded to the longest": notebook,
    "ours": ours,
}


def floor(folder: Path) -> float:
    """Floating-point operations of the model on the rows' own tokens."""
    package, model, pairs = load(folder)
    encoded = package.model_input.encode_all(pairs, package.tokenizer, package.contract)
    return forward_operations(model, [len(ids) for [ids] in encoded])


def forward_operations(model, lengths: list[int]) -> float:
    """Floating-point operations of a forward pass over sequences of these lengths, without padding."""
    weights = 0
    for name, weight in model.named_parameters():
        if (".layers." in name or ".layer." in name) and weight.dim() == 2:
            weights += weight.numel()

    config = model.config
    head_width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention_width = head_width * config.num_attention_heads * config.num_hidden_layers
    unmasked_share = 1.0 if config.model_type == "bert" else 0.5
    attention = 4.0 * attention_width * unmasked_share * sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention


def matrix_rate(clock: Callable[[], float] = time.perf_counter) -> float:
    """The machine's floating-point operations a second: the best torch.mm of float32 over several large shapes, all threads."""
    import torch

    best_rate = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 512, 2048), (8192, 384, 1536), (1024, 4096, 4096)):
        left = torch.randn(rows, inner)
        right = torch.randn(inner, columns)
        torch.mm(left, right)
        for _ in range(RATE_REPEATS):
            started = clock()
            torch.mm(left, right)
            seconds = clock() - started
            best_rate = max(best_rate, 2.0 * rows * inner * columns / seconds)
    return best_rate


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), help="With prompt, response_a, response_b; by default generated.")
@click.option("--base", type=click.Path(path_type=Path), help="MiniLM's folder; by default random weights of its shape.")
@click.option("--rows", default=200, show_default=True, help="Of MiniLM; the tiny Gemma-2 scores 4 times, the small one 0.4.")
@exits_with_2
def main(pairs: Path | None, base: Path | None, rows: int) -> None:
    """Write outputs/bench/kernel.json and print it as a table."""
    table = read_rows(pairs, rows)
    source = f"rows: {pairs or 'generated'}; MiniLM: {base or 'random weights of its shape'}"
    print(f"{source}; {BUDGET_TOKENS} tokens a row", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in SHAPES:
            folder = Path(temporary) / name.replace(" ", "-")
            in_process(make_folder, folder, name, table, base if name == "MiniLM" else None)
            results.append({"model": name, **compare(folder)})
            print(as_table(results[-1]), flush=True)
    write_json(Path("outputs/bench/kernel.json"), {"pairs": str(pairs), "base": str(base), "results": results})

    worst = max(line["difference"] for result in results for line in result["contenders"].values())
    if worst > TOLERANCE:
        raise UserError(f"probabilities differ by {worst:.1e}, more than {TOLERANCE}: not the same work was measured")


def read_rows(pairs: Path | None, rows: int) -> pl.DataFrame:
    """So many rows, of a file those that a fixed seed draws."""
    if pairs is None:
        return realistic_rows(rows)
    if not pairs.is_file():
        raise UserError(f"--pairs {pairs}: no such file")
    table = pl.read_parquet(pairs)
    for column in TEXTS:
        if column not in table.columns:
            raise UserError(f"--pairs {pairs}: no column {column}; expected the competition's layout or preprocess's")
        if table[column].dtype == pl.List(pl.String):
            table = table.with_columns(pl.col(column).list.join("\n"))
    return table.select("id", *TEXTS).sample(min(rows, len(table)), seed=0)


def compare(folder: Path) -> dict:
    """Every contender's fastest run, its difference from ours and the share of the matrix rate that it reaches."""
    runs: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    matrix_rates = []
    for _ in range(ROUNDS):
        matrix_rates.append(in_process(matrix_rate))
        for name, work in CONTENDERS.items():
            runs[name].append(in_process(work, folder))
    floor_seconds = in_process(floor, folder) / max(matrix_rates)

    fastest = {name: min(runs_of_one, key=lambda run: run.seconds) for name, runs_of_one in runs.items()}
    ours = fastest["ours"]
    contenders = {}
    for name, run in fastest.items():
        contenders[name] = {
            "seconds": round(run.seconds, 2),
            "ours_times_as_fast": round(run.seconds / ours.seconds, 2),
            "difference": max(abs(run.probabilities[row_id] - value) for row_id, value in ours.probabilities.items()),
            "padding": round(run.padding, 4),
            "share_of_floor": round(floor_seconds / run.seconds, 3),
        }
    return {"rows": len(ours.probabilities), "floor_seconds": floor_seconds, "contenders": contenders}


def as_table(result: dict) -> str:
    """One model's figures."""
    lines = [
        f"\n{result['model']}, {result['rows']} rows; floor {result['floor_seconds']:.1f} s",
        f"{'':<52}{'seconds':>8}{'it/ours':>8}{'padding':>9}{'of floor':>9}{'differs':>9}",
    ]
    for name, line in result["contenders"].items():
        lines.append(
            f"{name:<52}{line['seconds']:>8.1f}{line['ours_times_as_fast']:>8.2f}"
            f"{line['padding']:>9.3f}{line['share_of_floor']:>9.2f}{line['difference']:>9.0e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.kernel")
