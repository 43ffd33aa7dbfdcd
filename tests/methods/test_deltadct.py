"""Delta-DCT patch by patch, with the transform as a double sum; and what the page says of when it is worth it."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from dtrain import BitDelta, DeltaDCT
from dtrain.methods.accounting import binary_entropy
from dtrain.stages import encode
from tests.methods.settings import rebuilt


def basis(size):
    """Row k of the orthonormal DCT-II."""
    return np.array(
        [
            [math.sqrt((2 if k else 1) / size) * math.cos(math.pi * (2 * i + 1) * k / (2 * size)) for i in range(size)]
            for k in range(size)
        ]
    )


def transformed(patch, rows):
    """Sum over all elements, coefficient by coefficient: X[k, l] = sum_ij a[k, i] a[l, j] x[i, j]."""
    out = np.zeros_like(patch)
    for k in range(len(patch)):
        for m in range(len(patch)):
            out[k, m] = (np.outer(rows[k], rows[m]) * patch).sum()
    return out


def delta_dct(delta, p, bits, shares, fill, rescale):
    rows, columns = delta.shape
    padded = np.zeros((-(-rows // p) * p, -(-columns // p) * p))
    padded[:rows, :columns] = delta
    corners = [(i, j) for i in range(0, len(padded), p) for j in range(0, len(padded[0]), p)]
    patches = [padded[i : i + p, j : j + p] for i, j in corners]
    ranked = sorted(range(len(patches)), key=lambda t: -float((patches[t] ** 2).sum()))
    ends = [math.floor(sum(shares[: c + 1]) * len(patches) + 0.5) for c in range(len(shares))]
    width = {t: bits[next(c for c, end in enumerate(ends) if place < end)] for place, t in enumerate(ranked)}
    out, a = np.zeros_like(padded), basis(p)
    for t, ((i, j), patch) in enumerate(zip(corners, patches, strict=True)):
        if width[t]:
            x = transformed(patch, a)
            low, step = x.min(), (x.max() - x.min()) / (2 ** width[t] - 1)
            out[i : i + p, j : j + p] = transformed(low + step * np.round((x - low) / step), a.T)
        elif fill == "mean":
            out[i : i + p, j : j + p] = patch.mean()
    out = out[:rows, :columns]
    return out * np.abs(delta).sum() / np.abs(out).sum() if rescale else out


CASES = [
    DeltaDCT(4),
    DeltaDCT(4, rescale=False),
    DeltaDCT(8, fill="zero"),
    DeltaDCT(4, (6, 3, 2, 1, 0), (0.1, 0.2, 0.3, 0.2, 0.2), rescale=False),
    DeltaDCT(5, (8,), (1,)),
    DeltaDCT(3, (0,), (1,), rescale=False),
]


@pytest.mark.parametrize("method", CASES, ids=repr)
@pytest.mark.parametrize("shape", [(24, 16), (19, 30), (3, 4)])
def test_patches_are_ranked_transformed_rounded_and_scaled(method, shape):
    delta = torch.randn(shape) + 0.2
    expected = delta_dct(delta.double().numpy(), *astuple(method))
    # minimum, step and mean are halves: a code at the edge of its bin may move, rarely
    error = (rebuilt(method, delta) - torch.from_numpy(expected)).abs()
    assert float(error.median()) < 2e-3
    assert float(error.norm()) < 0.02 * float(delta.norm())


def cosine(method, delta):
    found = rebuilt(method, delta)
    return float((found * delta).sum() / found.norm() / delta.double().norm())


GAUSS = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def test_on_white_noise_one_good_sign_is_better():
    assert cosine(DeltaDCT(16), GAUSS) == pytest.approx(0.645, abs=0.02)
    assert cosine(BitDelta(), GAUSS) == pytest.approx(math.sqrt(2 / math.pi), abs=0.005)


@pytest.mark.parametrize(("patch", "bits"), [(8, 1.39), (16, 1.10), (32, 1.02), (64, 1.006)])
def test_it_wins_where_the_energy_of_patches_is_uneven(patch, bits):
    """Energies that fall off by a factor of 400: the lower half of the patches is next to nothing."""
    sides = torch.logspace(0, -2.6, (512 // patch) ** 2)[torch.randperm((512 // patch) ** 2)]
    uneven = GAUSS * sides.view(512 // patch, -1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    assert cosine(DeltaDCT(patch), uneven) > cosine(BitDelta(), uneven) + 0.1
    (payload,) = DeltaDCT(patch).encode("w", uneven)
    assert 8 * payload.data.numel() / uneven.numel() == pytest.approx(bits, rel=0.005)


def test_it_wins_on_heavy_tails():
    heavy = torch.distributions.StudentT(2.0).sample((512, 512))
    assert cosine(DeltaDCT(8), heavy) > cosine(BitDelta(), heavy) + 0.1


def test_on_smooth_deltas_one_coefficient_takes_the_whole_range():
    smooth = torch.nn.functional.avg_pool2d(GAUSS[None], 9, stride=1, padding=4)[0]
    assert cosine(DeltaDCT(16), smooth) < 0.55 < 0.75 < cosine(BitDelta(), smooth)


def test_the_scale_keeps_the_mean_magnitude_and_raises_the_squared_error():
    plain, scaled = (rebuilt(DeltaDCT(rescale=rescale), GAUSS) for rescale in (False, True))
    assert float(scaled.abs().mean()) == pytest.approx(float(GAUSS.abs().mean()), rel=1e-5)
    assert float((scaled - GAUSS).norm()) > float((plain - GAUSS).norm())


def test_the_cost_is_codes_sides_and_ranks():
    """Two bits of half the coefficients; two halves of a fine patch, one of a coarse one; which is which."""
    for patch in (8, 16, 32, 64):
        (payload,) = DeltaDCT(patch).encode("w", GAUSS)
        expected = 1 + (24 + binary_entropy(0.5)) / patch**2
        assert 8 * payload.data.numel() / GAUSS.numel() == pytest.approx(expected, rel=0.002)


def test_shares_that_leave_nothing_to_chance():
    """Every patch gets the bits of its class, whatever the rounding of shares."""
    method = DeltaDCT(2, (3, 1, 0), (1 / 3, 1 / 3, 1 / 3))
    (payload,) = method.encode("w", torch.randn(14, 10))  # 35 patches
    widths = torch.tensor([3] * 12 + [1] * 11 + [0] * 12)
    other = encode(method.pipeline, "w", torch.randn(14, 10), widths=widths)
    assert payload.data.numel() == pytest.approx(other.data.numel(), abs=4)
    assert replace(method, shares=[1, 0, 0]).nominal_bits == 3
