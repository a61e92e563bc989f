"""A spec that two T4s cannot hold, or that its recipes do not suit, is refused before anything is built."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.bundle import generate_files
from kaggle_kernels.build.listing import print_specs
from kaggle_kernels.build.memory_fit import find_recipe, fit_packages, in_gib
from kaggle_kernels.build.spec import all_specs, find_spec, read_spec
from postprocess.memory.model_size import served_of
from postprocess.memory.t4_fit import refusal
from preprocess.core.errors import UserError
from tests.kaggle_kernels.packages import write_recipe

GEMMA, QWEN, MINILM = "google/gemma-2-9b-it", "Qwen/Qwen2.5-14B-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
LLAMA_70B = "meta-llama/Meta-Llama-3-70B-Instruct"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder for a spec and its recipe: make(base_model, recipe's package keys, spec's keys)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()

    def make(base_model, *, quantize="none", placement="auto", more="", **pairwise):
        keys = {"template": "bert" if base_model == MINILM else "chatml", "budget_tokens": 2048, **pairwise}
        write_recipe(tmp_path, "big", "dataset-big", base_model, quantize, **keys)
        path = tmp_path / "specs" / "big.yml"
        path.write_text(
            "title: Pairwise Big\ncompetition: wsdm\nclock_seconds: 600\n"
            f"packages: [{{run: big, dataset: dataset-big, placement: {placement}}}]\nwheels: pairwise-wheels\n{more}"
        )
        return path

    return make


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("gemma2_llama3", "gemma2_qlora 9.8 GiB, llama3_cls 10.5 GiB, one model at a time."),
        ("gemma2_cls_int8", "gemma2_cls_int8 13.8 GiB"),
        ("qwen2_5_14b_cls", "of 3,072 tokens: qwen2_5_14b_cls 13.4 + 11.9 GiB (split)."),
    ],
)
def test_a_kernel_states_what_it_needs(name, needs):
    docstring = generate_files(find_spec(name))["kernel.py"].split('"""')[1]
    assert needs in " ".join(docstring.split())


@pytest.mark.parametrize(("quantize", "placement", "copies"), [("nf4", "each", 1), ("int8", "split", 2)])
def test_auto_is_a_copy_on_each_gpu_where_that_fits_and_split_where_not(workplace, quantize, placement, copies):
    path = workplace(QWEN, quantize=quantize, more="tokens_per_batch: 3072\n")
    [fit] = fit_packages(path, read_spec(path))
    assert (fit.placement, len(fit.gpu_bytes)) == (placement, copies)
    assert f'placement="{placement}"' in generate_files(path)["kernel.py"]


@pytest.mark.parametrize(("quantize", "needs"), [("gptq4", "7.4"), ("gptq8", "11.3")])
def test_a_gptq_package_needs_no_wheels(quantize, needs, workplace):
    path = workplace(GEMMA, quantize=quantize, more="tokens_per_batch: 2048\n")
    path.write_text(path.read_text().replace("wheels: pairwise-wheels\n", ""))
    [fit] = fit_packages(path, read_spec(path))
    assert (fit.placement, in_gib(fit.gpu_bytes)) == ("each", needs)


@pytest.mark.parametrize(
    ("base_model", "keys", "message"),
    [
        (
            QWEN,
            {"quantize": "int8", "placement": "each", "more": "tokens_per_batch: 3072\n"},
            r"packages.0: big needs 17.0 GiB on a GPU .*, a T4 offers 14.5; what would fit: placement: split \(13.4 GiB\), or ",
        ),
        (LLAMA_70B, {"quantize": "nf4"}, "14.5; no single change makes it fit; take a smaller base model$"),
        (
            MINILM,
            {"placement": "split", "budget_tokens": 256},
            "packages.0.placement: found split, but big is an encoder, which the kernel cannot split; write each",
        ),
        (
            MINILM,
            {"budget_tokens": 1024},
            "recipes/big.yml: pairwise.budget_tokens: found 1024, but .*/all-MiniLM-L6-v2 has only 512 positions; lower",
        ),
        (
            MINILM,
            {"budget_tokens": 512, "more": "budget_tokens: 1024\n"},
            "big.yml: budget_tokens: found 1024, but .* has only 512",
        ),
        (
            GEMMA,
            {"quantize": "nf4", "more": "tokens_per_batch: 1024\n"},
            r"tokens_per_batch: found 1024, but one row of big may have 2048 tokens \(recipes/big.yml: pairwise.budget_",
        ),
    ],
)
def test_a_model_that_cannot_be_served_so_is_refused_with_what_would_help(workplace, base_model, keys, message):
    path = workplace(base_model, **keys)
    with pytest.raises(UserError, match=message):
        fit_packages(path, read_spec(path))


def test_a_model_that_kaggles_transformers_lacks_is_refused(workplace, tiny_models):
    path = workplace(str(tiny_models("olmo2")))
    with pytest.raises(UserError, match="base_model: .*: Kaggle's transformers 5.0.0 has no classifier for olmo2"):
        fit_packages(path, read_spec(path))


def test_an_encoder_is_not_offered_gptq():
    served = served_of(find_recipe("minilm_cls", "packages.0"))
    deep = replace(served, base=replace(served.base, weights=served.base.weights * 1500))
    offers = refusal("minilm_cls", deep, 8192, "auto", Path("recipes/minilm_cls.yml"))
    assert "pairwise.package.quantize: nf4" in offers and "gptq" not in offers


@pytest.mark.parametrize(
    "change, message",
    [
        (("run: big", "run: gone"), "packages.0.run: there is no recipes/gone.yml, which would say the base model"),
        (
            ("dataset-big", "dataset-beg"),
            "packages.0.dataset: found 'dataset-beg', but recipes/big.yml makes the dataset 'dataset-big'",
        ),
        (("wheels: pairwise-wheels\n", ""), "wheels: missing; big is quantised with bitsandbytes, which Kaggle's image lacks"),
        (
            ("competition: wsdm", "competition: lmsys"),
            "recipes/big.yml: pairwise.verdicts: no tie, which the competition lmsys asks for",
        ),
    ],
)
def test_a_spec_that_its_recipe_does_not_suit_is_refused(workplace, change, message):
    path = workplace(GEMMA, quantize="nf4")
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        fit_packages(path, read_spec(path))


def test_every_spec_of_the_project_fits_and_has_a_row_in_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["list"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith(" ") and line.strip()]
    assert [row[0] for row in rows[2:] if row[1] in ("wsdm", "lmsys")] == [path.stem for path in all_specs()]
    [qlora] = [row for row in rows if row[:2] == ["gemma2_qlora", "wsdm"]]
    assert " ".join(qlora) == "gemma2_qlora wsdm gemma2_qlora gemma-2-9b-it nf4 9.8 4.75 h / 12 h not built"
    assert "0.5 × llama3_cls         Meta-Llama-3-8B-Instruct" in done.output

    (tmp_path / "outputs/kernels/demo").mkdir(parents=True)
    [demo] = [line.split() for line in CliRunner().invoke(main, ["list"]).output.splitlines() if line.startswith(" demo")]
    assert demo[-1] == "stale"


def test_a_spec_with_a_mistake_does_not_hide_the_others_of_the_list(workplace, capsys):
    with pytest.raises(UserError, match="packages.0: big needs"):
        print_specs([workplace(LLAMA_70B, quantize="nf4"), *all_specs()[:1]])
    output = capsys.readouterr().out
    assert "see below" in output and "demo" in output
