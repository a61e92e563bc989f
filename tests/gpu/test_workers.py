"""The kernel's workers on a GPU: two processes on it, two batches at once on streams of their own, and out of memory."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
import torch

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime.main import run_kernel
from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.pipeline import Stages
from kaggle_kernels.runtime.models.scoring import make_requests, verdict_logits
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scheduling.worker import Assignment
from tests import tiny
from tests.kaggle_kernels.packages import make_package, settings_for
from tests.kaggle_kernels.runtime.workers import start_in_thread

GPU = "cuda:0"
ROWS = 200
TOLERANCE = 0.01  # between float16 and float32, as in test_packages.py
SPARE_BYTES = 64 * 2**20  # more than a batch of a few rows needs, less than one of thousands


@pytest.fixture(scope="module")
def package_folder(tiny_models, tmp_path_factory):
    """A two-verdict package."""
    return make_package(tmp_path_factory.mktemp("packages") / "two", tiny_models("gemma2"))


@pytest.fixture
def package(package_folder):
    """The package, read as a kernel does."""
    return read_package(package_folder)


def score_with_kernel(folder, package_folder, devices, monkeypatch) -> pl.DataFrame:
    """Run a whole kernel below `folder`; what its scores.parquet holds of the test rows."""
    spec = Spec(title="Title", competition="wsdm", packages=[{"run": "two", "dataset": "tiny-two"}], clock_seconds=600)
    settings = settings_of("test", spec, [settings_for("two", "tiny-two")])
    competition = folder / "input" / settings.competition
    competition.mkdir(parents=True)
    (folder / "working").mkdir()
    shutil.copytree(package_folder, folder / "input" / "tiny-two")
    tiny.pairs(ROWS, seed=6).drop("winner").write_parquet(competition / "test.parquet")

    monkeypatch.setenv("KAGGLE_ROOT", str(folder))
    run_kernel(settings, devices)
    return pl.read_parquet(folder / "working" / "scores.parquet").sort("id")


def test_two_workers_on_one_gpu_score_what_a_cpu_scores(package_folder, tmp_path, monkeypatch, measure):
    on_gpu = score_with_kernel(tmp_path / "gpu", package_folder, [GPU, GPU], monkeypatch)
    on_cpu = score_with_kernel(tmp_path / "cpu", package_folder, ["cpu"], monkeypatch)
    assert on_gpu["id"].to_list() == on_cpu["id"].to_list()
    largest_difference = (on_gpu["p_model_a"] - on_cpu["p_model_a"]).abs().max()
    measure("largest difference, two workers on one GPU", round(largest_difference, 5))
    assert len(on_gpu) == ROWS
    assert largest_difference < TOLERANCE


def encode_rows(package) -> list:
    """Encode generated rows in both orders, as a worker gets them."""
    pairs = [package.model_input.pair_from_row(row) for row in tiny.pairs(ROWS, seed=9).to_dicts()]
    return make_requests(package.model_input, package.tokenizer, package.contract, pairs, ("as_given", "swapped"))


def test_two_batches_on_streams_of_their_own_score_what_each_scores_alone(package, gpu_memory):
    model = load_model(package.folder, package.contract, GPU)
    sequences = [request.sequences[0] for request in encode_rows(package)]
    batches = [sequences[first : first + 8] for first in range(0, len(sequences), 8)]

    @torch.inference_mode()
    def compute_alone(batch):
        return verdict_logits(model, package.contract, batch, GPU)

    expected = [compute_alone(batch) for batch in batches]
    stages = Stages(model, ["model.layers.1"], [GPU, GPU])

    @torch.inference_mode()
    def compute_in_stages(batch):
        return verdict_logits(model, package.contract, batch, GPU, stages.forward_pass)

    with ThreadPoolExecutor(2) as pool:
        computed = list(pool.map(compute_in_stages, batches))
    torch.testing.assert_close(torch.cat(computed), torch.cat(expected), atol=0.01, rtol=0)


def test_a_worker_survives_a_batch_that_its_gpu_cannot_hold(package, gpu_memory):
    requests = encode_rows(package)
    process, connection = start_in_thread(Assignment(str(package.folder), (GPU,), 0, 1))
    assert connection.recv()[0] == "loaded"

    all_bytes = gpu_memory.get_device_properties(0).total_memory
    gpu_memory.empty_cache()
    gpu_memory.set_per_process_memory_fraction((gpu_memory.memory_reserved(0) + SPARE_BYTES) / all_bytes)
    try:
        connection.send((1, requests * 20))
        assert connection.recv() == ("out of memory", 1)
        connection.send((2, requests[:8]))
        assert connection.recv()[:2] == ("scored", 2)
    finally:
        gpu_memory.set_per_process_memory_fraction(1.0)
        connection.close()
        process.thread.join(60)
