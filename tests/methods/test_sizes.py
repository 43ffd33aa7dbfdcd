"""What a payload costs on disk, against the formulas: METHODS.md, section 7, and every method card."""

import math

import pytest
import torch

from dtrain import (
    BitDelta,
    ComPEFT,
    Dare,
    DareX,
    DeltaDQ,
    EoRA,
    ImPart,
    Magnitude,
    SeededSign,
    Structured,
    UltraDelta,
    Wanda,
)
from dtrain.methods.accounting import binary_entropy
from tests.methods.oracles import affine
from tests.methods.settings import rebuilt

SIDE = 512
DELTA = 1e-3 * torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
WIDTHS = {"float16": 16, "bfloat16": 16, "uniform8": 8, "uniform4": 4, "uniform2": 2, "sign": 1}


def per_parameter(method):
    return 8 * sum(payload.data.numel() for payload in method.encode("w", DELTA)) / DELTA.numel()


def entropy(symbols):
    shares = torch.unique(symbols, return_counts=True)[1].double() / symbols.numel()
    return -float((shares * shares.log2()).sum())


def test_the_entropy_of_a_position_is_that_of_a_coin():
    for share in (0.01, 0.3, 0.5, 0.9):
        expected = share * math.log2(1 / share) + (1 - share) * math.log2(1 / (1 - share))
        assert binary_entropy(share) == pytest.approx(expected, rel=1e-12)
    assert binary_entropy(0.0) == binary_entropy(1.0) == 0.0


@pytest.mark.parametrize("values", WIDTHS)
@pytest.mark.parametrize("keep", [0.1, 1 / 64])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Dare, {}), (Dare, {"mask": "stratified"}), (Structured, {"q": 1.0}), (DareX, {"q": "norm"})],
)
def test_a_seeded_mask_costs_nothing(kind, arguments, keep, values):
    """Every kept value costs its bits and nothing else; strata keep exactly their share, coins by luck."""
    method = kind(keep=keep, values=values, **arguments)
    kept = int((rebuilt(method, DELTA.abs() + 1) != 0).sum())
    assert per_parameter(method) == 8 * math.ceil(kept * WIDTHS[values] / 8) / DELTA.numel()
    assert method.nominal_bits == keep * WIDTHS[values]
    coins = {Structured: SIDE}.get(kind, DELTA.numel())
    luck = 0.001 * keep if "mask" in arguments else 5 * math.sqrt(keep * (1 - keep) / coins)
    assert kept / DELTA.numel() == pytest.approx(keep, abs=luck)


@pytest.mark.parametrize("keep", [1 / 4, 1 / 32, 1 / 512])
def test_a_seeded_sign_costs_one_bit(keep):
    assert per_parameter(SeededSign(keep=keep)) == keep == SeededSign(keep=keep).nominal_bits


@pytest.mark.parametrize("keep", [0.5, 0.1, 0.01])
@pytest.mark.parametrize(("kind", "bits"), [(Magnitude, 16), (Wanda, 16), (ComPEFT, 1)])
def test_stored_positions_cost_their_entropy(kind, bits, keep):
    """keep * bits + H(keep) and a small table: 8.1 bits a position at 1 %."""
    method = kind(keep=keep)
    assert per_parameter(method) == pytest.approx(keep * bits + binary_entropy(keep), rel=0.025)
    assert method.nominal_bits == pytest.approx(keep * bits + (binary_entropy(keep) if kind is ComPEFT else 0))


@pytest.mark.parametrize("values", ["uniform8", "uniform4", "uniform2"])
def test_coded_values_cost_their_entropy(values):
    """keep * H(codes) + H(keep): what is kept of a bell curve has fewer bits than the format."""
    keep, method = 0.3, Magnitude(keep=0.3, values=values)
    kept = DELTA.abs().flatten().topk(round(keep * DELTA.numel())).indices
    expected = keep * entropy(rebuilt(method, DELTA).flatten()[kept]) + binary_entropy(keep)
    assert per_parameter(method) == pytest.approx(expected, rel=0.02)
    assert per_parameter(method) < keep * WIDTHS[values] + binary_entropy(keep)


def test_one_bit_is_one_bit():
    assert per_parameter(BitDelta()) == 1.0
    for scale in ("row", "column"):
        assert per_parameter(BitDelta(scale)) == 1 + 16 / SIDE


@pytest.mark.parametrize(("keep", "bits"), [(0.05, 4), (0.3, 4), (0.3, 6)])
def test_ultradelta_stores_where_its_values_are(keep, bits):
    """k H(codes) + H(k), where k counts the kept elements that are not of level 0."""
    codes = torch.tensor(affine(DELTA.double().flatten().tolist(), bits))
    others = codes[codes != 0]
    share = keep * len(others) / len(codes)
    method = UltraDelta(keep=keep, bits=bits)
    assert per_parameter(method) == pytest.approx(share * entropy(others) + binary_entropy(share), rel=0.02)
    assert per_parameter(method) < keep * entropy(codes) + binary_entropy(keep)
    assert method.nominal_bits == keep * bits


@pytest.mark.parametrize("alpha", [4, 8, 32])
@pytest.mark.parametrize("group", ["alpha", "row"])
def test_deltadq_without_parts_costs_its_codes(alpha, group):
    assert per_parameter(DeltaDQ(alpha, group, parts=1)) == pytest.approx(4 / alpha, rel=1e-3)


@pytest.mark.parametrize("keep", [0.05, 0.2, 1.0, 2])
def test_impart_costs_its_entries(keep):
    assert per_parameter(ImPart(keep=keep)) == pytest.approx(16 * keep, rel=0.1)
    assert ImPart(keep=keep, values="uniform4").nominal_bits == 4 * keep


def test_eora_costs_its_host_and_its_factors():
    found = per_parameter(EoRA(BitDelta(), 4, weighted=False))
    assert found == 1 + 8 * 4 * (SIDE + SIDE) / SIDE**2


def test_the_figures_of_the_cards():
    assert per_parameter(Magnitude(keep=0.01)) == pytest.approx(0.24, abs=0.005)
    assert per_parameter(UltraDelta()) / UltraDelta().keep == pytest.approx(6, abs=0.5)  # what a sign costs is 1
    assert binary_entropy(0.01) / 0.01 == pytest.approx(8.1, abs=0.05)
