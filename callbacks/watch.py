"""Look at the delta while it grows: how large it is, how it is spread, and what its file would take."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from dtrain.compression import compress
from dtrain.delta import Delta
from dtrain.errors import InputError
from dtrain.methods import Dbms, Inputs, Method
from dtrain.methods.method import Deltas, Encoder
from dtrain.rules import Rules
from dtrain.stages import Payload, rebuild
from dtrain.weights import Weights

#: When to look: every so many optimizer steps, at the end of every epoch, or not at all.
When = int | Literal["epoch", "never"]

_SAMPLE = 1 << 21  # elements that a look sees: of a larger model some rows of every matrix
_STALE = 0.05  # a projection is made anew, from the whole model, when the sample's bytes moved by more than this


class DeltaWatch:
    """Projects the file of a run that is not over, from a sample of its matrices.

    The first look compresses the whole model once, without any fit, and so knows what the file takes, every byte
    counted. Later looks compress the sampled rows only; the bytes of the file are taken to follow theirs. What a seeded
    mask or one bit per weight takes does not hang on the values, so there the projection is exact.

    Args:
        base: The weights that the fine-tuning started from.
        live: The weights now.
        method: How the delta will be compressed.
        rules: Which tensor is treated how.
    """

    def __init__(self, base: Weights, live: Weights, method: Method, rules: Rules) -> None:
        self._method, self._whole_method = _unfitted(method)
        self._rules = rules
        matrices = {
            name: start
            for name, tensor in live.tensors.items()
            if rules.role(name, tensor.shape, tensor.dtype) == "method"
            and (start := base.get(name)) is not None
            and start.shape == tensor.shape
        }
        share = _SAMPLE / max(1, sum(start.numel() for start in matrices.values()))
        self._rows = {name: _some_rows(len(start), share) for name, start in matrices.items()}
        self._base = {name: _take(start, self._rows[name]) for name, start in matrices.items()}
        self._weight = {name: len(start) / len(self._rows[name]) for name, start in matrices.items()}
        self._whole: _Whole | None = None

    def look(self, live: Weights, whole: Callable[[Method], Delta]) -> dict[str, float]:
        """Return the statistics of the delta and, where there is one that can be compressed, what its file would take.

        Args:
            live: The weights now.
            whole: Compresses all of them with the method it is given.
        """
        tuned = {n: _take(tensor, rows) for n, rows in self._rows.items() if (tensor := live.get(n)) is not None}
        deltas = {name: tensor.double() - self._base[name].double() for name, tensor in tuned.items()}
        values = self._describe(deltas)
        moved = frozenset(name for name, delta in deltas.items() if delta.any())
        if not moved or not math.isfinite(values["dtrain/delta_norm"]):
            return values
        try:
            return values | self._project(tuned, deltas, moved, whole)
        except InputError as error:  # no reason to end the run: it may be otherwise when that is over
            rank_zero_warn(f"DeltaCompressionCallback projects no file: {error}")
            return values

    def _project(
        self,
        tuned: Mapping[str, Tensor],
        deltas: Mapping[str, Tensor],
        moved: frozenset[str],
        whole: Callable[[Method], Delta],
    ) -> dict[str, float]:
        thin = compress(self._base, tuned, self._method, rules=Rules(whole=(), embeddings=()))
        records = {record.name: record for record in thin.content.records}
        now = sum(record.payload_bytes for record in records.values())
        if self._whole is None or self._whole.is_stale(now, moved):
            self._whole = _Whole.of(whole(self._whole_method), self._rows.keys(), now, moved)
        size = self._whole.project(now)
        error = self._error(deltas, {name: records[name].payloads for name in moved})
        return {
            "dtrain/projected_bytes": size,
            "dtrain/projected_ratio": self._whole.checkpoint_bytes / size,
            "dtrain/projected_error": error,
        }

    def _describe(self, deltas: Mapping[str, Tensor]) -> dict[str, float]:
        total = dict.fromkeys(("elements", "absolute", "energy", "base", "still", "spread", "moved"), 0.0)
        for name, delta in deltas.items():
            squares, weight = delta.square(), self._weight[name]
            energy, elements = float(squares.sum()), delta.numel()
            total["elements"] += weight * elements
            total["absolute"] += weight * float(delta.abs().sum())
            total["energy"] += weight * energy
            total["base"] += weight * float(self._base[name].double().square().sum())
            total["still"] += weight * (elements - int(delta.count_nonzero()))
            if energy:  # of every tensor by itself: that some move more than others is no heavy tail
                total["moved"] += weight * elements
                total["spread"] += weight * elements * float(squares.square().sum()) * elements / energy**2
        elements = max(1.0, total["elements"])
        values = {
            "dtrain/delta_norm": math.sqrt(total["energy"] / total["base"]) if total["base"] else math.inf,
            "dtrain/delta_mean_abs": total["absolute"] / elements,
            "dtrain/delta_unmoved": total["still"] / elements,
        }
        return values | ({"dtrain/delta_kurtosis": total["spread"] / total["moved"]} if total["moved"] else {})

    def _error(self, deltas: Mapping[str, Tensor], payloads: Mapping[str, tuple[Payload, ...]]) -> float:
        """Return ||D - D_hat|| / ||D||, every tensor at its scale of least squared error: a fit is yet to come."""
        left = energy = 0.0
        for name, encoded in payloads.items():
            own = float(deltas[name].square().sum())
            found = deltas[name] if self._method.bitwise else rebuild(encoded, name, deltas[name].shape)
            size = float(found.square().sum())
            explained = float((found * deltas[name]).sum()) ** 2 / size if size else 0.0
            left += self._weight[name] * max(0.0, own - explained)
            energy += self._weight[name] * own
        return math.sqrt(left / energy)


@dataclass(frozen=True)
class _Whole:
    """What the whole model took, and what the sample did at that time."""

    file_bytes: int
    checkpoint_bytes: int
    matrix_bytes: int
    sample_bytes: int
    moved: frozenset[str]

    @classmethod
    def of(cls, delta: Delta, matrices: Collection[str], sample_bytes: int, moved: frozenset[str]) -> _Whole:
        """Return what `delta` takes, all of it and its `matrices`."""
        report = delta.report()
        matrix_bytes = sum(record.payload_bytes for record in delta.content.records if record.name in matrices)
        return cls(report.file_bytes, report.checkpoint_bytes, matrix_bytes, sample_bytes, moved)

    def is_stale(self, sample_bytes: int, moved: frozenset[str]) -> bool:
        """Return whether the sample has changed so much that the rest may have changed otherwise."""
        return moved != self.moved or abs(sample_bytes - self.sample_bytes) > _STALE * self.sample_bytes

    def project(self, sample_bytes: int) -> float:
        """Return the bytes of the file, if the matrices' bytes follow the sample's."""
        if not self.sample_bytes:
            return float(self.file_bytes)
        return self.file_bytes + self.matrix_bytes * (sample_bytes / self.sample_bytes - 1)


@dataclass(frozen=True)
class _Unfitted(Method):
    """A method without what it would fit: its bytes do not hang on that, and a fit takes much longer than a look."""

    host: Method
    paper: ClassVar[str] = "a projection"

    @property
    @override
    def nominal_bits(self) -> float:
        """The host's."""
        return self.host.nominal_bits

    @override
    def plan(self, deltas: Deltas) -> Encoder:
        """Let the host look at all deltas."""
        return self.host.plan(deltas)

    @override
    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the host's payloads."""
        return self.host.encode(name, delta, inputs)

    @override
    def describe(self) -> dict[str, Any]:
        """Return the host's name and parameters."""
        return self.host.describe()


def _unfitted(method: Method) -> tuple[Method, Method]:
    """Return what compresses the sample, and what compresses the whole, without a fit.

    Of a shared base vector the task's file holds one scale per tensor: the sample is that of what it is to complete.
    """
    if isinstance(method, Dbms) and method.source == "shared":
        return _unfitted(method.hosts[1])[0], replace(method, lam=1.0, eta=1.0)
    plain = method if method.needs == "nothing" else _Unfitted(method)
    return plain, plain


def check_when(when: object) -> None:
    """Refuse what is neither "epoch" nor "never" nor a positive number of steps.

    Raises:
        InputError: If it is.
    """
    if when not in ("epoch", "never") and not (type(when) is int and when > 0):
        raise InputError(f"`watch` must be 'epoch', 'never' or a number of steps of at least 1, got {when!r}.")


def _some_rows(rows: int, share: float) -> Tensor:
    """Return which rows to look at: at random, since heads and experts repeat at even distances."""
    wanted = min(rows, max(2, math.ceil(share * rows)))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order[:wanted].sort().values


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    if len(rows) == len(tensor):
        return tensor.detach().cpu().clone()
    return tensor.detach().index_select(0, rows.to(tensor.device)).cpu()
