"""pip asked for wheels of Kaggle's Python, which is not the one that runs here; its answers in one line each."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from preprocess.core.errors import UserError

PYTHON, ABI = "3.12", "cp312"
NEWEST_GLIBC = (
    35  # Kaggle's image is no older than glibc 2.35, and manylinux_2_N asks for 2.N or newer
)
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(NEWEST_GLIBC, 4, -1)),
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)
TARGET = (
    *(
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        "--abi",
        ABI,
    ),
    *(f"--platform={platform}" for platform in PLATFORMS),
)
NO_CONNECTION = ("Retrying (Retry(", "connection error: ", "connection broken by")


def download(name: str, version: str, hashes: Sequence[str], folder: Path) -> None:
    """Put the wheel of a package into `folder`, if its SHA-256 is one of `hashes`; raises UserError where there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text(
            f"{name}=={version} {' '.join(f'--hash=sha256:{digest}' for digest in hashes)}\n"
        )
        options = ("--retries", "1", "--require-hashes", "--dest", str(folder), "-r", str(listed))
        done = _pip("download", "-vv", *TARGET, *options, environment=os.environ)
    if done.returncode:
        raise UserError(_why_not(name, version, unquote(done.stdout)))


def dry_run(folder: Path, packages: Sequence[str]) -> None:
    """Raise UserError unless pip would install `packages` for Kaggle's Python from `folder` alone, as a kernel does."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull  # no other folder or index may help
    with tempfile.TemporaryDirectory() as target:
        options = ("--dry-run", "--no-index", "--find-links", str(folder), "--target", target)
        done = _pip("install", *TARGET, *options, *packages, environment=environment)
    if done.returncode:
        raise UserError(
            f"pip would not install {', '.join(packages)} for Python {PYTHON} from their wheels alone: "
            f"{_last_error(done.stdout)}; pin another version in kaggle-wheels.txt"
        )


def _pip(
    command: str, *arguments: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess:
    quiet = ("--disable-pip-version-check", "--no-input")
    return subprocess.run(
        [sys.executable, "-m", "pip", command, *quiet, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def _why_not(name: str, version: str, output: str) -> str:
    """Why pip downloaded nothing, in one line, from what `pip download -vv` printed."""
    if found := re.search(r"Got\s+([0-9a-f]{64})", output):
        return (
            f"{name} {version}: its SHA-256 is {found[1][:12]}…, which kaggle-wheels.txt does not list; the file is not the "
            "one that was pinned: find out why before you change the list"
        )
    if files := _files_of(name, version, output):
        wanted = f"a wheel for Python {PYTHON} on Linux (x86_64, glibc 2.{NEWEST_GLIBC})"
        return f"{name} {version}: there is {', '.join(files)}, not {wanted}; pin another version in kaggle-wheels.txt"
    if any(words in output for words in NO_CONNECTION):
        return f"{name} {version}: no connection to the package index; run this where there is a network, or set PIP_INDEX_URL"
    if "No matching distribution found" in output:
        return f"{name} {version}: the package index has no such version; mend the pin in kaggle-wheels.txt"
    return f"{name} {version}: pip could not download it: {_last_error(output)}"


def _files_of(name: str, version: str, output: str) -> list[str]:
    """Names of the files of this version that pip saw and passed over, three at most."""
    spelt = re.sub(r"[-_.]+", "[-_.]+", re.escape(name).replace(r"\-", "-"))
    pattern = rf"(?<=/){spelt}-{re.escape(version)}(?:-[\w.+-]+\.whl|\.tar\.gz|\.zip)(?=\s|$|#)"
    found = sorted(set(re.findall(pattern, output, flags=re.IGNORECASE)))
    return [*found[:3], *([f"{len(found) - 3} more"] if len(found) > 3 else [])]


def _last_error(output: str) -> str:
    """The last line in which pip names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1]
