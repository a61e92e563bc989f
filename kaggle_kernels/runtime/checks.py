"""What must hold before hours of work begin: libraries that read the packages rightly, and GPUs.

What would make answers wrong, or could only end in a crash, is a MachineError that says what to do.
"""

import importlib.metadata
import json
import os
from collections.abc import Sequence

from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.settings import Clock, log

EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot do the work."""


def check_machine(packages: Sequence[Package], devices: Sequence[str], clock: Clock) -> None:
    """Check that the installed transformers can read each package, and that there are GPUs."""
    transformers_version = importlib.metadata.version("transformers")
    for package in packages:
        check_transformers(package, transformers_version)

    is_rehearsal = "KAGGLE_ROOT" in os.environ
    uses_gpus = any(device.startswith("cuda") for device in devices)
    if not uses_gpus and not is_rehearsal:
        raise MachineError(
            "PyTorch finds no GPU, and CPUs would take days; set machine_shape to NvidiaTeslaT4 "
            "and enable_gpu to true in kernel-metadata.json, or choose GPU T4 x2 in the editor, "
            "and look whether the week's GPU hours are spent"
        )
    if uses_gpus and len(devices) < EXPECTED_GPUS:
        log(clock, f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected")


def check_transformers(package: Package, installed: str) -> None:
    """Raise MachineError where the `installed` version of transformers would misread a package.

    An older major version reads a newer configuration without complaint and ignores what it does
    not know: version 5 writes rope_parameters, without which version 4 gives every model the same
    rotary base.
    """
    # config.json says by which version the model was saved, or else the contract of its training.
    config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
    trained_with = package.contract.recorded.get("versions", {})
    saved_by = config.get("transformers_version") or trained_with.get("transformers")
    if saved_by and major_version(installed) < major_version(saved_by):
        raise MachineError(
            f"{package.folder.name}: saved by transformers {saved_by}, but {installed} is installed "
            "here, which would read it wrongly; choose the newest environment for the kernel"
        )


def major_version(version: str) -> int:
    """Return the first number of a version."""
    return int(version.split(".")[0])
