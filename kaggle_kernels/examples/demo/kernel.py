"""Pairwise Demo: scores the pairs of wsdm-cup-multilingual-chatbot-arena and writes submission.csv.

Generated from the spec demo.yml by `python -m kaggle_kernels build demo`; change that, not this.
It runs on two T4s without internet, and needs the datasets that SETTINGS names and the competition's files.

On each GPU, which offers 14.5 GiB, computed for batches of 8,192 tokens: demo 0.8 GiB.
"""

import contextlib
import csv
import filecmp
import gc
import hashlib
import importlib.abc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import queue
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.masking_utils import sdpa_mask
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

# ==============================================================================================================
# settings.py
#
# What a spec asks of the kernel, the clock that it keeps to, and its log.
# ==============================================================================================================

RESERVE_SECONDS = 300  # kept for writing and checking the submission; a twentieth of a clock under 6,000 s


@dataclass(frozen=True)
class PackageSettings:
    """One model: the run that made it, the Kaggle dataset that holds its package, its weight in the mean.

    Placement is `each` (a copy on every GPU) or `split` (one copy, its layers over all of them). Verdicts, in the order of
    the logits, and model_type are the recipe's: a package that says otherwise is refused. Another base_model is only logged.
    """

    run: str
    dataset: str
    weight: float
    placement: str
    verdicts: tuple[str, ...]
    base_model: str
    model_type: str


@dataclass(frozen=True)
class Settings:
    """A spec, checked by `build`."""

    name: str
    competition: str  # Kaggle's slug
    columns: tuple[str, ...]  # of the submission, besides id
    verdicts: tuple[str, ...]  # what the competition tells apart
    packages: tuple[PackageSettings, ...]
    orders: tuple[str, ...]
    clock_seconds: float
    budget_tokens: int | None  # None: as in training
    tokens_per_batch: int
    temperature: float
    min_scored: float
    visible_rows: int  # of the train file, scored in the visible run
    wheels: str | None  # the dataset with wheels that Kaggle's image lacks
    build: str = ""  # tells this kernel's text from others, so that what it wrote can be told from what another wrote


@dataclass(frozen=True)
class Clock:
    """Seconds since the kernel began. After `deadline` no batch may be running; what is left then is for writing."""

    began: float
    deadline: float
    reserve_seconds: float = 0.0

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def start_clock(clock_seconds: float) -> Clock:
    """A clock that starts now."""
    began = time.monotonic()
    reserve_seconds = min(RESERVE_SECONDS, clock_seconds / 20)
    return Clock(began, began + clock_seconds - reserve_seconds, reserve_seconds)


def log(clock: Clock, message: str) -> None:
    """One line of the kernel's log, with the seconds since the beginning."""
    print(f"[{clock.elapsed():8.1f} s] {message}", flush=True)


SETTINGS = Settings(
    name="demo",
    competition="wsdm-cup-multilingual-chatbot-arena",
    columns=("winner",),
    verdicts=("model_a", "model_b"),
    packages=(
        PackageSettings(
            run="demo",
            dataset="pairwise-demo",
            weight=1.0,
            placement="each",
            verdicts=("model_a", "model_b"),
            base_model="outputs/demo/input/gemma2",
            model_type="gemma2",
        ),
    ),
    orders=("as_given", "swapped"),
    clock_seconds=600.0,
    budget_tokens=None,
    tokens_per_batch=8192,
    temperature=1.0,
    min_scored=0.98,
    visible_rows=512,
    wheels="pairwise-wheels",
    build="87114f1848435b5b",
)


# ==============================================================================================================
# package.py
#
# A package is read and checked before any device is touched: every byte, every golden token id.
#
# Raises PackageError where a package is not the one that was made; ContractError comes from the package's own model_input.py.
# ==============================================================================================================

HASHING_THREADS = 4  # hashlib lets the others go on; a core does about 1 GB a second
NOT_MOUNTED = ("dataset-metadata.json",)  # Kaggle's client reads this file and leaves it out of the dataset


class PackageError(ValueError):
    """A package is incomplete, damaged, or not what its manifest and contract say."""


@dataclass(frozen=True)
class Package:
    """A checked package: its folder, the parsed contract.json and manifest.json, its own model_input.py, its tokenizer."""

    folder: Path
    contract: object  # model_input.Contract
    manifest: dict
    model_input: ModuleType
    tokenizer: Tokenizer

    def manifest_sha256(self) -> str:
        """What tells this package from others, every file of it being as listed."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()


def read_package(folder: Path | str, clock: Clock | None = None) -> Package:
    """Read the package in `folder`: file hashes, contract, tokenizer and golden token ids are checked, in this order.

    With a `clock`, a line is logged of how long it took to read every byte.
    """
    folder = Path(folder)
    began = time.monotonic()
    manifest = check_manifest(folder)
    if clock:
        size = sum(expected["bytes"] for expected in manifest["files"].values())
        log(clock, f"{folder}: {size / 1e9:.2f} GB as listed, hashed in {time.monotonic() - began:.1f} s")
    model_input = execute_model_input(folder / "model_input.py")
    contract = model_input.read_contract(folder)
    check_hash(folder / "model_input.py", contract.model_input_sha256, "contract.json")
    for name, sha256 in contract.tokenizer_sha256.items():
        check_hash(folder / name, sha256, "contract.json")
    tokenizer = read_tokenizer(folder)
    model_input.check_golden(tokenizer, contract)
    return Package(folder, contract, manifest, model_input, tokenizer)


def check_manifest(folder: Path) -> dict:
    """The parsed manifest.json, once every file that it lists has the bytes that it lists, and none is there besides."""
    if not (folder / "manifest.json").is_file():
        raise PackageError(f"{folder}: manifest.json is missing; package the run again")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    listed = {name: expected for name, expected in manifest["files"].items() if name not in NOT_MOUNTED}
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise PackageError(f"{path}: missing, but manifest.json lists it; upload the package again")
        if path.stat().st_size != expected["bytes"]:
            raise PackageError(f"{path}: {path.stat().st_size} bytes, manifest.json says {expected['bytes']}; upload it again")
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for _ in pool.map(lambda name: check_hash(folder / name, listed[name]["sha256"], "manifest.json"), listed):
            pass
    present = {path.name for path in folder.iterdir() if path.is_file()}
    unlisted = sorted(present - set(manifest["files"]) - {"manifest.json", *NOT_MOUNTED})
    if unlisted:
        raise PackageError(f"{folder}: {', '.join(unlisted)} not listed in manifest.json; package the run again")
    return manifest


def check_hash(path: Path, expected: str, source: str) -> None:
    """Raise PackageError unless the SHA-256 of the file at `path` is `expected`, as `source` says."""
    if not path.is_file():
        raise PackageError(f"{path}: missing, but {source} lists it; package the run again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise PackageError(f"{path}: its SHA-256 is {found[:12]}…, {source} says {expected[:12]}…; the file has changed")


class _SourceOnly(importlib.abc.SourceLoader):
    """Loads a module from its source, never from a cached compilation, and writes none beside it."""

    def __init__(self, path: Path):
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()


def execute_model_input(path: Path) -> ModuleType:
    """The module in `path`, under a name of its own, so that packages with different copies can live side by side."""
    name = f"model_input_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    loader = _SourceOnly(path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json, as training saved it: no class of transformers can rebuild it differently."""
    if not (folder / "tokenizer.json").is_file():
        raise PackageError(f"{folder}: tokenizer.json is missing; package the run again")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# ==============================================================================================================
# models/placement.py
#
# Which part of a model stands on which device, where one device cannot hold it: layers in their order, bytes in balance.
#
# Nothing here needs torch: sizes come from the headers of the package's safetensors files.
# ==============================================================================================================

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


# ==============================================================================================================
# models/pipeline.py
#
# A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.
#
# A stage is the layers on one device. A batch leaves its stage once the device has computed it and the next stage is free, so
# that there is one batch in a stage at most, and a device holds the intermediates of one batch only.
#
# Each batch in flight has a CUDA stream of its own on every device. PyTorch's copy from one GPU to another makes the current
# streams of both wait for each other, and accelerate copies masks and positions anew for every layer of a later stage: on one
# stream, the first GPU's next batch would stand in the queue behind copies that wait for the second GPU.
# ==============================================================================================================


class Stages:
    """The stages of a split model, entered by forward hooks on the first part of each device.

    `devices` are the stages' devices; those that are GPUs get a stream for each batch in flight.
    """

    def __init__(self, model, starts: Sequence[str], devices: Sequence[str] = ()):
        self.locks = [threading.Lock() for _ in range(1 + len(starts))]
        self.local = threading.local()
        self.streams: queue.SimpleQueue[list] = queue.SimpleQueue()
        for _ in self.locks:
            self.streams.put([torch.cuda.Stream(device) for device in devices if device.startswith("cuda")])
        for stage, start in enumerate(starts, 1):
            part = next(part for name, part in model.named_modules() if f".{name}".endswith(f".{start}"))  # PEFT adds a prefix
            part.register_forward_pre_hook(lambda *_, stage=stage: self.enter(stage))

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """One batch on its way through all stages; outside of this nothing waits. What it computes must be read inside."""
        self.locks[0].acquire()
        self.local.stage, self.local.streams = 0, self.streams.get()
        try:
            with contextlib.ExitStack() as current:
                for stream in reversed(self.local.streams):  # the last one entered decides the thread's device
                    current.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            self.streams.put(self.local.streams)
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter(self, stage: int) -> None:
        """Wait until the stage is free, take it, and give back the one before once its device has done its work."""
        held = getattr(self.local, "stage", None)
        if held is not None:
            self.locks[stage].acquire()
            if self.local.streams:
                self.local.streams[held].synchronize()
            self.locks[held].release()
            self.local.stage = stage


def stage_starts(device_map: Mapping[str, str]) -> list[str]:
    """The first part on each device but the first, from a device_map in the order in which a row passes through its parts."""
    parts = [(part, device) for part, device in device_map.items() if ".layers." in part]
    return [part for (_, before), (part, device) in zip(parts, parts[1:], strict=False) if device != before]


# ==============================================================================================================
# models/gptq.py
#
# GPTQ packages without GPTQ's libraries: linear layers that unpack their 4 or 8 bits for each matrix product.
#
# Kaggle's image has none of them, and none can be taken there: gptqmodel is a source distribution that wants a newer
# transformers and compiles its CUDA kernels at first use. The file format is the standard one (checkpoint_format gptq): qweight
# and qzeros are int32 words, lowest bits first, of qweight along the inputs, of qzeros along the outputs, each zero less one.
# ==============================================================================================================

UNPACKING = "gptq_unpacked"  # the name that transformers knows these classes by; its own loader of gptq wants the libraries
READ = {"bits": (4, 8), "desc_act": (False,), "sym": (True,), "checkpoint_format": ("gptq",)}


class GptqLinear(torch.nn.Module):
    """A linear layer of (outputs, inputs), each row in groups of `group_size` weights with one float16 scale."""

    def __init__(self, outputs: int, inputs: int, bias: torch.nn.Parameter | None, bits: int, group_size: int):
        super().__init__()
        self.bits, self.group_size = bits, group_size
        groups, in_word = inputs // group_size, 32 // bits
        self.register_buffer("qweight", torch.zeros(inputs // in_word, outputs, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, outputs // in_word, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))  # i // group_size: nothing was reordered
        self.bias = bias

    def weight_ui(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in `dtype`, of shape (outputs, inputs): (code - zero) * scale."""
        codes_ui = unpack(self.qweight, self.bits).transpose(0, 1).flatten(1)
        zeros_qu = unpack(self.qzeros, self.bits).flatten(1) + 1
        weight_uqi = codes_ui.unflatten(1, (-1, self.group_size)).to(dtype)
        weight_uqi.sub_(zeros_qu.T.unsqueeze(-1)).mul_(self.scales.T.unsqueeze(-1).to(dtype))
        return weight_uqi.flatten(1)

    def forward(self, input_bti: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the input's dtype."""
        return linear(input_bti, self.weight_ui(input_bti.dtype), self.bias)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in int32 `words` of shape (rows, columns), uint8 (rows, columns, 32 // bits). Bytes stand lowest first."""
    bytes_rcb = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return bytes_rcb if bits == 8 else torch.stack((bytes_rcb & 15, bytes_rcb >> 4), dim=-1).flatten(-2)


class UnpackingConfig(QuantizationConfigMixin):
    """What a GPTQ package's config.json says, as far as loading needs it."""

    def __init__(self, bits: int, group_size: int, **_):
        self.quant_method, self.bits, self.group_size = UNPACKING, bits, group_size


class UnpackingQuantizer(HfQuantizer):
    """Tells transformers to put a GptqLinear in the place of every linear layer below `layers` before it reads weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_) -> None:
        config = self.quantization_config
        found = [(name, old) for name, old in model.named_modules() if isinstance(old, torch.nn.Linear) and ".layers." in name]
        for name, old in found:
            with torch.device("meta"):
                new = GptqLinear(old.out_features, old.in_features, old.bias, config.bits, config.group_size)
            model.set_submodule(name, new)

    def is_serializable(self, **_) -> bool:
        """No: what is loaded here is served."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: what is loaded here is served."""
        return False


def unpacking(settings: Mapping[str, object], folder: Path | str) -> dict[str, object]:
    """config.json's `quantization_config` as from_pretrained must get it. PackageError for a kind that is not unpacked here."""
    for key, known in READ.items():
        if settings.get(key) not in known:
            expected = " or ".join(map(str, known))
            raise PackageError(f"{folder}: config.json: {key} is {settings.get(key)!r}, expected {expected}; quantise it again")
    if UNPACKING not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(UNPACKING)(UnpackingConfig)
        register_quantizer(UNPACKING)(UnpackingQuantizer)
    return {"quant_method": UNPACKING, "bits": settings["bits"], "group_size": settings["group_size"]}


# ==============================================================================================================
# models/shortcuts.py
#
# What scoring can leave out without another answer: work for tokens that nobody reads, and attention's slow kernel.
#
# A head reads one token of a row: a decoder's last one, an encoder's first. In the last layer all tokens are needed for the
# attention's keys and values, but what comes after it only for the token that is read: hooks on its output projection and
# its MLP hand on that token alone. What they give, one token wide, is added to the residual of all tokens by broadcasting,
# which is right in the one place that is read.
# ==============================================================================================================

SDPA = "sdpa_repeated"
AFTER_ATTENTION = ("self_attn.o_proj", "mlp", "attention.output.dense", "intermediate")  # decoders' names, then BERT's
BEING_READ = threading.local()  # of the batch that this thread is scoring: a split model has one in each of several threads


def repeated_attention(module, query_bhtd, key_bhtd, value_bhtd, attention_mask, scaling=None, **_):
    """PyTorch's attention with keys and values repeated for every head of their group.

    transformers' own leaves the groups to PyTorch where there is no mask (`enable_gqa`). Only FlashAttention on a GPU can
    do that: on a T4, which has none, and on a CPU the unfused kernel is taken instead.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    output_bhtd = scaled_dot_product_attention(
        query_bhtd,
        key_bhtd.repeat_interleave(groups, dim=1) if groups > 1 else key_bhtd,
        value_bhtd.repeat_interleave(groups, dim=1) if groups > 1 else value_bhtd,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and module.is_causal,
    )
    return output_bhtd.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA, repeated_attention)
AttentionMaskInterface.register(SDPA, sdpa_mask)


def take_shortcuts(model: torch.nn.Module) -> None:
    """Have `model` compute the end of its last layer only for the tokens in `reading`, and say whether it is `causal`.

    Outside of `reading` it computes everything.
    """
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    model.causal = bool(attentions) and all(module.is_causal for module in attentions)
    if model.causal or model.config.model_type == "bert":
        layers = next(module for name, module in model.named_modules() if name.endswith((".layers", ".encoder.layer")))
        for name in AFTER_ATTENTION:
            with contextlib.suppress(AttributeError):
                layers[-1].get_submodule(name).register_forward_pre_hook(only_what_is_read)


@contextlib.contextmanager
def reading(places_b: torch.Tensor) -> Iterator[None]:
    """In this thread, a forward pass is only read at one place of each row."""
    BEING_READ.places_b = places_b
    try:
        yield
    finally:
        BEING_READ.places_b = None


def only_what_is_read(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """A forward pre-hook: of the hidden states (rows, tokens, width) the read token of each row, (rows, 1, width)."""
    places_b = getattr(BEING_READ, "places_b", None)
    if places_b is None:
        return None
    hidden_btd, *others = args
    rows_b = torch.arange(len(places_b), device=hidden_btd.device)
    return (hidden_btd[rows_b, places_b.to(hidden_btd.device)].unsqueeze(1), *others)


# ==============================================================================================================
# models/model.py
#
# The model of a package, loaded so that it answers as it did in training: pad id, attention and soft-cap from the contract.
# ==============================================================================================================

CLASSES = {
    "score": AutoModelForSequenceClassification,
    "reward": AutoModelForSequenceClassification,
    "label_tokens": AutoModelForCausalLM,
}
LORA = ("lora_config.json", "lora.safetensors")  # under PEFT's own names, transformers would go looking for the base model


def load_model(
    folder: Path | str,
    contract,
    device: str,
    dtype: torch.dtype | None = None,
    device_map: Mapping[str, str] | None = None,
) -> torch.nn.Module:
    """The model in `folder` on `device`, in eval mode, with the adapter on it where the folder holds one.

    `dtype` None means float16 on CUDA (a T4 has no bfloat16 units) and float32 elsewhere; quantised packages load by their
    own config.json. A `device_map` places parts of the model on several devices; its inputs then go to `device`, which holds
    the embedding. Raises PackageError where a weight is missing or the configuration contradicts the contract.
    """
    if contract.head not in CLASSES:
        raise PackageError(f"{folder}: its head is {contract.head!r}; this runtime scores {', '.join(CLASSES)}")
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    config = serving_config(folder, contract)
    quantised = getattr(config, "quantization_config", None)
    if quantised and device.startswith("cuda") and quantised.get("bnb_4bit_compute_dtype") == "bfloat16":
        raise PackageError(f"{folder}: computes in bfloat16, which a T4 lacks; quantise it again from float16 weights")
    if quantised and quantised.get("quant_method") == "gptq":
        config.quantization_config = unpacking(quantised, folder)
    placed = {"device_map": dict(device_map or {"": device})} if device_map or quantised or device != "cpu" else {}
    model, loaded = CLASSES[contract.head].from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=choose_attention(config, contract),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **placed,
    )
    lora_config, lora = (Path(folder) / name for name in LORA)
    missing = set(loaded["missing_keys"])
    if lora.is_file():
        model, found = put_adapter_on(model, lora_config, lora, dtype)
        missing -= found
    if missing:
        raise PackageError(f"{folder}: weights are missing: {', '.join(sorted(missing)[:5])}")
    take_shortcuts(model)
    return model.eval()


def choose_attention(config, contract) -> str:
    """Name the fastest implementation of attention that the architecture has; a soft cap has only transformers' eager one."""
    model_class = CLASSES[contract.head]._model_mapping[type(config)]
    if contract.softcap or not model_class._supports_sdpa:
        return "eager"
    if not model_class._supports_attention_backend:
        return "sdpa"
    return SDPA


def put_adapter_on(
    model: torch.nn.Module, lora_config: Path, lora: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, set[str]]:
    """The model with a LoRA adapter that was not merged, in `dtype`, and the names of the weights that the adapter replaces."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # noqa: PLC0415  few packages need it

    config = LoraConfig.from_peft_type(**json.loads(lora_config.read_text(encoding="utf-8")))
    tensors = load_file(lora)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    result = set_peft_model_state_dict(model, tensors)
    absent = [name for name in result.missing_keys if "lora_" in name or ".modules_to_save." in name]
    if absent or result.unexpected_keys:
        raise PackageError(f"{lora}: not the adapter of {lora_config}: {', '.join([*absent, *result.unexpected_keys][:5])}")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model, {name.removeprefix("base_model.model.") for name in tensors}


def serving_config(folder: Path | str, contract):
    """The folder's config.json with pad id and soft-cap set as the contract says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    outputs = {"score": len(contract.verdicts), "reward": 1, "label_tokens": 0}[contract.head]
    found = 0 if contract.head == "label_tokens" else config.num_labels
    if not found == contract.num_labels == outputs:
        raise PackageError(
            f"{folder}: config.json has {found} labels, contract.json {contract.num_labels} for the head {contract.head} and "
            f"the verdicts {', '.join(contract.verdicts)}; package the run again"
        )
    if contract.head == "label_tokens" and len(contract.label_token_ids) != len(contract.verdicts):
        raise PackageError(f"{folder}: contract.json names {len(contract.label_token_ids)} label tokens; package the run again")
    config.pad_token_id = contract.pad_token_id
    config.use_cache = False  # keys and values for a generation that never comes: 2.8 GB of Gemma-2-9b at 8,192 tokens
    if contract.softcap and not getattr(config, "attn_logit_softcapping", None):
        raise PackageError(f"{folder}: trained with a soft-cap, but config.json has no attn_logit_softcapping")
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config


# ==============================================================================================================
# models/scoring.py
#
# Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position.
# ==============================================================================================================

ORDERS = ("as_given", "swapped")
SPARE_TOKENS = 128  # about what a forward pass costs beside its tokens, of 4-bit weights that are unpacked each time


@dataclass(frozen=True)
class Request:
    """One pair to be scored: the pair `id`, with its responses in `order`, as one sequence, or for the reward head two."""

    id: str
    order: str
    sequences: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def orders_of(contract, orders: Iterable[str]) -> tuple[str, ...]:
    """The orders worth scoring: a reward model sees each response alone, so that its second order is its first."""
    return ORDERS[:1] if contract.head == "reward" else tuple(orders)


def padded_tokens(batch: Sequence[Request]) -> int:
    """Tokens that are computed for a batch, padding included."""
    lengths = [len(ids) for request in batch for ids in request.sequences]
    return sum(lengths[group[0]] * len(group) for group in alike(lengths))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """The lengths' places in groups, longest first, each to be one forward pass with at most SPARE_TOKENS of padding."""
    groups: list[list[int]] = []
    padding = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        padding += lengths[groups[-1][0]] - lengths[place] if groups else 0
        if not groups or padding > SPARE_TOKENS:
            groups.append([])
            padding = 0
        groups[-1].append(place)
    return groups


def make_requests(model_input: ModuleType, tokenizer, contract, pairs: Sequence, orders: Iterable[str]) -> list[Request]:
    """The requests for `pairs` in `orders`, encoded by the package's own model_input."""
    made = []
    for order in orders:
        ordered = [model_input.swap(pair) for pair in pairs] if order == "swapped" else list(pairs)
        encoded = model_input.encode_all(ordered, tokenizer, contract)
        made += [Request(pair.id, order, sequences) for pair, sequences in zip(pairs, encoded, strict=True)]
    return made


def make_batches(requests: Iterable[Request], tokens_per_batch: int) -> list[list[Request]]:
    """Batches of requests of like length, longest first, so that one too large for memory shows at once.

    A batch, padded, holds at most `tokens_per_batch` tokens; a request that is longer than that is a batch of its own.
    """
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: (-request.length, request.id, request.order)):
        if batches and padded_tokens([*batches[-1], request]) <= tokens_per_batch:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


@torch.inference_mode()
def score_batch(
    model: torch.nn.Module, model_input: ModuleType, contract, batch: list[Request], device: str, passing=contextlib.nullcontext
) -> list[list[float]]:
    """Probabilities of a batch, one list a request in the order of contract.verdicts, swapped ones swapped back.

    The softmax is in float32. Where the model overflowed, the probabilities are NaN. Each forward pass is made in the context
    `passing()`.
    """
    logits_bv = verdict_logits(model, contract, [ids for request in batch for ids in request.sequences], device, passing)
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias)
    probabilities_bv = logits_bv.softmax(-1).tolist()
    return [
        model_input.swap_probabilities(values, contract.verdicts) if request.order == "swapped" else values
        for request, values in zip(batch, probabilities_bv, strict=True)
    ]


def verdict_logits(
    model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str, passing=contextlib.nullcontext
) -> torch.Tensor:
    """The verdicts' logits, float32 of shape (requests, verdicts), of one sequence a request, for the reward head of two.

    Sequences of like length go through the model together: a pair's two responses, which are not, each with others.
    """
    compute_logits = label_token_logits if contract.head == "label_tokens" else classifier_logits
    rows = [torch.empty(0)] * len(sequences)
    for group in alike(list(map(len, sequences))):
        with passing():
            outputs_bu = compute_logits(model, contract, [sequences[place] for place in group], device).float().cpu()
        for place, row in zip(group, outputs_bu, strict=True):
            rows[place] = row
    logits = torch.stack(rows)
    if contract.head != "reward":
        return logits
    return logits.view(-1, 2)[:, [("model_a", "model_b").index(verdict) for verdict in contract.verdicts]]


def classifier_logits(model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str) -> torch.Tensor:
    """The outputs of a classifier, (sequences, outputs). Its rows are padded on the right.

    By itself it finds the last token that is not padding. What a decoder reads there never sees the padding behind it, so that
    only an encoder needs a mask.
    """
    is_decoder = getattr(model, "causal", False)
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id, pad_left=False)
    inputs = {"input_ids": ids_bt.to(device)}
    if not is_decoder and not mask_bt.all():
        inputs["attention_mask"] = mask_bt.long().to(device)

    # A decoder's head reads the last token of a row that is not padding, an encoder's the first.
    read_places = [0] * len(sequences)
    if is_decoder:
        read_places = [last_token_place(ids, contract.pad_token_id) for ids in sequences]
    with reading(torch.tensor(read_places, device=device)):
        return model(**inputs).logits


def label_token_logits(model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str) -> torch.Tensor:
    """The answer tokens' logits of a causal LM, (sequences, verdicts).

    Its rows are padded on the left: the answer then stands at the last place of every row, and only there are logits computed.
    """
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id, pad_left=True)
    position_ids_bt = (mask_bt.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_bt.to(device), "position_ids": position_ids_bt.to(device)}
    if not mask_bt.all():
        inputs["attention_mask"] = mask_bt.long().to(device)

    last_place = ids_bt.shape[1] - 1
    with reading(torch.full((len(sequences),), last_place, device=device)):
        logits_b1v = model(**inputs, logits_to_keep=1, use_cache=False).logits
    return logits_b1v[:, -1, list(contract.label_token_ids)]


def pad(sequences: Sequence[list[int]], pad_token_id: int, pad_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded to the longest sequence, and where they are no padding, both (sequences, tokens)."""
    lengths_b1 = torch.tensor([[len(ids)] for ids in sequences])
    longest = int(lengths_b1.max())
    places_t = torch.arange(longest)
    mask_bt = places_t >= longest - lengths_b1 if pad_left else places_t < lengths_b1

    ids_bt = torch.full(mask_bt.shape, pad_token_id)
    ids_bt[mask_bt] = torch.tensor([token for ids in sequences for token in ids])
    return ids_bt, mask_bt


def last_token_place(ids: Sequence[int], pad_token_id: int) -> int:
    """The place of the last token that is not the pad id; 0 where all are, as the classifier reads such a row."""
    for place in range(len(ids) - 1, -1, -1):
        if ids[place] != pad_token_id:
            return place
    return 0


def score(  # noqa: PLR0913  the last three are options by name
    model: torch.nn.Module,
    model_input: ModuleType,
    tokenizer,
    contract,
    pairs: Sequence,
    *,
    orders: Iterable[str] = ORDERS,
    tokens_per_batch: int = 8192,
    device: str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Probabilities by id and order, in the order of contract.verdicts; swapped ones are already swapped back.

    A reward model is run once a pair, whatever the orders. Raises FloatingPointError where a row's probabilities are not
    finite, ValueError where two pairs share an id.
    """
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    if len(scores) != len(pairs):
        raise ValueError(f"{len(pairs) - len(scores)} pairs have the id of another one; scores are joined by id")
    orders = tuple(orders)
    worth = orders_of(contract, orders)
    for batch in make_batches(make_requests(model_input, tokenizer, contract, pairs, worth), tokens_per_batch):
        for request, values in zip(batch, score_batch(model, model_input, contract, batch, device), strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}")
            scores[request.id] |= dict.fromkeys([request.order] if worth == orders else orders, values)
    return scores


def mean_of_orders(scores: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """The mean over the orders in which each pair was scored, by id; a pair that was not scored is left out."""
    return {
        pair_id: [sum(values) / len(by_order) for values in zip(*by_order.values(), strict=True)]
        for pair_id, by_order in scores.items()
        if by_order
    }


# ==============================================================================================================
# scheduling/plan.py
#
# Shares out the seconds that are left: which rows get the second order, and which a further model.
#
# schedule.plan_next_pass decides with it, after every pass, which pass comes next. An option is one more pass of a package in an
# order. It changes a probability by some amount, whose standard deviation s is measured. Its expected gain is that of the
# knowledge gradient (Frazier, Powell and Dayanik 2008): 2 (s φ(m/s) − m Φ(−m/s)), with m half the lead of the first verdict over
# the second. A row near the line between two verdicts gains most, one far from it nothing. For log loss it is s² (1 − Σp²).
#
# Rows are taken by their gain per second until the seconds are used. Which further models are worth their loading is tried out:
# with none of them, with the first, with the first two, and so on.
# ==============================================================================================================

LOAD_BYTES_PER_SECOND = 3e8
CHANGE_OF_ORDER = 0.06  # the change of a probability (sd) by a second order or model, until it is measured
CHANGE_OF_MODEL = 0.1
ROWS_TO_MEASURE = 30  # fewer give no standard deviation worth planning by
SHORTEST_SECONDS = 1e-9  # of a row while no speed is measured: gains are divided by it


@dataclass(frozen=True)
class Option:
    """One more pass that could be made: a package (its number in the spec) in an order, over the rows `unscored` (ids).

    `change` is the standard deviation of what the pass changes in a probability; `load_seconds` is 0 where its model is loaded.
    """

    package: int
    order: str
    change: float
    seconds_per_token: float
    load_seconds: float = 0.0
    unscored: Sequence[str] = ()


@dataclass(frozen=True)
class Offer:
    """One row of an option, which is named by its place."""

    option_place: int
    row_id: str
    gain: float
    seconds: float
    gain_per_second: float


@dataclass(frozen=True)
class Share:
    """What an option gets of the clock: its rows with their gain per second, and the seconds for them, without loading."""

    option: Option
    worth: dict[str, float]
    seconds: float


def allocate(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    by_log_loss: bool,
) -> list[Share]:
    """Share `seconds`, what is left of the clock, out among the options: rows of most gain per second first.

    `probabilities` are what the passes so far say of a row, by id (absent: nothing), `tokens` the rows' lengths. Each option
    gets a share, in their order; one without rows where it gets no time.
    """
    offers = make_offers(options, probabilities, tokens, by_log_loss)
    loaded = {option.package for option in options if not option.load_seconds}
    further = sorted({option.package for option in options if option.load_seconds})

    best_gain, best_shares = allocate_to(loaded, options, offers, seconds)
    for count in range(1, len(further) + 1):
        gain, shares = allocate_to(loaded.union(further[:count]), options, offers, seconds)
        if gain > best_gain:
            best_gain, best_shares = gain, shares
    return best_shares


def make_offers(
    options: Sequence[Option], probabilities: Mapping[str, Sequence[float]], tokens: Mapping[str, int], by_log_loss: bool
) -> list[Offer]:
    """Every unscored row of every option, by gain per second; equal ones stay in the order of options and rows."""
    offers = []
    for place, option in enumerate(options):
        for row_id in option.unscored:
            gain = expected_gain(probabilities.get(row_id), option.change, by_log_loss)
            seconds = max(tokens[row_id] * option.seconds_per_token, SHORTEST_SECONDS)
            offers.append(Offer(place, row_id, gain, seconds, gain / seconds))
    return sorted(offers, key=lambda offer: offer.gain_per_second, reverse=True)


def allocate_to(
    packages: Collection[int], options: Sequence[Option], offers: Sequence[Offer], seconds: float
) -> tuple[float, list[Share]]:
    """Take the best offers of these packages that fit the seconds left after loading; their gain, and every option's share."""
    load_seconds = {option.package: option.load_seconds for option in options if option.package in packages}
    seconds_left = seconds - sum(load_seconds.values())

    total_gain = 0.0
    worths: list[dict[str, float]] = [{} for _ in options]
    seconds_used = [0.0] * len(options)
    for offer in offers:
        place = offer.option_place
        # A row too long for what is left does not keep shorter ones behind it out.
        if options[place].package not in packages or offer.seconds > seconds_left:
            continue
        seconds_left -= offer.seconds
        seconds_used[place] += offer.seconds
        total_gain += offer.gain
        worths[place][offer.row_id] = offer.gain_per_second

    shares = [Share(option, worths[place], seconds_used[place]) for place, option in enumerate(options)]
    return total_gain, shares


def expected_gain(values: Sequence[float] | None, change: float, by_log_loss: bool) -> float:
    """What another opinion that changes a probability by `change` (sd) is expected to bring: accuracy, or nats of log loss."""
    if values is None:
        return 1.0
    if by_log_loss:
        return change**2 * (1 - sum(value**2 for value in values))
    second, first = sorted(values)[-2:]
    margin, change = (first - second) / 2, max(change, 1e-6)
    ratio = margin / change
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    return 2 * (change * density - margin * math.erfc(ratio / math.sqrt(2)) / 2)


def measured_change(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> float | None:
    """The standard deviation of the first probability's change over the rows in both; None for fewer than ROWS_TO_MEASURE."""
    changes = [after[row_id][0] - values[0] for row_id, values in before.items() if row_id in after]
    if len(changes) < ROWS_TO_MEASURE:
        return None
    return math.sqrt(sum(change**2 for change in changes) / len(changes))


def flop_per_token(package: Package) -> float:
    """Floating-point operations that a token costs: two for each parameter that it is multiplied with."""
    return 2.0 * sum(elements for name, (_, elements) in weight_sizes(package.folder).items() if is_multiplied(name))


def loading_seconds(package: Package, copies: int) -> float:
    """How long loading `copies` of a package should take, one after the other."""
    return copies * sum(size for size, _ in weight_sizes(package.folder).values()) / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Whether every token is multiplied with a tensor: no embedding, no lm_head (last places only), no norm, bias or scale."""
    return name.endswith((".weight", ".qweight")) and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))


# ==============================================================================================================
# inputs.py
#
# What Kaggle mounted, found by searching: the layout of /kaggle/input has changed before and differs between runs.
#
# WSDM's texts are strings; LMSYS's are JSON lists of turns with nulls. KAGGLE_ROOT stands for /kaggle in a rehearsal.
# ==============================================================================================================

TEXTS = ("prompt", "response_a", "response_b")
ROWS_AT_ONCE = 1024


def kaggle_root() -> Path:
    """/kaggle, or the folder that stands for it in a rehearsal."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str | None = None) -> Path:
    """The file named as one of `names`, the first that is there, in the dataset or competition `slug`, wherever it is mounted.

    A `kind`, datasets or competitions, leaves out what is mounted as the other, and takes `slug` at the place of a mount
    (slug, kind/slug, kind/owner/slug) before a folder of that name deeper inside. Mounted twice, the same file counts once.
    Raises FileNotFoundError where there is none, or several that differ.
    """
    inputs = root / "input"
    places: dict[tuple[int, str], list[Path]] = {}
    for name in names:
        for path in sorted(inputs.rglob(name)):
            place = place_in_mounts(path.relative_to(inputs).parts[:-1], slug, kind)
            if path.is_file() and place is not None:
                places.setdefault((place, name), []).append(path)
    found = places[min(places, key=lambda place: (place[0], names.index(place[1])))] if places else []
    if found and all(path.name == found[0].name and filecmp.cmp(path, found[0], shallow=False) for path in found[1:]):
        return found[0]
    mounted = sorted({str(path.parent.relative_to(inputs)) for path in inputs.rglob("*") if path.is_file()})
    raise FileNotFoundError(
        f"{inputs}: {len(found)} files named {' or '.join(names)} below a folder {slug!r}, expected one; mounted are "
        f"{', '.join(mounted) or 'no files at all'}; attach {slug} to the kernel once"
    )


def place_in_mounts(parts: Sequence[str], slug: str, kind: str | None) -> int | None:
    """How well a file's folders below /kaggle/input suit: 0 in the mount of `slug`, 1 in a folder of that name, None not."""
    other = {"datasets": "competitions", "competitions": "datasets"}.get(kind or "")
    if slug not in parts or (len(parts) > 1 and parts[0] == other):
        return None
    owner = 1 if kind == "datasets" else 0
    is_mount = parts[0] == slug or (parts[0] == kind and parts[1 + owner : 2 + owner] == (slug,))
    return 0 if kind is None or is_mount else 1


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """The test rows: id (str), prompt, response_a, response_b, each a string, null, or with `are_turns` a list of those.

    Ids keep the file's characters, numbers their digits. Raises ValueError where a column is missing or holds no text, where
    there are no rows, or where an id is null, no whole number, or there twice.
    """
    rows = list(rows_of(path, ("id", *TEXTS)))
    if not rows:
        raise ValueError(f"{path}: no rows")
    if twice := [row_id for row_id, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(f"{path}: an id occurs twice: {', '.join(twice[:3])}; a submission needs every id once")
    return [{"id": row["id"], **{name: read_text(row[name], are_turns) for name in TEXTS}} for row in rows]


def read_ids(path: Path) -> list[str]:
    """The ids of a table, in its order: what a submission is checked against."""
    return [row["id"] for row in rows_of(path, ("id",))]


def rows_of(path: Path, columns: Sequence[str], keep: Container[str] | None = None) -> Iterator[dict]:
    """The rows of a Parquet or CSV file with these columns, id among them, where it stands in `keep` if that is given.

    Others are never made into Python objects (Parquet) or soon dropped (CSV): memory is that of a thousand rows and those kept.
    """
    number = 0
    for values in (parquet_parts if path.suffix == ".parquet" else csv_parts)(path, columns, keep):
        for row in values:
            number += 1
            row_id = id_text(row["id"])
            if row_id is None:
                raise ValueError(f"{path}, row {number}: its id is {row['id']!r}; expected a text or a whole number")
            if keep is None or row_id in keep:
                yield {**row, "id": row_id}


def parquet_parts(path: Path, columns: Sequence[str], keep: Container[str] | None) -> Iterator[list[dict]]:
    """Rows by the thousand; of those that are not in `keep` only the id."""
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**18) as file:  # else whole columns: 340 MB of a file of 68 MB
        schema = file.schema_arrow
        check_columns(path, columns, schema.names)
        for name in set(columns) & set(TEXTS):
            if not holds_text(schema.field(name).type):
                raise ValueError(f"{path}: column {name} holds {schema.field(name).type}; expected text, or lists of it")
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(columns), use_threads=False):
            ids = batch.column("id").to_pylist()
            is_kept = [keep is None or id_text(row_id) in keep for row_id in ids]
            kept = iter(batch.filter(pa.array(is_kept, pa.bool_())).to_pylist())
            yield [next(kept) if wanted else {"id": row_id} for row_id, wanted in zip(ids, is_kept, strict=True)]


def csv_parts(path: Path, columns: Sequence[str], keep: Container[str] | None) -> Iterator[list[dict]]:
    """Rows one by one; what a row lacks is null."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        check_columns(path, columns, reader.fieldnames or ())
        for row in reader:
            yield [{name: row[name] for name in columns}]


def check_columns(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError where a column is not there."""
    if missing := [name for name in columns if name not in present]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(present) or 'none'}")


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column's type is text, or lists of it; a column of nothing but nulls is."""
    if isinstance(kind, pa.DictionaryType | pa.ListType | pa.LargeListType):
        return holds_text(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def id_text(value: object) -> str | None:
    """An id as the submission has it: a text as it is, a whole number as its digits; None where it is neither.

    A number that came as a float must be within 2**53: beyond it, digits have been lost.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return str(int(value))
    if isinstance(value, bool | float | bytes):
        return None
    return str(value) if value is not None and str(value) != "" else None


def read_text(value: str | Sequence | None, are_turns: bool) -> str | list[str | None] | None:
    """A text as it is; with `are_turns`, the turns in its JSON (null: None), or the text itself where that is no JSON list."""
    if not are_turns or not isinstance(value, str):
        return value
    try:
        turns = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
    if isinstance(turns, list):
        return [turn if turn is None else str(turn) for turn in turns]
    return None if turns is None else value


def install_missing_wheels(root: Path, folders: Sequence[Path], wheels: str | None) -> list[str]:
    """Install bitsandbytes from the mounted wheels where a package needs it and the image lacks it; what was installed."""
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]
    methods = {config.get("quantization_config", {}).get("quant_method") for config in configs}
    if "bitsandbytes" not in methods or importlib.util.find_spec("bitsandbytes"):
        return []
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is absent; name a dataset in the spec's `wheels`"
        )
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    check_wheels(folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", str(folder)]
    subprocess.run([*command, "bitsandbytes"], check=True)
    importlib.invalidate_caches()
    return ["bitsandbytes"]


def check_wheels(folder: Path) -> None:
    """Raise ValueError where a wheel is not the one that wheels.json beside it lists; without that file, all are taken."""
    if not (folder / "wheels.json").is_file():
        return
    manifest = json.loads((folder / "wheels.json").read_text(encoding="utf-8"))
    listed = {wheel["file"]: wheel["sha256"] for wheel in manifest["wheels"]}
    for path in sorted(folder.glob("*.whl")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != listed.get(path.name):
            raise ValueError(
                f"{path}: its SHA-256 is {found[:12]}…, wheels.json says {listed.get(path.name, 'nothing')[:12]}; make "
                "the dataset again with `python -m postprocess.wheels` and upload it"
            )


# ==============================================================================================================
# submission.py
#
# From probabilities to a submission that is whole: every id once, in the test file's order, or an error and no file.
# ==============================================================================================================

SMALLEST = 1e-6  # no probability is nearer to 0 or 1: log loss would punish it without end
PRIOR = {2: (0.6, 0.4), 3: (0.45, 0.25, 0.3)}  # longer, shorter, tie: the longer one wins 62 % of human verdicts


def to_competition(values: Sequence[float], of: Sequence[str], verdicts: Sequence[str]) -> list[float]:
    """Probabilities in the order `of` as probabilities of the competition's `verdicts`; what those lack is shared out."""
    kept = [values[list(of).index(verdict)] for verdict in verdicts]
    if not sum(kept):  # all was said of a tie, which the competition does not know
        return [1 / len(kept)] * len(kept)
    return [value / sum(kept) for value in kept]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The weighted mean of the models that scored a row; the weights need not sum to one."""
    return [sum(w * p for w, p in zip(weights, column, strict=True)) / sum(weights) for column in zip(*values, strict=True)]


def soften(values: Sequence[float], temperature: float) -> list[float]:
    """Probabilities at a temperature (above 1: less sure), each within SMALLEST of 0 and 1 at most, summing to one."""
    powers = [max(value, SMALLEST) ** (1 / temperature) for value in values]
    inner = [max(power / sum(powers), SMALLEST) for power in powers]
    return [value / sum(inner) for value in inner]


def is_first_longer(row: Mapping) -> bool:
    """Whether a row's first answer has as many characters as its second, or more, over all turns."""

    def length(value) -> int:
        return len(value or "") if value is None or isinstance(value, str) else sum(len(turn or "") for turn in value)

    return length(row["response_a"]) >= length(row["response_b"])


def prior(row: Mapping, verdicts: Sequence[str]) -> list[float]:
    """What to say of a row that could not be scored: the longer answer, by characters; of equal ones the first."""
    longer, shorter, *tie = PRIOR[len(verdicts)]
    return [longer, shorter, *tie] if is_first_longer(row) else [shorter, longer, *tie]


def fill_unscored(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], verdicts: Sequence[str], min_scored: float
) -> dict[str, list[float]]:
    """Probabilities of every row, in the rows' order: its score or the prior.

    Raises ValueError where fewer than the share `min_scored` were scored: a silent bad submission is worse than none.
    """
    found = sum(row["id"] in scored for row in rows)
    if found < min_scored * len(rows):
        raise ValueError(
            f"{found} of {len(rows)} rows were scored, the spec's min_scored is {min_scored}; nothing is submitted"
        )
    return {row["id"]: list(scored.get(row["id"]) or prior(row, verdicts)) for row in rows}


def write_submission(
    path: Path, settings: Settings, probabilities: Mapping[str, Sequence[float]], ids: Sequence[str] | None = None
) -> None:
    """Write id,winner or id and one probability a verdict; the file gets its name once `check_submission` has passed it.

    `ids` are the test file's, in its order, read again; without them it is checked against those of `probabilities`. Where
    a check fails, no file is left.
    """
    check_probabilities(probabilities, settings.verdicts)
    with whole_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *settings.columns])
            for row_id, values in probabilities.items():
                answer = values if len(settings.columns) > 1 else [settings.verdicts[values.index(max(values))]]
                writer.writerow([row_id, *answer])
        check_submission(temporary, settings, list(probabilities) if ids is None else ids)


def check_probabilities(probabilities: Mapping[str, Sequence[float]], verdicts: Sequence[str]) -> None:
    """Raise ValueError at a row without one probability a verdict, each above 0 and below 1, summing to one."""
    for row_id, values in probabilities.items():
        whole = len(values) == len(verdicts) and all(0 < value < 1 for value in values)
        if not whole or not math.isclose(sum(values), 1, abs_tol=1e-6):
            raise ValueError(
                f"id {row_id}: {list(values)} are not probabilities that sum to one, one for each of {', '.join(verdicts)}; "
                "nothing is submitted"
            )


def check_submission(path: Path, settings: Settings, ids: Sequence[str]) -> None:
    """Raise ValueError unless the file has the competition's columns and every id once, in order, with a valid answer."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    if header != ["id", *settings.columns]:
        raise ValueError(f"{path}: columns {header}, expected {['id', *settings.columns]}")
    check_order(path, [line[0] if line else "" for line in lines], ids)
    for row_id, *answer in lines:
        if len(answer) != len(settings.columns):
            raise ValueError(f"{path}: id {row_id}: {len(answer)} values, expected {len(settings.columns)}")
        if len(answer) == 1 and answer[0] not in settings.verdicts:
            raise ValueError(f"{path}: id {row_id}: {answer[0]!r}, expected one of {', '.join(settings.verdicts)}")
    if len(settings.columns) > 1:
        check_probabilities({row_id: [float(value) for value in answer] for row_id, *answer in lines}, settings.verdicts)


def check_order(path: Path, found: Sequence[str], ids: Sequence[str]) -> None:
    """Raise ValueError at the first id that is not the test file's at that place."""
    if len(found) != len(ids) or list(found) != list(ids):
        size = min(len(found), len(ids))
        at = next((at for at in range(size) if found[at] != ids[at]), size)
        here = f"row {at + 1} has {found[at]!r}" if at < len(found) else f"row {at + 1} is missing"
        there = repr(ids[at]) if at < len(ids) else "no more"
        raise ValueError(
            f"{path}: its {len(found)} ids are not the test file's {len(ids)} ids in their order: {here}, expected {there}"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes that name when the block succeeds and is removed when it fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_scores(
    path: Path,
    verdicts: Sequence[str],
    final: Mapping[str, Sequence[float]],
    scored: Mapping[str, Sequence[float]],
    per_package: Mapping[str, tuple[Sequence[str], Mapping[str, Mapping[str, Sequence[float]]]]],
) -> None:
    """Write every probability: p_VERDICT as submitted, `scored`, and RUN_p_VERDICT_ORDER as each model gave it (null: not).

    `per_package` holds for each run its verdicts and its scores by id and order.
    """
    columns: dict[str, list] = {"id": list(final), "scored": [row_id in scored for row_id in final]}
    for at, verdict in enumerate(verdicts):
        columns[f"p_{verdict}"] = [values[at] for values in final.values()]
    for run, (order_of_logits, scores) in per_package.items():
        for order in sorted({order for by_order in scores.values() for order in by_order}):
            for at, verdict in enumerate(order_of_logits):
                found = [scores.get(row_id, {}).get(order) for row_id in final]
                columns[f"{run}_p_{verdict}_{order}"] = [None if values is None else values[at] for values in found]
    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def write_record(path: Path, record: Mapping) -> None:
    """Write kernel.json."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# ==============================================================================================================
# checks.py
#
# What must hold before hours of work begin: libraries, GPUs, memory, disk. No GPU is touched here: nvidia-smi is asked.
#
# What would make answers wrong, or could only end in a crash, is a MachineError that says what to do; what costs no more than
# speed is a line in the log. What cannot be found out (no nvidia-smi, no /proc) is not checked.
# ==============================================================================================================

ASK_GPUS = ("nvidia-smi", "--query-gpu=name,memory.free,memory.total,compute_cap", "--format=csv,noheader,nounits")
ASK_SECONDS = 30
EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4
OLDEST_CAPABILITY = 7.0  # a P100 has 6.0, and the image's PyTorch no code for it
MEBIBYTE = 2**20
GIBIBYTE = 2**30
CUDA_CONTEXT_BYTES = GIBIBYTE // 2
BATCH_BYTES = 2 * GIBIBYTE  # with less beside the weights, batches are halved again and again
PROCESS_BYTES = GIBIBYTE  # of RAM: Python, PyTorch and CUDA's libraries in a worker
OUTPUT_BYTES = 1000  # of a row, in submission.csv and scores.parquet together: two models take a quarter of it
METHODS = {"bitsandbytes": "bitsandbytes", "gptq": None}  # how weights are packed, and what unpacks them if not this runtime
COMPARED = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot give the answers that the packages were made for."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi tells of it; None is what it did not tell."""

    name: str
    free_bytes: int | None
    total_bytes: int | None
    capability: float | None


@dataclass(frozen=True)
class Need:
    """A package's run, its placement, the bytes of its weights on the disk, and what each of those is in RAM on a CPU."""

    run: str
    placement: str
    weight_bytes: int
    cpu_factor: int = 1


def check_machine(
    root: Path, settings: Settings, packages: Sequence[Package], devices: Sequence[str], rows: int, clock: Clock
) -> dict:
    """Check libraries, GPUs, memory and disk for the checked packages, and log what is there; the record for kernel.json.

    `devices` are PyTorch's, `rows` those to be scored. Raises MachineError.
    """
    lines = check_libraries(packages, {name: installed_version(name) for name in COMPARED})
    needs = [need_of(chosen, package) for chosen, package in zip(settings.packages, packages, strict=True)]
    gpus = visible_gpus(ask_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    lines += check_gpus(devices, gpus, needs, on_kaggle="KAGGLE_ROOT" not in os.environ)
    memory = available_memory()
    lines += check_memory(memory, devices, needs)
    free = check_disk(root / "working", rows)
    log(clock, machine_line(gpus, memory, free))
    for line in lines:
        log(clock, line)
    return {
        "gpus": None if gpus is None else [asdict(gpu) for gpu in gpus],
        "memory_bytes": memory,
        "disk_bytes": free,
        "notes": lines,
    }


def need_of(chosen, package: Package) -> Need:
    """What a package of the settings asks of the machine. On a CPU, float16 weights that are not packed become float32."""
    size = sum(path.stat().st_size for path in package.folder.glob("*.safetensors"))
    widened = package.manifest.get("quantize") == "none" and package.manifest.get("dtype") == "float16"
    return Need(chosen.run, chosen.placement, size, 2 if widened else 1)


def installed_version(name: str) -> str | None:
    """The version of an installed package, None where it is absent; it is not imported."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_libraries(packages: Sequence[Package], served: Mapping[str, str | None]) -> list[str]:
    """Raise MachineError where a package needs what is absent or too old; lines of versions that differ from training's.

    Golden rows show whether another version of PyTorch or of the tokenizers gives other answers, so those are only told. But
    transformers of an older major version reads a newer configuration without complaint and ignores what it does not know:
    version 5 writes rope_parameters, without which version 4 gives every model the same rotary base.
    """
    lines = []
    for package in packages:
        name = package.folder.name
        config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
        trained = package.contract.recorded.get("versions", {})
        saved = config.get("transformers_version") or trained.get("transformers")
        if major(served["transformers"]) < major(saved):
            raise MachineError(
                f"{name}: saved by transformers {saved}, which version {served['transformers']} here would read wrongly; "
                "choose the newest environment for the kernel"
            )
        method = (config.get("quantization_config") or {}).get("quant_method")
        is_unmerged = (package.folder / "lora_config.json").is_file()
        if method and method not in METHODS:
            raise MachineError(f"{name}: quantised by {method}, this kernel knows {', '.join(METHODS)}; package the run again")
        for library in filter(None, (METHODS.get(method), "peft" if is_unmerged else None)):
            if served[library] is None:
                raise MachineError(f"{name}: needs {library}, which is not installed; attach a dataset with its wheel")
        used = {"torch", "transformers", "tokenizers", METHODS.get(method), "peft" if is_unmerged else None}
        lines += [
            f"{name}: trained with {library} {trained[library]}, served with {served[library]}"
            for library in COMPARED
            if library in used and trained.get(library, served[library]) != served[library]
        ]
    return lines


def major(version: str | None) -> int:
    """The first number of a version; 0 where there is none."""
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else 0


def ask_gpus() -> list[Gpu] | None:
    """The GPUs that nvidia-smi tells of; None where it is absent, fails, or does not answer in ASK_SECONDS."""
    try:
        done = subprocess.run(ASK_GPUS, capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs from nvidia-smi's lines: name, MiB free, MiB in all, compute capability; "[N/A]" is None."""

    def number(field: str) -> float | None:
        return float(field) if re.fullmatch(r"\d+(\.\d+)?", field) else None

    gpus = []
    for line in filter(str.strip, text.splitlines()):
        name, *fields = (field.strip() for field in line.rsplit(",", 3))
        free, total, capability = (*map(number, fields), None, None, None)[:3]
        gpus.append(Gpu(name, free and int(free * MEBIBYTE), total and int(total * MEBIBYTE), capability))
    return gpus


def visible_gpus(gpus: list[Gpu] | None, visible: str | None) -> list[Gpu] | None:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES lets PyTorch see, if it names them by number; nvidia-smi sees all."""
    if gpus is None or visible is None or not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", visible):
        return gpus
    return [gpus[number] for number in map(int, visible.split(",")) if number < len(gpus)]


def check_gpus(devices: Sequence[str], gpus: Sequence[Gpu] | None, needs: Sequence[Need], on_kaggle: bool) -> list[str]:
    """Raise MachineError where the GPUs cannot do the work; lines of what will make it slow. In a rehearsal CPUs stand in."""
    if not any(device.startswith("cuda") for device in devices):
        if on_kaggle:
            raise MachineError(
                "PyTorch finds no GPU, and CPUs would take days; set machine_shape to NvidiaTeslaT4 and enable_gpu to true in "
                "kernel-metadata.json, or choose GPU T4 x2 in the editor, and look whether the week's GPU hours are spent"
            )
        return []
    for gpu in gpus or ():
        if gpu.capability is not None and gpu.capability < OLDEST_CAPABILITY:
            raise MachineError(
                f"{gpu.name} has compute capability {gpu.capability}, Kaggle's PyTorch needs {OLDEST_CAPABILITY} or more; set "
                "machine_shape to NvidiaTeslaT4 in kernel-metadata.json, or choose GPU T4 x2 in the editor"
            )
    lines = []
    if len(devices) < EXPECTED_GPUS and any(need.placement == "each" for need in needs):
        lines.append(f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected: half the speed")
    if gpus is None or len(gpus) != len(devices) or any(gpu.free_bytes is None for gpu in gpus):
        return [*lines, "warning: nvidia-smi does not tell the free memory of each GPU, so it is not checked"]
    return lines + [line for need in needs for line in check_gpu_memory([gpu.free_bytes for gpu in gpus], need)]


def check_gpu_memory(free: Sequence[int], need: Need) -> list[str]:
    """Raise MachineError where no GPU (placement each) or not all of them together (split) hold the weights."""
    weights, is_split = in_gibibytes(need.weight_bytes), need.placement == "split"
    rooms = [one - CUDA_CONTEXT_BYTES for one in free]
    room = (sum(rooms) if is_split else max(rooms)) - need.weight_bytes
    if room < 0:
        where, told = " over all GPUs" if is_split else "", " and ".join(map(in_gibibytes, free))
        raise MachineError(
            f"{need.run}: {weights} GiB of weights{where}, and {told} GiB free; use two T4s (machine_shape NvidiaTeslaT4), "
            "restart the session if another kernel is on them, or quantise to fewer bits"
        )
    lines = []
    if room < BATCH_BYTES * (len(free) if is_split else 1):
        lines.append(f"warning: {need.run}: {weights} GiB of weights leave {in_gibibytes(room)} GiB free for batches")
    if not is_split:
        lines += [
            f"warning: {need.run}: cuda:{number} has {in_gibibytes(one)} GiB free, too few for {weights} GiB of weights"
            for number, one in enumerate(free)
            if one < CUDA_CONTEXT_BYTES + need.weight_bytes
        ]
    return lines


def available_memory(path: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of RAM, swap included, that can be had without pushing anything out; None where Linux does not say."""
    try:
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        return (int(found["MemAvailable"]) + int(found.get("SwapFree", 0))) * 1024
    except (OSError, KeyError):
        return None


def check_memory(available: int | None, devices: Sequence[str], needs: Sequence[Need]) -> list[str]:
    """Raise MachineError where RAM cannot hold the workers, with the weights too where those are CPUs; lines of what is tight.

    Weights on the way to a GPU are mapped files, which need no RAM; without room for them each GPU reads them from the disk.
    """
    if available is None or not needs:
        return []
    largest = max(needs, key=lambda need: need.weight_bytes * need.cpu_factor * copies(need, devices))
    held = largest.weight_bytes * largest.cpu_factor * copies(largest, devices)
    on_gpus = any(device.startswith("cuda") for device in devices)
    workers = PROCESS_BYTES * copies(largest, devices) if on_gpus else 0
    sizes = f"{in_gibibytes(available)} GiB of RAM can be had"
    if available < workers + (0 if on_gpus else held):
        what = f"{copies(largest, devices)} processes need {in_gibibytes(workers)}"
        if not on_gpus:
            what = f"{largest.run} needs {in_gibibytes(held)} on {', '.join(devices)}"
        raise MachineError(f"{sizes}, {what}; end what else runs on this machine")
    if on_gpus and available < workers + largest.weight_bytes:
        return [f"warning: {sizes}, less than the weights of {largest.run}: loading is as slow as the disk, on every GPU"]
    if not on_gpus and available < 1.2 * held:
        return [f"warning: {sizes}, {largest.run} needs {in_gibibytes(held)} for its weights alone"]
    return []


def copies(need: Need, devices: Sequence[str]) -> int:
    """How many copies of a package's model are loaded at a time."""
    return 1 if need.placement == "split" else len(devices)


def check_disk(working: Path, rows: int) -> int:
    """The bytes that are free in /kaggle/working; MachineError where the outputs cannot be written there."""
    needed = MEBIBYTE + rows * OUTPUT_BYTES
    try:
        working.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(working).free
        with tempfile.TemporaryFile(dir=working) as file:
            file.write(b"x")
    except OSError as error:
        raise MachineError(f"{working}: cannot be written to ({error}); the submission could not be kept") from None
    if free < needed:
        raise MachineError(
            f"{working}: {free / 1e6:.1f} MB free, {rows} rows may need {needed / 1e6:.1f}; remove files from there"
        )
    return free


def machine_line(gpus: Sequence[Gpu] | None, memory: int | None, disk: int) -> str:
    """GPUs, RAM and disk for the log."""
    if gpus is None:
        told = "no nvidia-smi"
    else:
        told = ", ".join(f"{gpu.name} ({in_gibibytes(gpu.free_bytes)} GiB free)" for gpu in gpus) or "no GPU"
    return f"machine: {told}; {in_gibibytes(memory)} GiB of RAM to be had; {disk / 1e9:.1f} GB free on the disk"


def in_gibibytes(size: int | None) -> str:
    """Bytes as GiB with one decimal."""
    return "?" if size is None else f"{size / GIBIBYTE:.1f}"


# ==============================================================================================================
# visible.py
#
# The visible run is a load test: beside the few test rows that it is shown, it scores rows of the competition's train file.
#
# They are rows of the validation fold that every package lists, so that accuracy means what it will mean in the hidden run,
# and there are enough of them to measure a speed and to predict from it when 10,000 and 25,000 rows will be done.
# ==============================================================================================================

VALIDATION_IDS = "validation_ids.json"
TRAIN_FILES = ("train.parquet", "train.csv")
TRAIN_PREFIX = "train:"
HIDDEN_ROWS = (10_000, 25_000)  # of the public and of the final phase
JUDGEMENTS = ("model_a", "model_b", "tie")
NEVER = 1e9  # seconds, where nothing was measured


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows.

    `rows` are like the test file's, each with a new id; `winners` holds their verdicts by that id (None: has none). With
    `trained_on` a model has seen the rows in training. `log_line` says what was chosen or why nothing was.
    """

    rows: tuple[dict, ...] = ()
    winners: Mapping[str, str | None] = field(default_factory=dict)
    trained_on: bool = False
    log_line: str = ""


@dataclass(frozen=True)
class Speed:
    """What was measured of a package, over all the devices that it was on: tokens without padding, of one order of a row.

    `orders` is how often a row is scored: 1 for a reward model.
    """

    run: str
    loading_seconds: float
    tokens_per_second: float
    tokens_per_row: float
    orders: int

    def seconds_for(self, rows: int, orders: int) -> float:
        """How long `rows` take, in that many orders, once the model is loaded."""
        return min(rows * orders * self.tokens_per_row / self.tokens_per_second, NEVER) if self.tokens_per_second else NEVER


def choose_visible_rows(root: Path, settings: Settings, folders: Sequence[Path], test_ids: Collection[str]) -> VisibleRows:
    """Choose at most settings.visible_rows rows of the train file that the packages in `folders` all list.

    No rows in the hidden run, and where there are none to choose from: the log then says why, and it is never an error.
    """
    if os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        return VisibleRows()
    if not settings.visible_rows:
        return no_visible_rows("visible_rows is 0, no row of the train file is scored")

    lists = []
    for folder in folders:
        if not (folder / VALIDATION_IDS).is_file():
            return no_visible_rows(f"{folder.name} has no {VALIDATION_IDS}; package the run again to have it measured")
        lists.append(json.loads((folder / VALIDATION_IDS).read_text(encoding="utf-8")))
    listed_by_all = frozenset.intersection(*(frozenset(listing["ids"]) for listing in lists))

    try:
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
    except FileNotFoundError:
        return no_visible_rows(f"no {' or '.join(TRAIN_FILES)} of {settings.competition} is mounted")
    try:
        train_rows = read_train_rows(file, settings, listed_by_all)
    except (OSError, ValueError, pa.ArrowException) as error:
        return no_visible_rows(f"the train file is not scored: {error}")
    if not train_rows:
        return no_visible_rows(f"{file.name} holds none of the {len(listed_by_all)} ids that every package lists")

    trained_on = any(listing["trained_on"] for listing in lists)
    if trained_on:
        kind = "rows that a model was trained on: they tell of speed only"
    else:
        folds = sorted({f"fold {listing['fold']}" for listing in lists})
        kind = f"held out ({' and '.join(folds)})"
    log_line = f"visible run: {len(train_rows)} rows of {file.name} are scored too, {kind}"
    rows, winners = rename_train_rows(train_rows, settings, test_ids)
    return VisibleRows(rows, winners, trained_on, log_line)


def no_visible_rows(reason: str) -> VisibleRows:
    """No rows, and a line for the log that says why."""
    return VisibleRows(log_line=f"visible run: {reason}")


def read_train_rows(file: Path, settings: Settings, listed: frozenset[str]) -> list[dict]:
    """The rows of the train file to be scored, in an order that does not depend on the file's: that of their ids' hashes."""
    present = listed.intersection(read_ids(file))
    by_hash = sorted(present, key=lambda row_id: hashlib.sha256(row_id.encode()).hexdigest())
    wanted = by_hash[: settings.visible_rows]
    columns = ("id", *TEXTS, *settings.columns)
    rows_by_id = {row["id"]: row for row in rows_of(file, columns, frozenset(wanted))}
    return [rows_by_id[row_id] for row_id in wanted]


def rename_train_rows(
    train_rows: Sequence[dict], settings: Settings, test_ids: Collection[str]
) -> tuple[tuple[dict, ...], dict[str, str | None]]:
    """The train file's rows as those of the test file are, and their verdicts, under new ids that no test row has."""
    prefix = TRAIN_PREFIX
    while any(row_id.startswith(prefix) for row_id in test_ids):
        prefix = TRAIN_PREFIX + prefix

    rows = []
    winners = {}
    for train_row in train_rows:
        new_id = prefix + train_row["id"]
        texts = {name: read_text(train_row[name], are_turns="tie" in settings.verdicts) for name in TEXTS}
        rows.append({"id": new_id, **texts})
        winners[new_id] = judgement_of(train_row, settings.columns)
    return tuple(rows), winners


def judgement_of(row: Mapping, columns: Sequence[str]) -> str | None:
    """A train row's verdict, from the one column with its name or from one flag a verdict; None where it has none."""
    if len(columns) == 1:
        return row[columns[0]] if row[columns[0]] in JUDGEMENTS else None
    won = [verdict for verdict, name in zip(JUDGEMENTS, columns, strict=True) if str(row[name]) in ("1", "1.0", "True")]
    return won[0] if len(won) == 1 else None


def visible_report(  # noqa: PLR0913  one for each thing that was measured
    visible: VisibleRows,
    verdicts: Sequence[str],
    scored: Mapping[str, Sequence[float]],
    per_package: Mapping[str, tuple[Sequence[str], Mapping[str, Mapping[str, Sequence[float]]]]],
    speeds: Sequence[Speed],
    before_seconds: float,
    clock_seconds: float,
) -> dict:
    """What the visible run measured, for kernel.json.

    `scored` are the final probabilities of `verdicts` by id; `per_package` holds for each run its verdicts and its scores by id
    and order. `before_seconds` passed before the first model was loaded, `clock_seconds` are there until the deadline.
    """
    ids = [row["id"] for row in visible.rows]
    report = {
        "rows": len(ids),
        "scored": sum(row_id in scored for row_id in ids),
        "trained_on": visible.trained_on,
        "speed": [
            {**asdict(speed), "rows_per_second": speed.tokens_per_second / max(speed.tokens_per_row, 1)} for speed in speeds
        ],
        "clock_seconds": clock_seconds,
        "predicted": [predict_finish(speeds, before_seconds, clock_seconds, rows) for rows in HIDDEN_ROWS],
    }
    if not visible.trained_on:
        report["quality"] = quality_of(visible, verdicts, scored)
        report["flips"] = {run: share_of_flips(scores, ids) for run, (_, scores) in per_package.items()}
    return report


def quality_of(visible: VisibleRows, verdicts: Sequence[str], scored: Mapping[str, Sequence[float]]) -> dict:
    """Accuracy, log loss (natural) and the accuracy of the longer answer over the scored rows with one of `verdicts`.

    Where the competition has no ties, rows that are one are left out. No figures where no row is left.
    """
    right, loss, longer_right, judged = 0, 0.0, 0, 0
    for row in visible.rows:
        values, winner = scored.get(row["id"]), visible.winners[row["id"]]
        if values is None or winner not in verdicts:
            continue
        judged += 1
        right += verdicts[values.index(max(values))] == winner
        loss -= math.log(max(values[verdicts.index(winner)], 1e-15))
        longer_right += ("model_a" if is_first_longer(row) else "model_b") == winner
    ties = 0 if "tie" in verdicts else sum(winner == "tie" for winner in visible.winners.values())
    if not judged:
        return {"judged": 0, "ties_left_out": ties}
    accuracy = right / judged
    return {
        "judged": judged,
        "ties_left_out": ties,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": loss / judged,
        "longer_accuracy": longer_right / judged,
    }


def share_of_flips(scores: Mapping[str, Mapping[str, Sequence[float]]], ids: Sequence[str]) -> float | None:
    """The share of rows whose verdict is another one in the second order; None where no row has two."""
    pairs = [list(scores[row_id].values()) for row_id in ids if len(scores.get(row_id, ())) == 2]
    flips = [one.index(max(one)) != other.index(max(other)) for one, other in pairs]
    return sum(flips) / len(flips) if flips else None


def predict_finish(speeds: Sequence[Speed], before_seconds: float, clock_seconds: float, rows: int) -> dict:
    """When `rows` will have their first score and when everything, in seconds since the beginning, one model after another.

    `first_share` of the rows get a first score within the clock, `rest_share` is what it allows of all that comes after.
    """
    first, *others = speeds
    loaded = before_seconds + first.loading_seconds
    once = loaded + first.seconds_for(rows, 1)
    everything = once + first.seconds_for(rows, first.orders - 1)
    everything += sum(speed.loading_seconds + speed.seconds_for(rows, speed.orders) for speed in others)
    first_share = (clock_seconds - loaded) / max(once - loaded, 1e-9)
    rest_share = (clock_seconds - once) / (everything - once) if everything > once else float(clock_seconds >= once)
    return {
        "rows": rows,
        "first_order_seconds": round(once, 1),
        "all_seconds": round(everything, 1),
        "first_share": min(max(first_share, 0.0), 1.0),
        "rest_share": min(max(rest_share, 0.0), 1.0),
    }


def visible_lines(report: Mapping) -> list[str]:
    """The report for the log."""
    lines = []
    quality = report.get("quality", {})
    if quality.get("judged"):
        flips = [f"{run} flips {share:.3f}" for run, share in report["flips"].items() if share is not None]
        ties = f" (ties left out: {quality['ties_left_out']})" if quality["ties_left_out"] else ""
        told = [
            f"accuracy {quality['accuracy']:.4f} ± {2 * quality['standard_error']:.4f} (two standard errors)",
            f"log loss {quality['log_loss']:.4f} on {quality['judged']} rows{ties}",
            f"the longer answer: {quality['longer_accuracy']:.4f}",
            *flips,
        ]
        lines.append(f"visible run: {', '.join(told)}")
    for speed in report["speed"]:
        lines.append(
            f"visible run: {speed['run']}: {speed['rows_per_second']:.2f} rows/s in one order, "
            f"{speed['tokens_per_second']:.0f} tokens/s, {speed['tokens_per_row']:.0f} tokens a row, loaded in "
            f"{speed['loading_seconds']:.0f} s"
        )
    return lines + [finish_line(finish, report["clock_seconds"]) for finish in report["predicted"]]


def finish_line(finish: Mapping, clock_seconds: float) -> str:
    """One prediction for the log."""
    begin, clock = f"predicted for {finish['rows']:,} rows", in_hours(clock_seconds)
    if finish["first_share"] < 1:
        told = f"{clock} are enough for {finish['first_share']:.0%} of them"
        return f"warning: {begin}: {told}; under min_scored nothing is submitted"
    ends = f"{begin}: every row scored once after {in_hours(finish['first_order_seconds'])}"
    if finish["rest_share"] < 1:
        return f"{ends}, {finish['rest_share']:.0%} of all else within {clock}"
    return f"{ends}, all done after {in_hours(finish['all_seconds'])} of {clock}"


def in_hours(seconds: float) -> str:
    """Seconds as hours and minutes, e.g. 4 h 40 min; under ten minutes as seconds."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ==============================================================================================================
# scheduling/worker.py
#
# A process for each device: it loads a model, then scores the batches that come through its pipe until the pipe closes.
#
# A model that one device cannot hold has one process with several devices, its layers over all of them, and a thread for each.
# A process, because a CUDA error takes a whole process with it, and because two threads share one Python. What the kernel's own
# process does when one dies: engine.handle_worker_death.
#
# To the worker: (number, requests). From it:
#     ("loaded", facts)                             dtype, batches_at_once, seconds, worst golden difference
#     ("scored", number, probabilities, bytes)      bytes: the most memory used so far, one number for each device
#     ("out of memory", number)                     it lives on; the batch is to be cut
#     ("refused", sentence)                         the package is not what was packaged: nothing would mend that
#     ("failed", traceback)                         and its end
# ==============================================================================================================

GOLDEN_TOLERANCE = 0.05  # float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more
MEMORY_WORDS = ("CUDA error: out of memory", "_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


@dataclass(frozen=True)
class Assignment:
    """What a worker is to load: the package in `folder`, on `devices` (several: its layers over them), with CPU `threads`."""

    folder: str
    devices: tuple[str, ...]
    position: int
    threads: int


def run_worker(connection, task: Assignment) -> None:
    """The process: work until the pipe closes. It leaves at once then, whatever its threads and CUDA are at."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"worker {task.position}", encoding="utf-8")  # as top and ps show it
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    work(connection, task)
    os._exit(0)


def work(connection, task: Assignment) -> None:
    """Load, then score until the other end of the pipe is closed or something fails."""
    began, device = time.monotonic(), task.devices[0]
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # else libraries that ask for no device take memory of the first GPU
        package = open_package(Path(task.folder))
        model, stages = load_on(package, task.devices)
        worst = check_golden_scores(package, model, device)
    except (PackageError, FloatingPointError) as error:
        return tell(connection, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return tell(connection, "failed", traceback.format_exc())
    at_once = len(stages.locks) if stages else 1
    facts = {"dtype": str(model.dtype), "batches_at_once": at_once, "worst": worst, "seconds": time.monotonic() - began}
    tell(connection, "loaded", facts)

    def score_requests(requests):
        passing = stages.batch if stages else contextlib.nullcontext
        with torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext():  # it is each thread's own
            return score_batch(model, package.model_input, package.contract, requests, device, passing)

    serve(connection, score_requests, at_once, lambda: memory_bytes(task.devices))


def open_package(folder: Path) -> Package:
    """A package whose files were checked before (see package.read_package), as this process needs it."""
    model_input = execute_model_input(folder / "model_input.py")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Package(folder, model_input.read_contract(folder), manifest, model_input, read_tokenizer(folder))


def load_on(package: Package, devices: tuple[str, ...]) -> tuple[torch.nn.Module, Stages | None]:
    """The model on a device, or split over several, then with its stages."""
    if len(devices) == 1:
        return load_model(package.folder, package.contract, devices[0]), None
    device_map = split_over(package.folder, devices)
    model = load_model(package.folder, package.contract, devices[0], device_map=device_map)
    return model, Stages(model, stage_starts(device_map), devices)


def check_golden_scores(package: Package, model: torch.nn.Module, device: str) -> float:
    """The largest difference from the manifest's golden probabilities; over GOLDEN_TOLERANCE it is a PackageError."""
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in package.contract.golden]
    contract = package.contract
    settings = {"orders": ("as_given",), "tokens_per_batch": contract.budget_tokens, "device": device}
    found = score(model, package.model_input, package.tokenizer, contract, pairs, **settings)
    worst = 0.0
    for golden in package.manifest["golden"]:
        values = found[golden["id"]]["as_given"]
        worst = max([worst, *(abs(f - e) for f, e in zip(values, golden["probabilities"], strict=True))])
        if worst > GOLDEN_TOLERANCE:
            raise PackageError(
                f"{package.folder}: golden row {golden['id']} scores {values} on {device}, the package recorded "
                f"{golden['probabilities']}; weights, head, pad id or attention are not those that were packaged"
            )
    return worst


def serve(connection, score_requests, at_once: int, memory) -> None:
    """Score what comes in, `at_once` batches at a time; `score_requests` gives a batch's probabilities, `memory` its bytes.

    Batches are read as they come, so that the next one lies ready when one is done.
    """
    inbox, lock = queue.SimpleQueue(), threading.Lock()

    def score_from_inbox():
        while message := inbox.get():
            number, requests = message
            try:
                answer = ("scored", number, score_requests(requests), memory())
            except Exception as error:
                is_too_large = lacks_memory(error, len(requests))
                answer = ("out of memory", number) if is_too_large else ("failed", traceback.format_exc())
            if answer[0] == "out of memory":
                free_memory()
            with lock:
                tell(connection, *answer)
            if answer[0] == "failed":
                return  # a CUDA error stays with its process: the other end will kill it

    for _ in range(at_once):
        threading.Thread(target=score_from_inbox, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    for _ in range(at_once):
        inbox.put(None)


def lacks_memory(error: Exception, rows: int) -> bool:
    """Whether a batch of so many rows was too large: PyTorch says so of its own memory, CUDA's libraries only in words.

    By those words a row that is alone is no batch to be cut; only a new process may help it.
    """
    said = any(words in str(error) for words in MEMORY_WORDS) or isinstance(error, MemoryError)
    return isinstance(error, torch.OutOfMemoryError) or (said and rows > 1)


def tell(connection, *message) -> None:
    """Send a message; where nobody listens any more there is nothing to tell."""
    with contextlib.suppress(OSError):
        connection.send(message)


def free_memory() -> None:
    """Give the memory of a batch that failed back to its device."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a broken device raises its error again; the next batch then ends the worker
            torch.cuda.empty_cache()


def memory_bytes(devices: tuple[str, ...]) -> list[int]:
    """The most memory that PyTorch took so far on each GPU, or this process on the CPU."""
    if devices[0].startswith("cuda"):
        return [torch.cuda.max_memory_reserved(device) for device in devices]
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]


# ==============================================================================================================
# scheduling/crew.py
#
# The workers as the kernel's own process sees them: started, given batches, killed, started again.
#
# A worker that dies is started again with half its token budget, which stays halved. One that dies FRUITLESS_DEATHS times in a
# row without having loaded its model or scored a batch is given up: its device is gone, and the others go on without it. What
# becomes of the rows that it had is decided by engine.handle_worker_death.
# ==============================================================================================================

FRUITLESS_DEATHS = 3
JOIN_SECONDS = 30.0  # a killed process may be stuck in a driver


@dataclass
class Worker:
    """One process and its history. Tokens are counted with their padding; `seconds` are those in which it had work."""

    name: str  # its devices, for the log
    task: Assignment
    tokens_per_batch: int
    start: Callable[[Assignment], tuple]  # gives the process and the pipe to it
    positions: tuple[int, ...] = ()  # of its devices
    process: object = None
    connection: object = None
    loaded: dict | None = None  # what the worker said of its model
    gone: bool = False
    outstanding: dict[int, list[Request]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    memory_bytes: list[int] = field(default_factory=list)
    deaths: int = 0
    fruitless: int = 0
    last_event: float = 0.0  # began to load, got its first batch, or gave one back
    numbers: int = 0

    @property
    def batches_at_once(self) -> int:
        """How many batches it scores at the same time: one for each stage of a split model."""
        return self.loaded["batches_at_once"] if self.loaded else 1

    def rate(self) -> float:
        """Tokens a second, from what it has done; 0 before its first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def launch(self) -> None:
        """Start the process, which loads the model."""
        self.loaded = None
        self.last_event = time.monotonic()
        self.process, self.connection = self.start(self.task)

    def send(self, batch: list[Request]) -> None:
        """Give it a batch; one that has died in the meantime is noticed by whoever reads from it."""
        if not self.outstanding:
            self.last_event = time.monotonic()
        self.numbers += 1
        self.outstanding[self.numbers] = batch
        with contextlib.suppress(OSError):
            self.connection.send((self.numbers, batch))

    def note_scored(self, number: int, memory: list[int]) -> list[Request]:
        """Count a batch that was scored, and give it back."""
        batch, now = self.outstanding.pop(number), time.monotonic()
        self.tokens += padded_tokens(batch)
        self.seconds += now - self.last_event
        self.last_event, self.memory_bytes = now, memory
        self.fruitless = 0
        return batch

    def note_out_of_memory(self, number: int) -> list[Request]:
        """Give back a batch that was too large; from now on none is larger than half of it, or than a row that was alone."""
        batch = self.outstanding.pop(number)
        self.last_event = time.monotonic()
        fits = padded_tokens(batch) // 2 if len(batch) > 1 else padded_tokens(batch) - 1
        self.tokens_per_batch = max(min(self.tokens_per_batch, fits), 1)
        return batch

    def note_death(self) -> tuple[list[list[Request]], list[list[Request]]]:
        """Count a death, and give back the batches that it was scoring and those that lay ready."""
        batches = list(self.outstanding.values())
        at_work = batches[: self.batches_at_once]
        self.outstanding.clear()
        self.stop()
        self.deaths += 1
        self.tokens_per_batch = max(self.tokens_per_batch // 2, 1)
        if not (at_work and all(len(batch) == 1 for batch in at_work)):  # a row that kills is given up, not its worker
            self.fruitless += 1
        self.gone = self.fruitless >= FRUITLESS_DEATHS
        return at_work, batches[len(at_work) :]

    def stop(self) -> None:
        """End the process, whatever it is doing; its device is free afterwards."""
        if self.process:
            self.connection.close()
            self.process.kill()
            self.process.join(JOIN_SECONDS)
        self.process, self.loaded = None, None


def start_process(task: Assignment) -> tuple:
    """A new process for `task`, and the pipe to it. Spawned, since CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def start_workers(
    package: Package, placement: str, devices: Mapping[int, str], tokens_per_batch: int, threads: int, clock: Clock
) -> list[Worker]:
    """A worker with a copy of the model for `each` device, or one with the model `split` over them; they load by themselves.

    `devices` are by position. `threads` are those of the CPU for each worker.
    """
    groups = [tuple(devices)] if placement == "split" else [(position,) for position in devices]
    workers = []
    for group in groups:
        names = [devices[position] for position in group]
        name = "+".join(n if n != "cpu" else f"cpu #{position}" for n, position in zip(names, group, strict=True))
        task = Assignment(str(package.folder), tuple(names), group[0], threads)
        workers.append(Worker(name, task, tokens_per_batch, start_process, group))
        workers[-1].launch()
    log(clock, f"{package.folder.name}: loading on {', '.join(worker.name for worker in workers)}")
    return workers


def stop_workers(workers: Sequence[Worker]) -> None:
    """End all the processes."""
    for worker in workers:
        worker.stop()


def leave() -> None:
    """End this process at once where a worker's is stuck: multiprocessing would wait for it for ever."""
    if multiprocessing.active_children():
        sys.stdout.flush()
        os._exit(0)


# ==============================================================================================================
# scheduling/engine.py
#
# One order of one package over its workers: batches dealt from one queue until it is empty or the deadline is near.
#
# schedule.make_next_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
#     out of memory      its worker's token budget is halved, and the batch cut and tried again (`cut`)
#     its worker dies    the worker is started again, or given up with its device; its rows go back to the queue, those that it
#                        was scoring one by one at the end, in case that one of them killed it (`handle_worker_death`)
#     its worker hangs   the worker is killed, which is a death like others (`watch`)
#     the clock ends     the batch stays in the queue (`next_batch`)
# A row without a score is simply not in the result, and the caller decides what that means.
# ==============================================================================================================

GIVEN_UP_AFTER = 3  # deaths of the worker that was scoring a row, the last two with that row alone
PATIENCE = 20.0  # times what a batch should take, but at least QUIET_SECONDS; then its worker is taken for hung
QUIET_SECONDS = 120.0
LOAD_PATIENCE_SECONDS = 1800.0
BLOCKS = 8  # where rows are scored by their worth, an eighth at a time is batched by length


@dataclass
class Pass:
    """The queue of batches and the probabilities by id, and what there is to tell of both."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    may_reorder: bool  # a clock too short for the whole queue then takes short rows first: more rows a second
    rows: int
    began: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    computed_tokens: int = 0
    out_of_memory: int = 0
    not_finite: int = 0
    given_up: list[str] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)  # by worker
    suspected: Counter = field(default_factory=Counter)  # deaths by row
    too_large: dict[str, set[str]] = field(default_factory=dict)  # by row, alone in its batch: the workers that lack the memory
    logged: float = field(default_factory=time.monotonic)
    queued_tokens: int = 0  # of the queue, padding included

    def __post_init__(self):
        self.queued_tokens = sum(map(padded_tokens, self.queue))

    def take(self, last: bool) -> list[Request]:
        """The queue's first or last batch."""
        batch = self.queue.pop() if last else self.queue.popleft()
        self.queued_tokens -= padded_tokens(batch)
        return batch

    def put_first(self, batches: Sequence[list[Request]]) -> None:
        """Put batches before all others, in their order."""
        self.queue.extendleft(reversed(batches))
        self.queued_tokens += sum(map(padded_tokens, batches))

    def put_last(self, batches: Sequence[list[Request]]) -> None:
        """Put batches after all others, in their order."""
        self.queue.extend(batches)
        self.queued_tokens += sum(map(padded_tokens, batches))

    def seconds_left(self, workers: Sequence[Worker]) -> float:
        """How long the queue will take on the workers that are alive, from what those have done; 0 where nothing is known."""
        rate = sum(worker.rate() for worker in workers if not worker.gone)
        return self.queued_tokens / rate if rate else 0.0

    def seconds(self) -> float:
        """Since its first batch was sent: loading a model does not count."""
        return max(time.monotonic() - self.began, 1e-9) if self.began else 1e-9


def make_pass(
    label: str,
    requests: Sequence[Request],
    deadline: float,
    workers: Sequence[Worker],
    worth: Mapping[str, float] | None = None,
) -> Pass:
    """A pass over `requests`: by length, or by blocks of those worth most first, where `worth` by id is given."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    if worth is None:
        batches = make_batches(requests, tokens_per_batch)
    else:
        by_worth = sorted(requests, key=lambda request: -worth[request.id])
        size = max(math.ceil(len(requests) / BLOCKS), 1)
        blocks = [by_worth[start : start + size] for start in range(0, len(by_worth), size)]
        batches = [batch for block in blocks for batch in make_batches(block, tokens_per_batch)]
    return Pass(label, deque(batches), deadline, worth is None, len(requests))


def run_pass(work: Pass, workers: Sequence[Worker], clock: Clock) -> Pass:
    """Work through the queue; raises PackageError where a worker refuses the package."""
    log(clock, f"{work.label}: {work.rows} rows in {len(work.queue)} batches")
    for worker in workers:
        if not worker.process and not worker.gone and time.monotonic() < work.deadline:
            worker.launch()
    while True:
        for worker in workers:
            feed(work, worker, workers)
        alive = [worker for worker in workers if worker.process]
        may_start = work.queue and time.monotonic() < work.deadline
        busy = [worker for worker in alive if worker.outstanding or (may_start and not worker.loaded)]
        if not busy:
            break
        by_connection = {worker.connection: worker for worker in alive}
        for connection in wait(list(by_connection), timeout=1.0):
            receive(work, by_connection[connection], workers, clock)
        for worker in busy:
            watch(work, worker, clock)
        if time.monotonic() - work.logged > max((clock.deadline - clock.began) / 300, 10):
            work.logged = time.monotonic()
            log(clock, f"{work.label}: {progress(work, workers)}")
    log(clock, f"{work.label}: {progress(work, workers)}")
    return work


def feed(work: Pass, worker: Worker, workers: Sequence[Worker]) -> None:
    """Give a worker what it can score at once, and one batch more that lies ready."""
    while worker.loaded and len(worker.outstanding) <= worker.batches_at_once:
        batch = next_batch(work, worker, workers)
        if batch is None:
            return
        work.began = work.began or time.monotonic()
        worker.send(batch)


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """The next batch within the worker's budget that it can end before the deadline; None when there is none."""
    left = work.deadline - time.monotonic()
    if not work.queue or left <= 0:
        return None
    last = work.may_reorder and work.seconds_left(workers) > left
    put_back, put_off = (work.put_last, work.put_first) if last else (work.put_first, work.put_last)
    for _ in range(len(work.queue)):
        whole = work.take(last)
        if worker.name not in work.too_large.get(whole[0].id, ()):
            break
        put_off([whole])
    else:
        return None
    batch, *rest = make_batches(whole, worker.tokens_per_batch)
    ahead = sum(map(padded_tokens, worker.outstanding.values())) + padded_tokens(batch)
    if worker.rate() and ahead / worker.rate() > left:
        put_back([whole])
        return None
    put_back(rest)
    return batch


def receive(work: Pass, worker: Worker, workers: Sequence[Worker], clock: Clock) -> None:
    """Read one message of a worker, or its death."""
    try:
        kind, *message = worker.connection.recv()
    except (EOFError, OSError):
        return handle_worker_death(work, worker, f"died (exit code {exit_code(worker)})", clock)
    if kind == "loaded":
        [worker.loaded] = message
        worker.load_seconds, worker.last_event = worker.loaded["seconds"], time.monotonic()
        log(
            clock,
            f"{worker.name}: loaded in {worker.load_seconds:.0f} s in {worker.loaded['dtype']}; "
            f"golden probabilities differ by at most {worker.loaded['worst']:.1e}",
        )
    elif kind == "scored":
        number, values, memory = message
        note_scores(work, worker.note_scored(number, memory), values)
    elif kind == "out of memory":
        told = cut(work, worker, worker.note_out_of_memory(message[0]), workers)
        log(clock, f"{worker.name}: out of memory: {worker.tokens_per_batch} tokens a batch from now on{told}")
    elif kind == "refused":
        if all(other.gone for other in workers if other is not worker):
            raise PackageError(message[0])
        handle_worker_death(work, worker, f"refuses the package, which another device may not: {message[0]}", clock)
    else:
        handle_worker_death(work, worker, f"failed: {message[0].strip()}", clock)


def cut(work: Pass, worker: Worker, batch: list[Request], workers: Sequence[Worker]) -> str:
    """Put a batch that was too large back; a row that was alone in it is for the other workers, or given up."""
    work.out_of_memory += 1
    if len(batch) > 1:
        work.put_first([batch])
        return ""
    lacking = work.too_large.setdefault(batch[0].id, set())
    lacking.add(worker.name)
    if all(other.name in lacking for other in workers if not other.gone):
        return give_up(work, batch)
    work.put_last([batch])
    return f"; row {batch[0].id} is left to the others"


def exit_code(worker: Worker) -> int | None:
    """How a process that closed its pipe ended."""
    worker.process.join(timeout=5)
    return worker.process.exitcode


def handle_worker_death(work: Pass, worker: Worker, why: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and start a new process in its place or give its device up.

    A row that was being scored at GIVEN_UP_AFTER deaths is given up. No process is started that the clock has no time to load.
    """
    at_work, ready = worker.note_death()
    work.deaths[worker.name] = work.deaths.get(worker.name, 0) + 1
    work.put_first(ready)

    # Any of the rows that it was scoring may have killed it: each is tried again alone, after all others.
    rows_given_up = ""
    for batch in at_work:
        for request in batch:
            work.suspected[request.id] += 1
            if work.suspected[request.id] >= GIVEN_UP_AFTER:
                rows_given_up += give_up(work, [request])
            else:
                work.put_last([[request]])

    log(clock, f"{worker.name}: {why}")
    if worker.gone:
        outcome = f"gone after {worker.fruitless} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}{rows_given_up}")


def give_up(work: Pass, batch: list[Request]) -> str:
    """Leave a row without a score."""
    work.given_up.append(batch[0].id)
    return f"; row {batch[0].id} is given up"


def watch(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that has said nothing for far too long, or that goes on after the deadline into the clock's reserve."""
    if not worker.process:
        return
    now = time.monotonic()
    quiet = now - worker.last_event
    if not worker.loaded:
        patience = LOAD_PATIENCE_SECONDS
    else:
        first = next(iter(worker.outstanding.values()), [])
        expected = padded_tokens(first) / worker.rate() if first and worker.rate() else 0.0
        patience = max(PATIENCE * expected, QUIET_SECONDS)
    if worker.outstanding and now > clock.deadline + clock.reserve_seconds / 3:
        patience = 0
    if quiet > patience:
        handle_worker_death(work, worker, f"killed: it said nothing for {quiet:.0f} s", clock)


def note_scores(work: Pass, batch: list[Request], values: list[list[float]]) -> None:
    """Keep a batch's probabilities by id; those that are not finite count as not scored."""
    work.computed_tokens += padded_tokens(batch)
    work.tokens += sum(request.tokens for request in batch)
    for request, probabilities in zip(batch, values, strict=True):
        if all(map(math.isfinite, probabilities)):
            work.scores[request.id] = probabilities
        else:
            work.not_finite += 1


def progress(work: Pass, workers: Sequence[Worker]) -> str:
    """Rows done, speed, memory and the predicted finish, for the log."""
    seconds = work.seconds()
    rest = f", {work.seconds_left(workers):.0f} s to go" if work.queue else ""
    memory = " + ".join(f"{size / 2**30:.1f}" for worker in workers for size in worker.memory_bytes)
    return (
        f"{len(work.scores)} of {work.rows} rows, {len(work.scores) / seconds:.1f} rows/s, "
        f"{work.tokens / seconds:.0f} tokens/s{rest}{f', {memory} GiB' if memory else ''}"
    )


def pass_record(work: Pass) -> dict:
    """A finished pass for kernel.json."""
    seconds = work.seconds()
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "left": sum(map(len, work.queue)),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(work.scores) / seconds, 2),
        "tokens_per_second": round(work.tokens / seconds, 1),
        "tokens": work.tokens,
        "computed_tokens": work.computed_tokens,
        "padding": round(1 - work.tokens / work.computed_tokens, 4) if work.computed_tokens else 0.0,
        "out_of_memory": work.out_of_memory,
        "not_finite": work.not_finite,
        "given_up": work.given_up,
        "deaths": work.deaths,
    }


def worker_record(worker: Worker) -> dict:
    """A worker for kernel.json."""
    return {
        "device": worker.name,
        "package": worker.task.folder.rpartition("/")[2],
        "load_seconds": round(worker.load_seconds, 1),
        "computed_tokens": worker.tokens,
        "busy_seconds": round(worker.seconds, 1),
        "tokens_per_batch": worker.tokens_per_batch,
        "memory_bytes": worker.memory_bytes,
        "deaths": worker.deaths,
        "gone": worker.gone,
    }


# ==============================================================================================================
# scheduling/schedule.py
#
# From packages and rows to scores: one pass after another, each planned when the one before has ended.
#
# main.run_kernel calls `score_all`. Models run one after the other, each on all devices. The first order of the first model
# goes over all rows and may use the whole clock: a row with one score is worth more than a second one. What comes then, the
# second order and further models, is decided by `plan_next_pass`, with what was measured so far: see plan.py.
# ==============================================================================================================

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
Key = tuple[int, str]  # a package's number in the spec, and an order
PADDING = 1.03  # what batches compute beyond their rows' tokens, while nothing is measured
ENCODED_AT_ONCE = 1000


@dataclass(frozen=True)
class Inputs:
    """What is to be scored, by which packages, on which devices (by position) and until when."""

    settings: Settings
    packages: Sequence[Package]
    contracts: Sequence  # the packages', with the spec's token budget
    rows: Sequence[Mapping]
    devices: Mapping[int, str]
    threads: int  # of the CPU, for each worker
    clock: Clock
    hidden_run: bool


@dataclass
class Measurements:
    """What plans are made of."""

    tokens: dict[str, int] = field(default_factory=dict)  # of the first sequence made of a row
    rates: dict[int, float] = field(default_factory=dict)  # tokens a second of a package's workers together
    changes: dict[Key, float] = field(default_factory=dict)  # of a probability (sd), by a pass


@dataclass
class Board:
    """The state of the run: its inputs, how far it is, what was measured, and the records for kernel.json."""

    inputs: Inputs
    scores: list[Scores]  # of each package
    devices: dict[int, str]  # those of the inputs that are not gone
    tried: dict[Key, set[str]] = field(default_factory=dict)  # rows that need not be asked for again, by pass
    given_up: dict[int, set[str]] = field(default_factory=dict)  # rows that a package's workers could not score in one order
    proven: set[int] = field(default_factory=set)  # positions of devices that had a model
    measured: Measurements = field(default_factory=Measurements)
    passes: list[dict] = field(default_factory=list)
    workers: list[dict] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    before_seconds: float = 0.0  # passed before the first model was loaded

    def orders(self, number: int) -> tuple[str, ...]:
        """The orders worth scoring with a package."""
        return orders_of(self.inputs.contracts[number], self.inputs.settings.orders)

    def unscored(self, key: Key) -> list[str]:
        """The ids of the rows that a pass has still to score."""
        number, _ = key
        finished = self.tried.get(key, set()) | self.given_up.get(number, set())
        return [row["id"] for row in self.inputs.rows if row["id"] not in finished]

    def probabilities(self, numbers: Sequence[int]) -> dict[str, list[float]]:
        """The probabilities by id that these packages give so far."""
        settings = self.inputs.settings
        of_these = replace(settings, packages=tuple(settings.packages[number] for number in numbers))
        packages = [self.inputs.packages[number] for number in numbers]
        return combine(of_these, packages, [self.scores[number] for number in numbers])

    def by_run(self) -> dict[str, tuple[tuple[str, ...], Scores]]:
        """The verdicts of each run, in the order of its probabilities, and its scores."""
        runs = [served.run for served in self.inputs.settings.packages]
        verdicts = [package.contract.verdicts for package in self.inputs.packages]
        return dict(zip(runs, zip(verdicts, self.scores, strict=True), strict=True))


@dataclass(frozen=True)
class NextPass:
    """A pass to be made now; for None every row is scored that is left, or the pass may last until the clock's deadline."""

    package: int  # its number in the spec
    order: str
    worth: Mapping[str, float] | None = None  # the rows to be scored, with their gain per second
    seconds: float | None = None


def make_board(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    devices: Sequence[str],
    clock: Clock,
    hidden_run: bool,
) -> Board:
    """A board on which nothing is scored yet. The CPU's cores are shared by as many workers as there are devices."""
    threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
    contracts = [serving_contract(package, settings) for package in packages]
    inputs = Inputs(settings, packages, contracts, rows, dict(enumerate(devices)), threads, clock, hidden_run)

    no_scores: list[Scores] = [{row["id"]: {} for row in rows} for _ in packages]
    return Board(inputs, no_scores, dict(inputs.devices))


def serving_contract(package: Package, settings: Settings):
    """The package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_all(board: Board) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    Raises PackageError where the workers refuse a package. In the hidden run a further package is left out instead, since the
    first one's scores are there.
    """
    clock = board.inputs.clock
    board.before_seconds = clock.elapsed()
    numbers = list(range(len(board.inputs.packages)))
    loaded: int | None = None
    workers: list[Worker] = []
    encoder = Encoder(board.inputs)
    try:
        while next_pass := plan_next_pass(board, numbers, loaded, workers):
            number = next_pass.package
            if number != loaded:
                retire(board, workers)
                workers = start_team(board, number)
                loaded = number
            try:
                if not workers:
                    numbers.remove(number)
                else:
                    make_next_pass(board, next_pass, numbers, workers, encoder)
            except PackageError as error:
                if number == 0 or not board.inputs.hidden_run:
                    raise
                log(clock, f"{board.inputs.packages[number].folder.name}: left out: {error}")
                numbers.remove(number)
    finally:
        retire(board, workers)
        encoder.close()


def plan_next_pass(board: Board, numbers: Sequence[int], loaded: int | None, workers: Sequence[Worker]) -> NextPass | None:
    """Decide what to do next: the first order of all rows, then what a new plan for the seconds that are left begins with.

    `numbers` are the packages that are not left out, `loaded` is the one that the workers have. None where nothing is left,
    nothing more fits the clock, or no worker is alive.
    """
    if not numbers or (workers and all(worker.gone for worker in workers)):
        return None

    first_package = numbers[0]
    first_order = board.orders(first_package)[0]
    if (first_package, first_order) not in board.tried:
        return NextPass(first_package, first_order)

    options = make_options(board, numbers, loaded)
    if not options:
        return None
    seconds_left = board.inputs.clock.left()
    by_log_loss = len(board.inputs.settings.columns) > 1
    shares = allocate(options, board.probabilities(numbers), board.measured.tokens, seconds_left, by_log_loss)
    note_plan(board, shares, seconds_left)

    planned = [share for share in shares if share.worth]
    if not planned:
        return None
    first, *later = planned

    # The pass may last until what is planned after it must begin to load.
    loading = {share.option.package: share.option.load_seconds for share in later}
    loading.pop(first.option.package, None)
    seconds = seconds_left - sum(share.seconds for share in later) - sum(loading.values())

    has_every_row = len(first.worth) == len(first.option.unscored)
    worth = None if has_every_row else first.worth
    return NextPass(first.option.package, first.option.order, worth, seconds)


def make_options(board: Board, numbers: Sequence[int], loaded: int | None) -> list[Option]:
    """Every pass that has rows left, those of the loaded model first."""
    options = []
    for number in sorted(numbers, key=lambda number: number != loaded):
        for order in board.orders(number):
            unscored = board.unscored((number, order))
            if unscored:
                options.append(make_option(board, (number, order), unscored, numbers, is_loaded=number == loaded))
    return options


def make_option(board: Board, key: Key, unscored: list[str], numbers: Sequence[int], is_loaded: bool) -> Option:
    """One more pass with what it should change and take, as measured or else as guessed."""
    number, order = key
    settings, packages, rates = board.inputs.settings, board.inputs.packages, board.measured.rates

    # What it should change. CHANGE_OF_MODEL is that of one of two models of equal weight.
    relative_weight = settings.packages[number].weight / sum(settings.packages[other].weight for other in numbers)
    is_new_model = not any(board.tried.get((number, other)) for other in board.orders(number))
    typical_change = 2 * CHANGE_OF_MODEL if is_new_model else CHANGE_OF_ORDER
    change = board.measured.changes.get(key, typical_change * relative_weight)

    # Before a package has run, its speed follows from that of another one and from the parameters of both.
    rate = rates.get(number, 0.0)
    if rates and not rate:
        measured_number = next(iter(rates))
        rate = rates[measured_number] * flop_per_token(packages[measured_number]) / flop_per_token(packages[number])
    seconds_per_token = PADDING / rate if rate else 0.0

    copies = 1 if settings.packages[number].placement == "split" else len(board.devices)
    load_seconds = 0.0 if is_loaded else loading_seconds(packages[number], copies)
    return Option(number, order, change, seconds_per_token, load_seconds, unscored)


def note_plan(board: Board, shares: Sequence[Share], seconds_left: float) -> None:
    """Log what the plan does with the seconds that are left, and what it leaves; keep the line for kernel.json."""
    parts = []
    for share in shares:
        option = share.option
        name = f"{board.inputs.packages[option.package].folder.name} {option.order}"
        part = f"{name} {len(share.worth)} of {len(option.unscored)} rows in {share.seconds:.1f} s"
        if share.worth and option.load_seconds:
            part += f" and {option.load_seconds:.1f} s to load"
        parts.append(part)
    line = f"{max(seconds_left, 0.0):.1f} s left: {'; '.join(parts)}"
    board.plans.append(line)
    log(board.inputs.clock, f"plan: {line}")


def start_team(board: Board, number: int) -> list[Worker]:
    """Workers for a package on the devices that are not gone; none where a model that is split would lack one of them."""
    inputs = board.inputs
    package = inputs.packages[number]
    placement = inputs.settings.packages[number].placement
    if not board.devices or (placement == "split" and len(board.devices) < len(inputs.devices)):
        log(inputs.clock, f"{package.folder.name}: no device is left for it")
        return []
    return start_workers(package, placement, board.devices, inputs.settings.tokens_per_batch, inputs.threads, inputs.clock)


def retire(board: Board, workers: list[Worker]) -> None:
    """End the workers and note what they did; devices that are gone leave the board.

    A device that had a model before stays where a worker could not load another one: that may be the package's fault.
    """
    stop_workers(workers)
    for worker in workers:
        if worker.gone and (worker.load_seconds or not board.proven.issuperset(worker.positions)):
            for position in worker.positions:
                board.devices.pop(position, None)
        elif worker.load_seconds:
            board.proven.update(worker.positions)
        board.workers.append(worker_record(worker))
    workers.clear()


def make_next_pass(
    board: Board, next_pass: NextPass, numbers: Sequence[int], workers: list[Worker], encoder: "Encoder"
) -> None:
    """Score the pass's rows, encoded while the workers load or the pass before runs, and note the result on the board."""
    number, order = next_pass.package, next_pass.order
    key = (number, order)
    package, clock = board.inputs.packages[number], board.inputs.clock
    deadline = clock.deadline
    if next_pass.seconds is not None:
        deadline = min(time.monotonic() + next_pass.seconds, deadline)

    ids = set(board.unscored(key) if next_pass.worth is None else next_pass.worth)
    rows = [row for row in board.inputs.rows if row["id"] in ids]
    requests = encoder.requests(number, order, rows)
    if not board.measured.tokens:
        board.measured.tokens = {request.id: request.tokens for request in requests}
    for other in board.orders(number):
        if (number, other) not in board.tried and other != order:
            encoder.begin(number, other, rows)

    before = board.probabilities(numbers)
    work = make_pass(f"{package.folder.name}, {order}", requests, deadline, workers, next_pass.worth)
    work = run_pass(work, workers, clock)
    note_pass(board, key, work, requests, workers)

    # Devices that had a model before are not to blame where this one could not be loaded on any.
    if all(worker.gone and not worker.load_seconds and board.proven.issuperset(worker.positions) for worker in workers):
        raise PackageError(f"{package.folder}: no device could load it, and another model ran on all of them")
    if change := measured_change(before, board.probabilities(numbers)):
        board.measured.changes[key] = change


def note_pass(board: Board, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]) -> None:
    """Put a pass's scores on the board, and what was measured."""
    number, order = key
    board.given_up.setdefault(number, set()).update(work.given_up)
    for row_id, values in work.scores.items():
        board.scores[number][row_id][order] = values

    # Rows that the pass left are tried again, but not where nothing came of any: they would be asked for for ever.
    finished = {request.id for request in requests}
    if work.scores or all(worker.gone for worker in workers):
        finished -= {request.id for batch in work.queue for request in batch}
    board.tried.setdefault(key, set()).update(finished)

    if rate := sum(worker.rate() for worker in workers if not worker.gone):
        board.measured.rates[number] = rate
    board.passes.append({"run": board.inputs.settings.packages[number].run, "order": order, **pass_record(work)})


class Encoder:
    """Rows made into requests, what is needed next in a thread of its own while the workers score.

    A tokenizer is for one thread at a time: model_input switches its control tokens off while it encodes what users wrote,
    and another thread would then encode the template as plain text.
    """

    def __init__(self, inputs: Inputs):
        self.inputs, self.pool, self.closing = inputs, ThreadPoolExecutor(1), threading.Event()
        self.ahead: dict[Key, Future] = {}
        self.tokenizers = [threading.Lock() for _ in inputs.packages]

    def begin(self, number: int, order: str, rows: Sequence[Mapping]) -> None:
        """Encode rows that are likely to be asked for."""
        if (number, order) not in self.ahead:
            self.ahead[number, order] = self.pool.submit(self.encode, number, order, rows)

    def requests(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """The rows' requests, in the rows' order."""
        begun = self.ahead.get((number, order))
        by_id = {request.id: request for request in (begun.result() if begun else ())}
        missing = [row for row in rows if row["id"] not in by_id]
        if missing:
            by_id |= {request.id: request for request in self.encode(number, order, missing)}
        return [by_id[row["id"]] for row in rows]

    def encode(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """By the package's own model_input; token ids in four bytes each, since there are millions of them."""
        began, encoded = time.monotonic(), []
        package, contract = self.inputs.packages[number], self.inputs.contracts[number]
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            if self.closing.is_set():
                return encoded
            pairs = [package.model_input.pair_from_row(row) for row in rows[start : start + ENCODED_AT_ONCE]]
            with self.tokenizers[number]:
                requests = make_requests(package.model_input, package.tokenizer, contract, pairs, (order,))
            for request in requests:
                encoded.append(replace(request, sequences=tuple(array("i", ids) for ids in request.sequences)))
        tokens, seconds = sum(request.tokens for request in encoded), time.monotonic() - began
        name = f"{package.folder.name}, {order}"
        log(self.inputs.clock, f"{name}: {len(encoded)} rows encoded, {tokens} tokens in {seconds:.1f} s")
        return encoded

    def close(self) -> None:
        """Stop, after the rows that are being encoded: ENCODED_AT_ONCE at most."""
        self.closing.set()
        self.pool.shutdown(cancel_futures=True)


def combine(settings: Settings, packages: Sequence[Package], per_package: Sequence[Scores]) -> dict[str, list[float]]:
    """Probabilities of the competition's verdicts by id: orders averaged, then packages by weight, then the temperature."""
    opinions: dict[str, list[list[float]]] = {}
    weights: dict[str, list[float]] = {}
    for served, package, scores in zip(settings.packages, packages, per_package, strict=True):
        for row_id, values in mean_of_orders(scores).items():
            opinion = to_competition(values, package.contract.verdicts, settings.verdicts)
            opinions.setdefault(row_id, []).append(opinion)
            weights.setdefault(row_id, []).append(served.weight)
    return {row_id: soften(weighted_mean(values, weights[row_id]), settings.temperature) for row_id, values in opinions.items()}


# ==============================================================================================================
# main.py
#
# The kernel from beginning to end: inputs, checks, scores, submission.
#
# Every check that needs no device comes before the first model is loaded. Written to /kaggle/working: submission.csv,
# scores.parquet, kernel.json.
# ==============================================================================================================


def visible_devices() -> list[str]:
    """Every GPU, or the CPU; in a rehearsal KAGGLE_DEVICES names them: "cpu,cpu" are two workers that stand in for GPUs."""
    if named := os.environ.get("KAGGLE_DEVICES"):
        return named.split(",")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission; raises, and writes no submission, where it would be wrong."""
    clock = start_clock(settings.clock_seconds)
    root = kaggle_root()
    (root / "working" / "submission.csv").unlink(missing_ok=True)  # of an earlier run in the same session
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    log(clock, f"{settings.name}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    test_file = find_mounted(root, settings.competition, ("test.parquet", "test.csv"), "competitions")
    rows = read_rows(test_file, are_turns="tie" in settings.verdicts)
    log(clock, f"{test_file}: {len(rows)} rows")
    packages = read_packages(root, settings, clock)
    folders = [package.folder for package in packages]
    installed = install_missing_wheels(root, folders, settings.wheels)
    if installed:
        log(clock, f"installed {', '.join(installed)} from {settings.wheels}")
    devices = list(devices or visible_devices())
    visible = choose_visible_rows(root, settings, folders, {row["id"] for row in rows})
    if visible.log_line:
        log(clock, visible.log_line)
    machine = check_machine(root, settings, packages, devices, len(rows) + len(visible.rows), clock)
    board = make_board(settings, packages, [*rows, *visible.rows], devices, clock, is_hidden_run())
    with carrying_on(board):
        score_all(board)
    scored = combine(settings, packages, board.scores)
    final = fill_unscored(rows, scored, settings.verdicts, settings.min_scored)
    write_submission(root / "working" / "submission.csv", settings, final, read_ids(test_file))
    record = {
        "settings": asdict(settings),
        "manifests": {one.dataset: package.manifest_sha256() for one, package in zip(settings.packages, packages, strict=True)},
        "versions": versions,
        "installed": installed,
        "machine": machine,
        "devices": devices,
        "hidden_run": board.inputs.hidden_run,
        "rows": len(rows),
        "scored": sum(row["id"] in scored for row in rows),
        "plans": board.plans,
        "passes": board.passes,
        "workers": board.workers,
        "visible": report_visible_rows(board, visible, scored) if visible.rows else None,
        "seconds": round(clock.elapsed(), 1),
    }
    with carrying_on(board):
        write_scores(root / "working" / "scores.parquet", settings.verdicts, final, scored, board.by_run())
        write_record(root / "working" / "kernel.json", record)
    log(clock, f"submission.csv: {len(rows)} rows, {record['scored']} scored, {len(rows) - record['scored']} by the prior")


def is_hidden_run() -> bool:
    """Whether this is the run on the hidden test rows, that of a submission."""
    return bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))


@contextlib.contextmanager
def carrying_on(board: Board) -> Iterator[None]:
    """In the hidden run an error in here is only logged: what was scored before it is worth submitting, if it is enough."""
    try:
        yield
    except Exception:
        if not board.inputs.hidden_run:
            raise
        log(board.inputs.clock, f"going on with what was scored until now: {traceback.format_exc()}")


def report_visible_rows(board: Board, visible: VisibleRows, scored: Mapping[str, list[float]]) -> dict:
    """What the visible run measured, for kernel.json, also logged."""
    clock_seconds = board.inputs.clock.deadline - board.inputs.clock.began
    verdicts, speeds = board.inputs.settings.verdicts, speeds_of(board)
    report = visible_report(visible, verdicts, scored, board.by_run(), speeds, board.before_seconds, clock_seconds)
    for line in visible_lines(report):
        log(board.inputs.clock, line)
    return report


def speeds_of(board: Board) -> list[Speed]:
    """What was measured of each package that scored."""
    speeds = []
    for number, chosen in enumerate(board.inputs.settings.packages):
        done = [record for record in board.passes if record["run"] == chosen.run and record["scored"]]
        name = board.inputs.packages[number].folder.name
        loads = [worker["load_seconds"] for worker in board.workers if worker["package"] == name]
        if done:
            rate = board.measured.rates[number] * done[0]["tokens"] / done[0]["computed_tokens"]
            tokens = done[0]["tokens"] / done[0]["scored"]
            speeds.append(Speed(chosen.run, max(loads, default=0.0), rate, tokens, len(board.orders(number))))
    return speeds


def read_packages(root: Path, settings: Settings, clock: Clock) -> list[Package]:
    """The spec's packages, found and checked against the spec and the recipe, the template against the token budget."""
    packages = []
    for chosen in settings.packages:
        package = read_package(find_mounted(root, chosen.dataset, ("manifest.json",), "datasets").parent, clock)
        check_package(package, chosen, settings)
        if package.contract.base_model != chosen.base_model:
            log(clock, f"{chosen.run}: made of {package.contract.base_model}, its recipe says {chosen.base_model}")
        empty = package.model_input.Pair("", (), (), ())
        package.model_input.encode(empty, package.tokenizer, serving_contract(package, settings))
        log(clock, f"{package.folder}: files, tokenizer and {len(package.contract.golden)} golden rows are as packaged")
        packages.append(package)
    return packages


def check_package(package: Package, chosen: PackageSettings, settings: Settings) -> None:
    """Raise PackageError where a package's verdicts, their order or its architecture are not those of the recipe."""
    contract, config = package.contract, json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
    if missing := set(settings.verdicts) - set(contract.verdicts):
        raise PackageError(f"{package.folder}: tells nothing of {', '.join(sorted(missing))}, which the competition asks for")
    for file, key, found, expected in (
        ("contract.json", "verdicts", contract.verdicts, chosen.verdicts),
        ("config.json", "model_type", config.get("model_type"), chosen.model_type),
    ):
        if found != expected:
            raise PackageError(
                f"{package.folder / file}: {key}: found {found}, the recipe of {chosen.run} says {expected}; package the run "
                "again, or build the kernel again from the recipe that it was trained with"
            )


if __name__ == "__main__":
    run_kernel(SETTINGS)
    leave()
