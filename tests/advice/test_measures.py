import math

import pytest
import torch

import dtrain
from dtrain.advice import spectrum


@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (16, 4, 3, 3)], ids=str)
def test_measures_are_what_their_names_say(shape):
    base, delta = torch.randn(shape), 1e-3 * torch.distributions.StudentT(4.0).sample(shape)
    delta[3:9] = 0
    tuned = base + delta
    (found,) = dtrain.advise({"w": base, "b": torch.ones(2)}, {"w": tuned, "b": torch.zeros(2)}).measures.tensors
    delta = tuned.double() - base.double()  # what float32 made of it
    changed = delta[delta != 0].abs()
    assert found.changed == changed.numel()
    assert found.unchanged_rows == 6
    assert found.mean_abs == pytest.approx(float(changed.mean()), rel=1e-6)
    assert found.rms == pytest.approx(float(changed.square().mean().sqrt()), rel=1e-6)
    assert found.tails == pytest.approx(found.rms / found.mean_abs)
    assert found.relative == pytest.approx(float(delta.norm() / base.double().norm()), rel=1e-6)
    top = changed.sort(descending=True).values.square()
    assert found.top1 == pytest.approx(float(top[: math.ceil(len(top) / 100)].sum() / top.sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (16, 4, 3, 3)], ids=str)
def test_the_spectrum_is_that_of_the_singular_values(shape):
    delta = torch.randn(shape) * torch.linspace(0.1, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    found = spectrum.measure_spectrum(delta, delta)
    rows, columns = matrix = shape[0], math.prod(shape[1:])
    energy = torch.linalg.svdvals(delta.reshape(matrix).double()).square()
    shares = (energy.cumsum(0) / energy.sum()).tolist()
    assert found.side == min(matrix)
    assert found.stable_rank == pytest.approx(float(energy.sum() / energy[0]))
    assert found.rank90 == next(rank for rank, share in enumerate(shares, 1) if share >= 0.9)
    assert found.rank == next(rank for rank, share in enumerate(shares, 1) if share >= 0.9999)
    assert found.top1 == pytest.approx(shares[0])
    assert found.top5 == pytest.approx(shares[max(1, round(0.05 * found.side)) - 1])
    eight_bit = max(1, rows * columns // (8 * (rows + columns)))
    assert found.factors == pytest.approx(shares[eight_bit - 1])


def test_patches_are_16_x_16_and_the_rest_is_left_out():
    base = torch.zeros(35, 50)
    delta = torch.rand(35, 50)
    (found,) = dtrain.advise({"w": base}, {"w": base + delta}).measures.tensors
    energy = sorted(
        (float(delta[r : r + 16, c : c + 16].square().sum()) for r in (0, 16) for c in (0, 16, 32)), reverse=True
    )
    assert found.patches == pytest.approx(sum(energy[:3]) / sum(energy), rel=1e-5)
    assert dtrain.advise({"w": base[:20, :20]}, {"w": delta[:20, :20]}).measures.patches is None


def test_a_gaussian_delta_reads_as_the_table_says():
    base = {"w": torch.zeros(512, 512)}
    measures = dtrain.advise(base, {"w": 1e-3 * torch.randn(512, 512)}).measures
    assert measures.tails == pytest.approx(math.sqrt(math.pi / 2), abs=0.005)
    assert measures.signs == pytest.approx(2 / math.pi, abs=0.005)
    assert measures.top1 == pytest.approx(0.085, abs=0.003)
    assert measures.patches == pytest.approx(0.535, abs=0.005)
    assert measures.spectral(lambda s: s.top5) == pytest.approx(0.17, abs=0.01)


def test_the_sample_of_a_large_tensor_is_close_and_always_the_same():
    delta = torch.distributions.StudentT(5.0).sample((800, 800))
    energy = delta.double().square().view(-1).sort(descending=True).values
    exact = float(energy[:6400].sum() / energy.sum())
    found = [dtrain.advise({"w": torch.zeros(800, 800)}, {"w": delta}).measures.top1 for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(exact, rel=0.05)


def test_the_whole_is_weighted_by_energy():
    base = {"a": torch.ones(32, 32), "b": torch.ones(32, 64)}
    tuned = {"a": base["a"] + 0.5, "b": base["b"] + 0.25 * (torch.rand(32, 64) < 0.5)}
    measures = dtrain.advise(base, tuned).measures
    a, b = measures.tensors
    changed = int((tuned["b"] != 1).sum())
    assert measures.elements == 3072
    assert measures.zeros == pytest.approx(1 - (1024 + changed) / 3072)
    assert measures.mean_abs == pytest.approx((512 + 0.25 * changed) / (1024 + changed))
    assert measures.relative == pytest.approx(math.sqrt((256 + changed / 16) / 3072))
    energies = a.energy, b.energy
    assert measures.signs == pytest.approx((energies[0] * 1.0 + energies[1] * changed / 2048) / sum(energies))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_energy_is_what_rounding_does(dtype):
    exact = 0.02 * torch.randn(400, 400, dtype=torch.float64)
    rounded = exact.to(dtype)
    error = float((rounded.double() - exact).square().sum())
    assert spectrum.rounding_energy(rounded) == pytest.approx(error, rel=0.02)
    assert spectrum.rounding_energy(torch.zeros(3, 3)) == 0


def test_a_budget_is_kept_and_spread():
    shapes = {f"{i:03}": (64, 64) for i in range(100)}
    one = 64**3 * 5
    assert spectrum.within_budget(shapes) == set(shapes)
    chosen = sorted(map(int, spectrum.within_budget(shapes, budget=10 * one + 1)))
    assert len(chosen) == 10
    assert chosen[0] < 10
    assert chosen[-1] >= 90
    assert spectrum.within_budget({"huge": (10**6, 10**5), "small": (8, 8)}) == {"small"}
