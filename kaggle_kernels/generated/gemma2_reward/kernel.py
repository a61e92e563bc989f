"""Pairwise Gemma 2 Reward: scores the pairs of wsdm-cup-multilingual-chatbot-arena and writes submission.csv.

Generated from the spec gemma2_reward.yml by `python -m kaggle_kernels build gemma2_reward`; change that, not this.
It runs on two T4s without internet, and needs the datasets that SETTINGS names and the competition's files.

On each GPU, which offers 14.5 GiB, computed for batches of 8,192 tokens: gemma2_reward 9.5 GiB.
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
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
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


@dataclass(frozen=True)
class Clock:
    """Seconds since the kernel began. After `deadline` no batch may be running; what is left then is for writing."""

    began: float
    deadline: float

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def start_clock(clock_seconds: float) -> Clock:
    """A clock that starts now."""
    began = time.monotonic()
    return Clock(began, began + clock_seconds - min(RESERVE_SECONDS, clock_seconds / 20))


def log(clock: Clock, message: str) -> None:
    """One line of the kernel's log, with the seconds since the beginning."""
    print(f"[{clock.elapsed():8.1f} s] {message}", flush=True)


SETTINGS = Settings(
    name="gemma2_reward",
    competition="wsdm-cup-multilingual-chatbot-arena",
    columns=("winner",),
    verdicts=("model_a", "model_b"),
    packages=(
        PackageSettings(
            run="gemma2_reward",
            dataset="pairwise-gemma2-reward",
            weight=1.0,
            placement="each",
            verdicts=("model_a", "model_b"),
            base_model="google/gemma-2-9b-it",
            model_type="gemma2",
        ),
    ),
    orders=("as_given", "swapped"),
    clock_seconds=17100.0,
    budget_tokens=None,
    tokens_per_batch=8192,
    temperature=1.0,
    min_scored=0.98,
    visible_rows=512,
    wheels="pairwise-wheels",
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
# placement.py
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
    """transformers' device_map for the model in `folder`, its layers over all `devices`.

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
# pipeline.py
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
# gptq.py
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

    def weight_oi(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in `dtype`, of shape (outputs, inputs): (code - zero) * scale."""
        codes_oi = unpack(self.qweight, self.bits).transpose(0, 1).flatten(1)
        zeros_go = unpack(self.qzeros, self.bits).flatten(1) + 1
        weight_ogi = codes_oi.unflatten(1, (-1, self.group_size)).to(dtype)
        weight_ogi.sub_(zeros_go.T.unsqueeze(-1)).mul_(self.scales.T.unsqueeze(-1).to(dtype))
        return weight_ogi.flatten(1)

    def forward(self, input_bti: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the input's dtype."""
        return linear(input_bti, self.weight_oi(input_bti.dtype), self.bias)


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
# model.py
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
        attn_implementation="eager" if contract.softcap else "sdpa",
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
    return model.eval()


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
# scoring.py
#
# Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position.
# ==============================================================================================================

ORDERS = ("as_given", "swapped")


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
    """Tokens of a batch, padding included."""
    return max(request.length for request in batch) * sum(len(request.sequences) for request in batch)


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
    model: torch.nn.Module, model_input: ModuleType, contract, batch: list[Request], device: str
) -> list[list[float]]:
    """Probabilities of a batch, one list a request in the order of contract.verdicts, swapped ones swapped back.

    The softmax is in float32. Where the model overflowed, the probabilities are NaN.
    """
    logits_bv = verdict_logits(model, contract, [ids for request in batch for ids in request.sequences], device)
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias, device=logits_bv.device)
    probabilities_bv = logits_bv.softmax(-1).tolist()
    return [
        model_input.swap_probabilities(values, contract.verdicts) if request.order == "swapped" else values
        for request, values in zip(batch, probabilities_bv, strict=True)
    ]


def verdict_logits(model: torch.nn.Module, contract, sequences: list[list[int]], device: str) -> torch.Tensor:
    """The verdicts' logits, float32 of shape (requests, verdicts), of one sequence a request, for the reward head of two.

    A classifier finds the last token that is not padding by itself, so its rows are padded on the right. A causal LM is
    padded on the left: the answer then stands at the last place of every row, and only there are logits computed.
    """
    longest = max(map(len, sequences))
    left = contract.head == "label_tokens"
    ids_bt = torch.full((len(sequences), longest), contract.pad_token_id, dtype=torch.long)
    mask_bt = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, ids in enumerate(sequences):
        place = slice(longest - len(ids), longest) if left else slice(len(ids))
        ids_bt[row, place] = torch.tensor(ids)
        mask_bt[row, place] = 1
    inputs = {"input_ids": ids_bt.to(device), "attention_mask": mask_bt.to(device)}
    if not left:
        logits = model(**inputs).logits.float()
        if contract.head == "score":
            return logits
        return logits.view(-1, 2)[:, [("model_a", "model_b").index(verdict) for verdict in contract.verdicts]]
    inputs["position_ids"] = (mask_bt.cumsum(-1) - 1).clamp(min=0).to(device)
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, list(contract.label_token_ids)].float()


def score(
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
# plan.py
#
# Several models on several GPUs: one after the other on all of them, or each on GPUs of its own, whichever should end sooner.
#
# The cost model: a copy of a model is loaded at LOAD_BYTES_PER_SECOND, one copy after the other; then a device does
# 2 x parameters (the embedding's not counted) x tokens floating-point operations at FLOP_PER_SECOND.
# One after the other loads every model on every device and keeps all devices busy until the end. Side by side loads each
# model once for each of its devices, and the devices of the faster model wait for the slower one.
# Side by side must also fit the clock SAFETY times over, else the first model, on half the devices, might not get round.
# ==============================================================================================================

LOAD_BYTES_PER_SECOND = 3e8
FLOP_PER_SECOND = {"cuda": 1.5e13, "cpu": 5e10}  # a T4 in float16 at a quarter of its peak; one core
SAFETY = 2.0
SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Job:
    """One model's work: bytes to load for each copy, floating-point operations for all rows in all orders."""

    load_bytes: float
    flop: float


@dataclass(frozen=True)
class Plan:
    """What was chosen, both estimates in seconds (side by side: None where it cannot be), and the sentence for the log."""

    side_by_side: bool
    in_turn_seconds: float
    side_by_side_seconds: float | None
    why: str


def make_plan(jobs: Sequence[Job], can_part: bool, devices: Sequence[str], seconds_left: float) -> Plan:
    """The plan for models of which each fits one device; `can_part` is False where one of them is split."""
    in_turn = seconds_in_turn(jobs, devices)
    if not can_part or not 2 <= len(jobs) <= len(devices):
        why = "a model is split over the devices" if not can_part else f"{len(jobs)} models, {len(devices)} devices"
        return Plan(False, in_turn, None, f"in turn, estimated at {in_turn:.0f} s ({why})")
    beside = seconds_side_by_side(jobs, devices)
    chosen = beside < in_turn and beside * SAFETY <= seconds_left
    estimates = f"in turn {in_turn:.0f} s, side by side {beside:.0f} s, {seconds_left:.0f} s left"
    return Plan(chosen, in_turn, beside, f"{'side by side' if chosen else 'in turn'} (estimates: {estimates})")


def seconds_in_turn(jobs: Sequence[Job], devices: Sequence[str]) -> float:
    """How long the models take one after the other, each on all devices."""
    return sum(job.load_bytes * len(devices) / LOAD_BYTES_PER_SECOND + job.flop / rate_of(devices) for job in jobs)


def seconds_side_by_side(jobs: Sequence[Job], devices: Sequence[str]) -> float:
    """How long the models take at the same time, each on its share of the devices; all are loaded before the first row."""
    shares = share_devices(devices, len(jobs))
    loading = sum(job.load_bytes * len(share) for job, share in zip(jobs, shares, strict=True)) / LOAD_BYTES_PER_SECOND
    return loading + max(job.flop / rate_of(share) for job, share in zip(jobs, shares, strict=True))


def share_devices(devices: Sequence[str], models: int) -> list[tuple[str, ...]]:
    """Each model's devices where they work side by side."""
    return [tuple(devices[number::models]) for number in range(models)]


def rate_of(devices: Sequence[str]) -> float:
    """Floating-point operations a second of all the devices."""
    return sum(FLOP_PER_SECOND[device.split(":")[0]] for device in devices)


def job_of(package: Package, contract, pairs: Sequence, orders: Sequence[str]) -> Job:
    """A package's work on `pairs`, with their tokens guessed from SAMPLE_ROWS of them, evenly spread."""
    sizes = weight_sizes(package.folder)
    multiplied = sum(elements for name, (_, elements) in sizes.items() if is_multiplied(name))
    sample = pairs[:: max(len(pairs) // SAMPLE_ROWS, 1)]
    requests = make_requests(package.model_input, package.tokenizer, contract, sample, ("as_given",))
    tokens = sum(request.tokens for request in requests) * len(pairs) / max(len(sample), 1) * len(orders_of(contract, orders))
    return Job(sum(size for size, _ in sizes.values()), 2 * multiplied * tokens)


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
HIDDEN_ROWS = (10_000, 25_000)  # of the public and of the final phase
JUDGEMENTS = ("model_a", "model_b", "tie")
NEVER = 1e9  # seconds, where nothing was measured


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows.

    `rows` are like the test file's, each with a new id; `winners` holds their verdicts by that id (None: has none). With
    `trained_on` a model has seen the rows in training. `told` is a sentence for the log, empty in the hidden run.
    """

    rows: tuple[dict, ...] = ()
    winners: Mapping[str, str | None] = field(default_factory=dict)
    trained_on: bool = False
    told: str = ""


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


def choose_visible_rows(root: Path, settings: Settings, folders: Sequence[Path], taken: Collection[str]) -> VisibleRows:
    """At most settings.visible_rows rows of the train file that the packages in `folders` all list, chosen by a hash of the id.

    Their ids get a prefix that none of `taken`, the test rows' ids, begins with. No rows in the hidden run, and where there is
    nothing to choose from, which is told and never an error.
    """
    if os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        return VisibleRows()
    if not settings.visible_rows:
        return VisibleRows(told="visible run: visible_rows is 0, no row of the train file is scored")
    lists = []
    for folder in folders:
        if not (folder / VALIDATION_IDS).is_file():
            return VisibleRows(
                told=f"visible run: {folder.name} has no {VALIDATION_IDS}; package the run again to have it measured"
            )
        lists.append(json.loads((folder / VALIDATION_IDS).read_text(encoding="utf-8")))
    listed = frozenset.intersection(*(frozenset(one["ids"]) for one in lists))
    try:
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
    except FileNotFoundError:
        return VisibleRows(told=f"visible run: no {' or '.join(TRAIN_FILES)} of {settings.competition} is mounted")
    try:
        present = sorted(listed.intersection(read_ids(file)), key=lambda row_id: hashlib.sha256(row_id.encode()).hexdigest())
        chosen = present[: settings.visible_rows]
        found = {row["id"]: row for row in rows_of(file, ("id", *TEXTS, *settings.columns), frozenset(chosen))}
    except (OSError, ValueError, pa.ArrowException) as error:
        return VisibleRows(told=f"visible run: the train file is not scored: {error}")
    if not found:
        return VisibleRows(told=f"visible run: {file.name} holds none of the {len(listed)} ids that every package lists")
    prefix = "train:"
    while any(row_id.startswith(prefix) for row_id in taken):
        prefix = f"train:{prefix}"
    are_turns = "tie" in settings.verdicts
    rows = tuple(
        {"id": prefix + row_id, **{name: read_text(found[row_id][name], are_turns) for name in TEXTS}} for row_id in chosen
    )
    winners = {prefix + row_id: judgement_of(found[row_id], settings.columns) for row_id in chosen}
    trained_on = any(one["trained_on"] for one in lists)
    folds = " and ".join(sorted({f"fold {one['fold']}" for one in lists}))
    what = "rows that a model was trained on: they tell of speed only" if trained_on else f"held out ({folds})"
    return VisibleRows(rows, winners, trained_on, f"visible run: {len(rows)} rows of {file.name} are scored too, {what}")


def judgement_of(row: Mapping, columns: Sequence[str]) -> str | None:
    """A train row's verdict, from the one column with its name or from one flag a verdict; None where it has none."""
    if len(columns) == 1:
        return row[columns[0]] if row[columns[0]] in JUDGEMENTS else None
    won = [verdict for verdict, name in zip(JUDGEMENTS, columns, strict=True) if str(row[name]) in ("1", "1.0", "True")]
    return won[0] if len(won) == 1 else None


def visible_report(
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
# engine.py
#
# One package over a list of devices: a thread and a copy of the model for each, batches dealt from one queue.
#
# A model that one device cannot hold has one worker with several devices, its layers over all of them, and a thread for each.
#
# What happens to a batch: out of memory halves that device's token budget and tries again; any other failure takes the
# device out and gives the batch to the others; the clock may leave batches behind. A row without a score is simply not in
# the result, and the caller decides what that means.
# ==============================================================================================================

GOLDEN_TOLERANCE = 0.05  # float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more
LOG_SECONDS = 20.0
CERTAINTY_BLOCKS = 8  # a short clock takes the second order by eighths, the least certain first


@dataclass
class Worker:
    """A copy of the model, and what it has done so far (tokens are counted with their padding).

    Its inputs go to `device`; a model that is split also has parts on the `others`.
    """

    device: str
    model: torch.nn.Module
    tokens_per_batch: int
    tokens: int = 0
    seconds: float = 0.0
    failure: str | None = None
    others: tuple[str, ...] = ()
    stages: Stages | None = None

    @property
    def name(self) -> str:
        """Its devices, for the log."""
        return "+".join((self.device, *self.others))

    @property
    def batches_at_once(self) -> int:
        """How many batches are in flight: one for each stage of a split model."""
        return len(self.stages.locks) if self.stages else 1

    def seconds_for(self, tokens: int) -> float:
        """How long `tokens` should take, from what it has done; 0 before its first batch."""
        return tokens * self.seconds / self.tokens if self.tokens else 0.0


@dataclass
class Pass:
    """One order of one package: the queue of batches, and the probabilities by id. Its workers share it under `lock`."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    may_reorder: bool  # a clock too short for the whole queue then takes short rows first: more rows a second
    rows: int
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    scores: dict[str, list[float]] = field(default_factory=dict)
    real_tokens: int = 0
    padded_tokens: int = 0
    out_of_memory: int = 0
    not_finite: int = 0
    logged: float = field(default_factory=time.monotonic)


def load_workers(package: Package, placement: str, devices: Sequence[str], tokens_per_batch: int, clock: Clock) -> list[Worker]:
    """A copy of the model on `each` device, one after another, or one copy `split` over them all.

    Each is checked against the manifest's golden probabilities.
    """
    workers = []
    for group in [tuple(devices)] if placement == "split" else [(device,) for device in devices]:
        device, *others = group
        device_map = split_over(package.folder, group) if others else None
        model = load_model(package.folder, package.contract, device, device_map=device_map)
        stages = Stages(model, stage_starts(device_map), group) if others else None
        worker = Worker(device, model, tokens_per_batch, others=tuple(others), stages=stages)
        worst = check_golden_scores(package, model, device)
        workers.append(worker)
        log(
            clock,
            f"{package.folder.name} on {worker.name} in {model.dtype}: golden probabilities differ by at most {worst:.1e}",
        )
    return workers


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


def score_package(
    package: Package,
    contract,
    workers: list[Worker],
    pairs: Sequence,
    orders: Iterable[str],
    deadlines: Sequence[float],
    clock: Clock,
) -> tuple[dict[str, dict[str, list[float]]], list[dict]]:
    """Scores by id and order (see scoring.score), and a record of each pass.

    `contract` is the package's, or one with another budget. `deadlines` are those of the orders, in time.monotonic's
    seconds. The second order takes its rows least certain first where the clock is too short for all of them.
    """
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    records = []
    for order, deadline in zip(orders_of(contract, orders), deadlines, strict=False):
        requests = make_requests(package.model_input, package.tokenizer, contract, pairs, [order])
        batches = plan_batches(requests, mean_of_orders(scores), workers, deadline)
        label = f"{package.folder.name}, {order}"
        first = not records
        done = run_pass(Pass(label, deque(batches), deadline, first, len(pairs)), package, contract, workers, clock)
        for row_id, values in done.scores.items():
            scores[row_id][order] = values
        records.append(pass_record(done, workers))
    return scores, records


def plan_batches(
    requests: Sequence[Request], known: dict[str, list[float]], workers: Sequence[Worker], deadline: float
) -> list[list[Request]]:
    """Batches in the order in which to score them: by length, or where the clock is short the least certain rows first."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    batches = make_batches(requests, tokens_per_batch)
    left = deadline - time.monotonic()
    if not known or seconds_left(batches, workers) <= left:
        return batches
    by_certainty = sorted(requests, key=lambda request: margin(known.get(request.id)))
    size = math.ceil(len(requests) / CERTAINTY_BLOCKS)
    blocks = [by_certainty[start : start + size] for start in range(0, len(by_certainty), size)]
    return [batch for block in blocks for batch in make_batches(block, tokens_per_batch)]


def margin(values: Sequence[float] | None) -> float:
    """How sure a model is: the lead of its first verdict over its second; -1 for a row without a score."""
    if values is None:
        return -1.0
    second, first = sorted(values)[-2:]
    return first - second


def seconds_left(batches: Iterable[list[Request]], workers: Sequence[Worker]) -> float:
    """How long the batches will take on the workers that are alive, from what those have done; 0 where nothing is known."""
    at_work = [worker for worker in workers if worker.tokens and not worker.failure]
    rate = sum(worker.batches_at_once * worker.tokens / worker.seconds for worker in at_work)
    return sum(map(padded_tokens, batches)) / rate if rate else 0.0


def run_pass(work: Pass, package: Package, contract, workers: list[Worker], clock: Clock) -> Pass:
    """Work through the queue on every worker that is alive, until it is empty or the deadline is near.

    A batch that a worker gave back as it failed, after the others had ended, starts those again.
    """
    while alive := [worker for worker in workers if not worker.failure]:
        devices = ", ".join(worker.name for worker in alive)
        log(clock, f"{work.label}: {sum(map(len, work.queue))} rows in {len(work.queue)} batches on {devices}")
        serving = [worker for worker in alive for _ in range(worker.batches_at_once)]
        threads = [threading.Thread(target=serve, args=(work, worker, package, contract, workers, clock)) for worker in serving]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not work.queue or not any(worker.failure for worker in alive):
            break
    log(clock, f"{work.label}: {progress(work, workers)}")
    return work


def serve(work: Pass, worker: Worker, package: Package, contract, workers: list[Worker], clock: Clock) -> None:
    """One worker's thread, or one of its threads where its model is split."""
    while not worker.failure and (batch := next_batch(work, worker, workers)):
        began = time.monotonic()
        try:
            with worker.stages.batch() if worker.stages else contextlib.nullcontext():
                values = score_batch(worker.model, package.model_input, contract, batch, worker.device)
        except torch.OutOfMemoryError:
            values = None
        except Exception as error:
            with work.lock:
                work.queue.append(batch)
                worker.failure = f"{type(error).__name__}: {error}"
            log(clock, f"{work.label}: {worker.name} is out of work: {traceback.format_exc()}")
            return
        if values is None:
            after_out_of_memory(work, worker, batch, clock)
            continue
        with work.lock:
            note_scores(work, worker, batch, values, time.monotonic() - began)
            if time.monotonic() - work.logged > LOG_SECONDS:
                work.logged = time.monotonic()
                log(clock, f"{work.label}: {progress(work, workers)}")


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """The next batch within the worker's budget that it can end before the deadline; None when there is none."""
    with work.lock:
        left = work.deadline - time.monotonic()
        if not work.queue or left <= 0:
            return None
        from_right = work.may_reorder and seconds_left(work.queue, workers) > left
        batch = work.queue.pop() if from_right else work.queue.popleft()
        batch, *rest = make_batches(batch, worker.tokens_per_batch)
        if worker.seconds_for(padded_tokens(batch)) > left:
            work.queue.appendleft([request for part in (batch, *rest) for request in part])
            return None
        if rest:
            work.queue.extendleft(reversed(rest))
        return batch


def after_out_of_memory(work: Pass, worker: Worker, batch: list[Request], clock: Clock) -> None:
    """Halve the worker's budget and give its batch back; a batch of one row is given up."""
    gc.collect()
    if worker.device.startswith("cuda"):
        with contextlib.suppress(RuntimeError):  # a broken device raises its error again; the next batch then takes it out
            torch.cuda.empty_cache()
    with work.lock:
        work.out_of_memory += 1
        worker.tokens_per_batch = max(min(worker.tokens_per_batch, padded_tokens(batch)) // 2, 1)
        if len(batch) > 1:
            work.queue.appendleft(batch)
    given_up = "" if len(batch) > 1 else f", row {batch[0].id} is given up"
    log(clock, f"{work.label}: {worker.name} is out of memory: {worker.tokens_per_batch} tokens a batch from now on{given_up}")


def note_scores(work: Pass, worker: Worker, batch: list[Request], values: list[list[float]], seconds: float) -> None:
    """Keep a batch's probabilities by id; those that are not finite count as not scored."""
    worker.tokens += padded_tokens(batch)
    worker.seconds += seconds
    work.padded_tokens += padded_tokens(batch)
    work.real_tokens += sum(request.tokens for request in batch)
    for request, probabilities in zip(batch, values, strict=True):
        if all(map(math.isfinite, probabilities)):
            work.scores[request.id] = probabilities
        else:
            work.not_finite += 1


def progress(work: Pass, workers: Sequence[Worker]) -> str:
    """Rows done, speed and the predicted finish, for the log."""
    seconds = max(time.monotonic() - work.began, 1e-9)
    rest = f", {seconds_left(work.queue, workers):.0f} s to go" if work.queue else ""
    return (
        f"{len(work.scores)} of {work.rows} rows, {len(work.scores) / seconds:.1f} rows/s, "
        f"{work.real_tokens / seconds:.0f} tokens/s{rest}"
    )


def pass_record(work: Pass, workers: Sequence[Worker]) -> dict:
    """A finished pass for kernel.json."""
    seconds = time.monotonic() - work.began
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(work.scores) / seconds, 2),
        "tokens_per_second": round(work.real_tokens / seconds, 1),
        "padding": round(1 - work.real_tokens / work.padded_tokens, 4) if work.padded_tokens else 0.0,
        "out_of_memory": work.out_of_memory,
        "not_finite": work.not_finite,
        "failures": {worker.name: worker.failure for worker in workers if worker.failure},
    }


# ==============================================================================================================
# main.py
#
# The kernel from beginning to end: inputs, checks, scores, submission.
#
# Every check that needs no device comes before the first model is loaded. Written to /kaggle/working: submission.csv,
# scores.parquet, kernel.json.
# ==============================================================================================================

Scores = dict[str, dict[str, list[float]]]  # by id, then by order


def visible_devices() -> list[str]:
    """Every GPU, or the CPU."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission; raises, and writes no submission, where it would be wrong."""
    clock = start_clock(settings.clock_seconds)
    root = kaggle_root()
    transformers_logging.disable_progress_bar()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    log(clock, f"{settings.name}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    test_file = find_mounted(root, settings.competition, ("test.parquet", "test.csv"))
    rows = read_rows(test_file, are_turns="tie" in settings.verdicts)
    log(clock, f"{test_file}: {len(rows)} rows")
    packages = read_packages(root, settings, clock)
    installed = install_missing_wheels(root, [package.folder for package in packages], settings.wheels)
    if installed:
        log(clock, f"installed {', '.join(installed)} from {settings.wheels}")
    devices = list(devices or visible_devices())
    per_package, records = score_packages(settings, packages, rows, devices, clock)
    scored = combine(settings, packages, per_package)
    final = fill_unscored(rows, scored, settings.verdicts, settings.min_scored)
    working = root / "working"
    by_run = {
        chosen.run: (package.contract.verdicts, scores)
        for chosen, package, scores in zip(settings.packages, packages, per_package, strict=True)
    }
    write_scores(working / "scores.parquet", settings.verdicts, final, scored, by_run)
    write_submission(working / "submission.csv", settings, final)
    record = {
        "settings": asdict(settings),
        "versions": versions,
        "installed": installed,
        "devices": devices,
        "hidden_run": bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN")),
        "rows": len(rows),
        "scored": len(scored),
        "passes": records,
        "seconds": round(clock.elapsed(), 1),
    }
    write_record(working / "kernel.json", record)
    log(clock, f"submission.csv: {len(rows)} rows, {len(scored)} scored, {len(rows) - len(scored)} by the prior")


def read_packages(root: Path, settings: Settings, clock: Clock) -> list[Package]:
    """The spec's packages, found and checked against the spec and the recipe, the template against the token budget."""
    packages = []
    for chosen in settings.packages:
        package = read_package(find_mounted(root, chosen.dataset, ("manifest.json",)).parent)
        check_package(package, chosen, settings)
        if package.contract.base_model != chosen.base_model:
            log(clock, f"{chosen.run}: made of {package.contract.base_model}, its recipe says {chosen.base_model}")
        empty = package.model_input.Pair("", (), (), ())
        package.model_input.encode(empty, package.tokenizer, serving_contract(package, settings))
        for name, trained in package.contract.recorded.get("versions", {}).items():
            if name in ("torch", "transformers") and trained != importlib.metadata.version(name):
                log(clock, f"{chosen.run}: trained with {name} {trained}, served with {importlib.metadata.version(name)}")
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


def serving_contract(package: Package, settings: Settings):
    """The package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_packages(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """Each package's scores, and a record of every pass: in turn or side by side, as planned."""
    if len(packages) == 1 or len(devices) == 1:
        return score_in_turn(settings, packages, rows, devices, clock)
    contracts = [serving_contract(package, settings) for package in packages]
    jobs = [
        job_of(package, contract, make_pairs(package, rows), settings.orders)
        for package, contract in zip(packages, contracts, strict=True)
    ]
    can_part = all(chosen.placement == "each" for chosen in settings.packages)
    plan = make_plan(jobs, can_part, devices, clock.left())
    log(clock, f"plan: {plan.why}")
    scoring = score_side_by_side if plan.side_by_side else score_in_turn
    per_package, records = scoring(settings, packages, rows, devices, clock)
    return per_package, [{"plan": plan.why}, *records]


def make_pairs(package: Package, rows: Sequence[Mapping]) -> list:
    """The rows as pairs of the package's own model_input."""
    return [package.model_input.pair_from_row(row) for row in rows]


def score_in_turn(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """One package after the other on all devices.

    The first order of the first package may use the whole clock: a row with one score is worth more than a second one.
    All else shares what is left of the clock equally among the packages to come. A later package that could not be loaded
    before the deadline is left out.
    """
    per_package, records = [], []
    for number, (chosen, package) in enumerate(zip(settings.packages, packages, strict=True)):
        if number and clock.left() <= loading_seconds(package, 1 if chosen.placement == "split" else len(devices)):
            log(clock, f"{package.folder.name}: left out, {clock.left():.0f} s are too few to load it")
            per_package.append({row["id"]: {} for row in rows})
            continue
        share = time.monotonic() + clock.left() / (len(packages) - number)
        deadlines = [share if number else clock.deadline, *[share] * (len(settings.orders) - 1)]
        contract = serving_contract(package, settings)
        pairs = make_pairs(package, rows)
        workers = load_workers(package, chosen.placement, devices, settings.tokens_per_batch, clock)
        scores, passes = score_package(package, contract, workers, pairs, settings.orders, deadlines, clock)
        per_package.append(scores)
        records += passes
        free(workers)
    return per_package, records


def score_side_by_side(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """Every package on devices of its own, all at the same time; each may use the whole clock.

    All models are loaded before the first row is scored: loading changes torch's defaults for every thread.
    """
    shares = share_devices(devices, len(packages))
    teams = [
        load_workers(package, "each", share, settings.tokens_per_batch, clock)
        for package, share in zip(packages, shares, strict=True)
    ]
    deadlines = [clock.deadline] * len(settings.orders)

    def score_one(package: Package, workers: list[Worker]) -> tuple[Scores, list[dict]]:
        contract = serving_contract(package, settings)
        pairs = make_pairs(package, rows)
        return score_package(package, contract, workers, pairs, settings.orders, deadlines, clock)

    with ThreadPoolExecutor(len(packages)) as pool:
        done = list(pool.map(score_one, packages, teams))
    per_package = [scores for scores, _ in done]
    records = [record for _, passes in done for record in passes]
    alive = [worker.device for team in teams for worker in team if not worker.failure]
    for team in teams:
        free(team)
    if len(alive) < len(devices):
        records += rescue(settings, packages, rows, alive, per_package, clock)
    return per_package, records


def rescue(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    alive: Sequence[str],
    per_package: list[Scores],
    clock: Clock,
) -> list[dict]:
    """After a device broke: the first order of the rows that its package left, on the devices that are `alive`.

    Whatever goes wrong here is only logged: the other packages' scores are there, and min_scored decides whether they do.
    """
    records = []
    for package, scores in zip(packages, per_package, strict=True):
        missing = [row for row in rows if not scores[row["id"]]]
        if not missing or not alive or clock.left() <= loading_seconds(package, len(alive)):
            continue
        try:
            workers = load_workers(package, "each", alive, settings.tokens_per_batch, clock)
        except Exception:
            log(clock, f"{package.folder.name}: cannot be loaded on {', '.join(alive)}: {traceback.format_exc()}")
            continue
        contract = serving_contract(package, settings)
        pairs = make_pairs(package, missing)
        found, passes = score_package(package, contract, workers, pairs, settings.orders[:1], [clock.deadline], clock)
        scores.update(found)
        records += passes
        free(workers)
    return records


def free(workers: list[Worker]) -> None:
    """Give the devices' memory back, as far as they still answer: one that broke raises its error again."""
    workers.clear()
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def combine(settings: Settings, packages: Sequence[Package], per_package: Sequence[Scores]) -> dict[str, list[float]]:
    """Probabilities of the competition's verdicts by id: orders averaged, then packages by weight, then the temperature."""
    by_id: dict[str, list[tuple[float, list[float]]]] = {}
    for chosen, package, scores in zip(settings.packages, packages, per_package, strict=True):
        for row_id, values in mean_of_orders(scores).items():
            told = to_competition(values, package.contract.verdicts, settings.verdicts)
            by_id.setdefault(row_id, []).append((chosen.weight, told))
    return {
        row_id: soften(weighted_mean([values for _, values in found], [weight for weight, _ in found]), settings.temperature)
        for row_id, found in by_id.items()
    }


if __name__ == "__main__":
    run_kernel(SETTINGS)
