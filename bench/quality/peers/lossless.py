"""Lossless peers: `zipnn` and Zstandard, on the checkpoint and on its bits xor the base's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from safetensors.torch import load, save

from bench.quality.peers.disk import Peer
from bench.tasks import State, Task

FILE = "weights"
Coder = Callable[[bytes, bytes | None], bytes]  # of a file, and of the base's where there is one

ZSTD_LEVEL = 3  # Zstandard's own default


def xor(data: bytes, base: bytes) -> bytes:
    return np.bitwise_xor(np.frombuffer(data, np.uint8), np.frombuffer(base, np.uint8)).tobytes()


def zstd_encode(data: bytes, base: bytes | None) -> bytes:
    return zstandard.compress(data if base is None else xor(data, base), ZSTD_LEVEL)


def zstd_decode(data: bytes, base: bytes | None) -> bytes:
    found = zstandard.decompress(data)
    return found if base is None else xor(found, base)


def zipnn_encode(data: bytes, base: bytes | None) -> bytes:
    return bytes(zipnn(base).compress(bytearray(data), delta_second_data=base and bytearray(base)))


def zipnn_decode(data: bytes, base: bytes | None) -> bytes:
    return bytes(zipnn(base).decompress(data, delta_second_data=base and bytearray(base)))


def zipnn(base: bytes | None) -> Any:
    from zipnn import ZipNN

    options = {} if base is None else {"delta_compressed_type": "byte"}
    return ZipNN(input_format="byte", bytearray_dtype="float32", threads=1, **options)


def write(task: Task, knob: float, folder: Path, encode: Coder, delta: bool) -> None:
    del knob  # there is none
    (folder / FILE).write_bytes(encode(save(task.tuned), save(task.base) if delta else None))


def read(task: Task, folder: Path, decode: Coder, delta: bool) -> State:
    return load(decode((folder / FILE).read_bytes(), save(task.base) if delta else None))


def lossless(label: str, package: str, encode: Coder, decode: Coder, delta: bool) -> Peer:
    writes, reads = (partial(write, encode=encode, delta=delta), partial(read, decode=decode, delta=delta))
    return Peer(label, package, writes, reads, exact=True)


LOSSLESS = (
    lossless("zstd", "zstandard", zstd_encode, zstd_decode, False),
    lossless("zstd on the xor", "zstandard", zstd_encode, zstd_decode, True),
    lossless("zipnn", "zipnn", zipnn_encode, zipnn_decode, False),
    lossless("zipnn on the xor", "zipnn", zipnn_encode, zipnn_decode, True),
)
