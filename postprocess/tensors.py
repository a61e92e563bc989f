"""safetensors checkpoints, read and written one tensor at a time, so that no stage holds a whole model in memory."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from preprocess.errors import UserError
from preprocess.files import read_json, write_json

SHARD_BYTES = 5 * 1000**3
INDEX = "model.safetensors.index.json"
HEADER_BYTES_A_TENSOR = 160  # dtype, shape and offsets of one tensor in a safetensors header; its name comes on top
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
class Tensors:
    """The tensors of an open checkpoint, by name; pages are mapped in when a tensor is read."""

    path: Path
    handles: dict[str, object]

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self.handles[name].get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype."""
        return self.handles[name].get_tensor(name)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open a safetensors file, or a folder with model.safetensors or its shards and their index."""
    files = _files_of(path) if path.is_dir() else [path]
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except FileNotFoundError:
                raise UserError(f"{file}: no such file, though the index beside it lists it; fetch the model again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a whole safetensors file ({error}); write or fetch it again") from None
            handles |= dict.fromkeys(handle.keys(), handle)
        yield Tensors(path, handles)


def _files_of(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: no weight_map of tensors to files; fetch the model again") from None
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise UserError(f"{folder}: no model.safetensors and no {INDEX}; weights in other formats are not read")


def write_tensors(
    folder: Path, names: Sequence[str], tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors`, named `names`, into `folder`: model.safetensors, or shards of about `shard_bytes` with an index.

    Each tensor goes to disk as it comes. Space for the header is kept at a shard's start and filled in last, because a
    tensor's size need not be known beforehand.
    """
    reserved = -(-sum(HEADER_BYTES_A_TENSOR + len(name) for name in names) // 8) * 8
    shards: list[list[str]] = []
    remaining = iter(tensors)
    following = next(remaining, None)
    while following is not None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        with (folder / f"shard-{len(shards)}").open("wb") as file:
            file.seek(8 + reserved)
            while following is not None and (position == 0 or position + following[1].nbytes <= shard_bytes):
                name, tensor = following
                data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data.data)
                offsets = [position, position + data.nbytes]
                header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
                position = offsets[1]
                following = next(remaining, None)
            _write_header(file, header, reserved)
        shards.append([name for name in header if name != "__metadata__"])
    written = {name for shard in shards for name in shard}
    if written != set(names):
        raise ValueError(f"tensors announced and not written, or the reverse: {sorted(written ^ set(names))[:5]}")
    _name_shards(folder, shards)


def _write_header(file, header: dict, reserved: int) -> None:
    encoded = json.dumps(header, separators=(",", ":")).encode("ascii")
    if len(encoded) > reserved:
        raise ValueError(f"{file.name}: a header of {len(encoded)} bytes does not fit the {reserved} kept for it")
    file.seek(0)
    file.write(reserved.to_bytes(8, "little") + encoded.ljust(reserved))


def _name_shards(folder: Path, shards: list[list[str]]) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
