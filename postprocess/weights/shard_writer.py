"""A model's weights → safetensors shards, a piece at a time, so that an interrupted run goes on at the shard it was at."""

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from postprocess.weights.checkpoint_reader import INDEX
from preprocess.core.files import write_json

SHARD_BYTES = 1000**3  # what an interrupted run loses at most
HEADER_BYTES_A_TENSOR = 160  # dtype, shape and offsets of one tensor in a safetensors header; its name comes on top
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
    """A tensor on its way to a file: its name there, its dtype and shape, and its values in pieces, first to last."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[torch.Tensor]


@dataclass(frozen=True)
class Planned:
    """A weight to be written: its name, the names that are stored of it, and about how many bytes those are."""

    name: str
    stored: tuple[str, ...]
    bytes: int


def write_shards(
    folder: Path,
    planned: Sequence[Planned],
    store: Callable[[str], Iterable[Stored]],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the weights `planned` into `folder`: model.safetensors, or shards of about `shard_bytes` with an index.

    `store` gives what is stored of a weight; each piece goes to disk as it comes, in a thread of its own, so that the next
    is computed meanwhile. A shard has its final name only once it is whole, and one that has it already is not written
    again. `progress` is told the bytes that are done. Which weight goes into which file depends on `planned` alone.
    """
    shards = plan_shards(planned, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with _Writer() as writer:
        for file_name, shard in zip(names, shards, strict=True):
            if (folder / file_name).exists():
                progress(sum(weight.bytes for weight in shard))
                continue
            _write_shard(folder / file_name, shard, store, writer, progress)
    if len(shards) > 1:
        total = sum((folder / name).stat().st_size for name in names)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map(folder, names)})


def write_file(path: Path, planned: Sequence[Planned], store: Callable[[str], Iterable[Stored]]) -> None:
    """Write the weights `planned` into one file, as write_shards writes a shard."""
    try:
        with _Writer() as writer:
            _write_shard(path, planned, store, writer, lambda _: None)
    except BaseException:
        path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
        raise


def plan_shards(planned: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """The weights of each shard, in order: as many as `shard_bytes` hold, at least one."""
    shards: list[list[Planned]] = []
    room = 0
    for weight in planned:
        if not shards or weight.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(weight)
        room -= weight.bytes
    return shards


def weight_map(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The file name of each tensor in the files `names`, from their headers, in order."""
    found = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), name)
    return dict(sorted(found.items()))


class _Writer:
    """Calls made one after the other in one thread, a few ahead of it at most; the first that fails is raised."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.pending: deque[Future] = deque()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind:
            self.pool.shutdown(cancel_futures=True)
            return
        with self.pool:
            self.wait(0)

    def call(self, function: Callable, *arguments) -> None:
        """Have `function` called; waits where too many calls are ahead of it."""
        self.pending.append(self.pool.submit(function, *arguments))
        self.wait(PIECES_IN_FLIGHT)

    def wait(self, left: int) -> None:
        """Wait until at most `left` calls are to be made."""
        while len(self.pending) > left:
            self.pending.popleft().result()


def _write_shard(
    path: Path, shard: Sequence[Planned], store: Callable[[str], Iterable[Stored]], writer: _Writer, progress: Callable
) -> None:
    """Write one shard beside its final name, which it takes once its bytes are on the disk.

    Space for the header is kept at the start and filled in last: a tensor's size need not be known beforehand.
    """
    announced = [name for weight in shard for name in weight.stored]
    reserved = -(-sum(HEADER_BYTES_A_TENSOR + len(name) for name in announced) // 8) * 8
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    temporary, position = path.with_name(f".{path.name}.tmp"), 0
    file = temporary.open("wb")
    file.seek(8 + reserved)
    for weight in shard:
        for stored in store(weight.name):
            begin = position
            for piece in stored.pieces:
                data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                writer.call(file.write, data.data)
                position += data.nbytes
            header[stored.name] = {
                "dtype": DTYPES[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [begin, position],
            }
        progress(weight.bytes)
    if set(announced) != header.keys() - {"__metadata__"}:
        unlike = sorted(set(announced) ^ (header.keys() - {"__metadata__"}))
        raise ValueError(f"tensors announced and not written, or the reverse: {unlike[:5]}")
    writer.call(_finish, file, header, reserved, position, path)


def _finish(file, header: dict, reserved: int, size: int, path: Path) -> None:
    """Write the header of a shard whose tensors are `size` bytes, and give it its name; not where one of its writes failed."""
    encoded = json.dumps(header, separators=(",", ":")).encode("ascii")
    if len(encoded) > reserved:
        raise ValueError(f"{file.name}: a header of {len(encoded)} bytes does not fit the {reserved} kept for it")
    with file:
        if file.seek(0, os.SEEK_END) != 8 + reserved + size:
            raise OSError(errno.EIO, f"{path}: shorter than what was written to it")
        file.seek(0)
        file.write(reserved.to_bytes(8, "little") + encoded.ljust(reserved))
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
