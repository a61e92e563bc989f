"""What is fast must stay fast: `python -m tests.bench input [TOKENIZER]` and `python -m tests.bench preprocess`.

Nothing in `make test` depends on these figures. `input` compares encode_all with the tokenizer's own encode_batch on the same
texts, side by side in one run; `preprocess` makes 48,000 rows in six scripts and runs the command on them in a process.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import polars as pl
from tokenizers import Tokenizer

from preprocess.model_input import Contract, Pair, Template, encode_all
from tests import tiny

ROWS = 48_000
SCRIPTS = {  # share of rows, first code point, how many, characters a word, what joins words
    "English": (0.5, 0x61, 26, (2, 9), " "),
    "Russian": (0.15, 0x430, 32, (2, 9), " "),
    "Chinese": (0.15, 0x4E00, 3000, (1, 2), ""),
    "Japanese": (0.1, 0x3041, 80, (1, 4), ""),
    "Arabic": (0.05, 0x627, 28, (2, 7), " "),
    "Korean": (0.05, 0xAC00, 2000, (1, 4), " "),
}
VOCABULARY = 20_000


@click.group()
def main() -> None:
    """Measure what has a limit."""


class Language:
    """Words of one script, drawn with Zipf's frequencies."""

    def __init__(self, name: str, rng: np.random.Generator):
        _, start, count, (shortest, longest), self.joiner = SCRIPTS[name]
        letters = start + np.minimum(rng.zipf(1.3, (VOCABULARY, longest)) - 1, 10**6) % count
        lengths = rng.integers(shortest, longest + 1, VOCABULARY)
        self.words = ["".join(map(chr, row[:length])) for row, length in zip(letters, lengths, strict=True)]
        frequency = 1 / np.arange(1, VOCABULARY + 1)
        self.cumulated = np.cumsum(frequency / frequency.sum())
        self.characters_per_word = float(lengths.mean()) + len(self.joiner)
        self.rng = rng

    def text(self, characters: int) -> str:
        """About so many characters of text."""
        draws = self.rng.random(max(int(characters / self.characters_per_word), 1))
        return self.joiner.join(self.words[at] for at in np.searchsorted(self.cumulated, draws).clip(max=VOCABULARY - 1))


def realistic_rows(rows: int, seed: int = 0) -> pl.DataFrame:
    """WSDM rows: prompts of 50 to 2,000 characters, responses of about 1,500; some repeated, edited or from templates."""
    rng = np.random.default_rng(seed)
    languages = {name: Language(name, rng) for name in SCRIPTS}
    names = rng.choice(list(SCRIPTS), rows, p=[share for share, *_ in SCRIPTS.values()])
    templates = [languages["English"].text(int(size)) for size in rng.integers(80, 400, 20)]
    prompts: list[str] = []
    for at, name in enumerate(names):
        kind = rng.random()
        size = int(np.exp(rng.uniform(np.log(50), np.log(2000))))
        if at and kind < 0.05:
            prompts.append(prompts[int(rng.integers(at))])
        elif at and kind < 0.1:
            other = prompts[int(rng.integers(at))]
            prompts.append(other + languages[name].joiner + languages[name].text(int(len(other) * rng.uniform(0, 0.4)) + 1))
        elif kind < 0.15:
            prompts.append(f"{templates[int(rng.integers(20))]} {languages['English'].text(int(rng.integers(10, 150)))}")
        else:
            prompts.append(languages[name].text(size))
    sizes = np.minimum(rng.lognormal(7.1, 0.7, (rows, 2)), 20_000)
    return pl.DataFrame(
        {
            "id": [f"row{at:06d}" for at in range(rows)],
            "prompt": prompts,
            "response_a": [languages[name].text(int(size)) for name, size in zip(names, sizes[:, 0], strict=True)],
            "response_b": [languages[name].text(int(size)) for name, size in zip(names, sizes[:, 1], strict=True)],
            "winner": rng.choice(["model_a", "model_b"], rows),
            "language": names,
        }
    )


@main.command("preprocess")
@click.option("--rows", default=ROWS, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the files here.")
def bench_preprocess(rows: int, folder: Path | None) -> None:
    """Seconds and peak memory of `python -m preprocess` on a competition's number of rows; at most 60 s and 2 GB."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "train.parquet"
        if not source.exists():
            realistic_rows(rows).write_parquet(source)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "preprocess", str(source), "--out", str(folder / "pairs.parquet")], check=True)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "rows": rows,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gigabytes": round(used.ru_maxrss / 2**20, 2),
    }
    print(json.dumps(figures))


@main.command("input")
@click.argument("tokenizer", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=1000, show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--budget", default=1024, show_default=True)
def bench_input(tokenizer: Path | None, rows: int, repeats: int, budget: int) -> None:
    """Texts a second of encode_all and of encode_batch, alternating, the best of each; the ratio should be 0.8 or more.

    TOKENIZER is a tokenizer.json; by default the tests' own small one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if tokenizer is None:
            tiny.bpe_tokenizer(Path(temporary))
            tokenizer = Path(temporary) / "tokenizer.json"
        backend = Tokenizer.from_file(str(tokenizer))
    table = realistic_rows(rows)
    pairs = [Pair(r["id"], (r["prompt"],), (r["response_a"],), (r["response_b"],)) for r in table.iter_rows(named=True)]
    texts = [text for pair in pairs for turns in (pair.prompt, pair.response_a, pair.response_b) for text in turns]
    template = Template("", "# Prompt\n{prompt}\n# Response A\n{response_a}\n# Response B\n{response_b}\n", "A or B?")
    contract = Contract(
        "score", ("model_a", "model_b"), template, budget, "middle", 0, "sdpa", False, "none", None, 2, (), "", {}, (), {}
    )
    theirs, ours = [], []
    for _ in range(repeats):
        theirs.append(_seconds(lambda: backend.encode_batch(texts, add_special_tokens=False)))
        ours.append(_seconds(lambda: encode_all(pairs, backend, contract)))
    some = pairs[:: max(rows // 50, 1)]
    same = [encode_all([pair], backend, contract)[0] for pair in some] == encode_all(some, backend, contract)
    figures = {
        "encode_batch_texts_per_second": round(len(texts) / min(theirs)),
        "encode_all_texts_per_second": round(len(texts) / min(ours)),
        "ratio": round(min(theirs) / min(ours), 3),
        "one_by_one_gives_the_same_ids": same,
    }
    print(json.dumps(figures))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(prog_name="python -m tests.bench")
