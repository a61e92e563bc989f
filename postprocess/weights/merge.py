"""Base weights and an adapter → one model, a weight at a time: in 16 bits, or quantised in the same pass.

PEFT and transformers need the whole model in memory and a 16-bit copy of it on the disk. Here each
weight is read, merged by PEFT in float32, rounded once to float16, quantised as bitsandbytes does it
where it is to be, and written. Names are those of the model that transformers builds from the base's
configuration for the contract's head. A full fine-tune goes the same way, without an adapter, and so
does a base model that nobody trained.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PretrainedConfig

from postprocess.run_folder import Run, adapter_settings
from postprocess.weights.bnb_quantize import quantise, quantised_bytes, quantised_weights
from postprocess.weights.checkpoint_reader import Tensors, open_tensors
from postprocess.weights.lora_adapter import Adapter, load_adapter, merge_layer
from postprocess.weights.meta_model import LABELLED, Skeleton, empty_model, model_skeleton, untie
from postprocess.weights.shard_writer import SHARD_BYTES, Stored, write_shards
from postprocess.weights.smooth_quant import Smoothing
from preprocess.core.errors import UserError
from preprocess.core.files import resumable_folder

# Names that old checkpoints of BERT use.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
PIECE_NUMBERS = 2**22  # numbers of a piece: 16 MiB in float32
ROWS_MULTIPLE = 64  # of a piece's rows, so that no block of nf4 is cut in two


@dataclass(frozen=True)
class Form:
    """In which form a model is written."""

    quantization: BitsAndBytesConfig | None = None  # of its layers; None for 16 bits
    dtype: torch.dtype = torch.float16  # of what is not quantised
    smoothing: Smoothing | None = None
    # Leave out low-rank changes. What the adapter holds whole (the head) is in.
    keeps_adapter_apart: bool = False


@dataclass(frozen=True)
class Sources:
    """What a model is made of."""

    skeleton: Skeleton  # the names and shapes of the tensors that are to be written
    base: Tensors  # the open checkpoint of the base model
    base_names: Mapping[str, str]  # each tensor's name in that checkpoint
    adapter: Adapter | None  # what training changed; None where the base is all there is
    smoothing: Smoothing | None  # what SmoothQuant changes after that

    def trained_path(self) -> Path:
        """Name the file that training wrote."""
        return self.adapter.path if self.adapter else self.base.path

    def read_before_merge(self, name: str) -> torch.Tensor:
        """Read a tensor without its low-rank change."""
        if self.adapter and name in self.adapter.replacements:
            return self.adapter.replacements[name]
        return self.base.get(self.base_names[name])

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor as it is to be written: in float32 where it changes, else as it is stored."""
        tensor = self.read_before_merge(name)
        if self.adapter and name in self.adapter.layers:
            tensor = merge_layer(self.adapter.layers[name], tensor)
        # SmoothQuant's scales are those of the merged model.
        if self.smoothing:
            tensor = self.smoothing.apply(name, tensor)
        return tensor

    def read_pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Read a tensor as it is after training, rounded to `dtype`, some rows at a time: that needs little memory.

        Raises:
            UserError: A number is not finite, or does not fit `dtype`.
        """
        # Whatever precision a weight is stored in, it is rounded once.
        for piece in split_rows(self.read(name)):
            rounded = piece.to(dtype) if piece.is_floating_point() else piece
            if not is_finite(rounded):
                raise UserError(self.explain_not_finite(name, piece, dtype))
            yield rounded

    def explain_not_finite(self, name: str, piece: torch.Tensor, dtype: torch.dtype) -> str:
        """Explain which file a number that is not finite comes from, and what to do."""
        if is_finite(piece):
            return (
                f"{self.trained_path()}: {name} is not finite once it is {dtype}: its values are too "
                "large; train again"
            )

        # It may have come from the base, or from training.
        is_from_base = self.adapter is None or name not in self.adapter.replacements
        if is_from_base and not is_finite(self.read_before_merge(name)):
            return f"{self.base.path}: {name} is not finite; fetch the model again"
        return f"{self.trained_path()}: {name} is not finite; train again"


def merge(
    run: Run,
    out: Path,
    form: Form = Form(),
    *,
    shard_bytes: int = SHARD_BYTES,
    key: str = "",
    add_files: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write the model of a run, with its configuration and tokenizer, as a folder.

    Args:
        run: The trained run.
        out: The folder.
        form: Whether the model is quantised and whether its adapter is merged.
        shard_bytes: About how many bytes a file of weights has.
        key: An interrupted call with the same key is continued at its shard.
        add_files: Writes further files into the folder before it gets its name.

    Raises:
        UserError: Base and adapter do not belong together, the head is missing, a number does not fit
            the dtype, or the disk is full.
    """
    with torch.no_grad(), open_sources(run, form) as sources:
        config = sources.skeleton.config
        quantised_names = set()
        if form.quantization:
            quantised_names = quantised_weights(config, run.contract.head, form.quantization)

        # Called for one weight after the other, as the shards are written.
        def store(name: str) -> Iterator[Stored]:
            if name in quantised_names:
                return store_quantised(sources, name, form)
            return store_plain(sources, name, form)

        weight_bytes = estimate_bytes(sources.skeleton, quantised_names, form)
        total_bytes = sum(weight_bytes.values())
        with (
            resumable_folder(out, key, total_bytes) as folder,
            tqdm(total=total_bytes, desc=out.name, unit="B", unit_scale=True, delay=2) as bar,
        ):
            write_shards(folder, weight_bytes, store, shard_bytes, bar.update)
            write_config(config, form, folder)
            for file in run.tokenizer_files():
                shutil.copyfile(file, folder / file.name)
            add_files(folder)


def estimate_bytes(skeleton: Skeleton, quantised_names: Set[str], form: Form) -> dict[str, int]:
    """Estimate what each weight takes on the disk, by its name."""
    weight_bytes = {}
    for name, shape in skeleton.shapes.items():
        if name in quantised_names:
            weight_bytes[name] = quantised_bytes(shape, form.quantization)
        else:
            weight_bytes[name] = torch.Size(shape).numel() * form.dtype.itemsize
    return weight_bytes


def store_quantised(sources: Sources, name: str, form: Form) -> Iterator[Stored]:
    """Yield the tensors that are stored of a quantised weight: its values and their scales."""
    # From float16, as if a merged model had been saved before.
    pieces = sources.read_pieces(name, torch.float16)
    tensors = quantise(name, sources.skeleton.shapes[name], pieces, form.quantization)
    for stored_name, tensor in tensors.items():
        yield Stored(stored_name, tensor.dtype, tuple(tensor.shape), [tensor])


def store_plain(sources: Sources, name: str, form: Form) -> Iterator[Stored]:
    """Yield a weight in 16 bits; whole numbers, such as a table of positions, keep their dtype."""
    dtype = sources.read_before_merge(name).dtype
    stored_dtype = form.dtype if dtype.is_floating_point else dtype
    pieces = sources.read_pieces(name, form.dtype)
    yield Stored(name, stored_dtype, sources.skeleton.shapes[name], pieces)


def write_config(config: PretrainedConfig, form: Form, folder: Path) -> None:
    """Write config.json."""
    # transformers reads from here how the weights are to be loaded.
    config.dtype = form.dtype
    if form.quantization:
        config.quantization_config = form.quantization
    config.save_pretrained(folder)


@contextlib.contextmanager
def open_sources(run: Run, form: Form) -> Iterator[Sources]:
    """Open the base and the adapter of a run, and check that they make the model that is to be written.

    The checks read only the headers of the files: a mistake is reported before gigabytes are read.

    Raises:
        UserError: Base and adapter do not belong together, or something is missing.
    """
    skeleton = model_skeleton(run.weights, run.contract)
    tied_names = skeleton.tied
    adapter = None
    if run.has_adapter:
        adapter = load_adapter(run.folder, empty_model(skeleton.config, run.contract.head))

        # Many bases use one tensor both as embedding and as output layer. If the adapter has trained one
        # of them alone, the model needs two tensors, which a base that stays as it is does not have.
        if was_untied(skeleton, adapter, adapter_settings(run.folder)):
            if form.keeps_adapter_apart:
                raise UserError(
                    f"{adapter.path}: the adapter has trained {' or '.join(tied_names)}, which is one tensor "
                    "with the embedding in this base; package with adapter: merged, where they become two"
                )
            skeleton = untie(skeleton)

        # Without its low-rank changes, the adapter still gives the tensors that it holds whole.
        if form.keeps_adapter_apart:
            adapter = replace(adapter, layers={})

    with open_tensors(run.weights) as base:
        base_names = find_base_names(base, skeleton)

        # Where one tensor of the base became two, both are read from that one.
        for name, source in tied_names.items():
            if name in skeleton.shapes and name not in base_names:
                base_names[name] = base_names[source]

        sources = Sources(skeleton, base, base_names, adapter, form.smoothing)
        if adapter:
            has_own_head = run.contract.head in LABELLED
            check_replacements(adapter, skeleton, tied_names, has_own_head)
        check_shapes(sources)
        yield sources


def was_untied(skeleton: Skeleton, adapter: Adapter, settings: Mapping[str, object]) -> bool:
    """Find out whether two tensors that are one in the base, such as embedding and output layer, were trained apart."""
    # PEFT trains them apart unless its settings forbid that.
    if settings.get("ensure_weight_tying"):
        return False

    trained_names = adapter.layers.keys() | adapter.replacements.keys()
    for name, source in skeleton.tied.items():
        if name in trained_names or source in trained_names:
            return True
    return False


def find_base_names(base: Tensors, skeleton: Skeleton) -> dict[str, str]:
    """Find under which name the checkpoint of the base holds each tensor of the model.

    Returns:
        The name in the checkpoint, by the name in the model. Tensors that the checkpoint lacks, such as a
        head that is trained first, are left out.
    """
    base_names = {}
    for base_name in base.names():
        name = base_name
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)

        # A checkpoint of an encoder alone has names without the prefix that a model with a head adds,
        # e.g. `embeddings…` instead of `bert.embeddings…`.
        for name_in_model in (name, f"{skeleton.prefix}.{name}"):
            if name_in_model in skeleton.shapes:
                base_names[name_in_model] = base_name
    return base_names


def check_shapes(sources: Sources) -> None:
    """Check that the adapter or the base has every tensor of the model, in the right shape.

    Raises:
        UserError: A tensor is missing, or has another shape.
    """
    replacements = sources.adapter.replacements if sources.adapter else {}
    for name, shape in sources.skeleton.shapes.items():
        # The adapter's tensor takes the place of the base's.
        if name in replacements:
            path = sources.adapter.path
            stored_shape = tuple(replacements[name].shape)
        elif name in sources.base_names:
            path = sources.base.path
            stored_shape = sources.base.shape(sources.base_names[name])
        else:
            part = "head" if name in sources.skeleton.head else "weight"
            raise UserError(
                f"{sources.base.path}: the {part} {name} is neither here nor in an adapter; train again, and with an "
                "adapter put it into lora_modules_to_save"
            )

        if stored_shape != shape:
            raise UserError(
                f"{path}: {name} has the shape {list(stored_shape)}, but the model needs {list(shape)}; put the "
                "training's file back, or train again"
            )


def check_replacements(
    adapter: Adapter, skeleton: Skeleton, tied_names: Mapping[str, str], has_own_head: bool
) -> None:
    """Check the tensors that an adapter holds whole, in place of the base's own.

    Raises:
        UserError: The model has no such tensor, or the head is missing.
    """
    unknown_names = adapter.replacements.keys() - skeleton.shapes.keys() - tied_names.keys()
    if unknown_names:
        raise UserError(
            f"{adapter.path}: {min(unknown_names)} is not part of {skeleton.config.architectures[0]}, so this is an "
            "adapter of another base; put the training's adapter back"
        )

    # Without a trained head, transformers would make a random one.
    if has_own_head and adapter.replacements.keys().isdisjoint(skeleton.head):
        raise UserError(
            f"{adapter.path}: the adapter has no head ({', '.join(skeleton.head)}), so that its answers would be random; "
            "train with task type SEQ_CLS (model_type: AutoModelForSequenceClassification)"
        )


def split_rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Divide a tensor along its first axis into pieces of about PIECE_NUMBERS numbers."""
    if tensor.dim() < 2:
        yield tensor
        return

    numbers_per_row = tensor[0].numel()
    blocks_of_rows = max(PIECE_NUMBERS // numbers_per_row // ROWS_MULTIPLE, 1)
    yield from tensor.split(blocks_of_rows * ROWS_MULTIPLE)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite.

    The extremes are looked at, which a NaN is passed on to: isfinite is a hundred times slower.
    """
    # An empty tensor has no extremes.
    if tensor.numel() == 0:
        return True
    extremes = torch.stack(tensor.aminmax())
    return bool(torch.isfinite(extremes).all())
