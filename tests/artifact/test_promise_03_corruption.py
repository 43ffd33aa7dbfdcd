"""Promise 3: every corruption is detected. Golden files cut short, flipped, mixed and lengthened."""

import json
from collections import Counter

import pytest

from dtrain import ArtifactError, Dare
from dtrain.artifact import unpack_file
from tests.artifact import craft
from tests.artifact.make_golden import GOLDEN
from tests.methods.settings import bytes_of, tiny

FILES = sorted(GOLDEN.glob("*.safetensors"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def checks(variants):
    """Count by which check every variant of a file is refused; one that is not refused fails the test."""
    found = Counter()
    for raw in variants:
        with pytest.raises(ArtifactError) as caught:
            unpack_file(raw)
        found[caught.value.check] += 1
    return found


def cut(raw):
    return (raw[:size] for size in range(len(raw)))


def flipped(raw, bits=range(8)):
    for at in range(len(raw)):
        for bit in bits:
            damaged = bytearray(raw)
            damaged[at] ^= 1 << (bit + at) % 8
            yield damaged


@every_file
def test_every_truncation_is_found(path):
    raw = bytearray(path.read_bytes())
    found = checks(cut(raw))
    assert found.total() == len(raw)
    assert set(found) == {"header", "size"}


@every_file
def test_a_flip_in_every_byte_is_found(path):
    """One bit of every byte, another one each time; `python -m bench.damage` flips all eight."""
    raw = path.read_bytes()
    found = checks(flipped(raw, [0]))
    assert found.total() == len(raw)
    assert set(found) <= {"header", "size", "checksum", "format version"}
    assert found["checksum"] > len(raw) / 3


def test_every_flipped_bit_of_a_small_file_is_found():
    raw = (GOLDEN / "lora.safetensors").read_bytes()
    assert checks(flipped(raw)).total() == 8 * len(raw)


@pytest.mark.parametrize("extra", [b"\0", b"{}", b"\0" * 64])
def test_bytes_behind_the_end_are_found(extra):
    with pytest.raises(ArtifactError, match="size"):
        unpack_file(bytes_of(tiny()[1]) + extra)


def test_parts_of_two_files_do_not_mix():
    """Payloads, manifests and headers swapped between two deltas of one shape, checksum over all repaired or not."""
    one, two = (bytes_of(tiny(Dare(keep=1, seed=seed))[1]) for seed in (0, 1))
    assert len(one) == len(two)
    start = 8 + int.from_bytes(one[:8], "little")
    middle = start + json.loads(one[8:start])["manifest"]["shape"][0]
    for cut in (start, middle, len(one) - 32):
        with pytest.raises(ArtifactError, match="checksum"):
            unpack_file(one[:cut] + two[cut:])
    with pytest.raises(ArtifactError, match=r"tensor 'a\.(bias|weight)': manifest: .*checksum"):
        unpack_file(craft.seal(one[:middle] + two[middle:-32]))
