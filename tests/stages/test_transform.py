"""Transforms against their formulas: an orthonormal cosine transform, the best approximation of a rank, a transpose."""

import math

import pytest
import torch

from dtrain.errors import InputError
from dtrain.stages import BlockDct, LowRank, Plain, Transposed, balanced, matrix_shape, singular_factors

SHAPES = [(6, 8), (5, 7), (1, 9), (13,), (), (3, 4, 5), (2, 3, 2, 2), (17, 2)]
TRANSFORMS = [Plain(), Transposed(), BlockDct(2), BlockDct(3), BlockDct(8), BlockDct(128), LowRank(1)]


def slow_dct(patch):
    """The orthonormal DCT-II in two dimensions, term by term."""
    p = len(patch)

    def basis(k, i):
        return math.sqrt((1 if k == 0 else 2) / p) * math.cos(math.pi * (2 * i + 1) * k / (2 * p))

    cells = [(i, j) for i in range(p) for j in range(p)]
    return [math.fsum(patch[i][j] * basis(k, i) * basis(m, j) for i, j in cells) for k, m in cells]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_coefficients_fill_the_grid(transform, shape):
    values = torch.randn(shape)
    coefficients = transform.forward(values)
    assert tuple(coefficients.shape) == transform.grid(shape)
    assert coefficients.dtype == torch.float32
    assert transform.inverse(coefficients, shape).shape == (values.numel(),)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS[:-1], ids=repr)
def test_forward_and_back(transform, shape):
    values = torch.randn(shape)
    back = transform.inverse(transform.forward(values), shape)
    if isinstance(transform, BlockDct):
        assert torch.allclose(back, values.view(-1), atol=1e-5 * transform.patch**0.5)
    else:
        assert torch.equal(back, values.view(-1))


@pytest.mark.parametrize(("shape", "outputs"), [((4, 3, 2), (4, 6)), ((7,), (1, 7)), ((), (1, 1)), ((0, 5), (0, 5))])
def test_matrix_shape(shape, outputs):
    assert matrix_shape(shape) == outputs


def test_transposed_rows_are_the_inputs():
    values = torch.randn(4, 3, 2)
    assert torch.equal(Transposed().forward(values), values.reshape(4, 6).t())


@pytest.mark.parametrize("patch", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 9)], ids=str)
def test_dct_is_its_formula(patch, shape):
    values = torch.randn(shape)
    down, across = -(-shape[0] // patch), -(-shape[1] // patch)
    padded = torch.zeros(down * patch, across * patch)
    padded[: shape[0], : shape[1]] = values
    expected = [
        slow_dct(padded[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].tolist())
        for r in range(down)
        for c in range(across)
    ]
    assert torch.allclose(BlockDct(patch).forward(values), torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("patch", [2, 3, 16, 128])
def test_dct_is_orthonormal(patch):
    """Unit coefficients are an orthonormal basis; energy and inner products do not change."""
    one, two = torch.randn(2, 2 * patch, 3 * patch)
    forward = BlockDct(patch).forward
    for a, b in ((one, one), (one, two)):
        before, after = (float((x.double() * y.double()).sum()) for x, y in ((a, b), (forward(a), forward(b))))
        assert after == pytest.approx(before, rel=1e-6, abs=1e-4)
    single = torch.zeros(1, patch**2)
    single[0, patch + 1] = 1.0
    back = BlockDct(patch).inverse(single, (patch, patch)).view(patch, patch)
    assert torch.allclose(forward(back), single, atol=1e-6)


def test_the_first_coefficient_is_the_mean_times_the_side():
    values = torch.randn(8, 8)
    assert float(BlockDct(8).forward(values)[0, 0]) == pytest.approx(8 * float(values.mean()), abs=1e-6)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_the_best_of_its_rank(rank, shape):
    """Eckart and Young: the error's energy is that of the singular values left out."""
    values = torch.randn(shape)
    found = LowRank(rank).inverse(LowRank(rank).forward(values), shape)
    left_out = torch.linalg.svdvals(values.double().reshape(matrix_shape(shape)))[rank:]
    error = float((values.view(-1) - found).double().square().sum())
    assert error == pytest.approx(float(left_out.square().sum()), rel=1e-5)


def test_slices_of_the_spectrum_add_up():
    values = torch.randn(6, 9)
    slices = [LowRank(2), LowRank(1, first=2), LowRank(3, first=3)]
    total = sum(part.inverse(part.forward(values), (6, 9)) for part in slices)
    assert torch.allclose(total, values.view(-1), atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (4, 3, 5), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 9], ids="of rank {}".format)
def test_singular_factors(shape, rank):
    """Orthogonal on both sides, as long as the singular values, in their order; the sum of all is the matrix itself."""
    rows, columns = matrix_shape(shape)
    matrix = torch.randn(rows, rank) @ torch.randn(rank, columns)
    factors = singular_factors(matrix.view(shape)).double()
    u, v = factors[:, :rows], factors[:, rows:]
    assert torch.allclose(u.t() @ v, matrix.double(), rtol=0.0, atol=1e-5 * float(matrix.abs().max()))
    singular = torch.linalg.svdvals(matrix.double())
    slack = 1e-5 * float(singular[0])
    assert torch.allclose(u.norm(dim=1) * v.norm(dim=1), singular, rtol=0.0, atol=slack)
    for side, other in ((u, v), (v, u)):
        spread = side @ side.t() * other.norm(dim=1)[:, None] * other.norm(dim=1)
        assert torch.allclose(spread, (singular**2).diag(), rtol=0.0, atol=slack * float(singular[0]))


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-6, 1e3), (1e5, 1e-8)])
def test_balanced_halves_have_equal_maxima_and_the_same_product(sizes):
    u, v = torch.randn(3, 5).double() * sizes[0], torch.randn(3, 8).double() * sizes[1]
    both = balanced(u, v)
    assert torch.allclose(both[:, :5].abs().amax(1), both[:, 5:].abs().amax(1), rtol=1e-6)
    assert torch.allclose(both[:, :5].double().t() @ both[:, 5:].double(), u.t() @ v, rtol=1e-5, atol=0.0)


def test_signs_do_not_depend_on_the_library():
    """A singular vector is known up to its sign; the greatest entry of v is made positive."""
    u, v = torch.randn(4, 5), torch.randn(4, 6)
    flipped = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None]
    assert torch.equal(balanced(u, v), balanced(u * flipped, v * flipped))
    half = balanced(u, v)[:, 5:]
    assert bool((half.gather(1, half.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("values", [torch.zeros(4, 5), torch.ones(4, 5), torch.eye(4)], ids=["zeros", "ones", "eye"])
def test_degenerate_matrices(values):
    """Singular values of 0, and equal ones."""
    factors = LowRank(4).forward(values)
    assert bool(torch.isfinite(factors).all())
    assert torch.allclose(LowRank(4).inverse(factors, values.shape), values.view(-1), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (7,), (0, 5)], ids=str)
def test_a_rank_beyond_the_sides_is_refused(shape):
    limit = min(matrix_shape(shape))
    for transform in (LowRank(limit + 1), LowRank(1, first=limit)):
        with pytest.raises(InputError, match="Use a smaller rank"):
            transform.grid(shape)
        with pytest.raises(InputError, match="Use a smaller rank"):
            transform.forward(torch.zeros(shape))


@pytest.mark.parametrize("call", [lambda: BlockDct(1), lambda: BlockDct(129), lambda: LowRank(0)])
def test_bad_parameters_are_refused(call):
    with pytest.raises(InputError, match="must be"):
        call()
