"""q of DAREx in closed form, from the delta and a few inputs of its layer (arXiv 2410.09344, section 4 and App. E).

For output row i and input x let c_j = D_ij x_j, S = sum_j c_j, Q = sum_j c_j^2. Keeping each element with probability
`keep` and dividing it by q makes an error of H = sum_j c_j (1 - M_j/q).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtrain.errors import InputError

_ROWS = 1024  # rows of the delta that are widened to float64 at a time


def bound_q(delta: Tensor, sample: Tensor, keep: float, eta: float, *, signed: bool = False) -> float:
    """Return the q that makes the Chernoff bound on the error of one layer small (DAREx-q, per layer, "analytical").

    The bound, `log E exp(eta H) <= eta (1 - keep/q) S + eta^2 Phi Q / (4 q^2)` per row and input (-H where S < 0), is
    least at `q = eta Phi Q / (2 keep |S|)`, clipped to [keep, 1]. The result is the mean over rows and inputs. Those
    with Q = 0, where no q makes a difference, are left out; if none remains q is 1, as no signal is worth any noise.

    Args:
        delta: Delta of one weight as a matrix, shape (outputs, inputs); see `Inputs.matrix`.
        sample: Inputs of the layer, shape (samples, inputs).
        keep: Share of the elements that is kept, in (0, 1].
        eta: Where the moment generating function is taken, above 0, in units of one over the layer's output. The
            larger it is, the more the noise counts. The paper searches it.
        signed: Whether rows with S <= 0 get q = 1, as in the published code, instead of the q of |S|.

    Returns:
        q in [keep, 1].

    Raises:
        InputError: If `keep` or `eta` is out of its range, or the shapes do not fit.
    """
    if not 0 < eta < math.inf:
        raise InputError(f"`eta` must be a finite number above 0, got {eta}. Start with eta=1 and search around it.")
    sums, squares = _sums(delta, sample, keep)
    signal = sums if signed else sums.abs()
    # In u = 1/q the bound is the parabola eta S (1 - keep u) + eta^2 Phi Q u^2 / 4: where S <= 0 it only grows with u.
    best = (eta * _phi(1 - keep) / (2 * keep) * squares / signal).clamp(keep, 1.0)
    best = torch.where(signal > 0, best, 1.0)[squares > 0]
    return float(best.mean()) if best.numel() else 1.0


def least_squares_q(delta: Tensor, sample: Tensor, keep: float) -> float:
    """Return the q of least expected squared error of one layer, `keep + (1-keep) sum Q / sum S^2`, at most 1.

    It minimises `E[H^2] = (1 - keep/q)^2 S^2 + keep (1-keep) Q / q^2`, summed over rows and inputs (ours). A place for
    a search to start from: alone it may shrink too much.

    Args:
        delta: Delta of one weight as a matrix, shape (outputs, inputs); see `Inputs.matrix`.
        sample: Inputs of the layer, shape (samples, inputs).
        keep: Share of the elements that is kept, in (0, 1].

    Returns:
        q in [keep, 1]; 1 where all S are 0.

    Raises:
        InputError: If `keep` is out of its range or the shapes do not fit.
    """
    sums, squares = _sums(delta, sample, keep)
    signal = float(sums.square().sum())
    return min(1.0, keep + (1 - keep) * float(squares.sum()) / signal) if signal else 1.0


def _sums(delta: Tensor, sample: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Return S and Q, float64, shape (samples, outputs), by two matrix products."""
    if not 0 < keep <= 1:
        raise InputError(f"`keep` must be in (0, 1], got {keep}. keep=0.01 keeps one element out of a hundred.")
    if delta.ndim != 2 or sample.ndim != 2 or delta.shape[1] != sample.shape[1]:
        raise InputError(
            f"a delta of shape {tuple(delta.shape)} does not fit inputs of shape {tuple(sample.shape)}. "
            "Give both as matrices with the same columns: `inputs.matrix(delta)` and `inputs.sample`."
        )
    x = sample.to(delta.device, torch.float64)  # squares of deltas of 1e-5 would leave little of float32's range
    sums = torch.empty(len(x), len(delta), dtype=torch.float64, device=delta.device)
    squares = torch.empty_like(sums)
    for start in range(0, len(delta), _ROWS):
        rows = slice(start, start + _ROWS)
        d = delta[rows].double()
        sums[:, rows], squares[:, rows] = x @ d.T, x.square() @ d.square().T
    return sums, squares


def _phi(p: float) -> float:
    """Return (1-2p) / log((1-p)/p), 1/2 at p = 1/2: `log E exp(t (M - keep)) <= Phi t^2 / 4` (Kearns and Saul 1998).

    log((1-p)/p) = 2 atanh(1-2p), which keeps the ratio accurate all the way to one half.
    """
    z = 1 - 2 * p
    if abs(z) == 1:
        return 0.0  # a coin that always falls on the same side does not vary
    return z / (2 * math.atanh(z)) if z else 0.5
