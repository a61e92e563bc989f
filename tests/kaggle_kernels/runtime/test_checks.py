"""What the machine must have is said before any work, and only what would fail or be wrong is refused."""

import json
from types import SimpleNamespace

import pytest

from kaggle_kernels.runtime.checks import MachineError, check_machine, check_transformers
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.settings import start_clock

TWO = ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    "config, trained, message",
    [
        ({"transformers_version": "5.16.1"}, {}, "saved by transformers 5.16.1, but 4.57.1 is installed here, which would"),
        ({}, {"transformers": "5.2.0"}, "saved by transformers 5.2.0,"),
    ],
)
def test_an_older_major_version_of_transformers_is_refused(tmp_path, config, trained, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    contract = SimpleNamespace(recorded={"versions": trained})
    package = SimpleNamespace(folder=tmp_path, contract=contract)
    for newer in ("5.0.0", "10.0.0"):
        check_transformers(package, newer)
    with pytest.raises(MachineError, match=message):
        check_transformers(package, "4.57.1")


def test_one_gpu_is_slow_and_on_kaggle_none_is_an_error(package_folder, monkeypatch, capsys):
    packages, clock = [read_package(package_folder)], start_clock(600)
    monkeypatch.setenv("KAGGLE_ROOT", "a rehearsal")
    check_machine(packages, TWO, clock)
    check_machine(packages, ["cpu"], clock)
    assert capsys.readouterr().out == ""
    check_machine(packages, ["cuda:0"], clock)
    assert "warning: 1 GPU where 2 were expected\n" in capsys.readouterr().out
    monkeypatch.delenv("KAGGLE_ROOT")
    with pytest.raises(MachineError, match="PyTorch finds no GPU.*set machine_shape to NvidiaTeslaT4"):
        check_machine(packages, ["cpu"], clock)
