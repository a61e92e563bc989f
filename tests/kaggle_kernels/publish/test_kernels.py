"""A kernel as it is meant and as Kaggle has it, compared field by field; one push starts one run at most."""

import json

import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.spec import find_spec
from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.kernels import Kernel, find_differences, read_kernel, read_log
from tests.fakes.kaggle.site import Kernel as KernelOfSite
from tests.fakes.kaggle.site import KernelVersion, Run

VERSIONS = {"me/pairwise-gemma2-qlora": 3, "me/pairwise-llama3-cls": 12}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    kernels = tmp_path_factory.mktemp("kernels")
    build(find_spec("gemma2_llama3"), kernels)
    return read_kernel(kernels / "gemma2_llama3", "me", VERSIONS)


def shown(kernel, code=None, **changes):
    """The kernel as Kaggle shows it, with changes."""
    return Kernel(code or kernel.code, {**kernel.metadata, "docker_image": "", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"machine_shape": None},
        {"enable_internet": None, "enable_tpu": None},
        {"dataset_sources": ["me/pairwise-wheels", "me/pairwise-llama3-cls", "me/pairwise-gemma2-qlora"]},
        {"id": "Me/pairwise-gemma-2-with-llama-3"},
    ],
    ids=["nothing", "no run yet", "false left out", "no versions, another order", "an owner in capitals"],
)
def test_what_kaggle_leaves_open_is_no_difference(kernel, changes):
    assert find_differences(kernel, shown(kernel, code=kernel.code + "\n", **changes)) == []


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"code": "print(1)"}, "the code is another one"),
        ({"is_private": False}, "is_private is false in place of true"),
        ({"enable_gpu": None}, "enable_gpu is null in place of true"),
        ({"machine_shape": "NvidiaTeslaP100"}, 'machine_shape is "NvidiaTeslaP100" in place of "NvidiaTeslaT4"'),
        ({"id": "me/elsewhere"}, 'id is "me/elsewhere" in place of "me/pairwise-gemma-2-with-llama-3"'),
        ({"model_sources": ["a/b/c/d/1"]}, 'model_sources is ["a/b/c/d/1"] in place of []'),
    ],
)
def test_each_difference_is_told(kernel, changes, difference):
    assert find_differences(kernel, shown(kernel, **changes)) == [difference]


def test_another_version_of_a_dataset_is_told(kernel):
    sources = ["me/pairwise-gemma2-qlora/2", "me/pairwise-llama3-cls", "me/pairwise-wheels"]
    [difference] = find_differences(kernel, shown(kernel, dataset_sources=sources))
    assert difference.startswith('dataset_sources is ["me/pairwise-gemma2-qlora/2", ')


PIECES = [{"stream_name": "stdout", "time": 1, "data": "a\nb\n"}, {"stream_name": "stderr", "time": 2, "data": "c"}]


@pytest.mark.parametrize(
    "log, lines", [(json.dumps(PIECES), ["a", "b", "c"]), ("[12.3 s] a\n\nb", ["[12.3 s] a", "b"]), ("", [])]
)
def test_a_log_is_read_as_text_and_as_kaggles_pieces(kaggle, log, lines):
    run = Run(statuses=["COMPLETE"], log=[log])
    kaggle.site.kernels["tester/x"] = KernelOfSite("tester/x", [KernelVersion(1, {}, run)])
    assert read_log(connect(Pace(0.01, 1)), "tester/x", 1) == lines
