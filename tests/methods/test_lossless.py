"""Bit for bit, whatever the bits are."""

import pytest
import torch

import dtrain
from dtrain import InputError, Lossless
from tests.methods.settings import same_bits

PATTERNS = {  # quiet, signalling and negative NaN with a payload, infinities, -0.0, the least subnormal
    torch.float32: [0x7FC12345, 0x7F800001, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 1],
    torch.bfloat16: [0x7FC1, 0x7F81, 0xFFC1, 0x7F80, 0xFF80, 0x8000, 1],
    torch.float16: [0x7E01, 0x7C01, 0xFE01, 0x7C00, 0xFC00, 0x8000, 1],
}


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["w", "head.weight"])
def test_lossless_keeps_every_bit(dtype, name, tmp_path):
    width = torch.tensor([], dtype=dtype).itemsize
    bits = b"".join(pattern.to_bytes(width, "little") for pattern in PATTERNS[dtype])
    special = torch.frombuffer(bytearray(bits), dtype=dtype).view(7, 1)
    base = {"v": torch.ones(2), "w": torch.zeros(7, 1, dtype=dtype)}
    tuned = {"v": torch.zeros(2), "w": base["w"], name: special}
    for old, new in ((base, tuned), (tuned, {k: base.get(k, tuned[k]) for k in tuned})):
        dtrain.compress(old, new, Lossless()).save(tmp_path / "delta")
        assert same_bits(dtrain.load(tmp_path / "delta").state_dict(old), new)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 20, 25), (torch.bfloat16, 4, 9)], ids=str)
def test_what_the_card_says_it_costs(dtype, least, most):
    base = {"w": (0.03 * torch.randn(512, 512)).to(dtype)}
    for size, bits in ((1e-4, least), (3e-3, most)):
        tuned = {"w": (base["w"].float() + size * torch.randn(512, 512)).to(dtype)}
        (record,) = dtrain.compress(base, tuned, Lossless()).content.records
        assert 8 * record.payload_bytes / 2**18 == pytest.approx(bits, abs=0.3)


def test_there_is_no_delta_to_encode():
    with pytest.raises(InputError, match="Lossless stores the bits of 'w', not a delta"):
        Lossless().encode("w", torch.zeros(2, 2))
