"""How the processes of a run end."""

import os
import subprocess
import sys

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
