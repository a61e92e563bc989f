"""Two batches in a split model: one in each stage, never two in one, and the same answers."""

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from kaggle_kernels.runtime.models.pipeline import Stages, stage_starts


class Part(torch.nn.Module):
    """A layer that tells when a batch is in it."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, batch):
        self.note(batch)
        return batch


class Model(torch.nn.Module):
    def __init__(self, note_first, note_second):
        super().__init__()
        self.first, self.second = Part(note_first), Part(note_second)

    def forward(self, batch):
        return self.second(self.first(batch))


def run(stages, model, batches):
    def one(batch):
        with stages.forward_pass():
            model(batch)

    threads = [threading.Thread(target=one, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
        if thread is threads[0]:
            model.entered.wait(10)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_there_is_never_more_than_one_batch_in_a_stage():
    inside, most, lock = {"first": 0, "second": 0}, [], threading.Lock()

    def note(name):
        def count(batch):
            with lock:
                inside[name] += 1
                most.append(inside[name])
            time.sleep(0.002)  # long enough for another batch to come in, were it let in
            with lock:
                inside[name] -= 1

        return count

    model = Model(note("first"), note("second"))
    model.entered = threading.Event()
    model.entered.set()
    run(Stages(model, ["second"]), model, range(20))
    assert len(most) == 40 and max(most) == 1


@pytest.fixture
def fake_streams(monkeypatch):
    """torch's streams without a GPU: each knows its device, and what became of it is noted with the thread's batch."""
    noted, current = [], threading.local()

    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            noted.append(("done", self.device, current.streams[self.device]))

    @contextlib.contextmanager
    def stream(entered):
        before = getattr(current, "streams", {})
        current.streams = {**before, entered.device: entered}
        yield
        current.streams = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return noted, current


def test_the_first_stage_takes_the_next_batch_while_the_second_has_one_each_on_streams_of_its_own(fake_streams):
    _, current = fake_streams
    begun, streams, overlapped = {batch: threading.Event() for batch in (1, 2, 3)}, {}, []

    def first(batch):
        streams[batch] = current.streams
        begun[batch].set()

    def second(batch):
        if batch == 1:
            overlapped.append(begun[2].wait(10))

    model = Model(first, second)
    model.entered = begun[1]
    stages = Stages(model, ["second"], ["cuda:0", "cuda:1"])
    run(stages, model, [1, 2])
    assert overlapped == [True]
    for device in ("cuda:0", "cuda:1"):
        assert streams[1][device] is not streams[2][device]
        assert streams[1][device].device == device
    assert not getattr(current, "streams", {})
    run(stages, model, [3])
    assert streams[3] in (streams[1], streams[2]), "a third batch takes a stream that is free again, and the memory that it has"


def test_a_stage_is_given_back_once_its_device_has_done_its_work(fake_streams):
    noted, current = fake_streams
    model = Model(lambda _: None, lambda _: noted.append(("second", stages.locks[0].locked())))
    stages = Stages(model, ["second"], ["cuda:0", "cuda:1"])
    with stages.forward_pass():
        used = current.streams["cuda:0"]
        release = stages.locks[0].release
        stages.locks[0] = SimpleNamespace(release=lambda: (noted.append(("released",)), release()), locked=lambda: False)
        model(1)
    assert noted == [("done", "cuda:0", used), ("released",), ("second", False)]


def test_a_batch_that_fails_gives_its_stage_back():
    def fail(batch):
        raise RuntimeError("CUDA error")

    model = Model(lambda _: None, fail)
    stages = Stages(model, ["second"])
    for _ in range(2):
        with pytest.raises(RuntimeError), stages.forward_pass():
            model(1)
    assert not any(lock.locked() for lock in stages.locks)
    assert stages.free_streams.qsize() == 2


def test_a_part_is_found_below_the_prefix_that_an_adapter_adds():
    seen = []
    model = Model(lambda _: None, lambda _: seen.append([lock.locked() for lock in stages.locks]))
    stages = Stages(torch.nn.ModuleDict({"base_model": torch.nn.ModuleDict({"model": model})}), ["model.second"])
    with stages.forward_pass():
        model(1)
    assert seen == [[False, True]]


def test_stages_begin_where_the_device_changes():
    placed = {
        "model.embed_tokens": "cuda:0",
        "model.layers.0": "cuda:0",
        "model.layers.1": "cuda:1",
        "model.layers.2": "cuda:1",
    }
    assert stage_starts({**placed, "score": "cuda:1", "model.rotary_emb": "cuda:0"}) == ["model.layers.1"]
    assert stage_starts(dict.fromkeys(placed, "cpu")) == []
