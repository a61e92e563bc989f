"""What must hold before hours of work begin: libraries, GPUs, a disk that can be written to.

No GPU is touched here: nvidia-smi is asked. What would make answers wrong, or could only end in a
crash, is a MachineError that says what to do; what costs no more than speed is a line in the log.
What cannot be found out is not checked.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.settings import Clock, log

ASK_GPUS = (
    "nvidia-smi",
    "--query-gpu=name,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
ASK_SECONDS = 30
EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4
OLDEST_CAPABILITY = 7.0  # a P100 has 6.0, and the image's PyTorch no code for it
MEBIBYTE = 2**20
GIBIBYTE = 2**30
FREE_BYTES = 14 * GIBIBYTE  # of a T4 that no other process uses

# How weights may be packed, and the library that unpacks them, if it is not this runtime.
METHODS = {"bitsandbytes": "bitsandbytes", "gptq": None}
COMPARED = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot do the work."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi describes it; None is what it does not say."""

    name: str
    free_bytes: int | None
    capability: float | None


def check_machine(
    root: Path, packages: Sequence[Package], devices: Sequence[str], clock: Clock
) -> dict:
    """Check libraries, GPUs and the disk for packages, and log what is there.

    Returns:
        What kernel.json says of the machine: `gpus` and `notes`.
    """
    check_disk(root / "working")
    notes = check_libraries(packages, {name: installed_version(name) for name in COMPARED})
    gpus = ask_gpus()
    notes += check_gpus(devices, gpus, on_kaggle="KAGGLE_ROOT" not in os.environ)

    # The log says what was there, whatever happens later.
    names = [f"{gpu.name} ({format_gib(gpu.free_bytes)} GiB free)" for gpu in gpus or ()]
    log(clock, f"machine: {', '.join(names) or 'no GPU'}")
    for note in notes:
        log(clock, note)
    return {"gpus": [asdict(gpu) for gpu in gpus or ()], "notes": notes}


def check_disk(working: Path) -> None:
    """Raise MachineError where the outputs cannot be written to /kaggle/working."""
    try:
        working.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=working) as file:
            file.write(b"x")
    except OSError as error:
        raise MachineError(
            f"{working}: cannot be written to ({error}); the submission could not be kept"
        ) from None


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, None where it is absent; it is not imported."""
    if importlib.util.find_spec(name) is None:
        return None

    # A module that was copied without its metadata is there all the same.
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_libraries(packages: Sequence[Package], installed: Mapping[str, str | None]) -> list[str]:
    """Check the libraries that packages need.

    Golden rows show whether another version of PyTorch or of the tokenizers gives other answers, so
    those are only noted. But transformers of an older major version reads a newer configuration
    without complaint and ignores what it does not know: version 5 writes rope_parameters, without
    which version 4 gives every model the same rotary base.

    Returns:
        A note for each version that differs from training's.

    Raises:
        MachineError: A package needs what is absent or too old.
    """
    notes = []
    for package in packages:
        name = package.folder.name
        config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
        trained_with = package.contract.recorded.get("versions", {})
        saved_by = config.get("transformers_version") or trained_with.get("transformers")
        if major_version(installed["transformers"]) < major_version(saved_by):
            raise MachineError(
                f"{name}: saved by transformers {saved_by}, which version "
                f"{installed['transformers']} here would read wrongly; choose the newest "
                "environment for the kernel"
            )

        # Weights that nothing here can unpack.
        method = config.get("quantization_config", {}).get("quant_method")
        if method is not None and method not in METHODS:
            raise MachineError(
                f"{name}: quantised by {method}, this kernel knows {', '.join(METHODS)}; "
                "package the run again"
            )

        # What this package is computed with.
        needed = {"torch", "transformers", "tokenizers"}
        if METHODS.get(method) is not None:
            needed.add(METHODS[method])
        if (package.folder / "lora_config.json").is_file():
            needed.add("peft")  # the adapter is not merged
        for library in COMPARED:
            if library not in needed:
                continue
            if installed[library] is None:
                raise MachineError(
                    f"{name}: needs {library}, which is not installed; "
                    "attach a dataset with its wheel"
                )
            trained_version = trained_with.get(library, installed[library])
            if trained_version != installed[library]:
                notes.append(
                    f"{name}: trained with {library} {trained_version}, "
                    f"served with {installed[library]}"
                )
    return notes


def major_version(version: str | None) -> int:
    """Return the first number of a version; 0 where there is none."""
    match = re.match(r"\d+", version or "")
    return int(match[0]) if match else 0


def ask_gpus() -> list[Gpu] | None:
    """Ask nvidia-smi for the GPUs; None where it is absent, fails, or does not answer in time."""
    try:
        done = subprocess.run(
            ASK_GPUS, capture_output=True, text=True, timeout=ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Read GPUs from nvidia-smi's lines: name, free MiB, compute capability; "[N/A]" is None."""
    gpus = []
    for line in text.splitlines():
        if line.strip():
            # A GPU's name may hold a comma: the fields are counted from the right.
            name, free_mib, capability = [field.strip() for field in line.rsplit(",", 2)]
            free_bytes = None
            if free_mib.isdigit():
                free_bytes = int(free_mib) * MEBIBYTE
            capability_number = None
            if re.fullmatch(r"\d+(\.\d+)?", capability):
                capability_number = float(capability)
            gpus.append(Gpu(name, free_bytes, capability_number))
    return gpus


def check_gpus(devices: Sequence[str], gpus: Sequence[Gpu] | None, on_kaggle: bool) -> list[str]:
    """Check that the GPUs can do the work.

    Args:
        devices: PyTorch's names.
        gpus: As nvidia-smi describes them; None: it does not.
        on_kaggle: Whether there must be GPUs; in a rehearsal CPUs stand in for them.

    Returns:
        A note for each thing that will make it slow.
    """
    if not any(device.startswith("cuda") for device in devices):
        if on_kaggle:
            raise MachineError(
                "PyTorch finds no GPU, and CPUs would take days; set machine_shape to "
                "NvidiaTeslaT4 and enable_gpu to true in kernel-metadata.json, or choose GPU T4 x2 "
                "in the editor, and look whether the week's GPU hours are spent"
            )
        return []

    # Older GPUs fail at the first kernel that PyTorch starts.
    for gpu in gpus or ():
        if gpu.capability is not None and gpu.capability < OLDEST_CAPABILITY:
            raise MachineError(
                f"{gpu.name} has compute capability {gpu.capability}, Kaggle's PyTorch needs "
                f"{OLDEST_CAPABILITY} or more; set machine_shape to NvidiaTeslaT4 in "
                "kernel-metadata.json, or choose GPU T4 x2 in the editor"
            )

    # The build has computed that the weights fit a T4 that is free.
    notes = []
    if len(devices) < EXPECTED_GPUS:
        notes.append(f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected")
    for gpu in gpus or ():
        if gpu.free_bytes is not None and gpu.free_bytes < FREE_BYTES:
            notes.append(
                f"warning: {gpu.name} has {format_gib(gpu.free_bytes)} GiB free; restart the "
                "session if another kernel is on it"
            )
    return notes


def format_gib(size: int | None) -> str:
    """Format bytes as GiB with one decimal."""
    return "?" if size is None else f"{size / GIBIBYTE:.1f}"
