"""Generated rows with the sizes and scripts of WSDM's, for the benches: realistic_rows, write_realistic_rows."""

from pathlib import Path

import numpy as np
import polars as pl
from pyarrow import parquet

SCRIPTS = {  # share of rows, first code point, number of letters, letters a word (least, most), what joins words
    "English": (0.5, 0x61, 26, (2, 9), " "),
    "Russian": (0.15, 0x430, 32, (2, 9), " "),
    "Chinese": (0.15, 0x4E00, 3000, (1, 2), ""),
    "Japanese": (0.1, 0x3041, 80, (1, 4), ""),
    "Arabic": (0.05, 0x627, 28, (2, 7), " "),
    "Korean": (0.05, 0xAC00, 2000, (1, 4), " "),
}
VOCABULARY = 20_000
ROWS_AT_ONCE = 25_000


class Language:
    """Words of one script, drawn with Zipf's frequencies."""

    def __init__(self, name: str, rng: np.random.Generator):
        _, first_letter, letter_count, (shortest, longest), self.joiner = SCRIPTS[name]
        ranks = np.minimum(rng.zipf(1.3, (VOCABULARY, longest)) - 1, 10**6)
        letters = first_letter + ranks % letter_count
        lengths = rng.integers(shortest, longest + 1, VOCABULARY)
        self.words = ["".join(map(chr, row[:length])) for row, length in zip(letters, lengths, strict=True)]
        frequency = 1 / np.arange(1, VOCABULARY + 1)
        self.cumulated = np.cumsum(frequency / frequency.sum())
        self.characters_per_word = float(lengths.mean()) + len(self.joiner)
        self.rng = rng

    def text(self, characters: float) -> str:
        """About so many characters of text."""
        draws = self.rng.random(max(int(characters / self.characters_per_word), 1))
        positions = np.searchsorted(self.cumulated, draws).clip(max=VOCABULARY - 1)
        return self.joiner.join(self.words[position] for position in positions)


def realistic_rows(rows: int, seed: int = 0) -> pl.DataFrame:
    """WSDM rows: prompts of 50 to 2,000 characters, responses of about 1,500; some repeated, edited or from templates."""
    rng = np.random.default_rng(seed)
    languages = {name: Language(name, rng) for name in SCRIPTS}
    names = rng.choice(list(SCRIPTS), rows, p=[share for share, *_ in SCRIPTS.values()])
    templates = [languages["English"].text(size) for size in rng.integers(80, 400, 20)]

    prompts: list[str] = []
    for row, name in enumerate(names):
        language = languages[name]
        kind = rng.random()
        size = np.exp(rng.uniform(np.log(50), np.log(2000)))
        if row and kind < 0.05:
            prompts.append(prompts[rng.integers(row)])
        elif row and kind < 0.1:
            earlier = prompts[rng.integers(row)]
            prompts.append(earlier + language.joiner + language.text(len(earlier) * rng.uniform(0, 0.4) + 1))
        elif kind < 0.15:
            prompts.append(f"{templates[rng.integers(20)]} {languages['English'].text(rng.integers(10, 150))}")
        else:
            prompts.append(language.text(size))

    columns = {"id": [f"row{row:06d}" for row in range(rows)], "prompt": prompts}
    for side in ("a", "b"):
        sizes = np.minimum(rng.lognormal(7.1, 0.7, rows), 20_000)
        columns[f"response_{side}"] = [languages[name].text(size) for name, size in zip(names, sizes, strict=True)]
    return pl.DataFrame(columns | {"winner": rng.choice(["model_a", "model_b"], rows), "language": names})


def write_realistic_rows(path: Path, rows: int) -> None:
    """Write realistic_rows to a Parquet file, a part at a time, so that a million need little memory."""
    writer = None
    for start in range(0, rows, ROWS_AT_ONCE):
        part = realistic_rows(min(ROWS_AT_ONCE, rows - start), seed=start)
        part = part.with_columns(id=pl.format("part{}-{}", pl.lit(start), "id")).to_arrow()
        writer = writer or parquet.ParquetWriter(path, part.schema)
        writer.write_table(part)
    writer.close()
