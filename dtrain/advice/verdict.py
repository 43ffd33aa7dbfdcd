"""What the numbers mean: large or small, sparse, a merged adapter, of low rank or uneven."""

from __future__ import annotations

from typing import Literal

from dtrain.advice.measure import Measures, TensorMeasures
from dtrain.advice.spectrum import Spectrum

#: From this mean |D| on a delta is large. A reading: the paper has 1e-4 where dropping works and 1e-2 where it fails,
#: and draws no line. On a small ViT of ours with 5.3e-3 dropping still beat keeping the largest by far.
LARGE = 1e-2
#: The same for ||D|| / ||W0||, for weights that are not of the usual size. A reading: about 1e-2 over weights of 0.02.
LARGE_RELATIVE = 0.5
#: From this share of exact zeros on the positions of the others are worth storing: at 0.9 for half a bit per weight.
SPARSE = 0.9
#: From this share of untouched rows on a tensor is worth a remark.
UNTOUCHED = 0.25
#: A matrix of at most this share of full rank is taken for a product of factors.
ADAPTER = 0.25
#: Matrices with a shorter side than this are of low rank whatever was done to them.
NARROW = 16
#: Energy that two bits with a minimum and a step per patch keep of 256 Gaussian values (measured on 20,000 patches).
TWO_BITS = 0.776

Code = Literal["signs", "factors", "patches"]


def is_large(measures: Measures) -> bool:
    """Return whether random dropping is likely to fail."""
    return measures.mean_abs >= LARGE or measures.relative >= LARGE_RELATIVE


def is_sparse(measures: Measures) -> bool:
    """Return whether most entries did not change at all."""
    return measures.zeros >= SPARSE


def stores_positions(measures: Measures) -> bool:
    """Return whether the method is one that chooses what it keeps, so that no seed draws the positions."""
    return bool(measures.tensors) and (is_sparse(measures) or is_large(measures))


def is_adapter(measures: Measures) -> bool:
    """Return whether every measured matrix is a product of thin factors, up to rounding that is small beside it."""
    spectra = [spectrum for _, spectrum in wide_matrices(measures)]
    return bool(spectra) and all(s.rank <= ADAPTER * s.side and s.rounding < 0.1 for s in spectra)


def best_code(measures: Measures) -> Code:
    """Return which code of about one bit per weight keeps most of the energy."""
    kept = kept_at_one_bit(measures)
    return max(kept, key=lambda code: kept[code])


def kept_at_one_bit(measures: Measures) -> dict[Code, float]:
    """Return the share of the energy that each code of about one bit per weight keeps."""
    factors, patches = measures.spectral(lambda spectrum: spectrum.factors), measures.patches
    kept: dict[Code, float] = {"signs": measures.signs}
    if factors is not None:
        kept["factors"] = factors
    if patches is not None:
        kept["patches"] = TWO_BITS * patches
    return kept


def wide_matrices(measures: Measures) -> list[tuple[TensorMeasures, Spectrum]]:
    """Return the tensors whose rank says something, with their spectra."""
    found = [(tensor, tensor.spectrum) for tensor in measures.tensors if tensor.spectrum]
    return [(tensor, spectrum) for tensor, spectrum in found if spectrum.side >= NARROW]
