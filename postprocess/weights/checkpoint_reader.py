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
    """The tensors of an open checkpoint by name; pages are mapped in when a tensor is read."""

    path: Path  # the file, or the folder of shards
    handles: Mapping[str, safe_open]  # safetensors' open file for each tensor

    def names(self) -> list[str]:
        """List every tensor's name."""
        return list(self.handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read a tensor's shape from the header alone."""
        return tuple(self.handles[name].get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """Map a tensor from its file, in its own dtype."""
        return self.handles[name].get_tensor(name)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open a safetensors file, or a folder with model.safetensors or its shards and their index.

    Raises:
        UserError: A file is missing or broken.
    """
    paths = find_files(path) if path.is_dir() else [path]
    handles = {}

    # All files stay open until the caller is done.
    with contextlib.ExitStack() as stack:
        for file in paths:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except FileNotFoundError:
                raise UserError(
                    f"{file}: no such file, though the index beside it lists it; fetch the model again"
                ) from None
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file}: not a complete safetensors file ({error}); write or fetch it again"
                ) from None
            for name in handle.keys():  # noqa: SIM118  a handle is no dictionary
                handles[name] = handle
        yield Tensors(path, handles)


def find_files(folder: Path) -> list[Path]:
    """List the files of a folder's weights: its shards in the order of their names, or its one file."""
    # A model in several files (shards) has an index, the only list of the files that belong together.
    index = folder / INDEX
    if index.is_file():
        try:
            file_names = set(read_json(index)["weight_map"].values())
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{index}: no weight_map of tensors to files; fetch the model again"
            ) from None
        return [folder / name for name in sorted(file_names)]

    single_file = folder / "model.safetensors"
    if single_file.is_file():
        return [single_file]
    raise UserError(
        f"{folder}: holds no model.safetensors and no {INDEX}, and weights in other formats cannot be read; "
        "save or fetch the model as safetensors"
    )
