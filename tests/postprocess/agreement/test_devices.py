"""Where models go on machines with GPUs, without any: what is asked of transformers, and what that means for a model."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from postprocess.agreement import reference_model
from postprocess.agreement.devices import place_checkpoint, place_package
from postprocess.agreement.model_scores import load_served
from postprocess.agreement.reference_model import load_trained
from recipes.pairwise.training.heads import linear_in_float32

LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture
def gpus_of(monkeypatch):
    """gpus_of(bytes, …) makes this a machine with such GPUs."""

    def set_gpus(*gpu_bytes: int) -> None:
        properties = [SimpleNamespace(total_memory=size) for size in gpu_bytes]
        monkeypatch.setattr("torch.cuda.is_available", lambda: bool(properties))
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(properties))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: properties[number])

    return set_gpus


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ((), {"device_map": {"": "cpu"}}),
        ((100,), {"device_map": {"": "cuda:0"}}),
        ((100, 200), {"device_map": "sequential", "max_memory": {0: 85, 1: 170}}),
    ],
)
def test_a_checkpoint_goes_to_the_cpu_to_one_gpu_or_over_several(gpus, expected, gpus_of):
    gpus_of(*gpus)
    assert place_checkpoint() == expected


def test_the_trained_model_asks_transformers_for_these_devices_and_keeps_no_cache(made, opened, gpus_of, monkeypatch):
    run = opened(made("gemma2"))
    gpus_of(100, 200)
    asked = {}

    def from_pretrained(folder, **options):
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(reference_model.CLASSES["score"], "from_pretrained", from_pretrained)
    with pytest.raises(InterruptedError):
        load_trained(run)
    assert (asked["device_map"], asked["max_memory"]) == ("sequential", {0: 85, 1: 170})
    assert asked["config"].use_cache is False


def test_a_package_is_split_as_the_kernel_splits_it_where_one_gpu_cannot_hold_it(packaged, opened, gpus_of, monkeypatch):
    run, _ = packaged("gemma2", quantize="none")
    folder = run.folder / "package"
    package_bytes = (folder / "model.safetensors").stat().st_size
    for gpus in ((), (package_bytes // 2,), (package_bytes * 2, package_bytes * 2)):
        gpus_of(*gpus)
        assert place_package(folder) is None

    gpus_of(package_bytes, package_bytes)  # of which 0.85 is for weights
    loads = []
    monkeypatch.setattr("postprocess.agreement.model_scores.load_model", lambda *arguments: loads.append(arguments))
    load_served(opened(run), folder, torch.float16)
    device, dtype, device_map = loads[0][2:]
    assert (device, dtype) == ("cuda:0", torch.float16)
    assert [device_map[layer] for layer in LAYERS] == ["cuda:0", "cuda:1"]


def test_a_head_on_another_gpu_than_the_last_layer_gets_its_input():
    with FakeTensorMode():  # tensors without memory, on devices that need not be there
        layer = SimpleNamespace(weight=torch.empty(2, 4, device="cuda:0", dtype=torch.bfloat16), bias=None)
        logits = linear_in_float32(layer, None, torch.empty(3, 4, device="cuda:1", dtype=torch.bfloat16))
    assert (str(logits.device), logits.dtype) == ("cuda:0", torch.float32)
