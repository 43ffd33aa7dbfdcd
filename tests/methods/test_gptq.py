"""GPTQ, and Delta-CoMe with it."""

import pytest
import torch

from dtrain import DeltaCoMe, Inputs
from dtrain.methods.gptq import gptq, inverse_root
from dtrain.stages import decode


def correlated(columns, rows=400):
    return torch.randn(rows, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)


def rounded(matrix, hessian, *levels):
    return gptq(matrix, inverse_root(hessian), *levels)


def nearest(matrix, step, zero, top):
    return ((matrix / step).round().add(zero).clamp(0, top) - zero) * step


def slow(matrix, hessian, step, zero, top):
    """Optimal brain surgery by the book: after each column the inverse Hessian of the columns that are left."""
    left = matrix.clone()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for column in range(matrix.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        value = nearest(left[:, column], step[:, column], zero[:, column], top)
        error = (left[:, column] - value) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
        left[:, column] = value
    return left


@pytest.fixture
def problem():
    matrix, inputs = torch.randn(6, 9, dtype=torch.float64), correlated(9)
    return matrix, inputs.t() @ inputs, torch.full((6, 9), 0.7, dtype=torch.float64), torch.full((6, 9), 3.0), 7


def test_the_cholesky_form_is_the_slow_one(problem):
    assert torch.allclose(rounded(*problem), slow(*problem), atol=1e-9)


def test_without_correlation_it_is_rounding(problem):
    matrix, _, *levels = problem
    assert torch.allclose(rounded(matrix, torch.eye(9), *levels), nearest(matrix, *levels))


def test_products_change_less_than_by_rounding():
    wins = 0
    for _ in range(20):
        matrix, inputs = torch.randn(6, 9, dtype=torch.float64), correlated(9)
        levels = (torch.full((6, 9), 0.7, dtype=torch.float64), torch.full((6, 9), 3.0), 7)
        errors = [
            float(((matrix - found) @ inputs.t()).square().sum())
            for found in (rounded(matrix, inputs.t() @ inputs, *levels), nearest(matrix, *levels))
        ]
        wins += errors[0] < errors[1]
    assert wins >= 18


@pytest.mark.parametrize("transposed", [False, True])
def test_delta_come_changes_outputs_less_with_it(transposed):
    delta, inputs = torch.randn(40, 30).double() @ torch.randn(30, 30).double() * 1e-3, correlated(30)
    seen = Inputs(inputs.square().sum(0).sqrt().float(), inputs[:8].float(), (inputs.t() @ inputs).float(), transposed)
    stored = delta.t().contiguous() if transposed else delta

    def error(method):
        left = stored.clone().view(-1)
        for payload in method.encode("w", stored.float(), seen):
            left -= decode(payload, "w", stored.shape).values.double() * payload.scale
        return float((inputs @ seen.matrix(left.view(stored.shape)).t()).square().sum())

    plain = DeltaCoMe(bits=(4, 3, 2), ranks=(4, 8), budget=4.0, block=32)
    better = DeltaCoMe(bits=(4, 3, 2), ranks=(4, 8), budget=4.0, block=32, gptq=True)
    assert error(better) < 0.8 * error(plain)
    assert plain.needs == "nothing"
    assert better.needs == "covariance"
