"""Files of a few bytes that ask for much memory or time: `python -m tests.artifact.bombs FOLDER` sets them off.

Every one of them is loaded from disk, inspected, and put on a base, with little memory to spare and a CPU timer.
"""

import hashlib
import mmap
import resource
import signal
import struct
import sys
import time
from pathlib import Path

import torch
import zstandard

import dtrain
from dtrain import ArtifactError, BaseMismatchError
from dtrain.weights import digest, zeros
from tests.artifact import craft, damaged
from tests.artifact.craft import build, kind, manifest, pipeline, record, varint

MEMORY = 300 << 20
SECONDS = 5


def on(base, stages, payload):
    """A file with one payload, a change of the tensor `w`."""
    found = digest(base["w"])
    table = manifest([stages], [kind(shape=base["w"].shape)], [record(data=[payload], digest=found[:4])])
    return build(hashlib.sha256(b"\1\0\0\0w" + found).digest() + table[32:], payload)


def frame(size, stated):
    """A Zstandard frame of `size` zeros that states another size."""
    whole = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(size)))
    assert whole[4] >> 6 == 2, "a content size of four bytes"
    at = 5 + (not whole[4] & 32)  # a window descriptor, unless the frame is one segment
    whole[at : at + 4] = struct.pack("<I", stated)
    return bytes(whole)


def many(number):
    """That many tensors of no element; all of one name, but nobody gets that far."""
    records = varint(number) + record(b"w", [b""]) * number
    table = bytes(32) + craft.listing([craft.F16]) + craft.listing([kind(shape=[0])]) + records
    return build(table, b"")


def bombs():
    """Title -> (file, base): a base of zeros where none is of the matter."""
    two, row = {"w": torch.zeros(2)}, {"w": torch.zeros(1, 1 << 16)}
    huge = {"w": torch.zeros(()).expand(1 << 40)}
    stages = {"zstd": pipeline(code=craft.ZSTD), "index": pipeline(select=craft.INDEXED)}
    coded = pipeline(quantise=craft.uniform(2), code=craft.RANS)
    sparse = pipeline(select=craft.bernoulli(2.0**-24), code=craft.ZSTD)

    def shaped(shape, used, payload=b"\0\0\0\0"):
        return build(manifest([used], [kind(shape=shape)], [record(data=[payload])]), payload)

    files = {
        "huge shape": shaped([1 << 47], craft.F16),
        "huge shape, sparse": shaped([1 << 47], pipeline(select=craft.bernoulli(2.0**-24))),
        "huge shape, coded": shaped([1 << 47], sparse),
        "huge shape, indexed": shaped([1 << 47], stages["index"], varint(1 << 46)),
        "huge shape, low rank": shaped([1 << 23, 1 << 23], pipeline(craft.low_rank(1 << 22), code=craft.ZSTD)),
        "index beyond the end": damaged.on_zeros(*damaged.PAYLOADS["position behind the end"]),
        "index of 2^62 positions": damaged.on_zeros(varint(1 << 62) + b"\0\1", stages["index"]),
        "index of 2^62 symbols": damaged.on_zeros(b"\1\0" + varint(1 << 62), stages["index"]),
        "2^60 words": damaged.on_zeros(b"\1\2\1\1" + varint(1 << 60), coded),
        "shares of 2^62": damaged.on_zeros(b"\1\2" + 2 * varint(1 << 62), coded),
        "zstd that grows": damaged.on_zeros(frame(1 << 28, 4), stages["zstd"]),
        "zstd that states much": damaged.on_zeros(frame(1 << 20, (1 << 32) - 1), stages["zstd"]),
        "JSON nested 1e5 deep": damaged.text(b"[" * 100_000 + b"]" * 100_000),
        "provenance nested 1e5 deep": damaged.HEADERS["nested provenance"],
        "99 MB of header": struct.pack("<Q", 99 << 20) + b" " * (99 << 20),
        "99 MB of header stated": struct.pack("<Q", 99 << 20) + b"{}",
        "2^62 bytes stated": craft.header(1 << 62, 1 << 62) + bytes(100),
        "1e6 empty tensors": many(10**6),
        "names that borrow": build(manifest([craft.F16], [kind(), kind(role=3, pipelines=())], [record(b"a")] + [
            record(b"b", (), kind=1, code=(1, i, 0)) for i in range(1, 10**4)])),
        "name of 1 MB": build(manifest(records=[record(b"a" * 10**6)])),
        "a number of 5000 digits": damaged.HEADERS["huge number in provenance"],
        "patches far wider than the row": None,
        "tables of the least keep rate": None,
    }  # fmt: skip
    made = {title: (data, huge if title.startswith("huge") else two) for title, data in files.items() if data}
    patches = pipeline(craft.dct(128), craft.bernoulli(2.0**-24), code=craft.ZSTD)
    made["patches far wider than the row"] = (on(row, patches, zstandard.ZstdCompressor().compress(b"")), row)
    rates = [pipeline(select=craft.bernoulli(2.0**-24 * (1 + i / 1000))) for i in range(250)]
    found = digest(two["w"])
    table = manifest(rates, [kind(pipelines=range(250))], [record(data=[b""] * 250, digest=found[:4])])
    table = hashlib.sha256(b"\1\0\0\0w" + found).digest() + table[32:]
    made["tables of the least keep rate"] = (build(table, b""), two)
    return made


def late(*_):
    raise TimeoutError


def main(folder):
    torch.set_num_threads(1)
    path, made = folder / "bomb.safetensors", bombs()
    zeros([("w", [1], torch.float32)])
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.signal(signal.SIGVTALRM, late)
    for title, (data, base) in made.items():
        path.write_bytes(data)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            delta = dtrain.load(path)
            delta.report().as_dict()
            state = delta.state_dict(base)
            outcome = f"harmless: {len(state)} tensors"
        except (ArtifactError, BaseMismatchError) as error:
            outcome = f"refused: {str(error).removeprefix(str(folder))[:150]}"
        except BaseException as error:
            outcome = f"BOMB: {type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(f"{title}: {time.process_time() - start:.2f} s, {len(data):,} bytes: {outcome}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
