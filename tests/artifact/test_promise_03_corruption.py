"""Promise 3: every corruption is detected. Golden files cut short, flipped, mixed and lengthened."""

import json
from collections import Counter

import pytest
import torch

import dtrain
from dtrain import ArtifactError, Dare, Lossless
from dtrain.artifact import file, pack_file, read_file, unpack_file
from dtrain.artifact.file import _PIECE
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
def test_a_flip_in_every_byte_is_found(path, monkeypatch):
    """One bit of every byte, another one each time; `python -m bench.damage` flips all eight."""
    monkeypatch.setattr(file, "find_damage", lambda *_: None)  # which tensor it is takes longer than to see it
    raw = path.read_bytes()
    found = checks(flipped(raw, [0]))
    assert found.total() == len(raw)
    assert set(found) <= {"header", "size", "checksum", "format version"}
    assert found["checksum"] > len(raw) / 3


def test_every_flipped_bit_of_a_small_file_is_found(monkeypatch):
    monkeypatch.setattr(file, "find_damage", lambda *_: None)
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
    with pytest.raises(ArtifactError, match=r"tensor 'a\.(bias|weight)': checksum"):
        unpack_file(one[:middle] + two[middle:-32] + one[-32:])


def test_the_damaged_tensor_is_named():
    raw = bytes_of(tiny(Lossless())[1])
    names = {record.name for record in unpack_file(raw).records}
    found = set()
    for at in range(len(raw) - 32 - sum(record.payload_bytes for record in unpack_file(raw).records), len(raw) - 32):
        raw[at] ^= 4
        with pytest.raises(ArtifactError, match=r"^delta, tensor '.*': checksum: the bytes are not those") as caught:
            unpack_file(raw)
        found.add(caught.value.tensor)
        raw[at] ^= 4
    assert found == names


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A file that is read in several pieces."""
    path = tmp_path_factory.mktemp("long") / "delta"
    base = {"w": torch.zeros(1800, 1700)}
    dtrain.compress(base, {"w": torch.ones(1800, 1700)}, Dare(keep=0.9)).save(path)
    assert path.stat().st_size > 2 * _PIECE
    return path


def test_a_long_file_is_the_same_read_in_pieces(long):
    whole = unpack_file(bytearray(long.read_bytes()))
    assert b"".join(pack_file(read_file(long))) == b"".join(pack_file(whole)) == long.read_bytes()


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.99, 1.0])
def test_a_long_file_is_checked_in_every_piece(long, tmp_path, place):
    raw = bytearray(long.read_bytes())
    at = min(int(place * len(raw)), len(raw) - 1)
    raw[at] ^= 1
    (tmp_path / "delta").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"delta(, tensor 'w')?: checksum: "):
        read_file(tmp_path / "delta")


@pytest.mark.parametrize("change", [-1, -40, -_PIECE, 1, 5 * _PIECE])
def test_a_long_file_of_another_length_is_refused(long, tmp_path, change):
    raw = long.read_bytes()
    (tmp_path / "delta").write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(ArtifactError, match="delta: size: "):
        read_file(tmp_path / "delta")
