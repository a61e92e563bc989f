"""Files on their way to Kaggle: each byte sent once, whatever breaks off."""

import hashlib
import os
import signal
import stat
import subprocess
import sys

import pytest

from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.uploads import find_dataset_folder, notes_path, read_notes, send_files
from preprocess.core.files import sha256
from tests.conftest import ROOT
from tests.fakes.kaggle.server import Fault
from tests.kaggle_kernels.publish.pushes import make_folder

FAST = Pace(poll_seconds=0.01, patience_seconds=20)
SIZE, LARGE = 2_000_000, 300_000_000
SEND = """
from pathlib import Path
from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.uploads import find_dataset_folder, send_files
send_files(connect(Pace(0.01, 20)), find_dataset_folder(Path("two"), "tester"))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, kaggle):
    """A folder with weights of 2 MB."""
    monkeypatch.chdir(tmp_path)
    return find_dataset_folder(make_folder(tmp_path / "two", model__safetensors=os.urandom(SIZE), empty__txt=b""), "tester")


@pytest.mark.slow
def test_an_upload_of_300_mb_that_was_killed_goes_on_at_the_byte_where_the_server_stands(folder, kaggle):
    model = folder.path / "model.safetensors"
    with model.open("ab") as file:
        file.truncate(LARGE - SIZE)
        file.seek(LARGE - SIZE)
        file.write(os.urandom(SIZE))
    kaggle.faults.append(Fault("PUT", where="model.safetensors", breaks_after_bytes=LARGE * 4 // 5, stalls=True))
    killed = subprocess.Popen([sys.executable, "-c", SEND], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert kaggle.stalled.wait(60)
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert kaggle.hung_up.wait(10)

    tokens = send_files(connect(FAST), folder)
    assert kaggle.uploaded_bytes("model.safetensors") == LARGE
    assert [put.bytes for put in kaggle.calls("PUT") if put.fields["range"].startswith("bytes 240000000-")] == [LARGE // 5]
    sent = [hashlib.sha256(kaggle.site.blobs[token].content).hexdigest() for token in tokens]
    assert sent == [sha256(folder.path / name) for name in folder.sizes()]


@pytest.mark.parametrize("fault", [{"status": 503}, {}], ids=["a gateway's error", "a lost connection"])
def test_an_upload_that_breaks_off_goes_on_in_the_same_call(folder, kaggle, fault):
    kaggle.faults.append(Fault("PUT", where="model.safetensors", breaks_after_bytes=500_000, **fault))
    send_files(connect(FAST), folder)
    assert len(kaggle.calls("StartBlobUpload")) == 3
    ranges = [put.fields["range"] for put in kaggle.calls("PUT") if put.fields["name"] == "model.safetensors"]
    question = f"bytes */{SIZE}"
    assert ranges == [question, f"bytes 0-{SIZE - 1}/{SIZE}", question, f"bytes 500000-{SIZE - 1}/{SIZE}"]


def test_what_has_arrived_is_not_sent_again_and_only_the_user_can_read_where(folder, kaggle):
    tokens = send_files(connect(FAST), folder)
    assert stat.S_IMODE(notes_path(folder).stat().st_mode) == 0o600
    requests = len(kaggle.requests)
    assert send_files(connect(FAST), folder) == tokens
    assert [request.call for request in kaggle.requests[requests:]] == ["IntrospectToken"]
    make_folder(folder.path, empty__txt=b"no more")
    assert read_notes(folder) == {}, "notes of another content"
