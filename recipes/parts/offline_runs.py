"""Read back what an offline run of W&B has kept: the records of its `.wandb` file, which no client reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.errors import InputError

MAGIC, BLOCK, HEADER = b":W&B", 1 << 15, 7  # a log file of LevelDB: pieces of records in blocks of 32 KiB


def records(path: Path) -> Iterator[Any]:
    """Give the records, which are protocol buffers of W&B, in the order in which they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise InputError(f"{path} is no run of W&B.")
    held, place = b"", HEADER
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block that takes no further header is padding
            place += BLOCK - place % BLOCK
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        held += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(held)
            held = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Return what was logged, call by call."""
    kept = (record.history.item for record in records(path) if record.HasField("history"))
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items} for items in kept]


def summary(path: Path) -> dict[str, Any]:
    """Return the last value of everything that was logged."""
    last: dict[str, Any] = {}
    for values in history(path):
        last |= values
    return last
