"""Base weights and an adapter → one model, a few rows at a time, the head included: in 16 bits, or quantised in the same pass.

Every weight is computed in float32 and rounded once to float16; a layer to be quantised is quantised from that, so that no
16-bit copy of the model is ever on disk. The names are those of the model that transformers builds from the base's
configuration for the contract's head: a classifier has no lm_head, a causal LM has one unless it is the embedding (tied, in
no file), an encoder's missing prefix is added. A full fine-tune goes the same way, without an adapter, and so does a base
model that nobody trained.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PretrainedConfig

from postprocess.run_folder import ADAPTER, Run, adapter_settings
from postprocess.weights.bnb_quantize import plan_quantised, quantise, quantised_weights, quantization_config
from postprocess.weights.checkpoint_reader import Tensors, open_tensors
from postprocess.weights.lora_adapter import Adapter, read_adapter, shape_of
from postprocess.weights.meta_model import LABELLED, Skeleton, head_modules, model_skeleton, untied
from postprocess.weights.shard_writer import SHARD_BYTES, Planned, Stored, write_shards
from preprocess.core.errors import UserError
from preprocess.core.files import resumable_folder

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
PIECE_NUMBERS = 2**22  # numbers of a piece: 16 MiB in float32
ROWS_MULTIPLE = 64  # of a piece's rows, so that no block of nf4 is cut in two


@dataclass(frozen=True)
class Sources:
    """What a model is made of: its skeleton, the open base, the base's names by the model's, the open adapter if any."""

    skeleton: Skeleton
    base: Tensors
    names: Mapping[str, str]
    adapter: Adapter | None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor that a change of `name` is added to: the adapter's own where it replaces the base's."""
        replaced = self.adapter.replacements.get(name) if self.adapter else None
        return self.adapter.tensors.get(replaced) if replaced else self.base.get(self.names[name])

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The tensor `name` after training in `dtype`, some rows at a time; a UserError where it is not finite there."""
        tensor = self.tensor(name)
        delta = self.adapter.delta(name) if self.adapter else None
        for start, rows in _pieces(tensor):
            changed = delta.apply(rows, start) if delta else rows
            rounded = changed.to(dtype) if changed.is_floating_point() else changed
            if not is_finite(rounded):
                raise UserError(self._why_not_finite(name, changed, dtype))
            yield rounded

    def _why_not_finite(self, name: str, changed: torch.Tensor, dtype: torch.dtype) -> str:
        if torch.isfinite(changed).all():
            return f"{self.base.path}: {name} is not finite once it is {dtype}: its values are too large; train again"
        replaced = self.adapter and name in self.adapter.replacements
        if replaced or torch.isfinite(self.tensor(name)).all():
            return f"{self.adapter.tensors.path}: {name} is not finite; train again"
        return f"{self.base.file_of(self.names[name])}: {name} is not finite; fetch the model again"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: of the extremes, which NaN is passed on to (isfinite is a hundred times slower)."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _pieces(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor in pieces of about PIECE_NUMBERS numbers, each with the row that it starts at."""
    if tensor.dim() < 2:
        yield 0, tensor
        return
    rows = max(PIECE_NUMBERS // tensor[0].numel() // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE
    for start in range(0, len(tensor), rows):
        yield start, tensor[start : start + rows]


def merge(  # noqa: PLR0913  each has a default but the first two
    run: Run,
    out: Path,
    settings: BitsAndBytesConfig | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = SHARD_BYTES,
    key: str = "",
    apart: bool = False,
    finish: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write the model of `run` with its configuration and tokenizer as the folder `out`, quantised where `settings` say so.

    With `apart`, the adapter's low-rank changes are left out; what it replaces (the head) is in. `finish` may add files to
    the folder. An interrupted call goes on at the shard that it was at, if it is called again with the same `key`.

    Everything is checked from the files' headers before a weight is read. Raises UserError where base and adapter do not
    belong together, the head is missing, a weight does not fit `dtype`, or the disk is full.
    """
    with open_sources(run, apart) as sources:
        skeleton = sources.skeleton
        quantised = quantised_weights(skeleton.config, run.contract.head, settings) if settings else set()
        planned = [
            plan_quantised(name, shape, settings) if name in quantised else plan_plain(name, shape, dtype)
            for name, shape in skeleton.shapes.items()
        ]
        total = sum(weight.bytes for weight in planned)

        def store(name: str) -> Iterator[Stored]:
            if name in quantised:
                yield from quantise(name, skeleton.shapes[name], sources.pieces(name, torch.float16), settings)
            else:
                stored = dtype if sources.tensor(name).is_floating_point() else sources.tensor(name).dtype
                yield Stored(name, stored, skeleton.shapes[name], sources.pieces(name, dtype))

        with (
            resumable_folder(out, key, total) as folder,
            tqdm(total=total, desc=out.name, unit="B", unit_scale=True, delay=2, mininterval=5) as progress,
        ):
            write_shards(folder, planned, store, shard_bytes, progress.update)
            skeleton.config.dtype = dtype
            if settings:
                skeleton.config.quantization_config = settings
            skeleton.config.save_pretrained(folder)
            for file in run.tokenizer_files():
                shutil.copyfile(file, folder / file.name)
            finish(folder)


def quantise_in_one_pass(run: Run, kind: str, out: Path, key: str = "") -> None:
    """Write the merged model of `run` in `kind` (nf4, int8) as the folder `out`, the head left as it is."""
    merge(run, out, quantization_config(kind, head_modules(run.weights, run.contract.head)), key=key)


def plan_plain(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Planned:
    """What is stored of a weight that is not quantised."""
    return Planned(name, (name,), torch.Size(shape).numel() * dtype.itemsize)


def merged_model(run: Run, dtype: torch.dtype = torch.float16) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The merged model in memory: its configuration, and its tensors by name."""
    with open_sources(run) as sources:
        tensors = {}
        for name, shape in sources.skeleton.shapes.items():
            tensors[name] = torch.cat([piece.reshape(-1) for piece in sources.pieces(name, dtype)]).reshape(shape)
        return sources.skeleton.config, tensors


@contextlib.contextmanager
def open_sources(run: Run, apart: bool = False) -> Iterator[Sources]:
    """The open base and, where the run has one, the open adapter, checked to fit each other and the model to be made."""
    skeleton = model_skeleton(run.weights, run.contract)
    tied = skeleton.tied
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_tensors(run.weights))
        adapter = None
        if run.has_adapter:
            tensors = stack.enter_context(open_tensors(run.folder / ADAPTER[0]))
            settings = adapter_settings(run.folder)
            adapter = read_adapter(tensors, settings, run.folder / ADAPTER[1])
            if _is_untied(skeleton, adapter, settings):
                if apart:
                    raise UserError(
                        f"{adapter.tensors.path}: trained {' or '.join(skeleton.tied)}, which is the embedding in this base; "
                        "only adapter: merged keeps the two apart"
                    )
                skeleton = untied(skeleton)
            adapter = adapter.without(skeleton.tied)
            if apart:
                adapter = adapter.untrained()
        names = base_names(base, skeleton)
        names |= {name: names[source] for name, source in tied.items() if name in skeleton.shapes and name not in names}
        check_fit(skeleton, base, names, adapter, has_own_head=run.contract.head in LABELLED)
        yield Sources(skeleton, base, names, adapter)


def _is_untied(skeleton: Skeleton, adapter: Adapter, settings: Mapping[str, object]) -> bool:
    """Whether two tensors that are one in the base were trained apart: PEFT does that unless it is told ensure_weight_tying."""
    trained = adapter.changes.keys() | adapter.replacements.keys()
    is_trained = any({name, source} & trained for name, source in skeleton.tied.items())
    return is_trained and not settings.get("ensure_weight_tying")


def base_names(base: Tensors, skeleton: Skeleton) -> dict[str, str]:
    """The model's name for each tensor of the base checkpoint that it has, as {model's: checkpoint's}."""
    names = {}
    for found in base.names():
        name = found
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        for candidate in (name, f"{skeleton.prefix}.{name}"):
            if candidate in skeleton.shapes:
                names[candidate] = found
    return names


def check_fit(
    skeleton: Skeleton, base: Tensors, sources: Mapping[str, str], adapter: Adapter | None, *, has_own_head: bool
) -> None:
    """Every tensor has one source of its own shape, every key of the adapter a place; else a UserError."""
    changes = adapter.changes if adapter else {}
    replaced = adapter.replacements if adapter else {}
    if adapter:
        if has_own_head:
            _check_head(skeleton, adapter)
        if unused := sorted((changes.keys() | replaced.keys()) - skeleton.shapes.keys()):
            kind = skeleton.config.architectures[0]
            raise UserError(
                f"{adapter.tensors.path}: {unused[0]} is not part of {kind} in {base.path}: an adapter of another base"
            )
    for name, shape in skeleton.shapes.items():
        if name not in replaced and name not in sources:
            what = "head" if name in skeleton.head else "weight"
            either = f" and not in {adapter.tensors.path.name}; list it in lora_modules_to_save" if adapter else ""
            raise UserError(f"{base.path}: the {what} {name} is not there{either}; train again")
        found = adapter.tensors.shape(replaced[name]) if name in replaced else base.shape(sources[name])
        if found != shape:
            path = adapter.tensors.path if name in replaced else base.path
            raise UserError(f"{path}: {name} has the shape {list(found)}, the model needs {list(shape)}")
        if name in changes and (needed := shape_of(changes[name], adapter.tensors)) != shape:
            raise UserError(
                f"{adapter.tensors.path}: the change of {name} is for the shape {list(needed)}, in "
                f"{base.path} it has {list(shape)}: an adapter of another base"
            )


def _check_head(skeleton: Skeleton, adapter: Adapter) -> None:
    if not any(name in adapter.replacements for name in skeleton.head):
        raise UserError(
            f"{adapter.tensors.path}: no head ({', '.join(skeleton.head)}) in the adapter, its answers would be random; train "
            "with task type SEQ_CLS (model_type: AutoModelForSequenceClassification)"
        )
