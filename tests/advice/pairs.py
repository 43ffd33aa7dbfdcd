"""Pairs of small models whose deltas are of a known kind."""

import torch


def pair(change, *, rows=64, columns=96, layers=3, dtype=torch.float32):
    """Two models of a few matrices, vectors, a buffer and a fresh head; `change` makes one delta from a shape."""
    base = {f"encoder.layer.{i}.dense.weight": torch.randn(rows, columns) * 0.02 for i in range(layers)}
    base |= {f"encoder.layer.{i}.norm.bias": torch.randn(columns) for i in range(layers)} | {"ids": torch.arange(7)}
    base = {name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()}
    tuned = {name: (value + change(value.shape)).to(value.dtype) for name, value in base.items() if name != "ids"}
    return base, {**tuned, "ids": base["ids"] + 1, "head.weight": torch.randn(2, columns)}


def gaussian(size):
    return lambda shape: size * torch.randn(shape)


def sparse(share):
    return lambda shape: 1e-3 * torch.randn(shape) * (torch.rand(shape) < share)


def product(rank, size):
    def change(shape):
        return size * torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) if len(shape) == 2 else 0.0

    return change


SMALL, LARGE = ("no", "SeededSign"), ("yes", "Magnitude")
#: Kinds of delta: how one is made, whether the chart calls it large, and the method it ends in.
KINDS = {
    "as fine-tunes are": (gaussian(3e-4), *SMALL),
    "just below the limits": (gaussian(9.5e-3), *SMALL),
    "large for the base": (gaussian(1.06e-2), *LARGE),  # mean |D| is 8.5e-3
    "as after continued pre-training": (gaussian(2e-2), *LARGE),
    "mostly zero": (sparse(0.02), None, "Lossless"),
    "half zero": (sparse(0.5), *SMALL),
    "a merged adapter": (product(4, 1e-3), *SMALL),
    "of low rank, with a tail": (lambda shape: product(2, 1e-3)(shape) + gaussian(2e-4)(shape), *SMALL),
    "only vectors": (lambda shape: gaussian(1e-3)(shape) if len(shape) == 1 else 0.0, None, "Dare"),
}
