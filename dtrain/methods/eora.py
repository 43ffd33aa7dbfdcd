"""EoRA: a low-rank payload for what another method left over."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.bitdelta import BitDelta
from dtrain.methods.drop import Values
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Deltas, Encoder, Method, Needs, check_flag, check_type
from dtrain.stages import (
    All,
    LowRank,
    Packed,
    Payload,
    Pipeline,
    balanced,
    encode,
    matrix_shape,
    rebuild,
    singular_factors,
    value_format,
)


@dataclass(frozen=True)
class EoRA(Method):
    """Compress with another method, and add a low-rank approximation of what that left over (EoRA).

    With the covariance G of a layer's inputs, the factors are those that change the outputs least: the singular vectors
    of (D - D_hat) G^(1/2), brought back by G^(-1/2). Without it, the plain singular value decomposition.

    * **Source**: Liu et al., "EoRA", arXiv 2410.21271, section 3: the eigenspace projection is certain; there the
      residual is that of a compressed model, here of a compressed delta (a reading).
    * **Data needed**: what the host needs, and a calibration unless weighted=False. A tensor that is no layer's weight
      (an embedding) gets the plain decomposition.
    * **Bits per parameter**: the host's and bits * rank * (rows + columns) / (rows * columns).
    * **When it fails**: the residual of a random mask is white noise and has no low rank; compensation is worth its
      bytes for biased hosts (`Magnitude`, `BitDelta`) and deltas of low rank.

    Args:
        host: The method whose residual is approximated. It must not need an objective: fix its q.
        rank: Singular values to add, 1 or more.
        values: How the factors are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".
        weighted: Whether to weigh errors by the layer's inputs.

    Raises:
        InputError: If an argument is out of its range.
    """

    host: Method = field(default_factory=BitDelta)
    rank: int = 4
    values: Values = "uniform8"
    weighted: bool = True
    paper: ClassVar[str] = "arXiv 2410.21271"

    def __post_init__(self) -> None:
        check_type("rank", self.rank, int)
        check_flag("weighted", self.weighted)
        if not isinstance(self.host, Method):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"`host` must be a method such as dtrain.BitDelta(), got {self.host!r}.")
        _ = value_format(self.values)
        if self.rank < 1:
            raise InputError(f"`rank` must be at least 1, got {self.rank}.")
        if self.host.bitwise or self.host.needs == "objective" or isinstance(self.host, EoRA):
            raise InputError(
                f"EoRA cannot complete {type(self.host).__name__} with these arguments: its host must be lossy, with "
                "fixed scales, and not EoRA itself. Use q='norm' or a number where q is searched."
            )

    @property
    def needs(self) -> Needs:
        """The covariance of every layer's inputs where errors are weighted; else what the host needs."""
        return "covariance" if self.weighted else self.host.needs

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter of the host by its own accounting: the factors' share depends on the shapes."""
        return self.host.nominal_bits

    def plan(self, deltas: Deltas) -> Encoder:
        """Let the host look at all deltas, where it wants to."""
        return partial(self._encode, self.host.plan(deltas))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the host's payloads and the factors of the residual."""
        return self._encode(self.host.encode, name, delta, inputs)

    def _encode(self, host: Encoder, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        payloads = host(name, delta, inputs)
        return (*payloads, *self._compensate(name, delta, payloads, inputs))

    def _compensate(
        self, name: str, delta: Tensor, payloads: tuple[Payload, ...], inputs: Inputs | None
    ) -> tuple[Payload, ...]:
        rows, columns = matrix_shape(delta.shape)
        rank = min(self.rank, rows, columns)
        if not rank:
            return ()
        residual = (delta.cpu().double() - rebuild(payloads, name, delta.shape)).reshape(rows, columns)
        covariance = inputs.gram if inputs is not None and self.weighted else None
        if covariance is None or inputs is None:
            factors = singular_factors(residual)[:rank]
        elif inputs.transposed:  # the tensor is (inputs, outputs): factor its transpose, and swap the halves
            swapped = _weighted(residual.t(), covariance, rank)
            factors = torch.cat([swapped[:, columns:], swapped[:, :columns]], dim=1)
        else:
            factors = _weighted(residual, covariance, rank)
        pipeline = Pipeline(All(), value_format(self.values), Packed(), LowRank(rank))
        return (encode(pipeline, name, delta, coefficients=factors),)


def _weighted(matrix: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Return the factors that minimise the trace of E G E^T, where E is what is left of `matrix`."""
    energy, basis = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(covariance.double()))
    # Directions that no input has would be divided by nearly nothing on the way back.
    root = energy.clamp_min(1e-6 * max(float(energy[-1]), 1e-300)).sqrt()
    rows = len(matrix)
    factors = singular_factors(matrix @ basis * root)[:rank].double()
    return balanced(factors[:, :rows], factors[:, rows:] / root @ basis.t())
