"""Runs that several tests look at, made once; a test that changes one takes a copy."""

import shutil

import pytest

from postprocess.run_folder import read_run
from recipes.pairwise.config.schema import read_recipe
from tests.postprocess import runs

# What the command makes of a run; the run of a session may have been packaged by another test.
MADE_OF_A_RUN = ("merged", "quantised*", "unmerged", "package", "agreement.*", "scores*.json", "postprocess.json")


@pytest.fixture(scope="session")
def made(tiny_models, tmp_path_factory):
    """made("gemma2", quantize="nf4") is a run as training leaves it, made once."""
    known = {}

    def make(kind: str, width: int = 64, **options) -> runs.Made:
        key = (kind, width, repr(sorted(options.items())))
        if key not in known:
            known[key] = runs.make(tmp_path_factory.mktemp(kind), tiny_models(kind, width), kind, **options)
        return known[key]

    return make


@pytest.fixture(scope="session")
def packaged(made):
    """packaged("gemma2", quantize="nf4") is the same run after `python -m postprocess`, with what the command printed."""
    printed = {}

    def build(kind: str, **options) -> tuple[runs.Made, str]:
        run = made(kind, **options)
        if run.folder not in printed:
            printed[run.folder] = runs.succeed(run.recipe)
        return run, printed[run.folder]

    return build


@pytest.fixture
def copied(made, tmp_path):
    """A private copy of a run whose files a test may damage; its recipe writes to the copy."""

    def copy(kind: str = "gemma2", **options) -> runs.Made:
        run = made(kind, **options)
        shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns(*MADE_OF_A_RUN))
        recipe = tmp_path / "recipe.yml"
        recipe.write_text(run.recipe.read_text().replace(str(run.folder), str(tmp_path / "run")))
        return runs.Made(recipe, tmp_path / "run", run.base, run.model)

    return copy


@pytest.fixture
def opened():
    """opened(made_run) is the run as postprocess reads it."""
    return lambda made_run: read_run(read_recipe(made_run.recipe))
