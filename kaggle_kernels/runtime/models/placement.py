"""Which part of a model stands on which device, where one device cannot hold it: layers in their order, bytes in balance.

Nothing here needs torch: sizes come from the headers of the package's safetensors files.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

LAYER = re.compile(r"^(.*\.layers)\.(\d+)\.")


def weight_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and elements of every tensor in the folder's model*.safetensors, by name.

    Two elements of nf4 share a byte. A word of GPTQ holds as many as there are inputs, which g_idx counts, to a row of words.
    """
    sizes = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            in_one = 2 if tensor["dtype"] == "U8" and f"{name}.absmax" in header else 1
            if name.endswith(".qweight"):
                in_one = header[name.removesuffix("qweight") + "g_idx"]["shape"][0] // tensor["shape"][0]
            sizes[name] = (end - start, math.prod(tensor["shape"]) * in_one)
    return sizes


def part_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part, in the order in which a row passes through them: embedding, layers by number, last norm, head."""
    parts: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: place_of(item[0])):
        layer = LAYER.match(name)
        part = f"{layer[1]}.{layer[2]}" if layer else name.removesuffix(".weight").removesuffix(".bias")
        parts[part] = parts.get(part, 0) + size
    return parts


def place_of(name: str) -> tuple[int, int]:
    """Where a tensor's part stands in a decoder."""
    if layer := LAYER.match(name):
        return (1, int(layer[2]))
    return (0 if "embed" in name else 2 if "norm" in name else 3, 0)


def balance(sizes: Sequence[int], devices: int) -> list[int]:
    """The device's number for each part: neighbours stay together, and the fullest device holds as little as can be."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fill(sizes, middle)[-1] < devices else (middle + 1, high)
    return fill(sizes, low)


def fill(sizes: Sequence[int], capacity: int) -> list[int]:
    """The device's number for each part, where a device takes parts until the next one would be over `capacity`."""
    numbers, device, held = [], 0, 0
    for size in sizes:
        if held + size > capacity:
            device, held = device + 1, 0
        held += size
        numbers.append(device)
    return numbers


def split_over(folder: Path, devices: Sequence[str]) -> dict[str, str]:
    """Transformers' device_map for the model in `folder`, its layers over all `devices`.

    Positions are computed beside the embedding; a head that is the embedding itself stays with it.
    """
    parts = part_sizes({name: size for name, (size, _) in weight_sizes(folder).items()})
    numbers = balance(list(parts.values()), len(devices))
    placed = {part: devices[number] for part, number in zip(parts, numbers, strict=True)}
    prefix = next(part for part in parts if ".layers." in part).split(".layers.")[0]
    placed[f"{prefix}.rotary_emb"] = devices[0]
    if not {"lm_head", "score"} & placed.keys():
        placed["lm_head"] = devices[0]
    return placed
