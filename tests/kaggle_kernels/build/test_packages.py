"""A package in outputs/ that is not the one that the kernel was built for is refused."""

from pathlib import Path

import pytest

from kaggle_kernels.build.bundle import kernel_text
from kaggle_kernels.build.memory_fit import fit_packages
from kaggle_kernels.build.packages import find_package
from kaggle_kernels.build.spec import Spec, read_spec
from preprocess.core.errors import UserError
from tests.kaggle_kernels.packages import change_json

PACKAGE = Path("outputs/two/package")


def refusal_of(spec_path):
    [fit] = fit_packages(spec_path, read_spec(spec_path))
    with pytest.raises(UserError) as raised:
        find_package(fit)
    return str(raised.value)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("contract.json", {"verdicts": ["model_b", "model_a"]}, "verdicts: found ['model_b', 'model_a'], recipes/two.yml says"),
        ("config.json", {"model_type": "llama"}, "model_type: found llama, recipes/two.yml says gemma2, which the kernel was"),
        ("manifest.json", {"quantize": "int8"}, "quantize: found int8, recipes/two.yml says none, which the kernel was built"),
        ("dataset-metadata.json", {"id": "me/tiny-too"}, "id: found the dataset 'tiny-too', but the spec names 'tiny-two'"),
    ],
)
def test_a_package_that_is_not_the_recipes_is_refused_with_file_key_and_fix(workplace, file, changes, message):
    change_json(PACKAGE / file, **changes)
    assert refusal_of(workplace).startswith(f"{PACKAGE / file}: {message}")


def test_an_absent_package_is_refused_with_the_command_that_makes_it(workplace):
    (PACKAGE / "manifest.json").unlink()
    assert refusal_of(workplace) == f"{PACKAGE}: no package; run `python -m postprocess recipes/two.yml` first"


def test_a_package_of_another_base_model_than_the_recipes_is_refused(workplace):
    change_json(PACKAGE / "contract.json", base_model="google/gemma-2-9b-it")
    assert refusal_of(workplace).startswith("recipes/two.yml: base_model is outputs/demo/input/gemma2, ")

    # A local copy may have any path, and is told by the size of its weights.
    change_json(PACKAGE / "contract.json", base_model=".")
    with (PACKAGE / "model.safetensors").open("ab") as file:
        file.truncate(2 * 2**30)
    assert refusal_of(workplace).startswith(
        f"{PACKAGE}: its weights have 2.0 GiB, but the kernel's memory was computed for 0.0"
    )


TWO, HALF = {"run": "two", "dataset": "tiny-two"}, {"weight": 0.5}
AS_GIVEN = {"best": 0.8, "low": 0.7, "high": 0.9}
MEASURED, WITHIN_NOISE = ({"both": {"best": 1.3, "low": low, "high": 1.6}, "as_given": AS_GIVEN} for low in (1.1, 0.9))


@pytest.mark.parametrize(
    ("changes", "manifest", "expected"),
    [
        ({}, {"temperature": MEASURED}, 1.3),
        ({}, {"temperature": WITHIN_NOISE}, 1.0),
        ({}, {"temperature": None}, 1.0),
        ({}, {}, 1.0),
        ({"orders": "as_given"}, {"temperature": MEASURED}, 0.8),
        ({"temperature": 1.5}, {"temperature": MEASURED}, 1.5),
        ({"competition": "wsdm"}, {"temperature": MEASURED}, 1.0),
        ({"packages": [TWO | HALF, {"run": "b", "dataset": "tiny-b"} | HALF]}, {"temperature": MEASURED}, 1.0),
    ],
    ids=[
        *("measured", "interval holds 1", "not measured", "packaged before"),
        *("order as given", "of the spec", "accuracy counts", "ensemble"),
    ],
)
def test_the_kernel_takes_a_measured_temperature_where_it_gains(workplace, changes, manifest, expected):
    change_json(PACKAGE / "manifest.json", **manifest)
    spec = Spec.model_validate({"title": "Title", "competition": "lmsys", "packages": [TWO], **changes})
    assert f"\n    temperature={expected},\n" in kernel_text("test", spec, [])
