"""How the processes of a run end."""

import os
import subprocess
import sys
import time

import pytest

from preprocess.core.errors import UserError
from recipes.pairwise.processes import check_compiler_locks
from tests.conftest import ROOT

LEAVES_AN_EVENT = """
import posthog
from axolotl.telemetry.manager import TelemetryManager
from recipes.pairwise.processes import end_without_telemetry

telemetry = TelemetryManager.get_instance()
posthog.host = "http://127.0.0.1:9"
telemetry.send_event("first")
posthog.default_client.join()  # as at exit: the sender is stopped before the queue is waited for
telemetry.send_event("second")
end_without_telemetry()
"""


def test_a_process_ends_though_telemetry_could_not_be_sent():
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "0", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES_AN_EVENT], env=environment, capture_output=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_lock_that_a_killed_compilation_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py312_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    check_compiler_locks()  # another process may be compiling now

    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    with pytest.raises(UserError, match="lock: left 60 minutes ago .* DeepSpeed's cpu_adam; .* delete the file$"):
        check_compiler_locks()
