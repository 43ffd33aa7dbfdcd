"""Write a merged model as one safetensors file, piece by piece: memory never holds more than one tensor's change."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dtrain.artifact import Content, Record, Role
from dtrain.artifact.atomic import write_atomic
from dtrain.errors import InputError
from dtrain.progress import progress
from dtrain.runtime import check_base, find_tensors, patch
from dtrain.stages.bits import as_buffer
from dtrain.weights import Weights, tensor_bytes

#: The names of dtypes in a safetensors header.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip

_PIECE = 1 << 20  # bytes: small enough to be reused by the allocator and to stay in the cache


def write_merged(path: Path, content: Content, base: Weights, origin: object) -> tuple[int, int]:
    """Write the fine-tuned model that a delta and its base make.

    Tied tensors are written once, under the name the delta has for them: safetensors knows no shared memory, and every
    loader that ties them needs one name only.

    Args:
        path: Where the checkpoint goes. It may be the file `base` was read from: that one is replaced only when the new
            one is complete, and the old one stays readable for as long as it is mapped.
        content: The delta.
        base: The base's weights, checked here before anything is written.
        origin: The delta's file, for messages.

    Returns:
        (tensors, bytes) written.

    Raises:
        BaseMismatchError: If `base` is not the base.
        InputError: If the file cannot be written, or not as safetensors.
    """
    check_base(content, base, origin)
    tensors = find_tensors(content, base)
    # By falling width, as safetensors itself sorts: then every tensor starts at a multiple of its own width.
    records = sorted(
        (record for record in content.records if record.role is not Role.BASE_ONLY),
        key=lambda record: (-record.dtype.itemsize, record.name.encode()),
    )
    header = _header(records)
    with progress("writing", len(records)) as advance:

        def chunks() -> Iterator[bytes | memoryview]:
            yield header
            for record in records:
                yield from _pieces(record, tensors.get(record.name), origin)
                advance(record.name)

        return len(records), write_atomic(path, chunks())


def _pieces(record: Record, base: Tensor | None, origin: object) -> Iterator[memoryview]:
    """Yield the bytes of one fine-tuned tensor."""
    change = patch(record, base, origin)
    if base is not None and change is None:
        # Straight from the mapped file where the dtype is the same.
        yield as_buffer(tensor_bytes(base.to(record.dtype)))
    elif base is not None and change is not None and change.positions is not None:
        yield from _patched(base.to(record.dtype), change.positions, change.values)
    elif change is not None:
        yield as_buffer(tensor_bytes(change.values))


def _patched(base: Tensor, positions: Tensor, values: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of `base` with `values` at `positions`, without a copy of the whole."""
    raw, width, step = as_buffer(tensor_bytes(base)), base.dtype.itemsize, _PIECE // base.dtype.itemsize
    starts = range(0, base.numel(), step)
    edges = cast("list[int]", torch.searchsorted(positions, torch.tensor([*starts, base.numel()])).tolist())
    for start, (first, last) in zip(starts, pairwise(edges), strict=True):
        piece = bytearray(raw[start * width : (start + step) * width])
        torch.frombuffer(piece, dtype=base.dtype)[positions[first:last] - start] = values[first:last]
        yield memoryview(piece)


def _header(records: Sequence[Record]) -> bytes:
    """Return the length and the JSON header, padded so that the data starts at a multiple of 8."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    for record, start, stop in _places(records):
        table[record.name] = {
            "dtype": _dtype_name(record),
            "shape": list(record.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _places(records: Iterable[Record]) -> Iterator[tuple[Record, int, int]]:
    start = 0
    for record in records:
        stop = start + math.prod(record.shape) * record.dtype.itemsize
        yield record, start, stop
        start = stop


def _dtype_name(record: Record) -> str:
    if record.dtype not in _DTYPES:
        raise InputError(
            f"tensor {record.name!r} is {record.dtype}, which safetensors cannot hold. "
            "Merge in Python with Delta.state_dict() and save it with torch.save()."
        )
    return _DTYPES[record.dtype]
