"""GPTQ from a run to a package, and from a package to probabilities."""

import json
import math
import sys
from hashlib import sha256
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from kaggle_kernels.publish.package_files import check_package
from kaggle_kernels.runtime.models.gptq import GptqLinear, unpack
from kaggle_kernels.runtime.models.placement import weight_sizes
from kaggle_kernels.runtime.package import read_package
from postprocess.gptq import environment, quantize
from postprocess.gptq.environment import ENVIRONMENT
from postprocess.memory.model_size import Served, bytes_by_class
from postprocess.run_folder import checked_tokenizer
from postprocess.weights.calibration import choose_calibration_rows, encode_calibration_rows
from postprocess.weights.merge import merge
from preprocess.core.errors import UserError
from recipes.pairwise.memory.measure import measure_folder
from tests.postprocess import runs
from tests.postprocess.test_kaggle_versions import in_kaggles_versions

ROOT = Path(__file__).parents[3]
RUN = {"width": 128, "training_rows": 30}
VARIANTS = {
    "gptq8": ("gemma2", {"quantize": "gptq8", **RUN}),
    "gptq4": ("phi3", {"quantize": "gptq4", "head": "label_tokens", "tolerance": 0.1, **RUN}),
}

needs_gptq = pytest.mark.skipif(
    not (ENVIRONMENT / "installed").exists(),
    reason="no .venv-gptq; `make setup` makes it from postprocess/gptq/requirements.txt",
)


@pytest.fixture
def package_of(packaged):
    """package_of("gptq8") is a run after `python -m postprocess`, its package's folder, and what was printed."""

    def build(quantize: str):
        kind, options = VARIANTS[quantize]
        run, printed = packaged(kind, **options)
        return run, run.folder / "package", printed

    return build


@needs_gptq
@pytest.mark.parametrize(("quantize", "head"), [("gptq8", "score.weight"), ("gptq4", "lm_head.weight")])
def test_layers_are_in_the_standard_format_and_the_head_is_as_it_was(quantize, head, package_of, opened, tmp_path):
    run, folder, _ = package_of(quantize)
    bits = int(quantize[-1])
    tensors = load_file(folder / "model.safetensors")
    merge(opened(run), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")

    layer = "model.layers.1.mlp.down_proj"
    parts = {name: tensors[f"{layer}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "qweight": (torch.int32, (256 * bits // 32, 128)),
        "qzeros": (torch.int32, (2, 128 * bits // 32)),
        "scales": (torch.float16, (2, 128)),
        "g_idx": (torch.int32, (256,)),
    }
    assert parts["g_idx"].tolist() == [0] * 128 + [1] * 128
    zero = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]  # 8 and 128, each less one
    assert set(parts["qzeros"].flatten().tolist()) == {zero}

    others = {name for name in tensors if name.rpartition(".")[2] not in parts}
    assert others == {name for name in merged if ".layers." not in name or "norm" in name}
    assert all(torch.equal(tensors[name], merged[name]) for name in others)
    assert head in others and tensors[head].dtype == torch.float16
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "meta": {"quantizer": ["optimum:2.3.0", "gptqmodel:7.6.0"]},
    }


@needs_gptq
@pytest.mark.parametrize("quantize", VARIANTS)
def test_no_text_of_a_pair_is_in_any_file_of_the_package(quantize, package_of):
    run, folder, _ = package_of(quantize)
    rows = pl.read_parquet(run.recipe.parent / "pairs.parquet")
    texts = [text for name in ("prompt", "response_a", "response_b") for turns in rows[name] for text in turns]
    assert len(texts) == 54 * 3 and min(map(len, texts)) > 10
    everything = b"\n".join(path.read_bytes() for path in sorted(folder.iterdir()))
    for text in texts:
        written = (text.encode(), json.dumps(text)[1:-1].encode(), text.encode("utf-16-le"))
        assert not any(form in everything for form in written), text


@needs_gptq
@pytest.mark.parametrize(("quantize", "mean", "largest"), [("gptq8", 0.004, 0.02), ("gptq4", 0.04, 0.2)])
def test_probabilities_are_near_those_of_the_model_as_trained(quantize, mean, largest, package_of):
    _, folder, printed = package_of(quantize)
    report = json.loads((folder / "manifest.json").read_text())["validation"]
    line = {line["model"]: line["against_trained"] for line in report["models"]}["quantised"]
    assert 0 < line["mean"] < mean and line["largest"] < largest
    assert runs.made_stages(printed) == ["merge", "quantise", "scores", "agreement", "package"]


@needs_gptq
@pytest.mark.parametrize("quantize", VARIANTS)
def test_a_package_has_the_bytes_that_were_computed(quantize, package_of):
    run, folder, _ = package_of(quantize)
    assert check_package(folder) == [], "push would refuse the package"
    sizes = weight_sizes(folder)
    served = Served(measure_folder(run.base), run.contract().head, quantize, False, 128)
    assert sum(bytes_by_class(served).values()) == sum(size for size, _ in sizes.values())
    assert sum(elements for name, (_, elements) in sizes.items() if name.endswith(".qweight")) == sum(
        weight.elements for weight in served.weights if weight.kind == "linear"
    )


@needs_gptq
def test_the_same_rows_give_the_same_bytes_and_other_rows_others(package_of, opened, tmp_path):
    run, folder, _ = package_of("gptq4")
    merge(opened(run), tmp_path / "merged")
    quantize.quantize(opened(run), tmp_path / "merged", 4, tmp_path / "again")
    first, again = (sha256((path / "model.safetensors").read_bytes()).digest() for path in (folder, tmp_path / "again"))
    assert first == again
    quantize.quantize(opened(run), tmp_path / "merged", 4, tmp_path / "other", seed=1)
    assert sha256((tmp_path / "other/model.safetensors").read_bytes()).digest() != first
    assert not list(tmp_path.glob(".*"))


@needs_gptq
def test_packages_give_the_same_probabilities_in_kaggles_versions(package_of):
    folders = [package_of(quantize)[1] for quantize in VARIANTS]
    found = in_kaggles_versions(folders)
    assert found["versions"]["transformers"] == "5.0.0"
    for folder, package in zip(folders, found["packages"], strict=True):
        assert package["quantised"] == "gptq"
        golden = read_package(folder).manifest["golden"]
        assert len(golden) == 20
        for row, probabilities in zip(golden, package["probabilities"], strict=True):
            assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(row["probabilities"], probabilities, strict=True)), row


# A worker that rounds nothing: the calibration rows decide how far it moves the head.
WORKER = """
import hashlib, json, shutil, sys
from safetensors.numpy import load_file, save_file
job = json.load(open(sys.argv[1]))
shutil.copyfile(f"{job['model']}/config.json", f"{sys.argv[2]}/config.json")
tensors = load_file(f"{job['model']}/model.safetensors")
tensors["score.weight"] *= 1 + hashlib.sha256(str(job["sequences"]).encode()).digest()[0] / 1000
save_file(tensors, f"{sys.argv[2]}/model.safetensors", {"format": "pt"})
"""


def test_of_repeated_models_the_best_is_packaged_and_none_is_made_again_until_the_model_changes(copied, tmp_path, monkeypatch):
    run = copied("gemma2", quantize="gptq4", tolerance=0.2, **RUN)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(environment, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(environment, "python_with_gptq", lambda: Path(sys.executable))

    def made_stages(*options):
        return runs.made_stages(runs.succeed(run.recipe, *options))

    def head_of(name):
        return load_file(run.folder / name / "model.safetensors")["score.weight"]

    def snapshot():
        return {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}

    assert made_stages() == ["merge", "quantise", "scores", "agreement", "package"]
    assert made_stages("--repeat", "3")[:3] == ["merge", "quantise-2", "quantise-3"]
    report = json.loads((run.folder / "agreement.json").read_text())
    names = ["quantised", "quantised-2", "quantised-3"]
    assert report["repeats"]["models"] == names
    assert report["packaged"] == min(report["candidates"], key=report["candidates"].get) != "quantised"
    assert len({head_of(name)[0, 0].item() for name in names}) == 3
    assert torch.equal(head_of("package"), head_of(report["packaged"]))
    assert not (run.folder / "merged").exists()

    before = snapshot()
    assert made_stages() == []
    assert snapshot() == before
    runs.set_json(run.folder / "adapter_config.json", lora_alpha=17)
    assert made_stages()[:2] == ["merge", "quantise"]
    assert not (run.folder / "quantised-2").exists()


def test_repeating_what_chance_is_not_in_is_one_line(made):
    error = runs.refuse(made("gemma2", quantize="nf4").recipe, "--repeat", "2")
    assert "--repeat: the recipe says quantize: nf4, which gives the same bytes each time; leave --repeat out" in error


def ids_of(run, seed=0):
    return choose_calibration_rows(run, seed)["id"].to_list()


def test_no_row_that_the_package_is_checked_on_is_calibrated_on(made, opened):
    run = opened(made("gemma2", training_rows=300))
    checked = set(pl.read_parquet(run.folder / "predictions.parquet")["id"])
    folds = dict(pl.read_parquet(run.recipe.pairwise.pairs, columns=["id", "fold"]).iter_rows())
    for seed in (0, 1):
        ids = ids_of(run, seed)
        assert len(ids) == len(set(ids)) == 256
        assert not checked & set(ids)
        assert {folds[row_id] for row_id in ids} == {1}
        assert ids == ids_of(run, seed)
    assert 200 < len(set(ids_of(run)) & set(ids_of(run, 1))) < 256


def test_a_run_on_all_rows_is_calibrated_outside_the_fixed_sample_where_there_is_more(copied, opened, monkeypatch):
    run = copied("gemma2", training_rows=30)
    monkeypatch.setenv("PAIRWISE_FOLD", "all")
    file = run.folder / "predictions.parquet"
    predictions = pl.read_parquet(file)
    ids = ids_of(opened(run))
    assert len(ids) == 30 and not set(predictions["id"]) & set(ids)

    every_id = pl.read_parquet(opened(run).recipe.pairwise.pairs)["id"]
    pl.concat([predictions] * 3)[:54].with_columns(id=every_id).write_parquet(file)
    assert len(ids_of(opened(run))) == 54


def test_pairs_are_seen_in_both_orders_through_the_runs_own_code(made, opened):
    run = opened(made("gemma2", training_rows=30))
    rows = choose_calibration_rows(run)
    found = encode_calibration_rows(run, rows)
    tokenizer = checked_tokenizer(run)
    pairs = [run.model_input.pair_from_row(row) for row in rows.iter_rows(named=True)]
    assert len(found) == 30
    assert found[0] == run.model_input.encode(pairs[0], tokenizer, run.contract)[0]
    assert found[1] == run.model_input.encode(run.model_input.swap(pairs[1]), tokenizer, run.contract)[0]
    assert max(map(len, found)) <= 128


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("bert", {}, "gptq8 is for decoders, but the template bert is for encoders; set int8 or none"),
        ("gemma2", {"training_rows": 30}, "GPTQ needs a multiple of 128 inputs and of 32 outputs, but model.layers.0."),
    ],
)
def test_a_model_that_gptq_cannot_take_is_one_line_before_any_work(kind, options, line, made, tmp_path):
    run = made(kind, **options)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(run.recipe.read_text().replace("slug: tiny-package", "slug: tiny-package\n    quantize: gptq8"))
    assert line in runs.refuse(recipe)
    assert not (run.folder / "merged").exists()


def test_an_encoder_under_a_template_of_its_own_is_refused_by_its_kind(made, opened):
    for kind in ("bert", "modernbert"):
        with pytest.raises(UserError, match=f"decoders whose layers are named as Llama's .* is a {kind}; write int8"):
            quantize.check_model(opened(made(kind)))


def test_codes_stand_lowest_bits_first():
    words = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    assert unpack(words, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, *[15] * 8]]
    assert unpack(words, 8).tolist() == [[0x10, 0x32, 0x54, 0x76, *[255] * 4]]


def test_a_weight_is_code_less_zero_times_scale():
    layer = GptqLinear(torch.nn.Linear(8, 8, bias=False), bits=4, group_size=4)
    layer.qweight = torch.full((1, 8), 0x76543210, dtype=torch.int32)  # along the inputs: 0 to 7, for each output
    layer.qzeros = torch.full((2, 1), 0x33333333, dtype=torch.int32)  # 4, less one
    layer.scales = torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16)
    layer.prepare()
    assert layer.words_ui.is_contiguous(), "bytes are transposed in every pass"
    assert layer.weight_ui(torch.float32).tolist() == [[-2.0, -1.5, -1.0, -0.5, 0.0, 2.0, 4.0, 6.0]] * 8
    assert layer(torch.ones(1, 8)).tolist() == [[7.0] * 8]
