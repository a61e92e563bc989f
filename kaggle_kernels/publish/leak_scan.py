"""What must not leave this machine, looked for in a folder before it goes up: tokens, home paths, rows of the data.

A table of patterns in place of a library: detect-secrets (last released in 2024) knows no token of Kaggle, Hugging Face or
wandb, and its check of entropy takes each hash of a manifest for a secret. Each pattern has words without which it cannot
match, and only files with one of these are searched. Of weights, only the header is read: gigabytes take no time.
"""

import functools
import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError
from recipes.pairwise.contract import GOLDEN_ROWS

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")  # words of all kinds, also paths
NAMES = re.compile(
    r"\.netrc|_netrc|kaggle\.json|access_token(\.txt)?|credentials\.json|\.env|id_(rsa|dsa|ecdsa|ed25519)|.*\.pem"
)
NEVER = (
    *(".parquet", ".csv", ".tsv", ".jsonl", ".arrow", ".feather", ".sqlite", ".db"),
    *(".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz"),
    *(".zip", ".gz", ".tar", ".tgz", ".xz", ".bz2", ".zst", ".7z"),
)
LIBRARIES = (".whl",)  # by their SHA-256 in postprocess/wheels/kaggle-wheels.txt they are what their makers published
WINDOW = 48  # characters of normalised text: longer than a vocabulary's words, and than what code has in common
WINDOWS_OF_A_ROW = 2  # so many windows of one row are no accident
TEXTS = ("prompt", "response_a", "response_b")
HEADER_BYTES = 100 * 2**20  # what safetensors itself allows


@dataclass(frozen=True)
class Kind:
    """A kind of secret: its pattern, and words of which a file with a match has one."""

    name: str
    pattern: re.Pattern[bytes]
    words: tuple[bytes, ...]
    is_path: bool = False


def _kind(name: str, pattern: str, *words: str, is_path: bool = False) -> Kind:
    return Kind(name, re.compile(pattern.encode()), tuple(word.encode() for word in words), is_path)


_IS = r"""["'\]]*\s{0,4}[:=]\s{0,4}["']?"""  # from a name to its value in Python, JSON, YAML and shells
KINDS = (
    _kind("a token of Kaggle", r"\bKGAT_[A-Za-z0-9]{20,}", "KGAT_"),
    _kind("a token of Kaggle", rf"KAGGLE_(?:KEY|API_TOKEN){_IS}[A-Za-z0-9_-]{{16,}}", "KAGGLE_"),
    _kind("a key of Kaggle", r'"key"\s{0,4}:\s{0,4}"[0-9a-f]{32}"', '"key"'),
    _kind("a token of Hugging Face", r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}", "hf_", "api_org_"),
    _kind("a key of wandb", r"\bwandb_v1_[A-Za-z0-9_]{20,}", "wandb_v1_"),
    _kind(
        "a key of wandb", r"(?i:wandb|api_key|api\.wandb\.ai)[^\n]{0,60}?[\"'=:\s][0-9a-f]{40}\b", "wandb", "WANDB", "api_key"
    ),
    _kind("a key of OpenAI or Anthropic", r"\bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32,}", "sk-"),
    _kind("a key of AWS", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "AKIA", "ASIA"),
    _kind("a key of AWS", rf"(?i:aws_secret_access_key|aws_session_token){_IS}[A-Za-z0-9/+=]{{40,}}", "aws_se", "AWS_SE"),
    _kind("a key of Google", r"\bAIza[0-9A-Za-z_-]{35}", "AIza"),
    _kind(
        "a token of GitHub",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,})",
        *("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    ),
    _kind(
        "a token of GitLab, Slack or PyPI", r"\b(?:glpat-|xox[abprs]-|pypi-AgE)[A-Za-z0-9_-]{16,}", "glpat-", "xox", "pypi-AgE"
    ),
    _kind(
        "a private key",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:\\[nr]|[\r\n \"']){0,8}"
        r"(?:[A-Za-z-]{4,20}: [^\n\\]{0,80}(?:\\[nr]|[\r\n]){1,4}){0,4}[A-Za-z0-9+/=]{32,}",
        "PRIVATE KEY",
    ),
    _kind("a password in an address", r"://[^\s/:@\"'<>{}]{1,64}:[^\s/:@\"'<>{}]{3,128}@[A-Za-z0-9]", "://"),
    _kind("a line of .netrc", r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+", "machine"),
    _kind(
        "a secret by its name",
        rf"(?i:api_?key|secret|password|passwd|access_token|auth_token){_IS}(?=[A-Za-z_+/=-]*[0-9])(?=[0-9_+/=-]*[A-Za-z])"
        r"[A-Za-z0-9_+/=-]{24,}",
        *("api_key", "apikey", "API_KEY", "APIKEY", "secret", "SECRET", "passw", "PASSW", "access_token", "auth_token"),
    ),
    _kind("the path of a home folder", r"(?<![\w.-])/(?:home|Users)/[A-Za-z0-9_.-]+", "/home/", "/Users/", is_path=True),
    _kind("the path of a home folder", r"(?<![\w./-])/root(?![\w.-])", "/root", is_path=True),
    _kind("the path of a home folder", r"(?i:\b[a-z]:\\{1,2}users\\{1,2})[^\\\s\"']+", "Users", "users", is_path=True),
)


def scan(folder: Path) -> list[str]:
    """A line for everything in the folder that looks like a secret or names a home folder; of a secret, four characters."""
    return [problem for path in sorted(folder.rglob("*")) if path.is_file() for problem in _scan_file(path)]


def _scan_file(path: Path) -> Iterator[str]:
    if NAMES.fullmatch(path.name):
        yield f"{path}: by its name it holds credentials; remove it"
    elif path.suffix.lower() in NEVER:
        yield f"{path}: a package holds no {path.suffix} files, which may hold rows of the data or code; remove it"
    elif path.suffix not in LIBRARIES and path.stat().st_size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            is_header = path.suffix == ".safetensors"
            yield from _matches(path, _header(content, path) if is_header else content, "header" if is_header else "line")


def _header(content: mmap.mmap, path: Path) -> bytes:
    """The JSON in front of the weights: names, shapes, and whatever their writer put there."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(HEADER_BYTES, len(content) - 8):
        raise UserError(f"{path}: no safetensors file, its header is said to have {length} bytes; make the folder again")
    return content[8 : 8 + length]


def _matches(path: Path, content: mmap.mmap | bytes, unit: str) -> Iterator[str]:
    for kind in KINDS:
        if kind.is_path and path.name in VOCABULARIES or not any(content.find(word) >= 0 for word in kind.words):
            continue
        for match in kind.pattern.finditer(content):
            at = content[: match.start()].count(b"\n") + 1
            shown = match[0][:4].decode("ascii", "replace")
            where = unit if unit == "header" else f"{unit} {at}"
            yield f"{path}: {where}: looks like {kind.name} ({shown}…); {_remedy(kind)}"


def _remedy(kind: Kind) -> str:
    if kind.is_path:
        return "name the base model by its repository or a relative path, and make the folder again"
    return "take it out, make the folder again, and revoke it if it has been anywhere else"


def rows_in(folders: Sequence[Path], pairs: Path) -> list[str]:
    """A line for each file with texts of rows of `pairs`: two stretches of 48 characters of the same row.

    Both sides are normalised: case, spaces and punctuation do not count. Shorter texts are not looked for, nor the golden rows,
    which are made up.
    """
    places: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        for text in _texts_of(path):
            places |= dict.fromkeys(_windows(text, 1), path)
    for window in _golden_windows():
        places.pop(window, None)
    if not places:
        return []
    found: dict[Path, list[str]] = {}
    for row_id, stretches in _stretches(pairs):
        hits = {window for stretch in stretches for window in _windows(stretch, WINDOW) if window in places}
        if len(hits) >= WINDOWS_OF_A_ROW:
            for path in {places[window] for window in hits}:
                found.setdefault(path, []).append(row_id)
    return [_told(path, ids, pairs) for path, ids in found.items()]


def _told(path: Path, ids: Sequence[str], pairs: Path) -> str:
    rows = f"{len(ids):,} row{'s' * (len(ids) > 1)} of {pairs} (id {ids[0]})"
    return f"{path}: holds texts of {rows}, which the competition does not let out; take them out, and make the folder again"


def _texts_of(path: Path) -> Iterator[str]:
    """The strings of a JSON file, or a text file as a whole; nothing of weights and wheels."""
    if path.suffix.lower() in (".safetensors", *LIBRARIES, *NEVER):
        return
    text = path.read_bytes().decode("utf-8", "replace")
    if path.name in VOCABULARIES and path.suffix != ".json":
        text = "\n".join(line for line in text.splitlines() if len(line) >= WINDOW)
    try:
        yield from _strings(json.loads(text)) if path.suffix == ".json" else [text]
    except (json.JSONDecodeError, RecursionError):
        yield text


def _strings(value: object) -> Iterator[str]:
    """Every string in parsed JSON that is long enough for a window."""
    if isinstance(value, str):
        if len(value) >= WINDOW:
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _windows(text: str, step: int) -> Iterator[str]:
    """Stretches of WINDOW characters of the normalised text, one every `step` characters.

    A character of Chinese, Japanese or Korean says as much as three others, and is written three times.
    """
    words = re.sub(r"\W+", " ", text.casefold()).strip()
    words = re.sub(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", r"\g<0>\g<0>\g<0>", words)
    return (words[at : at + WINDOW] for at in range(0, len(words) - WINDOW + 1, step))


@functools.cache
def _golden_windows() -> frozenset[str]:
    """The windows of the contract's made-up rows."""
    return frozenset(window for text in _strings(list(GOLDEN_ROWS)) for window in _windows(text, 1))


def _stretches(pairs: Path) -> Iterator[tuple[str, list[str]]]:
    """Of each row its id, and of each of its texts the beginning and the middle: enough for windows, not all of it."""
    try:
        table = pl.scan_parquet(pairs).select("id", *(pl.col(name).list.join("\n").alias(name) for name in TEXTS))
        heads = [pl.col(name).str.slice(0, 4 * WINDOW).alias(f"{name}_head") for name in TEXTS]
        middles = [
            pl.col(name).str.slice(pl.col(name).str.len_chars() // 2, 4 * WINDOW).alias(f"{name}_middle") for name in TEXTS
        ]
        rows = table.select("id", *heads, *middles).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{pairs}: cannot be read ({str(error).splitlines()[0]}); make it again with python -m preprocess"
        ) from None
    for row_id, *texts in rows.iter_rows():
        yield row_id, [text for text in texts if text]
