"""What is fast must stay fast: `python -m tests.bench input [TOKENIZER]` and `python -m tests.bench preprocess`.

Nothing in `make test` depends on these figures.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import click
from tokenizers import Tokenizer

from preprocess.model_input import Contract, Template, encode_all, pair_from_row
from tests import tiny
from tests.bench.rows import realistic_rows, write_realistic_rows

COMPETITION_ROWS = 48_000
REPEATS = 7
SECTIONS = "# Prompt\n{prompt}\n# Response A\n{response_a}\n# Response B\n{response_b}\n"
TEMPLATE = Template("", SECTIONS, "A or B?")
VERDICTS = ("model_a", "model_b")
CONTRACT = Contract("score", VERDICTS, TEMPLATE, 1024, "middle", 0, "sdpa", False, "none", None, 2, (), (), "", {}, (), {})


@click.group()
def main() -> None:
    """Measure what has a limit."""


@main.command("preprocess")
@click.option("--rows", multiple=True, default=[COMPETITION_ROWS], show_default=True, help="May be repeated.")
def bench_preprocess(rows: tuple[int, ...]) -> None:
    """Seconds and peak memory of `python -m preprocess`; at most 60 s and 2 GB on a competition's number of rows."""
    for row_count in rows:
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "train.parquet"
            write_realistic_rows(source, row_count)
            print(json.dumps({"rows": row_count} | measure_preprocess(source)), flush=True)


def measure_preprocess(source: Path) -> dict[str, float]:
    """Make pairs of a file in a process of its own; return what it took, peak memory (RSS) included."""
    command = [sys.executable, "-m", "preprocess", str(source), "--out", str(source.with_name("pairs.parquet"))]
    start = time.monotonic()
    process = subprocess.Popen(command)
    # The usage is that of the process, and of its children if it had any.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} failed")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gigabytes": round(usage.ru_maxrss / 2**20, 2),
    }


@main.command("input")
@click.argument("tokenizer", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=1000, show_default=True)
def bench_input(tokenizer: Path | None, rows: int) -> None:
    """Texts a second of encode_all and of encode_batch, alternating, the best of each; the ratio should be 0.8 or more.

    TOKENIZER is a tokenizer.json; by default the tests' own small one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if tokenizer is None:
            tiny.bpe_tokenizer(Path(temporary))
            tokenizer = Path(temporary) / "tokenizer.json"
        backend = Tokenizer.from_file(str(tokenizer))

    table = realistic_rows(rows)
    pairs = [pair_from_row(row) for row in table.to_dicts()]
    texts = [*table["prompt"], *table["response_a"], *table["response_b"]]
    theirs, ours = [], []
    for _ in range(REPEATS):
        theirs.append(timeit.timeit(lambda: backend.encode_batch(texts, add_special_tokens=False), number=1))
        ours.append(timeit.timeit(lambda: encode_all(pairs, backend, CONTRACT), number=1))

    some_pairs = pairs[::20]
    one_by_one = [encode_all([pair], backend, CONTRACT)[0] for pair in some_pairs]
    figures = {
        "encode_batch_texts_per_second": round(len(texts) / min(theirs)),
        "encode_all_texts_per_second": round(len(texts) / min(ours)),
        "ratio": round(min(theirs) / min(ours), 3),
        "one_by_one_gives_the_same_ids": one_by_one == encode_all(some_pairs, backend, CONTRACT),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench")
