"""A record put on its base, for every dtype that a sparse change can have."""

import pytest
import torch

from dtrain.artifact import Record, Role
from dtrain.runtime import merged
from dtrain.runtime.merge import patch, write
from dtrain.stages import Bernoulli, Float16, Pipeline, decode, encode

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sparse_change_is_put_on_any_float(dtype):
    payload = encode(Pipeline(Bernoulli(0.3, 1), Float16()), "w", torch.randn(8, 16))
    record = Record("w", Role.ADD, dtype, (8, 16), bytes(4), (payload,))
    base = torch.randn(8, 16).to(dtype)
    positions, values = decode(payload, "w", (8, 16))
    wide = torch.float64 if dtype is torch.float64 else torch.float32  # as the sum is taken, and rounded once
    expected = base.to(wide, copy=True).view(-1)
    expected[positions] += values.to(wide) * payload.scale
    expected = expected.to(dtype).view(8, 16)
    assert merged(record, base).double().equal(expected.double())
    inside = base.clone()
    write(inside, patch(record, base))
    assert inside.double().equal(expected.double())
