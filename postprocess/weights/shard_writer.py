"""A model's weights → safetensors shards, a piece at a time, so that an interrupted run continues at its shard.

safetensors' own save_file wants all tensors of a file in memory, and transformers' save_pretrained all
of the model. Here a shard's header is written last: of a weight in nf4, the size is known only then.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from postprocess.weights.checkpoint_reader import INDEX
from preprocess.core.files import write_json

SHARD_BYTES = 1000**3  # what an interrupted run loses at most

# A weight in nf4 is stored as up to six tensors. A header's entry has a tensor's dtype, shape and
# offsets, and its name, which is the weight's with an ending.
TENSORS_A_WEIGHT = 6
HEADER_BYTES_A_TENSOR = 220
LENGTH_BYTES = 8  # in front of the header, for its length
PIECES_IN_FLIGHT = 4
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A tensor on its way into a file."""

    name: str  # in the file, as are dtype and shape
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[torch.Tensor]  # its values in order, some at a time


def write_shards(
    folder: Path,
    weight_bytes: Mapping[str, int],
    store: Callable[[str], Iterable[Stored]],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a model as model.safetensors, or as several shards with an index.

    A shard gets its final name once its bytes are on the disk, and one that has it is not written again.

    Args:
        folder: Where the shards are written.
        weight_bytes: About how many bytes each weight takes, by name, in the order of the file.
        store: Gives the tensors that are stored of a weight.
        shard_bytes: About how many bytes a shard has.
        progress: Called after each shard with its bytes.
    """
    # The division depends on the sizes alone, so that a call after an interrupted one finds the same shards.
    shards = plan_shards(weight_bytes, shard_bytes)
    shard_count = len(shards)
    file_names = ["model.safetensors"]
    if shard_count > 1:
        numbers = range(1, shard_count + 1)
        file_names = [f"model-{number:05d}-of-{shard_count:05d}.safetensors" for number in numbers]

    for file_name, weights in zip(file_names, shards, strict=True):
        if not (folder / file_name).exists():
            temporary = folder / f".{file_name}.tmp"
            write_file(temporary, weights, store)
            os.replace(temporary, folder / file_name)
        progress(sum(weight_bytes[weight] for weight in weights))

    if shard_count > 1:
        write_index(folder, file_names)


def plan_shards(weight_bytes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Divide weights among shards of about `shard_bytes` in their order, and list the names in each shard."""
    shards: list[list[str]] = []
    bytes_left = 0
    for weight, size in weight_bytes.items():
        is_first = not shards
        if is_first or size > bytes_left:
            shards.append([])
            bytes_left = shard_bytes
        shards[-1].append(weight)
        bytes_left -= size
    return shards


def write_file(
    path: Path, weights: Sequence[str], store: Callable[[str], Iterable[Stored]]
) -> None:
    """Write weights into one safetensors file: the header's length, the header in JSON, the tensors' bytes.

    The header has each tensor's place, which is known only once all are written. So room is left for it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    header_bytes = reserve_header(weights)

    # One thread writes pieces to the disk while the next ones are computed. Only a few finished pieces may
    # wait for it: they fill the memory.
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as writer:
        file.seek(LENGTH_BYTES + header_bytes)
        waiting: deque[Future] = deque()
        position = 0
        for weight in weights:
            for stored in store(weight):
                begin = position
                for piece in stored.pieces:
                    flat = piece.detach().contiguous().reshape(-1)
                    data = flat.view(torch.uint8).numpy()
                    waiting.append(writer.submit(file.write, data.data))
                    if len(waiting) > PIECES_IN_FLIGHT:
                        waiting.popleft().result()
                    position += data.nbytes
                header[stored.name] = {
                    "dtype": DTYPES[stored.dtype],
                    "shape": list(stored.shape),
                    "data_offsets": [begin, position],
                }
        for write in waiting:
            write.result()

        # The format allows spaces after the JSON, which fill the room that is left.
        encoded = json.dumps(header, separators=(",", ":")).encode("ascii")
        if len(encoded) > header_bytes:
            raise ValueError(f"{path}: a header of {len(encoded)} bytes, {header_bytes} are free")
        file.seek(0)
        file.write(header_bytes.to_bytes(LENGTH_BYTES, "little") + encoded.ljust(header_bytes))
        file.flush()
        os.fsync(file.fileno())


def reserve_header(weights: Sequence[str]) -> int:
    """Compute how many bytes stay free for a header, which is written last, when all sizes are known."""
    name_bytes = sum(len(weight) for weight in weights)
    header_bytes = TENSORS_A_WEIGHT * (name_bytes + HEADER_BYTES_A_TENSOR * (len(weights) + 1))
    # Tensors start at a multiple of 8 bytes, as safetensors asks for.
    return math.ceil(header_bytes / 8) * 8


def write_index(folder: Path, file_names: Sequence[str]) -> None:
    """Write the index of a folder's shards, which says where each tensor is."""
    # The tensors' names are read from the files: this call may not have written all of them itself.
    weight_map = {}
    total_bytes = 0
    for file_name in file_names:
        with safe_open(folder / file_name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), file_name)
        total_bytes += (folder / file_name).stat().st_size

    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX, index)
