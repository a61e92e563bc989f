"""A two-model ensemble on thirty rows: settings, packages, and jobs of which nothing is scored yet."""

from dataclasses import replace

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime.scheduling import worker_handle
from kaggle_kernels.runtime.scheduling.schedule import ScoringJob, make_job
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny
from tests.kaggle_kernels.packages import settings_for
from tests.kaggle_kernels.runtime.workers import start_in_thread

SPEC = Spec(
    title="Title",
    competition="wsdm",
    packages=[{"run": "two", "dataset": "tiny-two", "weight": 0.5}, {"run": "other", "dataset": "tiny-other", "weight": 0.5}],
    clock_seconds=600,
    tokens_per_batch=1000,
)
BOTH = settings_of("test", SPEC, [settings_for("two", "tiny-two", 0.5), settings_for("other", "tiny-other", 0.5)])
ONE = replace(BOTH, packages=(settings_for("two", "tiny-two"),))
ROWS = tiny.pairs(30, seed=9).drop("winner").with_columns(counts=True).to_dicts()


def job_of(packages, devices=("cpu", "cpu"), settings=None, rows=ROWS) -> ScoringJob:
    """A job for one package or for both."""
    settings = settings or (ONE if len(packages) == 1 else BOTH)
    return make_job(settings, packages, rows, devices, start_clock(600))


def replace_workers(monkeypatch, folder, target, positions=(0, 1)) -> None:
    """Have the workers with the package in `folder` at these positions do `target`."""
    start_usual = worker_handle.start_process

    def start(task):
        if task.folder == str(folder) and task.position in positions:
            return start_in_thread(task, target)
        return start_usual(task)

    monkeypatch.setattr(worker_handle, "start_process", start)


def refuse(connection, task) -> None:
    """What a worker says whose golden rows score otherwise."""
    connection.send(("refused", "golden row 7"))
