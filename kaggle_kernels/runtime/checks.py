"""What must hold before hours of work begin: libraries, GPUs, memory, disk. No GPU is touched here: nvidia-smi is asked.

What would make answers wrong, or could only end in a crash, is a MachineError that says what to do; what costs no more than
speed is a line in the log. What cannot be found out (no nvidia-smi, no /proc) is not checked.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.settings import Clock, Settings, log

ASK_GPUS = ("nvidia-smi", "--query-gpu=name,memory.free,memory.total,compute_cap", "--format=csv,noheader,nounits")
ASK_SECONDS = 30
EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4
OLDEST_CAPABILITY = 7.0  # a P100 has 6.0, and the image's PyTorch no code for it
MEBIBYTE = 2**20
GIBIBYTE = 2**30
CUDA_CONTEXT_BYTES = GIBIBYTE // 2
BATCH_BYTES = 2 * GIBIBYTE  # with less beside the weights, batches are halved again and again
PROCESS_BYTES = GIBIBYTE  # of RAM: Python, PyTorch and CUDA's libraries in a worker
OUTPUT_BYTES = 1000  # of a row, in submission.csv and scores.parquet together: two models take a quarter of it
METHODS = {"bitsandbytes": "bitsandbytes", "gptq": None}  # how weights are packed, and what unpacks them if not this runtime
COMPARED = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot give the answers that the packages were made for."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi tells of it; None is what it did not tell."""

    name: str
    free_bytes: int | None
    total_bytes: int | None
    capability: float | None


@dataclass(frozen=True)
class Need:
    """A package's run, its placement, the bytes of its weights on the disk, and what each of those is in RAM on a CPU."""

    run: str
    placement: str
    weight_bytes: int
    cpu_factor: int = 1


def check_machine(
    root: Path, settings: Settings, packages: Sequence[Package], devices: Sequence[str], rows: int, clock: Clock
) -> dict:
    """Check libraries, GPUs, memory and disk for the checked packages, and log what is there; the record for kernel.json.

    `devices` are PyTorch's, `rows` those to be scored. Raises MachineError.
    """
    lines = check_libraries(packages, {name: installed_version(name) for name in COMPARED})
    needs = [need_of(chosen, package) for chosen, package in zip(settings.packages, packages, strict=True)]
    gpus = visible_gpus(ask_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    lines += check_gpus(devices, gpus, needs, on_kaggle="KAGGLE_ROOT" not in os.environ)
    memory = available_memory()
    lines += check_memory(memory, devices, needs)
    free = check_disk(root / "working", rows)
    log(clock, machine_line(gpus, memory, free))
    for line in lines:
        log(clock, line)
    return {
        "gpus": None if gpus is None else [asdict(gpu) for gpu in gpus],
        "memory_bytes": memory,
        "disk_bytes": free,
        "notes": lines,
    }


def need_of(chosen, package: Package) -> Need:
    """What a package of the settings asks of the machine. On a CPU, float16 weights that are not packed become float32."""
    size = sum(path.stat().st_size for path in package.folder.glob("*.safetensors"))
    widened = package.manifest.get("quantize") == "none" and package.manifest.get("dtype") == "float16"
    return Need(chosen.run, chosen.placement, size, 2 if widened else 1)


def installed_version(name: str) -> str | None:
    """The version of an installed package, None where it is absent; it is not imported."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_libraries(packages: Sequence[Package], served: Mapping[str, str | None]) -> list[str]:
    """Raise MachineError where a package needs what is absent or too old; lines of versions that differ from training's.

    Golden rows show whether another version of PyTorch or of the tokenizers gives other answers, so those are only told. But
    transformers of an older major version reads a newer configuration without complaint and ignores what it does not know:
    version 5 writes rope_parameters, without which version 4 gives every model the same rotary base.
    """
    lines = []
    for package in packages:
        name = package.folder.name
        config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
        trained = package.contract.recorded.get("versions", {})
        saved = config.get("transformers_version") or trained.get("transformers")
        if major(served["transformers"]) < major(saved):
            raise MachineError(
                f"{name}: saved by transformers {saved}, which version {served['transformers']} here would read wrongly; "
                "choose the newest environment for the kernel"
            )
        method = (config.get("quantization_config") or {}).get("quant_method")
        is_unmerged = (package.folder / "lora_config.json").is_file()
        if method and method not in METHODS:
            raise MachineError(f"{name}: quantised by {method}, this kernel knows {', '.join(METHODS)}; package the run again")
        for library in filter(None, (METHODS.get(method), "peft" if is_unmerged else None)):
            if served[library] is None:
                raise MachineError(f"{name}: needs {library}, which is not installed; attach a dataset with its wheel")
        used = {"torch", "transformers", "tokenizers", METHODS.get(method), "peft" if is_unmerged else None}
        lines += [
            f"{name}: trained with {library} {trained[library]}, served with {served[library]}"
            for library in COMPARED
            if library in used and trained.get(library, served[library]) != served[library]
        ]
    return lines


def major(version: str | None) -> int:
    """The first number of a version; 0 where there is none."""
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else 0


def ask_gpus() -> list[Gpu] | None:
    """The GPUs that nvidia-smi tells of; None where it is absent, fails, or does not answer in ASK_SECONDS."""
    try:
        done = subprocess.run(ASK_GPUS, capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs from nvidia-smi's lines: name, MiB free, MiB in all, compute capability; "[N/A]" is None."""

    def number(field: str) -> float | None:
        return float(field) if re.fullmatch(r"\d+(\.\d+)?", field) else None

    gpus = []
    for line in filter(str.strip, text.splitlines()):
        name, *fields = (field.strip() for field in line.rsplit(",", 3))
        free, total, capability = (*map(number, fields), None, None, None)[:3]
        gpus.append(Gpu(name, free and int(free * MEBIBYTE), total and int(total * MEBIBYTE), capability))
    return gpus


def visible_gpus(gpus: list[Gpu] | None, visible: str | None) -> list[Gpu] | None:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES lets PyTorch see, if it names them by number; nvidia-smi sees all."""
    if gpus is None or visible is None or not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", visible):
        return gpus
    return [gpus[number] for number in map(int, visible.split(",")) if number < len(gpus)]


def check_gpus(devices: Sequence[str], gpus: Sequence[Gpu] | None, needs: Sequence[Need], on_kaggle: bool) -> list[str]:
    """Raise MachineError where the GPUs cannot do the work; lines of what will make it slow. In a rehearsal CPUs stand in."""
    if not any(device.startswith("cuda") for device in devices):
        if on_kaggle:
            raise MachineError(
                "PyTorch finds no GPU, and CPUs would take days; set machine_shape to NvidiaTeslaT4 and enable_gpu to true in "
                "kernel-metadata.json, or choose GPU T4 x2 in the editor, and look whether the week's GPU hours are spent"
            )
        return []
    for gpu in gpus or ():
        if gpu.capability is not None and gpu.capability < OLDEST_CAPABILITY:
            raise MachineError(
                f"{gpu.name} has compute capability {gpu.capability}, Kaggle's PyTorch needs {OLDEST_CAPABILITY} or more; set "
                "machine_shape to NvidiaTeslaT4 in kernel-metadata.json, or choose GPU T4 x2 in the editor"
            )
    lines = []
    if len(devices) < EXPECTED_GPUS and any(need.placement == "each" for need in needs):
        lines.append(f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected: half the speed")
    if gpus is None or len(gpus) != len(devices) or any(gpu.free_bytes is None for gpu in gpus):
        return [*lines, "warning: nvidia-smi does not tell the free memory of each GPU, so it is not checked"]
    return lines + [line for need in needs for line in check_gpu_memory([gpu.free_bytes for gpu in gpus], need)]


def check_gpu_memory(free: Sequence[int], need: Need) -> list[str]:
    """Raise MachineError where no GPU (placement each) or not all of them together (split) hold the weights."""
    weights, is_split = in_gibibytes(need.weight_bytes), need.placement == "split"
    rooms = [one - CUDA_CONTEXT_BYTES for one in free]
    room = (sum(rooms) if is_split else max(rooms)) - need.weight_bytes
    if room < 0:
        where, told = " over all GPUs" if is_split else "", " and ".join(map(in_gibibytes, free))
        raise MachineError(
            f"{need.run}: {weights} GiB of weights{where}, and {told} GiB free; use two T4s (machine_shape NvidiaTeslaT4), "
            "restart the session if another kernel is on them, or quantise to fewer bits"
        )
    lines = []
    if room < BATCH_BYTES * (len(free) if is_split else 1):
        lines.append(f"warning: {need.run}: {weights} GiB of weights leave {in_gibibytes(room)} GiB free for batches")
    if not is_split:
        lines += [
            f"warning: {need.run}: cuda:{number} has {in_gibibytes(one)} GiB free, too few for {weights} GiB of weights"
            for number, one in enumerate(free)
            if one < CUDA_CONTEXT_BYTES + need.weight_bytes
        ]
    return lines


def available_memory(path: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of RAM, swap included, that can be had without pushing anything out; None where Linux does not say."""
    try:
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        return (int(found["MemAvailable"]) + int(found.get("SwapFree", 0))) * 1024
    except (OSError, KeyError):
        return None


def check_memory(available: int | None, devices: Sequence[str], needs: Sequence[Need]) -> list[str]:
    """Raise MachineError where RAM cannot hold the workers, with the weights too where those are CPUs; lines of what is tight.

    Weights on the way to a GPU are mapped files, which need no RAM; without room for them each GPU reads them from the disk.
    """
    if available is None or not needs:
        return []
    largest = max(needs, key=lambda need: need.weight_bytes * need.cpu_factor * copies(need, devices))
    held = largest.weight_bytes * largest.cpu_factor * copies(largest, devices)
    on_gpus = any(device.startswith("cuda") for device in devices)
    workers = PROCESS_BYTES * copies(largest, devices) if on_gpus else 0
    sizes = f"{in_gibibytes(available)} GiB of RAM can be had"
    if available < workers + (0 if on_gpus else held):
        what = f"{copies(largest, devices)} processes need {in_gibibytes(workers)}"
        if not on_gpus:
            what = f"{largest.run} needs {in_gibibytes(held)} on {', '.join(devices)}"
        raise MachineError(f"{sizes}, {what}; end what else runs on this machine")
    if on_gpus and available < workers + largest.weight_bytes:
        return [f"warning: {sizes}, less than the weights of {largest.run}: loading is as slow as the disk, on every GPU"]
    if not on_gpus and available < 1.2 * held:
        return [f"warning: {sizes}, {largest.run} needs {in_gibibytes(held)} for its weights alone"]
    return []


def copies(need: Need, devices: Sequence[str]) -> int:
    """How many copies of a package's model are loaded at a time."""
    return 1 if need.placement == "split" else len(devices)


def check_disk(working: Path, rows: int) -> int:
    """The bytes that are free in /kaggle/working; MachineError where the outputs cannot be written there."""
    needed = MEBIBYTE + rows * OUTPUT_BYTES
    try:
        working.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(working).free
        with tempfile.TemporaryFile(dir=working) as file:
            file.write(b"x")
    except OSError as error:
        raise MachineError(f"{working}: cannot be written to ({error}); the submission could not be kept") from None
    if free < needed:
        raise MachineError(
            f"{working}: {free / 1e6:.1f} MB free, {rows} rows may need {needed / 1e6:.1f}; remove files from there"
        )
    return free


def machine_line(gpus: Sequence[Gpu] | None, memory: int | None, disk: int) -> str:
    """GPUs, RAM and disk for the log."""
    if gpus is None:
        told = "no nvidia-smi"
    else:
        told = ", ".join(f"{gpu.name} ({in_gibibytes(gpu.free_bytes)} GiB free)" for gpu in gpus) or "no GPU"
    return f"machine: {told}; {in_gibibytes(memory)} GiB of RAM to be had; {disk / 1e9:.1f} GB free on the disk"


def in_gibibytes(size: int | None) -> str:
    """Bytes as GiB with one decimal."""
    return "?" if size is None else f"{size / GIBIBYTE:.1f}"
