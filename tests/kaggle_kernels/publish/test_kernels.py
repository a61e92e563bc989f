"""A kernel as it is meant and as Kaggle has it, compared field by field."""

import json

import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.spec import find_spec
from kaggle_kernels.publish.client import Answer
from kaggle_kernels.publish.kernels import Kernel, log_lines, read_kernel, what_differs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    kernels = tmp_path_factory.mktemp("kernels")
    build(find_spec("gemma2_llama3"), kernels)
    return kernels / "gemma2_llama3"


@pytest.fixture(scope="module")
def kernel(folder):
    return read_kernel(folder, "me", {"me/pairwise-gemma2-qlora": 3, "me/pairwise-llama3-cls": 12})


def there(kernel, code=None, **changes):
    """The kernel as `kernels pull` writes it, with changes."""
    added = {"id_no": 1, "keywords": [], "docker_image": ""}
    return Kernel(code or kernel.code, {**kernel.metadata, **added, "code_file": "other.py", **changes})


def test_what_kaggle_adds_and_leaves_open_is_no_difference(kernel):
    assert what_differs(kernel, there(kernel)) == []
    assert what_differs(kernel, there(kernel, machine_shape=None)) == []
    assert what_differs(kernel, there(kernel, code=kernel.code + "\n")) == []
    assert what_differs(kernel, there(kernel, enable_internet=None, enable_tpu=None)) == []
    unpinned = ["me/pairwise-wheels", "me/pairwise-llama3-cls", "me/pairwise-gemma2-qlora"]
    assert what_differs(kernel, there(kernel, dataset_sources=unpinned)) == []


def test_an_owner_in_capitals_is_the_same_owner(folder):
    meant = read_kernel(folder, "Me", {"Me/pairwise-gemma2-qlora": 3})
    sources = ["me/pairwise-gemma2-qlora/3", "me/pairwise-llama3-cls", "me/pairwise-wheels"]
    assert what_differs(meant, there(meant, id="me/pairwise-gemma-2-with-llama-3", dataset_sources=sources)) == []


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"code": "print(1)"}, "the code is another one"),
        ({"is_private": False}, "is_private is false in place of true"),
        ({"enable_gpu": None}, "enable_gpu is null in place of true"),
        ({"machine_shape": "NvidiaTeslaP100"}, 'machine_shape is "NvidiaTeslaP100" in place of "NvidiaTeslaT4"'),
        ({"id": "me/elsewhere"}, 'id is "me/elsewhere" in place of "me/pairwise-gemma-2-with-llama-3"'),
        ({"model_sources": ["a/b/c/d/1"]}, 'model_sources is ["a/b/c/d/1"] in place of []'),
    ],
)
def test_each_difference_is_told(kernel, changes, told):
    assert what_differs(kernel, there(kernel, **changes)) == [told]


def test_another_version_of_a_dataset_is_told(kernel):
    sources = ["me/pairwise-gemma2-qlora/2", "me/pairwise-llama3-cls", "me/pairwise-wheels"]
    [told] = what_differs(kernel, there(kernel, dataset_sources=sources))
    assert told.startswith('dataset_sources is ["me/pairwise-gemma2-qlora/2", ')


def test_a_log_is_read_as_text_and_as_kaggles_pieces():
    pieces = [{"stream_name": "stdout", "time": 1, "data": "a\nb\n"}, {"stream_name": "stderr", "time": 2, "data": "c"}]
    for text in (json.dumps(pieces), "Warning: outdated\n" + json.dumps(pieces, indent=1)):
        assert log_lines(Answer((), 0, text)) == ["a", "b", "c"]
    assert log_lines(Answer((), 0, "[12.3 s] a\nb")) == ["[12.3 s] a", "b"]
