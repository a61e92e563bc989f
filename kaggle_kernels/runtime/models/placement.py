"""Which part of a model stands on which device, where one device cannot hold it: layers in their order, work in balance.

A split model runs at the speed of its slower device. Its layers are shared out evenly, as far as the devices' memory allows;
embedding and head hardly compute, but take memory. The build places a model by the same functions (postprocess.memory).
Nothing here needs torch: sizes come from the headers of the package's safetensors files.
"""

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The name of a tensor in one of several modules of a list.
NUMBERED = re.compile(r"^(.+?)\.(\d+)\.")

# The name of a part that is a layer.
LAYER = re.compile(r"\.\d+$")

# The place of the head in `part_order`.
HEAD_ORDER = (3, 0)


@dataclass(frozen=True)
class Part:
    """A layer, or a module beside the layers: its bytes, and how many weights multiply every token."""

    size_bytes: int = 0
    work: int = 0


def weight_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Read the bytes and the elements of every tensor in the folder's model*.safetensors, by name."""
    sizes = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        # A file begins with the length of its header, which describes each tensor.
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_length))
        header.pop("__metadata__", None)

        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            sizes[name] = (end - start, count_elements(name, header))
    return sizes


def count_elements(name: str, header: Mapping[str, Mapping]) -> int:
    """Count a tensor's elements; those of a quantised weight as they were before it was packed."""
    tensor = header[name]
    stored_elements = math.prod(tensor["shape"])

    # nf4 packs two elements into a byte.
    if tensor["dtype"] == "U8" and f"{name}.absmax" in header:
        return stored_elements * 2

    # GPTQ packs several inputs into a word; g_idx has an entry for each input.
    if name.endswith(".qweight"):
        group_indices = header[name.removesuffix("qweight") + "g_idx"]
        inputs_per_word = group_indices["shape"][0] // tensor["shape"][0]
        return stored_elements * inputs_per_word
    return stored_elements


def find_layers(sizes: Mapping[str, tuple[int, int]]) -> str:
    """Find the name of the list of layers, such as model.layers: of all lists the one with the most bytes."""
    bytes_by_list: Counter[str] = Counter()
    for name, (size_bytes, _) in sizes.items():
        numbered = NUMBERED.match(name)
        if numbered:
            bytes_by_list[numbered[1]] += size_bytes
    return max(bytes_by_list, key=bytes_by_list.get)


def list_parts(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Part]:
    """List a model's parts: its layers, and the modules before and after them.

    Returns:
        The parts by name, in the order in which a row passes through them.
    """
    layers = find_layers(sizes)
    parts: dict[str, Part] = {}
    for name, (size_bytes, elements) in sizes.items():
        # Outside of the layers there is hardly any work: an embedding is looked up, and a head
        # reads one token.
        is_in_layer = name.startswith(f"{layers}.")
        work = elements if is_in_layer else 0

        part_name = name_part(name, layers)
        part = parts.get(part_name, Part())
        parts[part_name] = Part(part.size_bytes + size_bytes, part.work + work)

    ordered_names = sorted(parts, key=lambda name: part_order(name, layers))
    return {name: parts[name] for name in ordered_names}


def name_part(tensor_name: str, layers: str) -> str:
    """Name the module that a tensor belongs to: a layer, or the largest module that holds no layer.

    With the layers in model.layers, model.layers.7.mlp.up_proj.weight belongs to model.layers.7, and
    model.norm.weight to model.norm.
    """
    # The module's name is one step longer than what the tensor's path has in common with the layers'.
    path = tensor_name.split(".")
    layers_path = layers.split(".")
    shared_path = os.path.commonprefix([path, layers_path])
    return ".".join(path[: len(shared_path) + 1])


def part_order(part_name: str, layers: str) -> tuple[int, int]:
    """Give a part's key for sorting: the embedding comes first, then the layers by number, norm and head."""
    if part_name.startswith(f"{layers}."):
        return (1, int(part_name.rpartition(".")[2]))
    if "embed" in part_name:
        return (0, 0)
    if "norm" in part_name.lower():
        return (2, 0)
    return HEAD_ORDER


def balance(parts: Sequence[Part], devices: int, byte_limit: int | None = None) -> list[int]:
    """Place a model's parts on devices so that these have equal work, as far as memory allows.

    Neighbouring parts stay together: each device gets a stretch of the list, called a stage, with
    no more than `byte_limit` bytes of weights where that is possible.

    Returns:
        The number of each part's device, in the order of the parts.
    """
    # A cut is the place of a stage's first part. There are few ways to cut some dozens of layers in
    # two, so that all are tried.
    all_cuts = itertools.combinations(range(1, len(parts)), devices - 1)
    best_cuts = min(all_cuts, key=lambda cuts: rate_cuts(parts, cuts, byte_limit))

    device_numbers = []
    for device, stage in enumerate(cut_parts(parts, best_cuts)):
        device_numbers += [device] * len(stage)
    return device_numbers


def rate_cuts(
    parts: Sequence[Part], cuts: Sequence[int], byte_limit: int | None
) -> tuple[int, int, int]:
    """Rate a placement for `balance`, which takes the lowest rating.

    Returns:
        To be compared in this order: bytes over the limit, the work of the busiest device, the
        bytes of the fullest device.
    """
    most_bytes = 0
    most_work = 0
    for stage in cut_parts(parts, cuts):
        most_bytes = max(most_bytes, sum(part.size_bytes for part in stage))
        most_work = max(most_work, sum(part.work for part in stage))

    # Memory comes first: a placement that does not fit is of no use, however fast.
    excess_bytes = 0
    if byte_limit is not None:
        excess_bytes = max(most_bytes - byte_limit, 0)
    return (excess_bytes, most_work, most_bytes)


def cut_parts(parts: Sequence[Part], cuts: Sequence[int]) -> list[Sequence[Part]]:
    """Cut a list of parts before the places in `cuts`."""
    bounds = [0, *cuts, len(parts)]
    return [parts[start:end] for start, end in itertools.pairwise(bounds)]


def split_over(
    folder: Path, devices: Sequence[str], byte_limit: int | None = None
) -> dict[str, str]:
    """Split the layers of a model over devices, with equal work as far as memory allows.

    Returns:
        The device of each part by name, as transformers takes it for `device_map`.
    """
    sizes = weight_sizes(folder)
    parts = list_parts(sizes)
    device_numbers = balance(list(parts.values()), len(devices), byte_limit)
    device_map = {}
    for part_name, number in zip(parts, device_numbers, strict=True):
        device_map[part_name] = devices[number]

    # Rotary positions have no weights in the files. They stand beside the layers in the model.
    layers = find_layers(sizes)
    parent_module = layers.rpartition(".")[0]
    device_map[f"{parent_module}.rotary_emb"] = devices[0]

    # Where the files have no head, its weights are the embedding's.
    if not any(part_order(part_name, layers) == HEAD_ORDER for part_name in parts):
        device_map["lm_head"] = devices[0]
    return device_map
