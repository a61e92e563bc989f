"""Score chunks with Ray Data, on one machine or on several that see the project's folder under the same path.

Each worker loads the run's model once, and writes the files of its chunks itself. score_rows.py calls this.
"""

import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from postprocess.labels.score_rows import Chunk, ChunkScorer
from postprocess.run_folder import Run, read_run
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import Recipe

# Ray reads these when it is imported: nothing is reported to its makers, and it logs only what ends it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
import ray


class RayScorer:
    """What a Ray worker holds: a run with its model. Ray Data calls it with one chunk after the other."""

    def __init__(self, project: str, recipe: Recipe):
        """Load the run of a recipe, whose paths are relative to the project's folder."""
        # A worker starts in a folder of Ray's.
        os.chdir(project)
        self.scorer = ChunkScorer(read_run(recipe))

    def __call__(self, item: dict) -> dict:
        """Score a chunk that `make_item` has packed.

        Returns:
            rows_scored, and as `error` the message of a UserError or "": Ray would bury the exception itself.
        """
        rows = pl.read_ipc(io.BytesIO(item["rows"]))
        try:
            self.scorer.write_scores(Chunk(Path(item["file"]), rows))
        except UserError as error:
            return {"rows_scored": 0, "error": str(error)}
        return {"rows_scored": len(rows), "error": ""}


def score_with_ray(run: Run, chunks: Sequence[Chunk], workers: int) -> Iterator[int]:
    """Score chunks with workers of a Ray cluster: the one that RAY_ADDRESS names, else one on this machine.

    Each worker is a process; where the cluster has GPUs, each holds one.

    Yields:
        The number of rows of each chunk that is done.

    Raises:
        UserError: The cluster cannot run as many workers, or one of them met bad input.
    """
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    # The caller shows progress in pairs.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    # A worker takes a whole GPU, or a core where the cluster has no GPUs.
    device = "GPU" if "GPU" in ray.cluster_resources() else "CPU"
    devices = int(ray.cluster_resources().get(device, 0))
    if workers > devices:
        raise UserError(
            f"--ray {workers}: the Ray cluster has only {devices} {device}(s), and a worker needs one; "
            f"name at most {devices}"
        )

    items = [make_item(chunk) for chunk in chunks]
    scored_chunks = ray.data.from_items(items, override_num_blocks=len(items)).map(
        RayScorer,
        fn_constructor_args=(os.getcwd(), run.recipe),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks))),
        num_gpus=1 if device == "GPU" else 0,
    )
    for scored in scored_chunks.iter_rows():
        if scored["error"]:
            raise UserError(scored["error"])
        yield scored["rows_scored"]


def make_item(chunk: Chunk) -> dict:
    """Pack a chunk for Ray Data, whose rows hold plain values."""
    # Lists of turns survive as Arrow's own format.
    buffer = io.BytesIO()
    chunk.rows.write_ipc(buffer)
    return {"file": str(chunk.file), "rows": buffer.getvalue()}
