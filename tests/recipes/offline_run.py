"""What wandb wrote in offline mode, read back: LevelDB's log format (7 bytes before it), one protobuf message a record."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, RECORD = 7, 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """A run as `wandb sync` would upload it. Keys of history and summary are joined by dots."""

    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    config: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    has_ended: bool = False


def records(file: Path):
    """The records of a .wandb file."""
    data, at, parts = file.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + RECORD.size <= len(data):
        left = BLOCK - at % BLOCK
        _, length, kind = RECORD.unpack_from(data, at)
        if left < RECORD.size or not kind:
            at += left
            continue
        parts += data[at + RECORD.size : at + RECORD.size + length]
        at += RECORD.size + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read(folder: Path) -> OfflineRun:
    """The one offline run below `folder`, which is wandb's own."""
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    run = OfflineRun()
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.project, run.name = record.run.project, record.run.display_name
            run.group, run.job_type = record.run.run_group, record.run.job_type
            run.config |= values(record.run.config.update)
        elif kind == "config":
            run.config |= values(record.config.update)
        elif kind == "history":
            run.history.append(values(record.history.item))
        elif kind == "summary":
            run.summary |= values(record.summary.update)
        run.has_ended |= kind == "exit"
    return run


def values(items) -> dict:
    """Key → value of a record's items."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
