"""safetensors checkpoints, read one tensor at a time, so that no stage holds a whole model in memory."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from preprocess.core.errors import UserError
from preprocess.core.files import read_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensors:
    """The tensors of an open checkpoint, by name; pages are mapped in when a tensor is read."""

    path: Path
    handles: Mapping[str, object]
    files: Mapping[str, Path]

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.handles)

    def file_of(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self.handles[name].get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype, mapped from the file."""
        return self.handles[name].get_tensor(name)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open a safetensors file, or a folder with model.safetensors or its shards and their index."""
    files = _files_of(path) if path.is_dir() else [path]
    with contextlib.ExitStack() as stack:
        handles, found = {}, {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except FileNotFoundError:
                raise UserError(f"{file}: no such file, though the index beside it lists it; fetch the model again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a whole safetensors file ({error}); write or fetch it again") from None
            handles |= dict.fromkeys(handle.keys(), handle)
            found |= dict.fromkeys(handle.keys(), file)
        yield Tensors(path, handles, found)


def _files_of(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: no weight_map of tensors to files; fetch the model again") from None
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise UserError(f"{folder}: no model.safetensors and no {INDEX}; weights in other formats are not read")
