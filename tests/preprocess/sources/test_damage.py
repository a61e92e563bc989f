"""A damaged file of any format and layout is read, or refused in one line; it never ends in a traceback."""

import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.core.errors import UserError
from preprocess.sources.reader import read_prompts
from preprocess.sources.rows import ROWS
from tests.preprocess.sources import test_layouts
from tests.preprocess.sources.test_reader import GOOD
from tests.preprocess.sources.whole_files import jsonl, read_rows

LAYOUTS = {
    **GOOD,
    **{name: getattr(test_layouts, name) for name in ("ARENA_33K", "ARENA_140K", "PPE", "HELPSTEER", "ULTRAFEEDBACK", "HH")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


def write_file(folder, layout: str, suffix: str) -> bytes:
    """Write twenty rows of a layout, and return the bytes; CSV holds texts alone, so that lists become JSON."""
    rows = [LAYOUTS[layout] | {"id": f"row {number}"} for number in range(20)]
    path = folder / f"good.{suffix}"
    if suffix == "jsonl":
        jsonl(path, *rows)
    elif suffix == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        texts = [{name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows]
        pl.DataFrame(texts).write_csv(path)
    return path.read_bytes()


def damage(data, content: bytes) -> bytes:
    """Change some bytes, cut a piece out, or cut the end off."""
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        length = data.draw(st.sampled_from([0, len(new), len(new), 100, len(mutated)]))
        mutated[start : start + length] = new
    return bytes(mutated)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@settings(deadline=None, max_examples=300)
@given(data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_a_damaged_file_is_read_or_refused_in_one_line(folder, suffix, data, layout):
    path = folder / f"damaged.{suffix}"
    path.write_bytes(damage(data, write_file(folder, layout, suffix)))
    for read in (read_rows, read_prompts):
        try:
            table = read(path)
        except UserError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            assert read is read_prompts or table.schema == ROWS
