"""A second look at what goes up, for what must not leave this machine: tokens, home folders, rows of the data.

package_files.py decides which files may go up at all. Of weights only the header is read: gigabytes take no time.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
from safetensors import SafetensorError, safe_open

from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from preprocess.sources.rows import TEXTS

# Words of all kinds, also what looks like a path; their hashes are in the contract.
VOCABULARIES = ("tokenizer.json", "vocab.txt")

# Characters of normalised text: more than code and templates have in common with a row.
NGRAM_CHARACTERS = 48
# So many n-grams of one row in one file are no accident.
NGRAMS_OF_A_ROW = 2
REMEDY = "take it out, make the folder again, and revoke a secret that has been anywhere else"

# From a name to its value in Python, JSON, YAML and shells.
IS = r"""["'\]]*\s{0,4}[:=]\s{0,4}["']?"""

SECRETS = (
    r"\b(KGAT_|hf_|api_org_|wandb_v1_|AIza|gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{20,}",
    r"\bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32,}",
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"""(?i:wandb)[^\n]{0,60}?["'=:\s][0-9a-f]{40}\b""",
    r"PRIVATE KEY-----(\\n|\s){1,8}[A-Za-z0-9+/=]{32,}",
    r"""://[^\s/:@"'<>{}]{1,64}:[^\s/:@"'<>{}]{3,128}@[A-Za-z0-9]""",
    rf"(?i:key|secret|password|token){IS}(?=[A-Za-z_+/=-]*\d)(?=[\d_+/=-]*[A-Za-z])[\w+/=-]{{24,}}",
)
HOMES = (
    r"(?<![\w.-])/(home|Users)/[\w.-]+",
    r"(?<![\w./-])/root(?![\w.-])",
    r"(?i:\b[a-z]:\\{1,2}users\\{1,2})\w+",
)


def scan(folder: Path) -> list[str]:
    """List what looks like a secret, or names a home folder, in a folder's files; a line for each."""
    problems = []
    for path in sorted(folder.iterdir()):
        text = read_text(path)
        problems += find_matches(path, text, SECRETS, "a secret")
        if path.name not in VOCABULARIES:
            problems += find_matches(path, text, HOMES, "the path of a home folder")
    return problems


def read_text(path: Path) -> str:
    """Read the text of a file: of weights the header's, of wheels and folders none."""
    if not path.is_file() or path.suffix == ".whl":
        return ""
    if path.suffix != ".safetensors":
        return path.read_bytes().decode("utf-8", "replace")

    # A broken header is reported by package_files.py.
    try:
        with safe_open(path, framework="np") as file:
            return json.dumps([file.metadata(), list(file.keys())])
    except SafetensorError:
        return ""


def find_matches(path: Path, text: str, patterns: Sequence[str], name: str) -> Iterator[str]:
    """Find every match of the patterns in a file's text."""
    for pattern in patterns:
        for match in re.finditer(pattern, text, re.ASCII):
            # The log must not hold the secret: its first four characters help to find it.
            line = text.count("\n", 0, match.start()) + 1
            yield f"{path}: line {line}: looks like {name} ({match[0][:4]}…); {REMEDY}"


def find_rows(folders: Sequence[Path], pairs: Path) -> list[str]:
    """Find files that hold texts of the competition's pairs, which may not be published.

    Texts are compared by n-grams: stretches of NGRAM_CHARACTERS characters, without regard to case, spaces and
    punctuation. A file holds a row's text where it has NGRAMS_OF_A_ROW of the row's n-grams.

    Returns:
        A line for each file in `folders` that holds texts of the file `pairs`.
    """
    ngrams_by_path = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            ngrams_by_path[path] = cut_file(path)

    # A file's n-grams begin at each of its characters, so that n-grams of a row that lie end to end are
    # enough: wherever its text stands in the file, they are found.
    ids_by_path: dict[Path, list[str]] = {}
    for row_id, beginnings in read_beginnings(pairs):
        row_ngrams = set()
        for beginning in beginnings:
            row_ngrams.update(cut_ngrams(beginning, step=NGRAM_CHARACTERS))
        for path, file_ngrams in ngrams_by_path.items():
            if len(row_ngrams & file_ngrams) >= NGRAMS_OF_A_ROW:
                ids_by_path.setdefault(path, []).append(row_id)

    # The texts themselves must not get into a log: one row's id helps to find them.
    problems = []
    for path, ids in ids_by_path.items():
        problems.append(
            f"{path}: holds texts of {len(ids):,} of the pairs in {pairs} (id {ids[0]}), which the "
            "competition does not allow to publish; take them out, and make the folder again"
        )
    return problems


def cut_file(path: Path) -> set[str]:
    """Cut a file's text into n-grams, one at each character; no n-grams for a file that cannot hold rows."""
    is_binary = path.suffix in (".safetensors", ".whl")
    if is_binary or path.name in VOCABULARIES or not path.is_file():
        return set()

    # JSON may escape characters, so that its strings are compared, not its bytes.
    if path.suffix == ".json":
        texts = find_strings(read_json(path))
    else:
        texts = [read_text(path)]
    ngrams = set()
    for text in texts:
        ngrams.update(cut_ngrams(text, step=1))
    return ngrams


def find_strings(value: object) -> list[str]:
    """Find every string in parsed JSON."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, Sequence):
        return []

    strings = []
    for inner in value:
        strings += find_strings(inner)
    return strings


def cut_ngrams(text: str, step: int) -> Iterator[str]:
    """Cut n-grams of NGRAM_CHARACTERS out of the normalised text, one every `step` characters."""
    words = re.sub(r"\W+", " ", text.casefold()).strip()
    # A character of Chinese, Japanese or Korean says as much as three others.
    words = re.sub(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", r"\g<0>\g<0>\g<0>", words)
    for start in range(0, len(words) - NGRAM_CHARACTERS + 1, step):
        yield words[start : start + NGRAM_CHARACTERS]


def read_beginnings(pairs: Path) -> Iterator[tuple[str, list[str]]]:
    """Read each row's id and the beginnings of its texts, each long enough for four n-grams."""
    beginning_columns = []
    for name in TEXTS:
        turns_joined = pl.col(name).list.join("\n")
        beginning_columns.append(turns_joined.str.slice(0, 4 * NGRAM_CHARACTERS))
    try:
        rows = pl.scan_parquet(pairs).select("id", *beginning_columns).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{pairs}: cannot be read ({reason}); make it again with python -m preprocess"
        ) from None

    for row_id, *beginnings in rows.iter_rows():
        yield row_id, [beginning for beginning in beginnings if beginning]
