"""What a delta looks like: magnitude, tails, zeros, patches and rank of every matrix, and of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dtrain.advice.spectrum import Spectrum, measure_spectrum, within_budget
from dtrain.difference import Change
from dtrain.errors import InputError
from dtrain.progress import progress
from dtrain.stages import matrix_shape, random_mask

_PIECE = 1 << 20  # elements that are float64 at a time
_SAMPLE = 1 << 18  # elements of a tensor that are sorted; of larger ones a seeded sample
_PATCH = 16


@dataclass(frozen=True)
class TensorMeasures:
    """One tensor's delta D.

    Args:
        name: The tensor's name.
        shape: Its shape.
        changed: How many entries of D are not zero.
        unchanged_rows: How many slices along the first dimension are all zero.
        absolute: The sum of |D|.
        energy: The sum of D^2.
        base_energy: The sum of W0^2.
        top1: Share of the energy in the largest 1 % of the changed entries; of a seeded sample of 262,144 where
            there are more.
        patches: Share of the energy in the stronger half of the 16 x 16 patches; None where there are fewer than two.
        spectrum: The singular values; None where the budget left them out.
    """

    name: str
    shape: tuple[int, ...]
    changed: int
    unchanged_rows: int
    absolute: float
    energy: float
    base_energy: float
    top1: float
    patches: float | None
    spectrum: Spectrum | None

    @property
    def elements(self) -> int:
        """Entries, zero or not."""
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the tensor is taken for."""
        return matrix_shape(self.shape)

    @property
    def mean_abs(self) -> float:
        """Mean |D| of the entries that changed."""
        return self.absolute / max(self.changed, 1)

    @property
    def rms(self) -> float:
        """Root mean square of the entries that changed."""
        return math.sqrt(self.energy / max(self.changed, 1))

    @property
    def relative(self) -> float | None:
        """||D|| / ||W0||; None where the base is zero."""
        return math.sqrt(self.energy / self.base_energy) if self.base_energy else None

    @property
    def tails(self) -> float:
        """The ratio rms / mean |D| of the entries that changed: 1 if all are of one size, 1.2533 for a Gaussian."""
        return self.rms / self.mean_abs

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        derived = {"mean_abs": self.mean_abs, "rms": self.rms, "relative": self.relative, "tails": self.tails}
        return {**asdict(self), "shape": list(self.shape), **derived}


@dataclass(frozen=True)
class Measures:
    """The delta of all tensors that a method would compress and that changed.

    Shares and ratios are means over the tensors, weighted by their energy: every tensor is coded by itself, so what
    counts is how it looks by itself.

    Args:
        tensors: One entry per tensor, in the order of their names.
    """

    tensors: tuple[TensorMeasures, ...]

    @property
    def elements(self) -> int:
        """Entries of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def mean_abs(self) -> float:
        """Mean |D| of the entries that changed, so that untouched rows do not dilute it."""
        return self._sum("absolute") / self._sum("changed")

    @property
    def rms(self) -> float:
        """Root mean square of the entries that changed."""
        return math.sqrt(self._sum("energy") / self._sum("changed"))

    @property
    def relative(self) -> float:
        """||D|| / ||W0|| over all tensors; infinite where the base is zero."""
        base = self._sum("base_energy")
        return math.sqrt(self._sum("energy") / base) if base else math.inf

    @property
    def tails(self) -> float:
        """The ratio rms / mean |D|: 1.2533 for a Gaussian."""
        return self._mean(lambda tensor: tensor.tails)

    @property
    def top1(self) -> float:
        """Share of the energy in the largest 1 % of a tensor's changed entries: 0.085 for a Gaussian."""
        return self._mean(lambda tensor: tensor.top1)

    @property
    def zeros(self) -> float:
        """Share of entries that did not change."""
        return 1 - self._sum("changed") / self.elements

    @property
    def signs(self) -> float:
        """Share of the energy that one bit per weight keeps: (mean |D|)^2 / mean D^2, zeros counted; Gaussian 0.637."""
        return self._mean(lambda tensor: tensor.absolute**2 / (tensor.elements * tensor.energy))

    @property
    def patches(self) -> float | None:
        """Share of the energy in the stronger half of the patches; None if no tensor has any."""
        found = [tensor for tensor in self.tensors if tensor.patches is not None]
        return _weighted(found, lambda tensor: tensor.patches or 0.0) if found else None

    @property
    def with_spectrum(self) -> list[TensorMeasures]:
        """The tensors whose singular values were measured."""
        return [tensor for tensor in self.tensors if tensor.spectrum is not None]

    def spectral(self, value: Callable[[Spectrum], float]) -> float | None:
        """Return the mean of `value` over the spectra that were measured; None if none was."""
        found = self.with_spectrum
        return _weighted(found, lambda tensor: value(tensor.spectrum) if tensor.spectrum else 0.0) if found else None

    def largest(self, count: int) -> list[TensorMeasures]:
        """Return the tensors that changed most relative to the base."""
        sizes = {tensor.name: math.inf if tensor.relative is None else tensor.relative for tensor in self.tensors}
        return sorted(self.tensors, key=lambda tensor: -sizes[tensor.name])[:count]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        if not self.tensors:
            return {"elements": 0, "tensors": []}
        names = ("elements", "mean_abs", "rms", "tails", "top1", "zeros", "signs", "patches")
        spectral = {
            "stable_rank": self.spectral(lambda spectrum: spectrum.stable_rank),
            "rank90_share": self.spectral(lambda spectrum: spectrum.rank90 / spectrum.side),
            **{name: self.spectral(lambda s, name=name: getattr(s, name)) for name in ("top1", "top5", "factors")},
        }
        return {
            **{name: getattr(self, name) for name in names},
            "relative": self.relative if math.isfinite(self.relative) else None,
            "spectra": len(self.with_spectrum),
            "spectral": spectral,
            "tensors": [tensor.as_dict() for tensor in self.tensors],
        }

    def _sum(self, field: str) -> float:
        return math.fsum(getattr(tensor, field) for tensor in self.tensors)

    def _mean(self, value: Callable[[TensorMeasures], float]) -> float:
        return _weighted(self.tensors, value)


def measure(changes: Sequence[Change]) -> Measures:
    """Measure the deltas of the tensors whose role is "method", one after the other.

    Memory holds a few copies of the largest tensor. Every figure is exact but for two: the largest entries of a tensor
    of more than 262,144 are those of a seeded sample, and where all singular values would cost more than 2^40
    multiply-adds, those of a part of the matrices are measured.

    Raises:
        InputError: If a delta holds NaN or inf.
    """
    moved = [change for change in changes if change.role == "method" and change.tuned.numel()]
    chosen = within_budget({change.name: change.tuned.shape for change in moved})
    found: list[TensorMeasures] = []
    with progress("measuring", len(moved)) as advance:
        for change in moved:
            if (tensor := _measure(change, spectrum=change.name in chosen)).changed:
                found.append(tensor)
            advance(change.name)
    return Measures(tuple(found))


def _measure(change: Change, *, spectrum: bool) -> TensorMeasures:
    delta = change.delta().cpu()  # float64 is not to be had on every device
    changed, absolute, energy = _moments(delta)
    if not math.isfinite(energy):
        raise InputError(
            f"tensor {change.name!r} holds NaN or inf. Mend the checkpoint, or keep its bits with Lossless()."
        )
    rows = delta.reshape(matrix_shape(delta.shape))
    return TensorMeasures(
        name=change.name,
        shape=tuple(delta.shape),
        changed=changed,
        unchanged_rows=int((rows == 0).all(1).sum()),
        absolute=absolute,
        energy=energy,
        base_energy=_moments(change.base)[2] if change.base is not None else 0.0,
        top1=_top1(change.name, delta) if changed else 0.0,
        patches=_patches(rows),
        spectrum=measure_spectrum(delta, change.tuned) if spectrum and changed else None,
    )


def _moments(values: Tensor) -> tuple[int, float, float]:
    """Return how many values are not zero, the sum of their magnitudes and that of their squares."""
    changed, absolute, energy = 0, 0.0, 0.0
    flat = values.detach().cpu().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        wide = flat[start : start + _PIECE].double()
        changed += int(wide.count_nonzero())
        absolute += float(wide.abs().sum())
        energy += float(wide.square().sum())
    return changed, absolute, energy


def _top1(name: str, delta: Tensor) -> float:
    flat = delta[delta != 0]
    if flat.numel() > _SAMPLE:
        # Our own generator: the same sample, hence the same advice, everywhere.
        flat = flat[random_mask("bernoulli", _SAMPLE / flat.numel(), 0).positions(name, (1, flat.numel()))]
    energy = flat.double().square()
    return float(energy.topk(math.ceil(energy.numel() / 100)).values.sum() / energy.sum())


def _patches(matrix: Tensor) -> float | None:
    rows, columns = (size // _PATCH for size in matrix.shape)
    cut = matrix[: rows * _PATCH, : columns * _PATCH].reshape(rows, _PATCH, columns, _PATCH)
    energy = cut.square().sum((1, 3), dtype=torch.float64).view(-1).sort(descending=True).values
    total = float(energy.sum())
    return float(energy[: energy.numel() // 2].sum()) / total if energy.numel() > 1 and total else None


def _weighted(tensors: Sequence[TensorMeasures], value: Callable[[TensorMeasures], float]) -> float:
    """Return the mean of `value`, weighted by energy."""
    total = math.fsum(tensor.energy for tensor in tensors)
    return math.fsum(tensor.energy * value(tensor) for tensor in tensors) / total
