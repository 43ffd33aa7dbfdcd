"""Singular vectors: against numpy's decomposition, band by band, rate by rate, and weighted by a layer's inputs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dtrain import BitDelta, DareX, DeltaCoMe, EoRA, ImPart, Inputs, Magnitude
from dtrain.report import Row
from dtrain.stages import All
from tests.methods.oracles import affine
from tests.methods.settings import HALF, dense, rebuilt, tiny


def balanced(matrix):
    """Rows [u_k, v_k]: s_k is shared out for the same greatest magnitude, and the greatest entry of v_k is positive."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rows = []
    for k in range(len(s)):
        left, right = u[:, k] * s[k], v[k]
        share = math.sqrt(np.abs(right).max() / np.abs(left).max()) * np.sign(right[np.abs(right).argmax()])
        rows.append(np.concatenate([left * share, right / share]))
    return np.array(rows)


def bands(shape, bits, ranks, budget):
    """(bits, ranks from, to) of every band, one singular value after the other until the bits are spent."""
    left, first, out = budget * shape[0] * shape[1], 0, []
    for width, wanted in itertools.zip_longest(bits, ranks, fillvalue=min(shape)):
        last = first
        while last < min(shape) and last - first < wanted and left >= width * sum(shape):
            last, left = last + 1, left - width * sum(shape)
        out.append((width, first, last))
        first = last
    return [band for band in out if band[1] < band[2]]


def delta_come(matrix, bits, ranks, budget, block):
    factors, total = balanced(matrix), np.zeros_like(matrix)
    for width, first, last in bands(matrix.shape, bits, ranks, budget):
        flat = factors[first:last].flatten().tolist()
        rounded = [v for i in range(0, len(flat), block) for v in affine(flat[i : i + block], width)]
        part = np.array(rounded).reshape(last - first, -1)
        total += part[:, : len(matrix)].T @ part[:, len(matrix) :]
    return total


COMES = [
    DeltaCoMe(),
    DeltaCoMe((6, 3), (2,), 1.5, 32),
    DeltaCoMe((5,), (), 4.0, 40),
    DeltaCoMe((8, 4, 2), (1, 3), 2.0, 7),
    DeltaCoMe((8,), (), 0.01),
]


@pytest.mark.parametrize("method", COMES, ids=repr)
@pytest.mark.parametrize("shape", [(40, 30), (12, 90)])
def test_bands_of_singular_vectors(method, shape):
    delta = torch.randn(shape) + 0.1
    expected = delta_come(delta.double().numpy(), method.bits, method.ranks, method.budget, method.block)
    found = rebuilt(method, delta).numpy()
    left, expected_left = (np.linalg.norm(delta.numpy() - part) for part in (found, expected))
    assert left == pytest.approx(expected_left, rel=0.05)
    # Steps are halves: a code at the edge of its bin may move by one. So may the zero of a block whose extremes are
    # alike, and with it the block: with few bits that is no small matter.
    if min(method.bits) > 3:
        assert np.linalg.norm(found - expected) <= 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("budget", [0.3, 1.0, 1.7, 4.0])
def test_the_budget_is_spent_and_not_exceeded(budget):
    delta, bits, ranks = torch.randn(96, 160), (8, 3, 2), (2, 32)
    payloads = DeltaCoMe(bits, ranks, budget).encode("w", delta)
    stages = [(p.pipeline.quantise.bits, p.pipeline.transform.first, p.pipeline.transform.rank) for p in payloads]
    assert stages == [(width, first, last - first) for width, first, last in bands(delta.shape, bits, ranks, budget)]
    spent = sum(width * rank * 256 for width, _, rank in stages)
    full = sum(rank for *_, rank in stages) == 96
    assert spent <= budget * delta.numel() < spent + stages[-1][0] * 256 or full
    on_disk = 8 * sum(p.data.numel() for p in payloads)
    assert 1.02 * spent < on_disk < 1.075 * spent


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_with_bits_to_spare_it_is_the_best_approximation_of_its_rank(rank):
    delta = torch.randn(12, 20)
    budget = 16 * rank * 32 / 240 + 1e-9
    found = rebuilt(DeltaCoMe((16,), (), budget, 4), delta)
    left = torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt()
    assert float((found - delta).norm()) == pytest.approx(float(left), abs=2e-3 * float(delta.norm()))


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize(("rank", "expected"), [(0, []), (1, [1]), (3, [2, 1]), (6, [2, 3, 1])])
@pytest.mark.parametrize("shape", [(40, 30), (12, 90)])
def test_nothing_is_spent_beyond_the_deltas_rank(shape, rank, expected, gptq):
    delta = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    payloads = DeltaCoMe((8, 6, 6), (2, 3), 30.0, 16, gptq=gptq).encode("w", delta)
    assert [p.pipeline.transform.rank for p in payloads] == expected
    assert float((dense(payloads, shape) - delta).norm()) <= 0.1 * float(delta.norm())


def test_what_the_budget_has_no_room_for_is_still_the_methods():
    """Less than one singular value: no payload, the base's weights, and a row of its own in the report."""
    base, delta = tiny(DeltaCoMe((8,), (), 0.01))
    rows = {row.kind: row for row in delta.report().rows}
    assert rows["matrix"] == Row("matrix", "method", None, tensors=1, elements=12, kept=0, payload_bytes=0)
    assert rows["vector"].tensors == 1
    assert torch.equal(delta.state_dict(base)["a.weight"], base["a.weight"])


def rates(payloads):
    """The rate at which every singular vector is kept, as the stages say."""
    return [getattr(p.pipeline.select, "keep", 1.0) for p in payloads for _ in range(p.pipeline.transform.rank)]


def impart(sizes, wanted, beta):
    """1 - p_k with p_k = gamma (1 - s_k / s_1): the tail goes by beta, or until gamma = 1 affords what is left."""
    count = math.ceil((1 - beta) * len(sizes))
    while count > 1 and sum(s / sizes[0] for s in sizes[:count]) > wanted:
        count -= 1
    low, high = 0.0, 1.0
    for _ in range(60):
        gamma = (low + high) / 2
        low, high = (
            (gamma, high) if sum(1 - gamma * (1 - s / sizes[0]) for s in sizes[:count]) > wanted else (low, gamma)
        )
    kept = [1 - high * (1 - s / sizes[0]) for s in sizes[:count]]
    return [rate * min(1, wanted / sum(kept)) for rate in kept]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 1.1, 2])
def test_important_vectors_are_kept_at_higher_rates(keep, beta):
    delta = torch.randn(30, 50)
    sizes = torch.linalg.svdvals(delta.double()).tolist()
    expected = impart(sizes, keep * 1500 / 80, beta)
    found = rates(ImPart(keep=keep, beta=beta).encode("w", delta))
    assert found == pytest.approx([2 ** (round(4 * math.log2(rate)) / 4) for rate in expected])
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(128, 128), (64, 256)])
def test_as_many_entries_are_kept_as_asked_for(keep, shape):
    payloads = ImPart(keep=keep).encode("w", torch.randn(shape))
    kept = sum(p.data.numel() // 2 for p in payloads)
    assert kept == pytest.approx(keep * shape[0] * shape[1], rel=0.1, abs=sum(shape))  # to one pair of vectors


def test_bands_share_no_mask():
    payloads = ImPart(keep=1, seed=2**64 - 1).encode("w", torch.randn(60, 60))
    seeds = [payload.pipeline.select.seed for payload in payloads if payload.pipeline.select != All()]
    assert len(set(seeds)) == len(seeds) > 3


@pytest.mark.parametrize(("keep", "beta"), [(0.3, 0.0), (0.6, 0.5), (1.0, 0.2)])
def test_the_mean_over_masks_is_the_part_that_is_not_pruned(keep, beta):
    """Two masks per product, each divided by its rate: every element within five standard errors over 300 seeds."""
    delta, rounds = torch.randn(6, 8), 300
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    count = len(rates(ImPart(keep=keep, beta=beta).encode("w", delta)))
    part = u[:, :count] * s[:count] @ v[:count]
    found = torch.stack(
        [rebuilt(ImPart(keep=keep, beta=beta, seed=100 * seed), delta) for seed in range(rounds)]  # bands use up seeds
    )
    slack = 5 * found.std(0) / math.sqrt(rounds) + 4 * HALF * float(delta.abs().max())
    assert 0 < count < 6
    assert bool(((found.mean(0) - part).abs() < slack).all())


def seen(columns, tokens=400):
    """Inputs of uneven size that hang together."""
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns) * torch.logspace(0, -1, columns)
    return Inputs(x.square().sum(0).sqrt(), x[:64], x.T @ x)


def weighted(error, gram):
    """tr(E G E^T): the squared change of the outputs over all inputs."""
    return float((error @ gram.double() * error).sum())


HOSTS = [Magnitude(keep=0.1), BitDelta(), DareX(keep=0.1, q=1.0), DeltaCoMe((4, 2), (1,), 1.0, 16)]


@pytest.mark.parametrize("host", HOSTS, ids=repr)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_factors_of_this_rank_change_the_outputs_less(host, rank, transposed):
    """The least there is, in closed form: with G = L L^T it is the energy of R L beyond its first singular values."""
    matrix, inputs = torch.randn(20, 16), replace(seen(16), transposed=transposed)
    delta = matrix.t().contiguous() if transposed else matrix
    residual = (delta - rebuilt(host, delta)).t() if transposed else delta - rebuilt(host, delta)
    least = torch.linalg.svdvals(residual @ torch.linalg.cholesky(inputs.gram.double()))[rank:].square().sum()
    found = rebuilt(EoRA(host, rank, "float16"), delta, inputs)
    error = delta - found
    achieved = weighted(error.t() if transposed else error, inputs.gram)
    assert achieved == pytest.approx(float(least), rel=0.01)
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    assert weighted(residual - u[:, :rank] * s[:rank] @ v[:rank], inputs.gram) > achieved
    assert weighted(residual, inputs.gram) > achieved


@pytest.mark.parametrize("inputs", [None, "identity", "other"])
def test_without_weights_it_is_the_plain_decomposition(inputs):
    delta, host = torch.randn(20, 16), BitDelta()
    if inputs is not None:
        inputs = Inputs(torch.ones(16), torch.ones(1, 16), torch.eye(16) if inputs == "identity" else seen(16).gram)
    residual = delta - rebuilt(host, delta)
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    plain = u[:, :3] * s[:3] @ v[:3]
    identity = inputs is None or torch.equal(inputs.gram, torch.eye(16))
    found = rebuilt(EoRA(host, 3, "float16", weighted=identity), delta, inputs) - rebuilt(host, delta)
    assert float((found - plain).norm()) < 2e-3 * float(plain.norm())


def test_inputs_that_are_never_seen_do_no_harm():
    """A direction without energy is divided by next to nothing on the way back: its factors stay bounded."""
    gram = seen(16).gram
    gram[3], gram[:, 3] = 0.0, 0.0
    inputs = Inputs(gram.diagonal().sqrt(), torch.ones(1, 16), gram)
    delta = torch.randn(20, 16)
    found = rebuilt(EoRA(BitDelta(), 2, "float16"), delta, inputs)
    assert weighted(delta - found, gram) < weighted(delta - rebuilt(BitDelta(), delta), gram)
    assert float(found.abs().max()) < 10 * float(delta.abs().max())


def test_the_factors_come_on_top_of_the_hosts_payloads():
    delta, host = torch.randn(40, 30), DeltaCoMe((4, 2), (1,), 1.0, 16)
    payloads, own = EoRA(host, 2, weighted=False).encode("w", delta), host.encode("w", delta)
    assert [bytes(p.data) for p in payloads[:-1]] == [bytes(p.data) for p in own]
    assert payloads[-1].data.numel() == 2 * 70  # a byte per entry: bits * rank * (rows + columns) / 8
    host_left, left = (float((delta - dense(p, delta.shape)).norm()) for p in (own, payloads))
    assert left < host_left
