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


def test_without_a_gpu_kaggle_is_refused_and_a_rehearsal_is_not():
    with pytest.raises(MachineError, match="PyTorch finds no GPU.*set machine_shape to NvidiaTeslaT4"):
        check_gpus(["cpu"], [], [need(6)], on_kaggle=True)
    assert check_gpus(["cpu"], None, [need(6)], on_kaggle=False) == []


@pytest.mark.parametrize("on_kaggle", [True, False])
def test_a_p100_is_refused_with_what_to_do(on_kaggle):
    p100 = Gpu("Tesla P100-PCIE-16GB", 16 * GIB, 16 * GIB, 6.0)
    with pytest.raises(MachineError, match="P100-PCIE-16GB has compute capability 6.0, .* set machine_shape to NvidiaTeslaT4"):
        check_gpus(["cuda:0"], [p100], [need(6)], on_kaggle)


@pytest.mark.parametrize("capability", [7.0, 7.5, 8.9, 10.0, None])
def test_other_gpus_are_fine(capability):
    assert check_gpus(TWO, [t4(22, capability)] * 2, [need(6)], True) == []


def test_one_gpu_in_place_of_two_is_half_the_speed():
    assert check_gpus(["cuda:0"], [t4()], [need(6)], True) == ["warning: 1 GPU where 2 were expected: half the speed"]


def test_a_split_model_is_refused_on_one_gpu_that_cannot_hold_it_and_served_on_one_that_can():
    with pytest.raises(MachineError, match="gemma: 15.5 GiB of weights over all GPUs, and 14.5 GiB free; use two T4s"):
        check_gpus(["cuda:0"], [t4()], [need(15.5, "split")], True)
    assert check_gpus(["cuda:0"], [t4(80)], [need(15.5, "split")], True) == []
    assert check_gpus(TWO, [t4()] * 2, [need(15.5, "split")], True) == []


def test_memory_that_another_process_holds_is_missed():
    with pytest.raises(MachineError, match="gemma: 6.0 GiB of weights, and 5.0 and 2.0 GiB free; .* restart the session"):
        check_gpus(TWO, [t4(5), t4(2)], [need(6)], True)
    [line] = check_gpus(TWO, [t4(), t4(2)], [need(6)], True)
    assert line == "warning: gemma: cuda:1 has 2.0 GiB free, too few for 6.0 GiB of weights"


def test_little_room_for_batches_is_told():
    [line] = check_gpus(TWO, [t4()] * 2, [need(13)], True)
    assert line == "warning: gemma: 13.0 GiB of weights leave 1.0 GiB free for batches"
    [line] = check_gpus(TWO, [t4()] * 2, [need(25, "split")], True)
    assert line == "warning: gemma: 25.0 GiB of weights leave 3.0 GiB free for batches"


@pytest.mark.parametrize("gpus", [None, [t4()], [t4(), Gpu("?", None, None, None)]])
def test_without_figures_memory_is_not_checked_and_that_is_told(gpus):
    lines = check_gpus(TWO, gpus, [need(60)], True)
    assert lines == ["warning: nvidia-smi does not tell the free memory of each GPU, so it is not checked"]


def test_ram_and_swap_are_read_from_proc(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       32000000 kB\nMemAvailable:    2000 kB\nSwapFree:      24 kB\nHugePages_Total:    0\n")
    assert available_memory(file) == 2024 * 1024
    file.write_text("MemTotal:       32000000 kB\n")
    assert available_memory(file) is None
    assert available_memory(tmp_path / "absent") is None


def test_weights_must_fit_ram_where_cpus_stand_in():
    with pytest.raises(MachineError, match="20.0 GiB of RAM can be had, gemma needs 36.0 on cpu, cpu; end what else runs"):
        check_memory(20 * GIB, ["cpu", "cpu"], [need(1), need(9, cpu_factor=2)])
    assert check_memory(40 * GIB, ["cpu", "cpu"], [need(9, "split", 2)]) == []
    [line] = check_memory(20 * GIB, ["cpu"], [need(9, cpu_factor=2)])
    assert line == "warning: 20.0 GiB of RAM can be had, gemma needs 18.0 for its weights alone"


def test_weights_on_the_way_to_gpus_need_no_ram_but_are_slow_without():
    assert check_memory(29 * GIB, TWO, [need(17)]) == []
    [line] = check_memory(18 * GIB, TWO, [need(17)])
    assert line.startswith(
        "warning: 18.0 GiB of RAM can be had, less than the weights of gemma: loading is as slow as the disk"
    )
    with pytest.raises(MachineError, match="1.5 GiB of RAM can be had, 2 processes need 2.0"):
        check_memory(3 * GIB // 2, TWO, [need(6)])
    assert check_memory(None, TWO, [need(6)]) == []


def test_a_disk_without_room_for_the_outputs_is_refused(tmp_path, monkeypatch):
    assert check_disk(tmp_path / "working", 25_000) > 0
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    assert check_disk(tmp_path, 1000) == 5_000_000
    with pytest.raises(MachineError, match="5.0 MB free, 25000 rows may need 26.0; remove files"):
        check_disk(tmp_path, 25_000)
    assert list(tmp_path.iterdir()) == [tmp_path / "working"]


def test_a_working_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "working").write_text("a file")
    with pytest.raises(MachineError, match="working: cannot be written to"):
        check_disk(tmp_path / "working", 3)


@pytest.fixture
def package(tmp_path):
    """package(config, versions, unmerged) is what check_libraries looks at."""

    def make(config=None, versions=None, unmerged=False):
        (tmp_path / "config.json").write_text(json.dumps(config or {}))
        if unmerged:
            (tmp_path / "lora_config.json").write_text("{}")
        return SimpleNamespace(folder=tmp_path, contract=SimpleNamespace(recorded={"versions": versions or {}}))

    return make


def test_versions_that_differ_from_trainings_are_told(package, tmp_path):
    versions = {"torch": "2.13.0", "transformers": "5.16.1", "tokenizers": "0.22.2", "peft": "0.20.0", "bitsandbytes": "absent"}
    assert check_libraries([package({"transformers_version": "5.16.1"}, versions)], SERVED) == [
        f"{tmp_path.name}: trained with torch 2.13.0, served with 2.10.0",
        f"{tmp_path.name}: trained with transformers 5.16.1, served with 5.0.0",
    ]
    lines = check_libraries([package({}, versions, unmerged=True)], SERVED)
    assert lines[2] == f"{tmp_path.name}: trained with peft 0.20.0, served with 0.19.1"


def test_transformers_of_an_older_major_version_are_refused_and_newer_ones_are_not(package):
    saved_by_5 = package({"transformers_version": "5.16.1"})
    with pytest.raises(MachineError, match="saved by transformers 5.16.1, which version 4.57.1 here would read wrongly"):
        check_libraries([saved_by_5], {**SERVED, "transformers": "4.57.1"})
    with pytest.raises(MachineError, match="saved by transformers 5.2.0,"):
        check_libraries([package({}, {"transformers": "5.2.0"})], {**SERVED, "transformers": "4.57.1"})
    assert check_libraries([package({"transformers_version": "4.44.0"})], SERVED) == []
    assert check_libraries([package({"transformers_version": "10.0.0"})], {**SERVED, "transformers": "10.1.0"}) == []


def test_what_unpacks_the_weights_must_be_installed(package):
    in_nf4 = package({"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(MachineError, match="needs bitsandbytes, which is not installed; attach a dataset with its wheel"):
        check_libraries([in_nf4], SERVED)
    assert check_libraries([in_nf4], {**SERVED, "bitsandbytes": "0.50.2"}) == []
    assert check_libraries([package({"quantization_config": {"quant_method": "gptq"}})], SERVED) == []
    with pytest.raises(MachineError, match="quantised by awq, this kernel knows bitsandbytes, gptq"):
        check_libraries([package({"quantization_config": {"quant_method": "awq"}})], SERVED)


def test_peft_is_needed_for_packages_that_are_not_merged(package):
    assert check_libraries([package()], {**SERVED, "peft": None}) == []
    with pytest.raises(MachineError, match="needs peft, which is not installed"):
        check_libraries([package(unmerged=True)], {**SERVED, "peft": None})


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
