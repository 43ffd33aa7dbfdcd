"""Signs and their scales, by loops."""

import math

import pytest
import torch

from dtrain import BitDelta
from tests.methods.settings import HALF, rebuilt


def bitdelta(matrix, scale):
    """mean |D| * sign(D), the mean over the tensor, the row or the column; the sign of 0 is -1."""
    rows, columns = len(matrix), len(matrix[0])
    sharing = {
        "tensor": lambda i, j: [abs(v) for row in matrix for v in row],
        "row": lambda i, j: [abs(v) for v in matrix[i]],
        "column": lambda i, j: [abs(row[j]) for row in matrix],
    }[scale]
    sign = [[1 if v > 0 else -1 for v in row] for row in matrix]
    means = [[math.fsum(sharing(i, j)) / len(sharing(i, j)) for j in range(columns)] for i in range(rows)]
    return [[means[i][j] * sign[i][j] for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", [(5, 9), (1, 12), (12, 1), (3, 2, 4)])
def test_signs_times_the_mean_magnitude(scale, shape):
    delta = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1))
    delta.view(-1)[3] = 0.0
    expected = torch.tensor(bitdelta(delta.flatten(1).tolist(), scale), dtype=torch.float64).view(shape)
    # the scales of rows and columns are halves, relative to the tensor's greatest
    assert torch.allclose(rebuilt(BitDelta(scale), delta), expected, rtol=1e-6 if scale == "tensor" else HALF)


@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
def test_no_other_scale_of_the_signs_is_better(scale):
    delta = torch.randn(20, 30).double()
    found = rebuilt(BitDelta(scale), delta.float())
    error = float((delta - found).square().sum())
    assert all(float((delta - found * factor).square().sum()) > error for factor in (0.99, 1.01))


def test_a_scale_per_row_pays_where_rows_differ():
    uneven = torch.randn(64, 64) * torch.logspace(-2, 0, 64)[:, None]
    errors = [float((uneven - rebuilt(BitDelta(scale), uneven)).norm()) for scale in ("row", "tensor", "column")]
    assert errors[0] < 0.8 * min(errors[1:])
    turned = [float((uneven.t() - rebuilt(BitDelta(scale), uneven.t())).norm()) for scale in ("column", "tensor")]
    assert turned[0] == pytest.approx(errors[0], rel=1e-3)
    assert turned[1] == pytest.approx(errors[1], rel=1e-6)
