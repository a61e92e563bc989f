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


@dataclass(frozen=True)
class Part:
    """A layer, or a module beside the layers: its bytes, and its weights that are multiplied with every token."""

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
    """List a model's parts in the order in which a row passes through them, by bytes and elements of each tensor."""
    layers = find_layers(sizes)
    parts: dict[str, Part] = {}
    for name, (size_bytes, elements) in sizes.items():
        # Outside of the layers there is hardly work: embeddings are looked up, a head reads one token.
        work = 0
        if name.startswith(f"{layers}."):
            work = elements

        part_name = name_part(name, layers)
        part = parts.get(part_name, Part())
        parts[part_name] = Part(part.size_bytes + size_bytes, part.work + work)

    ordered_names = sorted(parts, key=lambda name: part_order(name, layers))
    return {name: parts[name] for name in ordered_names}


def name_part(tensor_name: str, layers: str) -> str:
    """Name the module that a tensor belongs to: a layer, or the largest module that holds no layer."""
    path = tensor_name.split(".")
    layers_path = layers.split(".")
    shared_path = os.path.commonprefix([path, layers_path])
    return ".".join(path[: len(shared_path) + 1])


def part_order(part_name: str, layers: str) -> tuple[int, int]:
    """Sort parts: embedding, layers by number, norm, head."""
    if part_name.startswith(f"{layers}."):
        return (1, int(part_name.rpartition(".")[2]))
    if "embed" in part_name:
        return (0, 0)
    if "norm" in part_name.lower():
        return (2, 0)
    return (3, 0)


def balance(parts: Sequence[Part], devices: int, byte_limit: int | None = None) -> list[int]:
    """Place parts on devices, neighbours together.

    Args:
        parts: The model's parts, in their order.
        devices: How many devices there are.
        byte_limit: The most bytes of weights on a device; None for no limit.

    Returns:
        Each part's device, by number. No device is over the limit by more than must be, the busiest has as little work as can
        be, and the fullest as few bytes.
    """
    # There are few ways to cut some dozens of layers in two: all are tried.
    all_cuts = itertools.combinations(range(1, len(parts)), devices - 1)
    best_cuts = min(all_cuts, key=lambda cuts: rate_cuts(parts, cuts, byte_limit))

    numbers = []
    for device, stage in enumerate(cut_parts(parts, best_cuts)):
        numbers += [device] * len(stage)
    return numbers


def rate_cuts(
    parts: Sequence[Part], cuts: Sequence[int], byte_limit: int | None
) -> tuple[int, int, int]:
    """Rate a placement, the best one lowest: bytes over the limit, then most work, then most bytes."""
    stages = cut_parts(parts, cuts)
    most_bytes = max(sum(part.size_bytes for part in stage) for stage in stages)
    most_work = max(sum(part.work for part in stage) for stage in stages)

    # Memory comes first: a split that does not fit is of no use, however fast.
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
    """Make transformers' device_map for the model in `folder`, its layers over all `devices`.

    Positions are computed beside the embedding; a head that is the embedding itself stays with it.
    """
    sizes = weight_sizes(folder)
    parts = list_parts(sizes)
    numbers = balance(list(parts.values()), len(devices), byte_limit)
    device_map = {}
    for part_name, number in zip(parts, numbers, strict=True):
        device_map[part_name] = devices[number]

    # What holds no weights, or those of another part, is not in the files.
    layers = find_layers(sizes)
    device_map[f"{layers.rpartition('.')[0]}.rotary_emb"] = devices[0]
    last_part = list(parts)[-1]
    if part_order(last_part, layers) == (2, 0):  # the norm: there is no head
        device_map["lm_head"] = devices[0]
    return device_map
