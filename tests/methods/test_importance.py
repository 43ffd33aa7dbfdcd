"""The greatest elements: against sorting, tensor by tensor, row by row and over a whole model."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import dtrain
from dtrain import ComPEFT, Inputs, Magnitude, Wanda
from dtrain.methods.top import nonzero_at, top_positions, top_share, top_threshold
from tests.methods.settings import HALF, RULES, calibration_of, dense, inputs, rebuilt, zoo

FEW = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0])  # so that many are equal


def greatest(scores, count):
    """Positions of the greatest scores by a stable sort: of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(FEW, min_size=n, max_size=n), min_size=1)), st.data())
def test_top_positions_are_those_of_a_stable_sort(rows, data):
    count = data.draw(st.integers(0, len(rows[0])))
    score = torch.tensor(rows)
    expected = [i * len(row) + j for i, row in enumerate(rows) for j in greatest(row, count)]
    for laid in (score, score.t().contiguous().t()):
        assert top_positions(laid, count).tolist() == expected


def shared(rows, keep):
    """The same number of each row by sorting, and the spare ones to the rows whose next score is greatest."""
    each, spare = divmod(round(keep * sum(map(len, rows))), len(rows))
    more = greatest([sorted(row)[-each - 1] for row in rows], spare) if spare else []
    return [i * len(row) + j for i, row in enumerate(rows) for j in greatest(row, each + (i in more))]


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(FEW, min_size=n, max_size=n), min_size=1, max_size=9)),
    st.floats(0.001, 1),
)
@example([[1.0, 1.0, 0.5], [1.0, 2.0, 0.5], [2.0, 0.0, 0.0]], 0.3)  # one of each row, whatever the others have
@example([[1.0, 1.0, 0.5], [1.0, 2.0, 0.5], [2.0, 0.0, 0.0]], 0.2)  # fewer than one of each row: the greatest
@example([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], 0.7)  # all alike: the first rows get the spare one
def test_a_share_is_the_same_of_every_row_to_within_one(rows, keep):
    score = torch.tensor(rows)
    for laid in (score, score.t().contiguous().t()):
        found = top_share(laid, keep)
        assert found.tolist() == shared(rows, keep)
    assert len(found) == round(keep * score.numel())
    counts = torch.bincount(found // score.shape[1], minlength=len(rows))
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_share_of_nothing_is_nothing(shape):
    assert not top_share(torch.empty(shape), 0.5).numel()


SIZES = st.floats(0, 2.0**127, width=32) | st.sampled_from([0.0, 2.0**-149, 2.0**-126, 1.0, 1 + 2.0**-23])


@given(st.lists(st.lists(SIZES, max_size=8), min_size=1, max_size=4), st.floats(0.01, 1))
def test_the_threshold_is_the_one_of_a_concatenated_sort(parts, keep):
    tensors = [torch.tensor(part) * (-1) ** i for i, part in enumerate(parts)]
    both = sorted((abs(v) for t in tensors for v in t.tolist()), reverse=True)
    wanted = round(keep * len(both))
    deltas = [(str(i), lambda t=t: t) for i, t in enumerate(tensors)]
    assert top_threshold(deltas, keep) == (both[wanted - 1] if wanted else math.inf)


def test_zeros_are_not_stored():
    delta = torch.tensor([[0.0, 2.0, -0.0], [-3.0, 0.0, 1.0]])
    assert nonzero_at(delta, torch.tensor([0, 1, 2, 3, 4])).tolist() == [1, 3]
    for method in (Magnitude(keep=0.9, values="sign"), Wanda(keep=0.9, values="sign"), ComPEFT(keep=0.9)):
        assert torch.equal(rebuilt(method, delta).sign(), delta.double().sign())


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 0.99, 1])
@pytest.mark.parametrize("shape", [(7, 19), (1, 40), (3, 4, 5)])
def test_magnitude_keeps_the_greatest_of_a_tensor(keep, shape):
    delta = torch.randn(shape)
    flat = delta.double().flatten()
    expected = torch.zeros_like(flat)
    chosen = greatest(flat.abs().tolist(), round(keep * len(flat)))
    expected[chosen] = flat[chosen]
    assert torch.allclose(rebuilt(Magnitude(keep=keep), delta), expected.view(shape), rtol=HALF, atol=0)


def test_magnitude_may_keep_the_norm():
    delta = torch.randn(30, 20)
    plain, scaled = (rebuilt(Magnitude(keep=0.2, rescale=rescale), delta) for rescale in ("none", "norm"))
    assert float(scaled.norm()) == pytest.approx(float(delta.norm()), rel=1e-6)
    assert torch.allclose(scaled, plain * (scaled.norm() / plain.norm()), rtol=1e-6)


def wanda(matrix, norms, keep):
    """|D_ij| ||x_j||, compared within each row i; nothing is rescaled."""
    expected, flat = torch.zeros(matrix.numel(), dtype=torch.float64), matrix.double().flatten()
    chosen = shared((matrix.abs() * norms).tolist(), keep)
    expected[chosen] = flat[chosen]
    return expected.view(matrix.shape)


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.5, 1])
@pytest.mark.parametrize("shape", [(6, 21), (5, 2, 3, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_wanda_compares_within_outputs(keep, shape, transposed):
    matrix = torch.randn(shape).flatten(1)
    sample = inputs(1, 50, matrix.shape[1]) * torch.arange(matrix.shape[1])  # the first input is always 0
    seen = Inputs(sample.square().sum(0).sqrt(), sample, transposed=transposed)
    found = rebuilt(Wanda(keep=keep), matrix.t() if transposed else matrix.view(shape), seen)
    found = found.t() if transposed else found.flatten(1)
    assert torch.allclose(found, wanda(matrix, seen.norms, keep), rtol=HALF, atol=0)


@pytest.mark.parametrize("values", ["float16", "sign", "uniform4"])
@pytest.mark.parametrize("keep", [0.01, 0.3, 1])
def test_without_inputs_wanda_is_magnitude(keep, values):
    """An embedding is ranked as a whole: a row of small changes may keep nothing."""
    delta = torch.randn(12, 10) * torch.logspace(0, -3, 12)[:, None]
    (found,), (expected,) = (kind(keep=keep, values=values).encode("w", delta) for kind in (Wanda, Magnitude))
    assert (found.pipeline, found.scale) == (expected.pipeline, expected.scale)
    assert torch.equal(found.data, expected.data)


def test_wanda_in_a_model():
    """Measured through `compress`: a matrix, a turned-over weight, and one that no layer multiplies by."""
    base, tuned = zoo()
    delta = dtrain.compress(base, tuned, Wanda(keep=0.4), calibration=calibration_of(tuned), rules=RULES)
    norms = (inputs(0, 30, 18).square().sum(0) + inputs(1, 30, 18).square().sum(0)).sqrt()
    records = {record.name: record for record in delta.content.records}
    for name, seen in {"attn.query.weight": norms, "conv1d": norms, "sliced": torch.ones(())}.items():
        change, found = tuned[name] - base[name], dense(records[name].payloads, tuned[name].shape, name)
        if name == "conv1d":
            change, found = change.t(), found.t()
        elif name == "sliced":
            change, found = change.reshape(1, -1), found.view(1, -1)
        assert torch.allclose(found, wanda(change, seen, 0.4), rtol=HALF, atol=0), name


def compeft(deltas, keep, alpha):
    """alpha * std * sign where |D| is at least the least of the greatest `keep`, of all tensors in one list."""
    both = sorted((abs(v) for delta in deltas for v in delta.flatten().tolist()), reverse=True)
    least = both[round(keep * len(both)) - 1]
    return [alpha * d.double().std(correction=0) * d.double().sign() * (d.abs() >= least) for d in deltas]


@pytest.mark.parametrize(("keep", "alpha"), [(0.05, 1.0), (0.4, 2.5), (1, 0.5)])
def test_compeft_has_one_threshold_for_all_tensors(keep, alpha):
    deltas = {"a": torch.randn(20, 30), "b": 4 * torch.randn(5, 6, 7), "c": 0.01 * torch.randn(40, 3)}
    encoder = ComPEFT(keep=keep, alpha=alpha).plan([(name, lambda d=d: d) for name, d in deltas.items()])
    for (name, delta), expected in zip(deltas.items(), compeft(deltas.values(), keep, alpha), strict=True):
        assert torch.allclose(dense(encoder(name, delta, None), delta.shape, name), expected, rtol=1e-6, atol=0)


def test_compeft_keeps_all_that_are_equal():
    deltas = {"a": torch.tensor([[1.0, -2.0, 1.0, 0.5]]), "b": torch.tensor([[-1.0, 0.0, 0.0, 0.5]])}
    encoder = ComPEFT(keep=0.3).plan([(name, lambda d=d: d) for name, d in deltas.items()])  # two of eight
    signs = [dense(encoder(name, d, None), d.shape, name).sign().tolist() for name, d in deltas.items()]
    assert signs == [[[1, -1, 1, 0]], [[-1, 0, 0, 0]]]


def test_compeft_of_a_tensor_by_itself():
    delta = torch.tensor([[1.0, -2.0, 1.0, 0.5]])
    found = rebuilt(ComPEFT(keep=0.5, alpha=3.0, scope="tensor"), delta)
    std = 3 * float(delta.double().std(correction=0))
    assert torch.allclose(found, torch.tensor([[std, -std, 0.0, 0.0]], dtype=torch.float64), rtol=1e-6)


def test_compeft_has_three_values_however_many_zeros():
    """In bfloat16 most of a small delta is 0: such elements have no sign, even where there is room for them."""
    sparse = torch.randn(30, 30) * (torch.rand(30, 30) < 0.2)
    for method in (ComPEFT(keep=0.6), ComPEFT(keep=0.6, scope="tensor"), ComPEFT(keep=1)):
        (payload,) = method.plan([("w", lambda: sparse)])("w", sparse, None)
        assert torch.equal(dense([payload], sparse.shape).sign(), sparse.double().sign())
