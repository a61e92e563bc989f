"""What the machine must have is told before any work, and only what would fail or be wrong is refused."""

import json
from types import SimpleNamespace

import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime import checks
from kaggle_kernels.runtime.checks import (
    Gpu,
    MachineError,
    Need,
    ask_gpus,
    available_memory,
    check_disk,
    check_gpus,
    check_libraries,
    check_machine,
    check_memory,
    parse_gpus,
    visible_gpus,
)
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.settings import start_clock
from tests.kaggle_kernels.packages import settings_for

GIB = 2**30
TWO = ["cuda:0", "cuda:1"]
SERVED = {"torch": "2.10.0", "transformers": "5.0.0", "tokenizers": "0.22.2", "peft": "0.19.1", "bitsandbytes": None}


def t4(free=14.5, capability=7.5):
    return Gpu("Tesla T4", int(free * GIB), 15 * GIB, capability)


def need(gib, placement="each", cpu_factor=1):
    return Need("gemma", placement, int(gib * GIB), cpu_factor)


def test_what_nvidia_smi_prints_is_read():
    text = "Tesla T4, 14913, 15360, 7.5\nNVIDIA A100-SXM4-40GB MIG 1g.5gb, [N/A], [N/A], [N/A]\n\n"
    assert parse_gpus(text) == [
        Gpu("Tesla T4", 14913 * 2**20, 15360 * 2**20, 7.5),
        Gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None),
    ]


@pytest.mark.parametrize("command", [("no-such-command",), ("false",), ("sleep", "20")], ids=["absent", "fails", "hangs"])
def test_nvidia_smi_may_be_absent_fail_or_hang(monkeypatch, command):
    monkeypatch.setattr(checks, "ASK_GPUS", command)
    monkeypatch.setattr(checks, "ASK_SECONDS", 0.2)
    assert ask_gpus() is None
    monkeypatch.setattr(checks, "ASK_GPUS", ("echo", "Tesla T4, 1, 2, 7.5"))
    monkeypatch.setattr(checks, "ASK_SECONDS", 30)
    assert ask_gpus() == [Gpu("Tesla T4", 2**20, 2**21, 7.5)]


@pytest.mark.parametrize(
    "visible, expected", [(None, "abc"), ("2", "c"), ("1, 0", "ba"), ("GPU-5f", "abc"), ("0,7", "a"), ("", "abc")]
)
def test_gpus_that_are_hidden_from_pytorch_are_not_counted(visible, expected):
    assert "".join(visible_gpus(["a", "b", "c"], visible)) == expected
    assert visible_gpus(None, visible) is None


P100 = Gpu("Tesla P100-PCIE-16GB", 16 * GIB, 16 * GIB, 6.0)
UNKNOWN = Gpu("?", None, None, None)


@pytest.mark.parametrize(
    "devices, gpus, wanted, on_kaggle, message",
    [
        (["cpu"], [], need(6), True, "PyTorch finds no GPU.*set machine_shape to NvidiaTeslaT4"),
        (["cuda:0"], [P100], need(6), True, "P100-PCIE-16GB has compute capability 6.0, .* set machine_shape to NvidiaTeslaT4"),
        (["cuda:0"], [P100], need(6), False, "P100-PCIE-16GB has compute capability 6.0"),
        (["cuda:0"], [t4()], need(15.5, "split"), True, "gemma: 15.5 GiB of weights over all GPUs, and 14.5 GiB free; use two"),
        (TWO, [t4(5), t4(2)], need(6), True, "gemma: 6.0 GiB of weights, and 5.0 and 2.0 GiB free; .* restart the session"),
    ],
    ids=["no GPU", "a P100", "a P100 in a rehearsal", "a split model on one", "memory that another process holds"],
)
def test_gpus_that_cannot_do_the_work_are_refused(devices, gpus, wanted, on_kaggle, message):
    with pytest.raises(MachineError, match=message):
        check_gpus(devices, gpus, [wanted], on_kaggle)


NO_FIGURES = ["warning: nvidia-smi does not tell the free memory of each GPU, so it is not checked"]


@pytest.mark.parametrize(
    "devices, gpus, wanted, on_kaggle, lines",
    [
        (["cpu"], None, need(6), False, []),
        (TWO, [t4(22, 7.0), t4(22, None)], need(6), True, []),
        (TWO, [t4()] * 2, need(15.5, "split"), True, []),
        (["cuda:0"], [t4(80)], need(15.5, "split"), True, []),
        (["cuda:0"], [t4()], need(6), True, ["warning: 1 GPU where 2 were expected: half the speed"]),
        (TWO, [t4(), t4(2)], need(6), True, ["warning: gemma: cuda:1 has 2.0 GiB free, too few for 6.0 GiB of weights"]),
        (TWO, [t4()] * 2, need(13), True, ["warning: gemma: 13.0 GiB of weights leave 1.0 GiB free for batches"]),
        (TWO, [t4()] * 2, need(25, "split"), True, ["warning: gemma: 25.0 GiB of weights leave 3.0 GiB free for batches"]),
        (TWO, None, need(60), True, NO_FIGURES),
        (TWO, [t4()], need(60), True, NO_FIGURES),
        (TWO, [t4(), UNKNOWN], need(60), True, NO_FIGURES),
    ],
)
def test_gpus_that_are_only_slow_or_unknown_are_told(devices, gpus, wanted, on_kaggle, lines):
    assert check_gpus(devices, gpus, [wanted], on_kaggle) == lines


def test_ram_and_swap_are_read_from_proc(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       32000000 kB\nMemAvailable:    2000 kB\nSwapFree:      24 kB\nHugePages_Total:    0\n")
    assert available_memory(file) == 2024 * 1024
    file.write_text("MemTotal:       32000000 kB\n")
    assert available_memory(file) is None
    assert available_memory(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "gib, devices, wanted, message",
    [
        (20, ["cpu", "cpu"], need(9, cpu_factor=2), "20.0 GiB of RAM can be had, gemma needs 36.0 on cpu, cpu; end what else"),
        (1.5, TWO, need(6), "1.5 GiB of RAM can be had, 2 processes need 2.0"),
    ],
)
def test_weights_on_cpus_and_processes_must_fit_ram(gib, devices, wanted, message):
    with pytest.raises(MachineError, match=message):
        check_memory(int(gib * GIB), devices, [need(1), wanted])


@pytest.mark.parametrize(
    "gib, devices, wanted, lines",
    [
        (40, ["cpu", "cpu"], need(9, "split", 2), []),
        (20, ["cpu"], need(9, cpu_factor=2), ["warning: 20.0 GiB of RAM can be had, gemma needs 18.0 for its weights alone"]),
        (29, TWO, need(17), []),
        (18, TWO, need(17), ["warning: 18.0 GiB of RAM can be had, less than the weights of gemma: loading is as slow as"]),
        (None, TWO, need(6), []),
    ],
)
def test_weights_on_the_way_to_gpus_need_no_ram_but_are_slow_without(gib, devices, wanted, lines):
    told = check_memory(None if gib is None else gib * GIB, devices, [wanted])
    assert [line[: len(expected)] for line, expected in zip(told, lines, strict=True)] == lines


def test_a_disk_that_cannot_hold_the_outputs_is_refused(tmp_path, monkeypatch):
    assert check_disk(tmp_path / "working", 25_000) > 0
    assert list((tmp_path / "working").iterdir()) == []
    (tmp_path / "file").write_text("a file")
    with pytest.raises(MachineError, match="file: cannot be written to"):
        check_disk(tmp_path / "file", 3)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    assert check_disk(tmp_path, 1000) == 5_000_000
    with pytest.raises(MachineError, match="5.0 MB free, 25000 rows may need 26.0; remove files"):
        check_disk(tmp_path, 25_000)


NF4 = {"quantization_config": {"quant_method": "bitsandbytes"}}
GPTQ = {"quantization_config": {"quant_method": "gptq"}}
AWQ = {"quantization_config": {"quant_method": "awq"}}


def check_package(folder, config, trained=(), **served):
    """The lines of check_libraries for a package with this config.json, trained with some versions and served with others."""
    (folder / "config.json").write_text(json.dumps(config))
    contract = SimpleNamespace(recorded={"versions": dict(trained)})
    return check_libraries([SimpleNamespace(folder=folder, contract=contract)], {**SERVED, **served})


@pytest.mark.parametrize(
    "config, trained, message",
    [
        ({"transformers_version": "5.16.1"}, {}, "saved by transformers 5.16.1, which version 4.57.1 here would read wrongly"),
        ({}, {"transformers": "5.2.0"}, "saved by transformers 5.2.0,"),
        (NF4, {}, "needs bitsandbytes, which is not installed; attach a dataset with its wheel"),
        (AWQ, {}, "quantised by awq, this kernel knows bitsandbytes, gptq"),
    ],
)
def test_libraries_that_are_absent_or_too_old_for_a_package_are_refused(tmp_path, config, trained, message):
    with pytest.raises(MachineError, match=message):
        check_package(tmp_path, config, trained, transformers="4.57.1")


def test_newer_transformers_and_libraries_that_no_package_uses_are_fine(tmp_path):
    assert check_package(tmp_path, {"transformers_version": "4.44.0"}) == []
    assert check_package(tmp_path, {"transformers_version": "9.1.0"}, transformers="10.0.0") == []
    assert check_package(tmp_path, NF4, bitsandbytes="0.50.2") == []
    assert check_package(tmp_path, GPTQ, peft=None) == []


def test_versions_that_differ_from_trainings_are_told_and_peft_only_where_the_adapter_is_not_merged(tmp_path):
    trained = {"torch": "2.13.0", "transformers": "5.0.0", "peft": "0.20.0", "bitsandbytes": "absent"}
    torch_line = f"{tmp_path.name}: trained with torch 2.13.0, served with 2.10.0"
    assert check_package(tmp_path, {}, trained) == [torch_line]
    (tmp_path / "lora_config.json").write_text("{}")
    peft_line = f"{tmp_path.name}: trained with peft 0.20.0, served with 0.19.1"
    assert check_package(tmp_path, {}, trained) == [torch_line, peft_line]
    with pytest.raises(MachineError, match="needs peft, which is not installed"):
        check_package(tmp_path, {}, peft=None)


def test_a_package_on_this_machine_passes_and_is_recorded(package_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    monkeypatch.setattr(checks, "ask_gpus", lambda: [t4()] * 2)
    spec = Spec(title="Title", competition="wsdm", packages=[{"run": "two", "dataset": "tiny-two"}], clock_seconds=600)
    settings = settings_of("test", spec, [settings_for("two", "tiny-two")])
    record = check_machine(tmp_path, settings, [read_package(package_folder)], TWO, 3, start_clock(600))
    assert record["gpus"][1] == {"name": "Tesla T4", "free_bytes": 29 * GIB // 2, "total_bytes": 15 * GIB, "capability": 7.5}
    assert json.loads(json.dumps(record)) == record
    assert "machine: Tesla T4 (14.5 GiB free), Tesla T4 (14.5 GiB free); " in capsys.readouterr().out
    monkeypatch.delenv("KAGGLE_ROOT")  # as on Kaggle itself
    with pytest.raises(MachineError, match="PyTorch finds no GPU"):
        check_machine(tmp_path, settings, [read_package(package_folder)], ["cpu"], 3, start_clock(600))
