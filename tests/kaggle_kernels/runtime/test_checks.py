"""What the machine must have is told before any work, and only what would fail or be wrong is refused."""

import json
from types import SimpleNamespace

import pytest

from kaggle_kernels.runtime import checks
from kaggle_kernels.runtime.checks import (
    Gpu,
    MachineError,
    ask_gpus,
    check_disk,
    check_gpus,
    check_libraries,
    check_machine,
    parse_gpus,
)
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.settings import start_clock

GIB = 2**30
TWO = ["cuda:0", "cuda:1"]
SERVED = {"torch": "2.10.0", "transformers": "5.0.0", "tokenizers": "0.22.2", "peft": "0.19.1", "bitsandbytes": None}


def t4(free=14.5, capability=7.5):
    return Gpu("Tesla T4", int(free * GIB), capability)


def test_what_nvidia_smi_prints_is_read():
    text = "Tesla T4, 14913, 7.5\nNVIDIA A100-SXM4-40GB MIG 1g.5gb, [N/A], [N/A]\n\n"
    assert parse_gpus(text) == [
        Gpu("Tesla T4", 14913 * 2**20, 7.5),
        Gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ]


@pytest.mark.parametrize("command", [("no-such-command",), ("false",), ("sleep", "20")], ids=["absent", "fails", "hangs"])
def test_nvidia_smi_may_be_absent_fail_or_hang(monkeypatch, command):
    monkeypatch.setattr(checks, "ASK_GPUS", command)
    monkeypatch.setattr(checks, "ASK_SECONDS", 0.2)
    assert ask_gpus() is None
    monkeypatch.setattr(checks, "ASK_GPUS", ("echo", "Tesla T4, 1, 7.5"))
    monkeypatch.setattr(checks, "ASK_SECONDS", 30)
    assert ask_gpus() == [Gpu("Tesla T4", 2**20, 7.5)]


P100 = Gpu("Tesla P100-PCIE-16GB", 16 * GIB, 6.0)


@pytest.mark.parametrize(
    "devices, gpus, on_kaggle, message",
    [
        (["cpu"], [], True, "PyTorch finds no GPU.*set machine_shape to NvidiaTeslaT4"),
        (["cuda:0"], [P100], True, "P100-PCIE-16GB has compute capability 6.0, .* set machine_shape to NvidiaTeslaT4"),
        (["cuda:0"], [P100], False, "P100-PCIE-16GB has compute capability 6.0"),
    ],
    ids=["no GPU", "a P100", "a P100 in a rehearsal"],
)
def test_gpus_that_cannot_do_the_work_are_refused(devices, gpus, on_kaggle, message):
    with pytest.raises(MachineError, match=message):
        check_gpus(devices, gpus, on_kaggle)


@pytest.mark.parametrize(
    "devices, gpus, on_kaggle, lines",
    [
        (["cpu"], None, False, []),
        (TWO, [t4(22, 7.0), t4(22, None)], True, []),
        (TWO, None, True, []),
        (["cuda:0"], [t4()], True, ["warning: 1 GPU where 2 were expected"]),
        (TWO, [t4(), t4(2)], True, ["warning: Tesla T4 has 2.0 GiB free; restart the session if another kernel is on it"]),
        (TWO, [t4(), Gpu("?", None, None)], True, []),
    ],
)
def test_gpus_that_are_only_slow_or_unknown_are_told(devices, gpus, on_kaggle, lines):
    assert check_gpus(devices, gpus, on_kaggle) == lines


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    check_disk(tmp_path / "working")
    assert list((tmp_path / "working").iterdir()) == []
    (tmp_path / "file").write_text("a file")
    with pytest.raises(MachineError, match="file: cannot be written to"):
        check_disk(tmp_path / "file")


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
    record = check_machine(tmp_path, [read_package(package_folder)], TWO, start_clock(600))
    assert record["gpus"][1] == {"name": "Tesla T4", "free_bytes": 29 * GIB // 2, "capability": 7.5}
    assert json.loads(json.dumps(record)) == record
    assert "machine: Tesla T4 (14.5 GiB free), Tesla T4 (14.5 GiB free)\n" in capsys.readouterr().out
    monkeypatch.delenv("KAGGLE_ROOT")  # as on Kaggle itself
    with pytest.raises(MachineError, match="PyTorch finds no GPU"):
        check_machine(tmp_path, [read_package(package_folder)], ["cpu"], start_clock(600))
