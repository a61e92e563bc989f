"""Base models in numbers: the names, shapes and kinds of their tensors, and the memory of a batch.

The numbers stand in base_models.yml, so that `build` and `list` need neither torch nor a hub. The command
`python -m recipes.pairwise.memory` measures them. A base model that is a folder is measured when it is asked for.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import yaml

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_yaml

BASE_MODELS = Path(__file__).parent / "base_models.yml"
GIB = 2**30  # bytes

# Of a weight in bitsandbytes' nf4: four bits, and a float32 scale for 64 of them.
NF4_BYTES = 0.5625

# A layer's number in a tensor's name, and the numbers of several layers: layers.7.mlp, layers.0-41.mlp
LAYER_NUMBER = re.compile(r"\.(\d+)\.")
ANY_LAYER = "*"
LAYER_NUMBERS = re.compile(r"(?<=\.)\d+(-\d+|(,\d+)+)(?=\.)")


@dataclass(frozen=True)
class Weight:
    """A tensor of the 16-bit model: its name, its shape, and linear, embedding, norm, bias or head."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BatchBytes:
    """Bytes that a batch takes beside the weights, at the two moments that may need most."""

    mlp_per_token: int
    attention_per_token: int
    attention_per_score: int  # beside that, for each token that a token attends to


@dataclass(frozen=True)
class BaseModel:
    """A base model as transformers builds it."""

    model_type: str
    is_encoder: bool
    positions: int | None  # None: its configuration names no limit
    vocabulary: int
    weights: tuple[Weight, ...]  # without a head
    # score (with two labels), and label_tokens for a causal LM
    heads: Mapping[str, tuple[Weight, ...]]
    batches: Mapping[str, BatchBytes]  # as the kernel computes attention: plain, or with a softcap


def find_base_model(name: str) -> BaseModel:
    """Look up the base model of a recipe in base_models.yml, or measure it where it is a folder.

    Raises:
        UserError: There is neither an entry nor a folder.
    """
    # An entry comes first: it costs no import of torch.
    record = read_records().get(name)
    if record is not None:
        return parse_record(record)

    if not (Path(name) / "config.json").is_file():
        raise UserError(
            f"recipes/pairwise/memory/{BASE_MODELS.name}: no entry {name}, and no such folder; "
            f"run `python -m recipes.pairwise.memory {name}`, which writes it"
        )
    from recipes.pairwise.memory.measure import measure_folder  # noqa: PLC0415  needs torch

    return measure_folder(Path(name))


@functools.cache
def read_records() -> dict[str, dict]:
    """Read base_models.yml, by the base model's name."""
    return read_yaml(BASE_MODELS)


def write_records(records: Mapping[str, dict]) -> None:
    """Write base_models.yml."""
    text = yaml.safe_dump(dict(records), sort_keys=False, width=120, default_flow_style=None)
    with atomic_file(BASE_MODELS) as path:
        path.write_text(
            f"# Written by `python -m recipes.pairwise.memory`.\n{text}", encoding="utf-8"
        )
    read_records.cache_clear()


def make_record(config: Mapping[str, object], base_model: BaseModel) -> dict:
    """Convert a base model to an entry of base_models.yml."""
    # YAML has lists where a BaseModel has tuples and classes.
    heads = {head: pack_weights(weights) for head, weights in base_model.heads.items()}
    batches = {attention: list(astuple(batch)) for attention, batch in base_model.batches.items()}
    return {
        "config": dict(config),
        "is_encoder": base_model.is_encoder,
        "positions": base_model.positions,
        "vocabulary": base_model.vocabulary,
        "batches": batches,
        "heads": heads,
        "weights": pack_weights(base_model.weights),
    }


def parse_record(record: Mapping) -> BaseModel:
    """Convert an entry of base_models.yml to the model that it describes."""
    heads = {head: unpack_weights(rows) for head, rows in record["heads"].items()}
    batches = {attention: BatchBytes(*sizes) for attention, sizes in record["batches"].items()}
    return BaseModel(
        model_type=record["config"]["model_type"],
        is_encoder=record["is_encoder"],
        positions=record["positions"],
        vocabulary=record["vocabulary"],
        weights=unpack_weights(record["weights"]),
        heads=heads,
        batches=batches,
    )


def pack_weights(weights: Iterable[Weight]) -> list[str]:
    """Write weights as name/kind/shape, one text for the same weight of many layers.

    For example, the up_proj of each of 42 layers becomes one text:

        model.layers.0-41.mlp.up_proj.weight/linear/14336x3584
    """
    # From a text with * for the layer's number to the layers that it stands for. Where the name has no
    # such number, there are none.
    layers_by_text: dict[str, list[int]] = {}
    for weight in weights:
        sizes = "x".join(map(str, weight.shape))
        text = f"{weight.name}/{weight.kind}/{sizes}"
        layer_number = LAYER_NUMBER.search(weight.name)
        if layer_number is None:
            layers_by_text[text] = []
            continue

        # With * for the layer's number, the texts of all layers are the same: model.layers.*.mlp…
        text = LAYER_NUMBER.sub(f".{ANY_LAYER}.", text, count=1)
        layers_by_text.setdefault(text, []).append(int(layer_number[1]))

    packed_weights = []
    for text, layers in layers_by_text.items():
        packed_weights.append(text.replace(ANY_LAYER, format_layers(layers)))
    return packed_weights


def format_layers(layers: list[int]) -> str:
    """Write layers that follow each other as 0-41, others one by one: 0,2,4."""
    if layers and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def unpack_weights(rows: Iterable[str]) -> tuple[Weight, ...]:
    """Read the texts that pack_weights writes."""
    weights = []
    for row in rows:
        pattern, kind, sizes = row.split("/")
        shape = tuple(map(int, sizes.split("x")))
        for name in list_names(pattern):
            weights.append(Weight(name, kind, shape))
    return tuple(weights)


def list_names(pattern: str) -> list[str]:
    """List the names of a weight in its layers: layers.0-2.mlp and layers.0,4.mlp stand for three and for two."""
    match = LAYER_NUMBERS.search(pattern)
    if match is None:
        return [pattern]

    numbers = match[0]
    if "-" in numbers:
        first, last = numbers.split("-")
        layers = range(int(first), int(last) + 1)
    else:
        layers = numbers.split(",")

    beginning = pattern[: match.start()]
    end = pattern[match.end() :]
    return [f"{beginning}{layer}{end}" for layer in layers]
