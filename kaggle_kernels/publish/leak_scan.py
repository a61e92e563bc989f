"""A second look at what goes up, for what must not leave this machine: tokens, home folders, rows of the data.

package_files.py decides which files may go up at all. Each pattern here has words without which it cannot match, and only files
with one of these are searched. Of weights only the header is read: gigabytes take no time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from recipes.pairwise.contract import GOLDEN_ROWS

# Words of all kinds, also what looks like a path; their hashes are in the contract.
VOCABULARIES = ("tokenizer.json", "vocab.txt")
WHEEL = ".whl"
WEIGHTS = ".safetensors"

# Characters of normalised text: more than code and templates have in common with a row.
NGRAM_CHARACTERS = 48
# So many n-grams of one row are no accident.
NGRAMS_OF_A_ROW = 2
REMEDY = "take it out, make the folder again, and revoke a secret that has been anywhere else"
TEXTS = ("prompt", "response_a", "response_b")

# From a name to its value in Python, JSON, YAML and shells.
IS = r"""["'\]]*\s{0,4}[:=]\s{0,4}["']?"""

# What is looked for, what it looks like, and words of which a file with a match has one.
SECRET, HOME = "a secret", "the path of a home folder"
PATTERNS = (
    (
        SECRET,
        r"\b(KGAT_|hf_|api_org_|wandb_v1_|AIza|gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{20,}",
        "KGAT_ hf_ api_org_ wandb_v1_ AIza ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat-",
    ),
    (SECRET, r"\bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32,}", "sk-"),
    (SECRET, r"\b(AKIA|ASIA)[0-9A-Z]{16}\b", "AKIA ASIA"),
    (SECRET, r"""(?i:wandb)[^\n]{0,60}?["'=:\s][0-9a-f]{40}\b""", "wandb WANDB"),
    (SECRET, r"PRIVATE KEY-----(\\n|\s){1,8}[A-Za-z0-9+/=]{32,}", "PRIVATE"),
    (SECRET, r"""://[^\s/:@"'<>{}]{1,64}:[^\s/:@"'<>{}]{3,128}@[A-Za-z0-9]""", "://"),
    (
        SECRET,
        rf"(?i:key|secret|password|token){IS}(?=[A-Za-z_+/=-]*\d)(?=[\d_+/=-]*[A-Za-z])[\w+/=-]{{24,}}",
        "key KEY secret SECRET password PASSWORD token TOKEN",
    ),
    (HOME, r"(?<![\w.-])/(home|Users)/[\w.-]+", "/home/ /Users/"),
    (HOME, r"(?<![\w./-])/root(?![\w.-])", "/root"),
    (HOME, r"(?i:\b[a-z]:\\{1,2}users\\{1,2})\w+", "Users users"),
)


def scan(folder: Path) -> list[str]:
    """List what looks like a secret or names a home folder, a line for each; of a secret, four characters."""
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != WHEEL:
            content = read_header(path) if path.suffix == WEIGHTS else path.read_bytes()
            problems.extend(find_secrets(path, content))
    return problems


def read_header(path: Path) -> bytes:
    """Read the JSON in front of the weights: names, shapes, and whatever their writer put there."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def find_secrets(path: Path, content: bytes) -> Iterator[str]:
    """Find every match of every pattern in a file's content."""
    for name, pattern, words in PATTERNS:
        is_vocabulary = path.name in VOCABULARIES and name == HOME
        if is_vocabulary or not any(word.encode() in content for word in words.split()):
            continue

        # A secret that is printed would be one more place that has it: four characters find it again.
        for match in re.finditer(pattern.encode(), content):
            line = content.count(b"\n", 0, match.start()) + 1
            shown = match[0][:4].decode("ascii", "replace")
            yield f"{path}: line {line}: looks like {name} ({shown}…); {REMEDY}"


def find_rows(folders: Sequence[Path], pairs: Path) -> list[str]:
    """Find texts of the competition's pairs in the files that are to be uploaded.

    A row counts as found where two of its n-grams, of 48 characters each, are in the files. Case,
    spaces and punctuation do not count, and the made-up golden rows are not looked for.

    Args:
        folders: The folders to be uploaded.
        pairs: The pairs.parquet whose texts may not go up.

    Returns:
        One problem for each file with n-grams of such rows.
    """
    path_by_ngram = index_ngrams(folders)

    # The files are cut at every character, so that the rows need not be: far fewer look-ups.
    ids_by_path: dict[Path, list[str]] = {}
    for row_id, beginnings in read_beginnings(pairs):
        shared_ngrams = set()
        for beginning in beginnings:
            ngrams = cut_ngrams(beginning, step=NGRAM_CHARACTERS)
            shared_ngrams.update(ngram for ngram in ngrams if ngram in path_by_ngram)
        if len(shared_ngrams) >= NGRAMS_OF_A_ROW:
            for path in {path_by_ngram[ngram] for ngram in shared_ngrams}:
                ids_by_path.setdefault(path, []).append(row_id)

    problems = []
    for path, ids in ids_by_path.items():
        rows = "1 row" if len(ids) == 1 else f"{len(ids):,} rows"
        problems.append(
            f"{path}: holds texts of {rows} of {pairs} (id {ids[0]}), which the competition does "
            "not let out; take them out, and make the folder again"
        )
    return problems


def index_ngrams(folders: Sequence[Path]) -> dict[str, Path]:
    """Map each n-gram of the folders' texts to a file that has it."""
    path_by_ngram = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            for text in read_texts(path):
                path_by_ngram.update(dict.fromkeys(cut_ngrams(text, step=1), path))

    # A package may have the golden rows, which are made up.
    for text in find_strings(GOLDEN_ROWS):
        for ngram in cut_ngrams(text, step=1):
            path_by_ngram.pop(ngram, None)
    return path_by_ngram


def read_texts(path: Path) -> list[str]:
    """Read the strings of a JSON file, or a text file as a whole; nothing of weights, wheels and vocabularies."""
    if not path.is_file() or path.suffix in (WEIGHTS, WHEEL) or path.name in VOCABULARIES:
        return []
    # JSON escapes what is not ASCII: its strings are compared, not its bytes.
    text = path.read_bytes().decode("utf-8", "replace")
    if path.suffix != ".json":
        return [text]
    return find_strings(read_json(path))


def find_strings(value: object) -> list[str]:
    """Find every string in parsed JSON."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [text for inner in value for text in find_strings(inner)]
    return [value] if isinstance(value, str) else []


def cut_ngrams(text: str, step: int) -> Iterator[str]:
    """Cut n-grams of NGRAM_CHARACTERS out of the normalised text, one every `step` characters."""
    words = re.sub(r"\W+", " ", text.casefold()).strip()
    # A character of Chinese, Japanese or Korean says as much as three others.
    words = re.sub(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", r"\g<0>\g<0>\g<0>", words)
    for start in range(0, len(words) - NGRAM_CHARACTERS + 1, step):
        yield words[start : start + NGRAM_CHARACTERS]


def read_beginnings(pairs: Path) -> Iterator[tuple[str, list[str]]]:
    """Read each row's id and the beginnings of its texts, each long enough for four n-grams."""
    texts = [pl.col(name).list.join("\n").str.slice(0, 4 * NGRAM_CHARACTERS) for name in TEXTS]
    try:
        rows = pl.scan_parquet(pairs).select("id", *texts).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{pairs}: cannot be read ({reason}); make it again with python -m preprocess"
        ) from None
    for row_id, *beginnings in rows.iter_rows():
        yield row_id, [beginning for beginning in beginnings if beginning]
