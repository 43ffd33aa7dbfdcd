"""DBMS: the identities of its formula, and the byte split between base vector and residual."""

import math

import pytest
import torch

import dtrain
from dtrain import (
    BitDelta,
    Dare,
    DareX,
    Dbms,
    DeltaDQ,
    Ecsq,
    Magnitude,
    NeedsDataError,
    SeededSign,
)
from dtrain.stages import decode
from tests.methods.settings import dense

DELTA = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * 1e-3
LAMS = [0.0, 0.3, 1.0, 1.25, 7.0]


def rebuilt(method, delta=DELTA):
    return dense(method.encode("w", delta), delta.shape)


def host_of(method):
    return method.hosts[1]


@pytest.mark.parametrize("host", [SeededSign(keep=0.25), Dare(keep=0.2), DareX(keep=0.1), Ecsq(bits=0.5), BitDelta()])
def test_without_a_shift_it_is_the_host(host):
    method = Dbms(host, lam=0.0, eta=1.0)
    base, residual = method.encoder([("w", lambda: DELTA)]).groups("w", DELTA)
    expected = host_of(method).plan([("w", lambda: DELTA)])("w", DELTA, None)
    assert [item.scale for item in base] == [0.0] * len(base)
    assert [(item.pipeline, item.scale, bytes(item.data)) for item in residual] == [
        (item.pipeline, item.scale, bytes(item.data)) for item in expected
    ]


@pytest.mark.parametrize("lam", LAMS)
def test_without_a_residual_the_base_moves_by_lam_times_the_base_vector(lam):
    (vector,) = Dbms(BitDelta(), split=None).hosts[0].encode("w", DELTA)
    assert torch.allclose(rebuilt(Dbms(BitDelta(), split=None, lam=lam, eta=0.0)), lam * dense([vector], DELTA.shape))


@pytest.mark.parametrize("lam", LAMS)
def test_with_an_exact_host_every_shift_gives_the_finetuned_weights(lam):
    found = rebuilt(Dbms(Dare(keep=1), split=None, lam=lam, eta=1.0))
    error = 2**-11 * float(DELTA.abs().max()) * (1 + lam)
    assert torch.allclose(found, DELTA.double(), atol=error, rtol=0)


def test_signs_twice_are_a_quantiser_of_two_bits():
    """METHODS.md, section 4: relative squared error 0.118 on a Gaussian at lam = 1.25, against 0.363 with one bit."""
    gaussian = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    found = rebuilt(Dbms(BitDelta(), split=None, lam=1.25, eta=1.0), gaussian)
    assert len(found.unique()) <= 4
    error = float((found - gaussian).square().sum() / gaussian.double().square().sum())
    assert error == pytest.approx(0.118, abs=0.002)
    assert float((rebuilt(BitDelta(), gaussian) - gaussian).square().mean()) == pytest.approx(
        1 - 2 / math.pi, abs=0.005
    )


@pytest.mark.parametrize("host", [SeededSign(keep=0.25), Dare(keep=0.25), DareX(keep=0.25, q=0.5), DeltaDQ(alpha=4)])
def test_the_two_masks_are_independent(host):
    (base,), (residual,) = Dbms(host, split=None, lam=1.0, eta=1.0).encoder([("w", lambda: DELTA)]).groups("w", DELTA)
    first, second = (set(decode(item, "w", DELTA.shape).positions.tolist()) for item in (base, residual))
    chance, n = 1 / 16, DELTA.numel()
    assert abs(len(first & second) - chance * n) < 5 * math.sqrt(n * chance)


@pytest.mark.parametrize("host", [SeededSign(keep=0.25), Dare(keep=0.2), DareX(keep=0.5), Ecsq(bits=1.0)])
@pytest.mark.parametrize("split", [0.25, 0.5, 0.75])
def test_both_payloads_take_the_hosts_bytes(host, split):
    def size(payloads):
        return sum(item.data.numel() for item in payloads)

    delta = torch.randn(256, 512)
    (encoder, plain) = (m.plan([("w", lambda: delta)]) for m in (Dbms(host, split=split, lam=0.5, eta=1.0), host))
    base, residual = encoder.groups("w", delta)
    whole = size(plain("w", delta, None))
    assert size(base) + size(residual) == pytest.approx(whole, rel=0.05)
    assert size(base) / whole == pytest.approx(split, rel=0.05)


@pytest.mark.parametrize("split", [0.25, 0.5, 0.75])
def test_where_values_decide_the_bytes_both_take_no_more_than_the_host(split):
    """The parts of DeltaDQ are coded by their entropy, and the residual's values lie closer together."""
    delta = torch.randn(256, 512)
    found, whole = (
        sum(item.data.numel() for item in method.encode("w", delta))
        for method in (Dbms(DeltaDQ(alpha=12), split=split, lam=0.5, eta=1.0), DeltaDQ(alpha=12))
    )
    assert found < 1.05 * whole


def test_half_of_bitdelta_keeps_half_of_the_signs():
    first, second = Dbms(BitDelta(), lam=1.0, eta=1.0).hosts
    assert isinstance(first, SeededSign)
    assert isinstance(second, SeededSign)
    assert (first.keep, second.keep) == (0.5, 0.5)


def test_a_scale_that_the_host_searches_is_eta():
    assert Dbms(DareX(keep=0.1)).hosts[1].q == "keep"
    assert Dbms(DareX(keep=0.1), lam=1.0, eta=1.0).needs == "nothing"
    assert Dbms(DareX(keep=0.1), lam=1.0).needs == "objective"
    assert Dbms(Magnitude(keep=0.1), lam=1.0, eta=1.0, split="search").needs == "objective"


def test_a_shared_base_vector_must_be_given():
    base = {"w": torch.randn(4, 4)}
    tuned = {"w": base["w"] + 1e-3 * torch.randn(4, 4)}
    with pytest.raises(NeedsDataError, match=r"got no base vector. Make one with dtrain.shared_base"):
        dtrain.compress(base, tuned, Dbms(source="shared", lam=1.0, eta=1.0))
